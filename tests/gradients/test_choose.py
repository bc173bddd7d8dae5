"""auto: what it chooses meets the tolerance, within the budget, measured by other means than its own."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from resode_cli.errors import ResodeError
from resode_cli.gradients import probe
from resode_cli.gradients.candidates import planned_evaluations
from resode_cli.gradients.check_grad import StageAdjoints, check_gradients
from resode_cli.gradients.choose import choose_adjoints
from resode_cli.gradients.results import ChosenAdjoints
from resode_cli.network.model import OdeResNet, freeze_batch_norm
from resode_cli.ode import Adjoint
from resode_cli.simulation import ledger, step
from resode_cli.surgery.rewrite import deepen, tie

PLENTY = 2**34
LEAN = None  # no budget: nothing is held for speed alone


@pytest.fixture(autouse=True)
def convolutions_take_the_time(monkeypatch):
    """As they do in networks of more channels, on larger images."""
    monkeypatch.setattr(step, "CPU", replace(ledger.CPU, start=0.0, traffic=1e20))


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.tensor([0, 1, 2, 3])


@pytest.fixture
def deep(build_tiny) -> OdeResNet:
    """In `pre` form, 12 steps per stage, double precision: easy to reverse, but not exactly."""
    return _deepened(build_tiny, 12)


@pytest.fixture
def medium(build_tiny) -> OdeResNet:
    """The same with 6 steps, which takes less time to plan for."""
    return _deepened(build_tiny, 6)


def _deepened(build_tiny, steps: int) -> OdeResNet:
    model = build_tiny(form="pre")
    for name, stage in model.stages.items():
        model.replace_stage(name, deepen(stage, steps))
    return model.double()


def chosen(model: OdeResNet, images, labels, *, tolerance: float, budget: int | None = LEAN, **options):
    model.train()
    freeze_batch_norm(model)
    images = images.to(next(model.parameters()).dtype)
    return choose_adjoints(model, images, labels, tolerance=tolerance, budget=budget, batch_size=len(images), **options)


def measured(model: OdeResNet, calibration, images, labels) -> dict[str, float]:
    images = images.to(next(model.parameters()).dtype)
    report = check_gradients(model, images, labels, methods=[StageAdjoints("auto", calibration.adjoints)])
    return {row.stage: row.relative_error for row in report.methods[0].stages if row.steps}


@pytest.fixture(scope="module")
def planned() -> dict[float, tuple[ChosenAdjoints, dict[str, float]]]:
    """By tolerance: what was chosen for `deep`, and its errors in the whole network, of which several tests are."""
    return {}


@pytest.fixture
def deep_at(planned, deep, images, labels):
    """What is chosen for `deep` at a tolerance, and its measured errors: planned once."""

    def found(tolerance: float) -> tuple[ChosenAdjoints, dict[str, float]]:
        if tolerance not in planned:
            calibration = chosen(deep, images, labels, tolerance=tolerance)
            planned[tolerance] = calibration, measured(deep, calibration, images, labels)
        return planned[tolerance]

    return found


@pytest.mark.parametrize("tolerance", [0.3, 0.02, 1e-3, 1e-6])
def test_the_choice_meets_the_tolerance_in_the_whole_network(tolerance, deep_at):
    calibration, errors = deep_at(tolerance)
    assert len(errors) == 3 and max(errors.values()) <= tolerance
    for choice in calibration.stages:  # and what it said is what is measured
        assert choice.error == pytest.approx(errors[choice.piece], rel=1e-3, abs=1e-9)


def test_a_smaller_tolerance_buys_more(deep_at):
    (loose, _), (tight, _) = deep_at(0.3), deep_at(1e-6)
    assert sum(c.bytes_held for c in loose.choices) < sum(c.bytes_held for c in tight.choices)
    assert any(c.error > 1e-6 for c in loose.stages)
    assert all(c.adjoint.plan(c.steps, "euler").exact for c in tight.stages)


def test_a_reference_that_is_not_backprop_is_no_reference(build_tiny, images, labels, monkeypatch):
    """What `auto` is held against is itself held against plain backprop."""
    model = build_tiny().double()
    monkeypatch.setattr(probe, "reference_adjoint", lambda stage: Adjoint("euler"))
    with pytest.raises(ResodeError, match="stage layer1: gradients by euler, .* from plain backprop's"):
        chosen(model, images, labels, tolerance=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rounding_of_a_low_precision_is_no_wrong_reference(dtype, build_tiny, images, labels):
    """A tied block's gradient is a sum over its steps, rounded otherwise when the steps are taken one by one."""
    model = build_tiny(form="pre")
    for name, stage in model.stages.items():
        model.replace_stage(name, deepen(tie(stage), 24))
    model.train()
    freeze_batch_norm(model)
    autocast = partial(torch.autocast, "cpu", dtype=dtype, enabled=dtype != torch.float32)
    found = probe.Probe(model, images, labels, autocast)
    assert set(found.stages) == set(model.stages)
    # What overflows is compared with nothing, and is for the training loop's guard to name.
    with torch.no_grad():
        model.net.linear.weight.fill_(torch.inf)
    assert probe.Probe(model, images, labels, autocast).stages


