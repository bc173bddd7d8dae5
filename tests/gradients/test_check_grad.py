"""The gradient check measures what it says, on a model that it leaves alone."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resode_cli.errors import ResodeError, UsageError
from resode_cli.gradients.check_grad import check_batches, check_gradients, sweep_depths
from resode_cli.gradients.gradient_errors import SweepRow
from resode_cli.network.model import OdeResNet, freeze_batch_norm
from resode_cli.ode import Adjoint
from resode_cli.reports.report import gradient_json, sweep_json
from resode_cli.surgery.rewrite import deepen

LABELS = torch.tensor([0, 1, 2, 3])


@pytest.fixture
def deep(tiny: OdeResNet) -> OdeResNet:
    """Six steps per stage, in float64."""
    for name, stage in tiny.stages.items():
        tiny.replace_stage(name, deepen(stage, 6))
    return tiny.double()


@pytest.fixture
def doubles(images: Tensor) -> Tensor:
    return images.double()


@pytest.mark.parametrize("batch_norm", ["frozen", "batch"])
@pytest.mark.parametrize("anchors", [None, 1, 2, 4, 9])
def test_checkpoint_is_exact(anchors: int | None, batch_norm: str, deep, doubles):
    report = check_gradients(deep, doubles, LABELS, methods=[Adjoint("checkpoint", anchors)], batch_norm=batch_norm)
    (method,) = report.methods
    assert method.largest_error <= 1e-12
    for row in method.stages:
        assert row.relative_error <= 1e-12 and row.cosine == pytest.approx(1.0, abs=1e-12)
        assert row.drift is None and (row.transition_error or 0.0) <= 1e-12


@pytest.mark.parametrize("name", ["euler", "pc"])
def test_reconstructing_methods_are_not_exact(name: str, deep, doubles):
    (method,) = check_gradients(deep, doubles, LABELS, methods=[Adjoint(name)]).methods
    for row in method.stages[1:-1]:
        assert row.relative_error > 1e-6 and row.cosine < 1.0
        assert row.drift is not None and row.drift > 0
        assert row.evaluations_per_step == 2.0


def gradients(model: OdeResNet, images: Tensor, adjoint: Adjoint) -> dict[str, Tensor]:
    model.use_adjoint(adjoint)
    freeze_batch_norm(model.train())
    names, parameters = zip(*model.net.named_parameters(), strict=True)
    loss = F.cross_entropy(model(images), LABELS)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def test_error_and_cosine_are_those_computed_by_hand(deep, doubles):
    exact = gradients(deep, doubles, Adjoint("backprop"))
    approximate = gradients(deep, doubles, Adjoint("euler"))
    groups = {
        "stem": [k for k in exact if k.startswith(("conv1.", "bn1."))],
        "layer1": [k for k in exact if k.startswith("layer1.")],
        "layer2": [k for k in exact if k.startswith("layer2.") and not k.startswith("layer2.0.")],
        "layer2 transition": [k for k in exact if k.startswith("layer2.0.")],
    }

    def compare(name: str) -> tuple[float, float]:
        g = torch.cat([exact[k].flatten() for k in groups[name]])
        h = torch.cat([approximate[k].flatten() for k in groups[name]])
        return ((g - h).norm() / g.norm()).item(), (g @ h / g.norm() / h.norm()).item()

    (method,) = check_gradients(deep, doubles, LABELS, methods=[Adjoint("euler")]).methods
    rows = {row.stage: row for row in method.stages}
    for name in ("stem", "layer1", "layer2"):
        error, cosine = compare(name)
        assert rows[name].relative_error == pytest.approx(error, rel=1e-9)
        assert rows[name].cosine == pytest.approx(cosine, rel=1e-9)
    assert rows["layer2"].transition_error == pytest.approx(compare("layer2 transition")[0], rel=1e-9)
    assert rows["layer1"].transition_error is None


def test_rows_are_the_stem_and_every_stage(deep, doubles):
    report = check_gradients(deep, doubles, LABELS, methods=[Adjoint("pc"), Adjoint("checkpoint")], data="noise")
    for method in report.methods:
        assert [(row.stage, row.steps) for row in method.stages] == [
            ("stem", 0),
            ("layer1", 6),
            ("layer2", 6),
            ("layer3", 6),
        ]
    assert [method.name for method in report.methods] == ["pc", "checkpoint"]
    assert (report.images, report.data, report.batch_norm) == (4, "noise", "frozen")


def test_the_loss_is_the_models_own(deep, doubles):
    with torch.no_grad():
        expected = F.cross_entropy(deep.eval()(doubles), LABELS).item()
    for methods in ([Adjoint("pc")], [Adjoint("heun"), Adjoint("pc")], [Adjoint("heun")]):
        assert check_gradients(deep, doubles, LABELS, methods=methods).loss == pytest.approx(expected)


def test_backprop_is_its_own_reference(deep, doubles):
    (method,) = check_gradients(deep, doubles, LABELS, methods=[Adjoint("backprop")]).methods
    assert method.largest_error == 0.0
    assert [row.evaluations_per_step for row in method.stages[1:]] == [0.0, 0.0, 0.0]


def test_worst_parameters_are_sorted_and_named_as_in_the_file(deep, doubles):
    (method,) = check_gradients(deep, doubles, LABELS, methods=[Adjoint("euler")]).methods
    errors = [error for _, error in method.worst]
    assert errors == sorted(errors, reverse=True) and errors[0] > 0
    assert {name for name, _ in method.worst} <= set(deep.file_state())


@pytest.mark.parametrize("batch_norm", ["frozen", "batch"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(batch_norm: str, fails: bool, deep, doubles):
    deep.train()
    deep.net.bn1.eval()
    deep.net.conv1.weight.requires_grad_(False)
    deep.stages["layer2"].use_adjoint(Adjoint("pc", 3))
    before = {name: value.clone() for name, value in deep.state_dict().items()}

    def flags() -> list[object]:
        modes = [module.training for module in deep.modules()]
        stages = [(stage.adjoint, stage.spec, stage.monitor.count_kept) for stage in deep.stages.values()]
        return [modes, stages, [p.requires_grad for p in deep.parameters()]]

    expected = flags()
    methods = [Adjoint("euler"), Adjoint("heun"), Adjoint("checkpoint")]
    # Labels of classes that do not exist make the loss fail after the forward pass has moved the statistics.
    labels = LABELS + 5 if fails else LABELS
    try:
        check_gradients(deep, doubles, labels, methods=methods, batch_norm=batch_norm)
        assert not fails
    except (IndexError, RuntimeError, ResodeError):
        assert fails
    assert flags() == expected
    assert all(torch.equal(value, before[name]) for name, value in deep.state_dict().items())
    assert all(p.grad is None for p in deep.parameters())


def test_heun_on_an_euler_model_is_measured_under_its_own_rule_and_says_so(deep, doubles):
    methods = [Adjoint("heun"), Adjoint("euler")]
    heun, euler = check_gradients(deep, doubles, LABELS, methods=methods).methods
    assert heun.scheme_switched and heun.scheme == "heun"
    assert not euler.scheme_switched and euler.scheme == "euler"
    # The reference is backprop under the same rule, so nothing depends on what was measured before.
    (alone,) = check_gradients(deep, doubles, LABELS, methods=[Adjoint("euler")]).methods
    assert alone == euler


def test_heun_on_a_heun_model_is_not_switched(deep, doubles):
    deep.use_scheme("heun")
    for method in check_gradients(deep, doubles, LABELS, methods=[Adjoint("heun"), Adjoint("checkpoint")]).methods:
        assert not method.scheme_switched and method.scheme == "heun"


def test_stages_with_rules_of_their_own_are_all_named(deep, doubles):
    deep.stages["layer2"].use_scheme("heun")
    (method,) = check_gradients(deep, doubles, LABELS, methods=[Adjoint("checkpoint")]).methods
    assert method.scheme == "euler, heun" and not method.scheme_switched


def test_frozen_parameters_are_measured_too(deep, doubles):
    (expected,) = check_gradients(deep, doubles, LABELS, methods=[Adjoint("euler")]).methods
    deep.requires_grad_(False)
    (method,) = check_gradients(deep, doubles, LABELS, methods=[Adjoint("euler")]).methods
    assert method == expected


def test_gradients_that_are_not_finite_are_infinite_errors_and_null_in_json(tiny, images):
    # The branch overflows, and with it the loss and every gradient.
    with torch.no_grad():
        tiny.stages["layer1"].blocks[2].bn2.weight.fill_(3e38)
    report = check_gradients(tiny, images, LABELS, methods=[Adjoint("euler"), Adjoint("checkpoint")])
    assert report.methods[0].largest_error == math.inf
    text = json.dumps(gradient_json(report), allow_nan=False)
    assert json.loads(text)["methods"][0]["largest_error"] is None


def test_json_holds_the_figures(deep, doubles):
    report = check_gradients(deep, doubles, LABELS, methods=[Adjoint("pc")])
    content = json.loads(json.dumps(gradient_json(report), allow_nan=False))
    assert content["methods"][0]["stages"][1]["relative_error"] == report.methods[0].stages[1].relative_error
    assert content["methods"][0]["worst"][0]["parameter"] == report.methods[0].worst[0][0]


def test_an_unknown_batch_norm_mode_is_refused(deep, doubles):
    with pytest.raises(UsageError, match="unknown BatchNorm mode 'eval' .allowed: frozen, batch"):
        check_gradients(deep, doubles, LABELS, methods=[Adjoint("pc")], batch_norm="eval")


# sweep


@pytest.mark.parametrize("order", [0.5, 1.0, 2.0])
def test_slope_of_a_power_law_is_its_exponent(order: float):
    depths = (3, 10, 20, 80)
    row = SweepRow("pc", "layer1", depths, tuple(0.7 * n**-order for n in depths))
    assert row.slope == pytest.approx(-order, rel=1e-12)


@pytest.mark.parametrize("errors", [(0.1, 0.0), (0.1, math.inf), (math.nan, 0.1)])
def test_slope_needs_positive_finite_errors(errors: tuple[float, ...]):
    row = SweepRow("pc", "layer1", (4, 8), errors)
    assert row.slope is None
    json.dumps(sweep_json([row]), allow_nan=False)


def test_no_slope_is_made_of_rounding():
    errors = (1e-3, 1e-5, 1e-7)
    assert SweepRow("pc", "layer1", (4, 8, 16), errors, rounding=2e-6).slope is None
    assert SweepRow("pc", "layer1", (4, 8, 16), errors, rounding=1e-14).slope is not None


def test_a_slope_has_the_standard_error_of_its_line():
    """Points at log N = 0, 1, 2 that are off the line −2x by 0, 0.3, 0: slope −2, residuals ∓0.1, 0.2, by hand."""
    depths = (1, 2, 4)
    errors = tuple(n**-2 * math.exp(off) for n, off in zip(depths, (0.0, 0.3, 0.0), strict=True))
    row = SweepRow("pc", "layer1", depths, errors)
    assert row.slope == pytest.approx(-2)
    assert row.slope_error == pytest.approx(math.sqrt((0.1**2 + 0.2**2 + 0.1**2) / (2 * math.log(2) ** 2)))
    assert SweepRow("pc", "layer1", (1, 2), errors[:2]).slope_error is None


def _three(images: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(images.roll(k, 2) * (1 + k), LABELS.roll(k)) for k in range(3)]


def test_over_batches_errors_are_medians_and_their_range(deep, doubles):
    methods = [Adjoint("euler"), Adjoint("checkpoint")]
    batches = _three(doubles)
    one_by_one = [check_gradients(deep, *batch, methods=methods) for batch in batches]
    report = check_batches(deep, batches, methods=methods)
    assert report.batches == 3 and report.images == len(doubles)
    assert report.loss == pytest.approx(sum(each.loss for each in one_by_one) / 3)
    for m, method in enumerate(report.methods):
        for s, row in enumerate(method.stages):
            errors = sorted(each.methods[m].stages[s].relative_error for each in one_by_one)
            assert [row.least_error, row.relative_error, row.largest_error] == errors
        for p, own in enumerate(method.parameters):
            assert own.relative_error == sorted(each.methods[m].parameters[p].relative_error for each in one_by_one)[1]
    euler = report.methods[0]
    assert euler.largest_error == max(row.largest_error for row in euler.stages if row.largest_error is not None)
    assert euler.largest_error > max(row.relative_error for row in euler.stages)


def test_a_gradient_that_is_not_finite_on_one_batch_is_seen_over_several(deep, doubles):
    batches = _three(doubles)
    batches[1] = (torch.full_like(doubles, 1e300), LABELS)
    report = check_batches(deep, batches, methods=[Adjoint("euler")])
    assert report.methods[0].largest_error == math.inf


def test_batches_of_different_sizes_are_not_taken_together(deep, doubles):
    with pytest.raises(UsageError, match="different sizes"):
        check_batches(deep, [(doubles, LABELS), (doubles[:2], LABELS[:2])], methods=[Adjoint("euler")])


def test_a_sweep_over_batches_has_their_medians(deep, doubles):
    (row,) = (
        r
        for r in sweep_depths(deep, _three(doubles), depths=[6, 12], methods=[Adjoint("euler")])
        if r.stage == "layer2"
    )
    single = [
        r.errors
        for batch in _three(doubles)
        for r in sweep_depths(deep, [batch], depths=[6, 12], methods=[Adjoint("euler")])
        if r.stage == "layer2"
    ]
    assert row.errors == tuple(sorted(at)[1] for at in zip(*single, strict=True))


def test_slope_needs_two_depths():
    assert SweepRow("pc", "layer1", (4,), (0.1,)).slope is None


def test_a_sweep_measures_every_depth_and_leaves_the_model(deep, doubles):
    specs = [stage.spec for stage in deep.stages.values()]
    rows = sweep_depths(deep, [(doubles, LABELS)], depths=[6, 12], methods=[Adjoint("euler"), Adjoint("checkpoint")])
    assert [stage.spec for stage in deep.stages.values()] == specs
    assert {(row.method, row.stage) for row in rows} == {
        (method, stage) for method in ("euler", "checkpoint") for stage in ("stem", "layer1", "layer2", "layer3")
    }
    (method,) = check_gradients(deep, doubles, LABELS, methods=[Adjoint("euler")]).methods
    by_stage = {row.stage: row for row in rows if row.method == "euler"}
    for stage in method.stages:
        assert by_stage[stage.stage].depths == (6, 12)
        assert by_stage[stage.stage].errors[0] == pytest.approx(stage.relative_error, rel=1e-9)


def test_a_sweep_below_a_stages_depth_is_refused(deep, doubles):
    with pytest.raises(UsageError, match="has 6 steps already, more than --blocks 4"):
        sweep_depths(deep, [(doubles, LABELS)], depths=[4, 8], methods=[Adjoint("pc")])