def test_a_smaller_budget_is_kept_to(medium, images, labels):
    """Backprop, then ever less, always by the fastest plan; and exact where the tolerance leaves nothing else."""
    free = chosen(medium, images, labels, tolerance=1e-6, budget=PLENTY)
    assert {c.adjoint.method for c in free.choices} == {"backprop"} and free.time == 1
    times = []
    for share in (0.9, 0.6, 0.4):
        budget = int(share * free.predicted_bytes)
        tight = chosen(medium, images, labels, tolerance=1e-6, budget=budget)
        assert tight.predicted_bytes <= budget
        assert max(measured(medium, tight, images, labels).values()) <= 1e-6
        times.append(tight.time)
    assert 1 < times[0] <= times[1] <= times[2]


def test_too_small_a_budget_is_refused(medium, images, labels):
    with pytest.raises(ResodeError, match="takes at least .* [KM]iB; raise --memory-budget"):
        chosen(medium, images, labels, tolerance=0.02, budget=1000)


def test_native_depth_gets_exact_anchors_and_the_reason(tiny, images, labels):
    with torch.no_grad():
        for name, p in tiny.named_parameters():
            if ".bn2.weight" in name:
                p.mul_(10)
    calibration = chosen(tiny, images, labels, tolerance=0.02)
    for choice in calibration.stages:
        assert choice.adjoint.method == "checkpoint"
        assert "exact anchors" in choice.reason and "off by" in choice.reason
    assert any("cannot converge" in choice.reason for choice in calibration.stages)


@pytest.mark.parametrize("method", ["pc", "multistep"])
def test_anchors_auto_stays_with_the_method(method, deep, images, labels):
    calibration = chosen(deep, images, labels, tolerance=1e-3, methods=(method,))
    assert {choice.adjoint.method for choice in calibration.stages} == {method}
    assert max(measured(deep, calibration, images, labels).values()) <= 1e-3


@pytest.mark.parametrize("budget", [LEAN, PLENTY])
def test_what_is_fixed_stays_and_the_rest_is_planned_around_it(budget, deep, images, labels):
    """The tolerance is not that of the stage that is fixed, nor are those below it blamed for its error."""
    with torch.no_grad():
        for name, p in deep.stages["layer3"].named_parameters():
            if "bn2.weight" in name:
                p.mul_(2)
    tolerance, fixed = 0.02, {"layer3": Adjoint("euler"), "layer1": Adjoint("backprop")}
    found = chosen(deep, images, labels, tolerance=tolerance, budget=budget, fixed=fixed)
    choices = {choice.piece: choice for choice in found.choices}
    for name, adjoint in fixed.items():
        assert choices[name].adjoint == adjoint == deep.stages[name].adjoint
    assert choices["layer3 transition"].adjoint == Adjoint("checkpoint") and choices["layer3"].error is None
    errors = measured(deep, found, images, labels)
    assert errors["layer3"] > tolerance and errors["layer2"] > tolerance, "there is nothing to be blamed for"
    exact = StageAdjoints("rest", {**found.adjoints, "layer3": Adjoint("checkpoint")})
    report = check_gradients(deep, images.double(), labels, methods=[exact])
    rest = {row.stage: row.relative_error for row in report.methods[0].stages if row.steps}
    assert (choices["layer2"].error > 0) == (budget is LEAN)  # or plain backprop is chosen
    for name in ("layer1", "layer2"):
        assert rest[name] <= tolerance and choices[name].error == pytest.approx(rest[name], rel=1e-3, abs=1e-9)


def test_stages_that_no_gradient_passes_are_left_out(deep, images, labels):
    deep.requires_grad_(False)
    deep.stages["layer3"].requires_grad_(True)
    calibration = chosen(deep, images, labels, tolerance=0.02)
    assert all(choice.error == 0 for choice in calibration.stages if choice.piece != "layer3")
    assert max(measured(deep, calibration, images, labels).values()) <= 0.02


def test_the_model_and_the_generators_are_left_as_they_were(medium, images, labels):
    medium.train()  # batch statistics: every evaluation would move them
    state = {k: v.clone() for k, v in medium.state_dict().items()}
    random = torch.get_rng_state()
    found = choose_adjoints(medium, images.double(), labels, tolerance=0.02, budget=LEAN, batch_size=4)
    assert found.images == 4 and any(choice.tried for choice in found.stages)  # it was evaluated
    assert all(torch.equal(state[k], v) for k, v in medium.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in medium.parameters())


@pytest.mark.slow
def test_heun_stages_can_be_calibrated(deep, images, labels):
    deep.use_scheme("heun")
    calibration = chosen(deep, images, labels, tolerance=0.02)
    assert max(measured(deep, calibration, images, labels).values()) <= 0.02


def test_planned_evaluations_are_the_counted_ones(deep):
    stage, x = deep.stages["layer2"], torch.rand(2, 4, 8, 8, dtype=torch.float64)
    spaced = [Adjoint(method, anchors) for method in ("checkpoint", "pc", "euler") for anchors in (None, 5, 8)]
    for adjoint in (*spaced, *(Adjoint("checkpoint", snapshots=s) for s in (1, 2, 5, 11))):
        stage.use_adjoint(adjoint)
        stage(x.clone().requires_grad_()).sum().backward()
        plan = adjoint.plan(12, "euler")
        assert stage.monitor.evaluations / 12 == pytest.approx(planned_evaluations(plan)), adjoint


def test_an_exact_plan_is_not_measured(build_tiny, images, labels, monkeypatch):
    model = build_tiny()
    free = chosen(model, images, labels, tolerance=0.02, budget=PLENTY).predicted_bytes
    monkeypatch.setattr(probe.Probe, "__init__", lambda *_: pytest.fail("nothing needs to be measured"))
    found = chosen(model, images, labels, tolerance=0.02, budget=int(0.8 * free))
    assert found.images == 0 and all(choice.error == 0 for choice in found.choices)


@pytest.mark.slow
def test_more_memory_is_never_refused_where_less_was_enough(build_tiny, images, labels):
    """And what a refusal names is then enough."""
    model = build_tiny()
    free = chosen(model, images, labels, tolerance=1e-6, budget=PLENTY).predicted_bytes
    with pytest.raises(ResodeError, match="takes at least") as refused:
        chosen(model, images, labels, tolerance=1e-6, budget=1000)
    number, unit = str(refused.value).split("takes at least ")[1].split(";")[0].split()
    named = int(float(number) * {"KiB": 2**10, "MiB": 2**20}[unit])
    previous = float("inf")
    for budget in [named, *(named + (free - named) * k // 9 for k in range(1, 10))]:
        found = chosen(model, images, labels, tolerance=1e-6, budget=budget)
        assert found.predicted_bytes <= budget and found.time <= 1.3 * previous
        previous = found.time


def test_transitions_and_the_stem_are_within_the_tolerance_too(build_tiny, images, labels):
    """States of transitions are coded as well, and what codes are off by reaches the stem."""
    model = build_tiny()
    model.train()
    for name in model.stages:
        model.use_adjoint({name: Adjoint("checkpoint", bits=2), f"{name} transition": Adjoint("checkpoint", bits=2)})
    coded = model.adjoints
    found = probe.Probe(model, images, labels, torch.enable_grad)
    model.use_adjoint(coded)
    errors = found.together()
    assert list(errors) == ["stem", "layer1", "layer2 transition", "layer2", "layer3 transition", "layer3"]
    assert all(error > 1e-4 for error in errors.values())


class Rolls(torch.nn.Module):
    """Mixes the images of a batch from three on."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.3 * x.roll(1, 0) if len(x) > 2 else x


@pytest.mark.parametrize("layer", [Rolls(), torch.nn.Dropout(0.3), torch.nn.Identity()], ids=lambda m: type(m).__name__)
def test_a_batch_is_split_only_where_that_changes_nothing(layer, build_tiny, labels):
    model = build_tiny()
    model.net.bn1 = torch.nn.Sequential(model.net.bn1, layer)
    x, y = torch.rand(16, 3, 48, 48), labels.repeat(4)
    free = chosen(model, x, y, tolerance=0.02, budget=PLENTY).predicted_bytes
    found = chosen(model, x, y, tolerance=0.02, budget=int(0.8 * free), micro_batches=True)
    assert (found.micro_batches > 1) == isinstance(layer, torch.nn.Identity)
    assert found.predicted_bytes <= 0.8 * free
