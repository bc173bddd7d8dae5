"""Plans: their shapes, where they are exact, what they leave alone, what they cost, the drift they report."""

from __future__ import annotations

import math

import pytest
import torch

from resode_cli.errors import UsageError
from resode_cli.ode import METHODS, SCHEMES, Adjoint, Carry, Monitor, Prediction, required_scheme

CASES = [(method, scheme) for method in METHODS[1:] for scheme in SCHEMES if required_scheme(method) in (None, scheme)]
REVERSING = [case for case in CASES if case[0] != "checkpoint"]


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def calls(field):
    return sum(residual.module.calls for residual in field.residuals)


def predictions(plan):
    return [step.prediction for step in plan.steps]


# --- shapes ------------------------------------------------------------------------------------------------


def test_backprop_has_no_plan():
    assert Adjoint("backprop").plan(5, "euler") is None


def test_checkpoint_holds_every_state_by_default():
    plan = Adjoint("checkpoint").plan(4, "euler")
    assert plan.anchors == (0, 1, 2, 3)
    assert predictions(plan) == [Prediction.HELD] * 4


def test_checkpoint_runs_each_segment_again_from_its_top():
    plan = Adjoint("checkpoint", 3).plan(8, "euler")
    held, replay = Prediction.HELD, Prediction.REPLAY
    assert plan.anchors == (0, 3, 6)
    assert predictions(plan) == [held, held, replay, held, held, replay, held, replay]
    assert [step.hold for step in plan.steps if step.prediction is replay] == [(1,), (4,), ()]


@pytest.mark.parametrize(
    ("method", "prediction", "carry"),
    [
        ("euler", Prediction.REVERSE_EULER, Carry.PREDICTED),
        ("pc", Prediction.REVERSE_EULER, Carry.MIXED),
        ("multistep", Prediction.EXTRAPOLATED, Carry.CORRECTED),
    ],
)
def test_reversing_methods_hold_nothing_by_default(method, prediction, carry):
    plan = Adjoint(method).plan(5, "euler")
    assert (plan.anchors, plan.depth, plan.exact, plan.states_kept, plan.most_states_held) == ((), 5, False, 2, 2)
    assert predictions(plan) == [prediction] * 5
    assert {step.carry for step in plan.steps} == {carry}
    assert plan.extrapolates == (method == "multistep")


@pytest.mark.parametrize(("method", "scheme"), REVERSING)
def test_corrections_are_of_the_steps_that_are_reconstructed(method, scheme):
    plan = Adjoint(method, 3, 2).plan(8, scheme)
    assert [step.corrections for step in plan.steps] == [0, 2, 2, 0, 2, 2, 0, 2]
    assert plan.states_kept == plan.most_states_held == 4  # x_0, x_3, x_6 and x_N


def test_heun_steps_back_by_its_own_rule():
    assert set(predictions(Adjoint("heun").plan(5, "heun"))) == {Prediction.REVERSE_SCHEME}


@pytest.mark.parametrize(("method", "scheme"), REVERSING)
def test_anchors_replace_the_reconstruction(method, scheme):
    plan = Adjoint(method, 3).plan(8, scheme)
    assert plan.anchors == (0, 3, 6)
    assert [n for n, step in enumerate(plan.steps) if step.exact] == [0, 3, 6]


@pytest.mark.parametrize(("method", "scheme"), CASES)
def test_a_stage_without_steps_has_an_empty_plan(method, scheme):
    assert Adjoint(method).plan(0, scheme).depth == 0


# --- mistakes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "meant"), [("chekpoint", "checkpoint"), ("huen", "heun"), ("back-prop", "backprop")])
def test_an_unknown_method_is_answered_with_the_nearest(given, meant):
    with pytest.raises(UsageError, match=f"'{given}'; did you mean .*{meant}") as raised:
        Adjoint(given)
    assert all(method in str(raised.value) for method in METHODS)


@pytest.mark.parametrize("anchors", [0, -1])
def test_anchors_below_one_are_refused(anchors):
    with pytest.raises(UsageError, match="1 or more"):
        Adjoint("pc", anchors)


def test_backprop_takes_no_anchors():
    with pytest.raises(UsageError, match="no anchors"):
        Adjoint("backprop", 2)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"method": "checkpoint", "corrections": 1}, "checkpoint is exact and takes no corrections"),
        ({"method": "backprop", "corrections": 1}, "backprop is exact and takes no corrections"),
        ({"method": "pc", "corrections": -1}, "-1 corrections: must be 0 or more"),
        ({"method": "pc", "snapshots": 3}, "placed for 'checkpoint'; pc takes anchors"),
        ({"method": "multistep", "snapshots": 3}, "placed for 'checkpoint'; multistep takes anchors"),
        ({"method": "backprop", "snapshots": 3}, "placed for 'checkpoint'"),
        ({"method": "checkpoint", "snapshots": 0}, "0 snapshots: must be 1 or more"),
        ({"method": "checkpoint", "snapshots": -2}, "-2 snapshots: must be 1 or more"),
        ({"method": "checkpoint", "snapshots": 3, "anchors": 3}, "either anchors .* or snapshots .*, not both"),
    ],
)
def test_choices_that_a_method_does_not_have_are_refused(chosen, message):
    with pytest.raises(UsageError, match=message):
        Adjoint(**chosen)


@pytest.mark.parametrize(
    ("adjoint", "label"),
    [
        (Adjoint("backprop"), "backprop"),
        (Adjoint("checkpoint", snapshots=12), "checkpoint, 12 snapshots"),
        (Adjoint("multistep", 20), "multistep, anchors 20"),
        (Adjoint("pc", corrections=1), "pc, 1 correction"),
        (Adjoint("pc", 10, 2), "pc, anchors 10, 2 corrections"),
    ],
)
def test_a_label_names_what_was_chosen_and_nothing_else(adjoint, label):
    assert adjoint.label == label


def test_heun_on_the_euler_rule_is_refused_not_replaced(make_stage):
    with pytest.raises(UsageError, match="'heun'.*'euler'"):
        Adjoint("heun").plan(4, "euler")
    with pytest.raises(UsageError, match="'heun'.*'euler'"):
        make_stage(scheme="euler").use_adjoint(Adjoint("heun"))


def test_switching_the_rule_under_heun_is_refused_at_the_next_forward(make_stage, images):
    stage = make_stage(scheme="heun")
    stage.use_adjoint(Adjoint("heun"))
    with pytest.raises(UsageError, match="'heun'.*'euler'"):
        stage.use_scheme("euler")
        stage(images)


# --- exactness ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tied", "rough"])
@pytest.mark.parametrize(("method", "scheme"), CASES)
def test_anchors_at_every_step_give_backprops_gradient(method, scheme, kind, make_field, field_gradients, state):
    field = make_field(kind, 6, horizon=3.0)
    monitor = Monitor()
    found = field_gradients(field, Adjoint(method, 1), state, scheme=scheme, monitor=monitor)
    assert_same(found, field_gradients(field, Adjoint("backprop"), state, scheme=scheme))


@pytest.mark.parametrize("scheme", ["euler", "heun"])
@pytest.mark.parametrize("depth", [1, 2, 7, 12])
@pytest.mark.parametrize("every", [1, 2, 3, 5, 20])
def test_checkpoint_is_exact_for_every_spacing(every, depth, scheme, make_field, field_gradients, state):
    field = make_field("rough", depth, horizon=3.0)
    found = field_gradients(field, Adjoint("checkpoint", every), state, scheme=scheme)
    assert_same(found, field_gradients(field, Adjoint("backprop"), state, scheme=scheme))


def test_checkpoint_spacings_agree_to_the_last_bit(make_field, field_gradients, state):
    # A replayed state is the forward pass's own, so the spacing cannot be seen in the gradient at all.
    field = make_field("rough", 9)
    dense = field_gradients(field, Adjoint("checkpoint", 1), state)
    sparse = field_gradients(field, Adjoint("checkpoint", 4), state)
    assert all(torch.equal(a, b) for a, b in zip(dense, sparse, strict=True))


def test_reconstruction_is_not_exact(make_field, field_gradients, state):
    # Guards the tests above: a method that quietly fell back to backprop would pass them all.
    field = make_field("rough", 9)
    truth = field_gradients(field, Adjoint("backprop"), state)
    for method in ("euler", "pc", "multistep"):
        found = field_gradients(field, Adjoint(method), state)
        assert (found[0] - truth[0]).norm() > 1e-6 * truth[0].norm()


# --- the function ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("horizon", [1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_the_input_is_left_alone(method, horizon, make_stage, images):
    stage = make_stage(scheme=required_scheme(method) or "euler", horizon=horizon)
    stage.use_adjoint(Adjoint(method))
    base = images.clone().requires_grad_()
    x = base * 1
    stage(x).square().sum().backward()
    assert torch.equal(x, images)
    assert x.untyped_storage().nbytes() == images.numel() * 8
    assert x._version == 0


@pytest.mark.parametrize("horizon", [1, 3])
@pytest.mark.parametrize(("method", "scheme"), CASES)
def test_the_method_does_not_change_the_function(method, scheme, horizon, make_stage, images):
    stage = make_stage((0, 1, 0), scheme=scheme, horizon=horizon)
    expected = stage(images)
    stage.use_adjoint(Adjoint(method, 2))
    assert torch.equal(stage(images), expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_stage_without_steps_is_the_identity(method, make_stage, images):
    stage = make_stage((), scheme=required_scheme(method) or "heun")
    stage.use_adjoint(Adjoint(method))
    leaf = images.clone().requires_grad_()
    out = stage(leaf)
    out.square().sum().backward()
    assert torch.equal(out, images)
    assert torch.equal(leaf.grad, 2 * images)


@pytest.mark.parametrize("method", METHODS)
def test_inference_mode_runs_the_same_function(method, make_stage, images):
    stage = make_stage((0, 1, 0), scheme=required_scheme(method) or "heun").eval()
    expected = stage(images)
    stage.use_adjoint(Adjoint(method))
    with torch.inference_mode():
        assert torch.equal(stage(images), expected)
        assert torch.equal(stage(images.clone()), expected)


# --- cost --------------------------------------------------------------------------------------------------


def checkpoint_cost(depth, every):
    """Each segment of L steps runs L − 1 of them again and takes L on the tape."""
    lengths = [min(every, depth - start) for start in range(0, depth, every)]
    return sum(2 * length - 1 for length in lengths)


@pytest.mark.parametrize("every", [None, 1, 2, 3, 5, 12, 30])
def test_checkpoint_evaluations(every, make_field, field_gradients, state):
    field, monitor = make_field("tied", 12), Monitor()
    field_gradients(field, Adjoint("checkpoint", every), state, monitor=monitor)
    assert calls(field) == monitor.evaluations == checkpoint_cost(12, every or 1)


@pytest.mark.parametrize(
    ("method", "scheme", "per_step"),
    [("euler", "euler", 2), ("pc", "euler", 2), ("euler", "heun", 4), ("pc", "heun", 4), ("heun", "heun", 4)],
)
@pytest.mark.parametrize("kind", ["tied", "rough"])
def test_reversing_evaluations(method, scheme, per_step, kind, make_field, field_gradients, state):
    field, monitor = make_field(kind, 10), Monitor()
    field_gradients(field, Adjoint(method), state, scheme=scheme, monitor=monitor)
    assert calls(field) == monitor.evaluations == per_step * 10


@pytest.mark.parametrize(
    ("method", "expected"), [("euler", 3 * 1 + 7 * 2), ("pc", 3 * 1 + 7 * 2), ("multistep", 10 + 1)]
)
def test_an_anchored_step_costs_one_evaluation(method, expected, make_field, field_gradients, state):
    field = make_field("tied", 10)
    field_gradients(field, Adjoint(method, 4), state)
    assert calls(field) == expected


def test_backprop_evaluates_nothing_again(make_field, field_gradients, state):
    field, monitor = make_field("tied", 10), Monitor()
    field_gradients(field, Adjoint("backprop"), state, monitor=monitor)
    assert calls(field) == monitor.evaluations == 0


# --- drift -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "adjoint", [Adjoint("backprop"), Adjoint("checkpoint"), Adjoint("checkpoint", 3), Adjoint("pc", 1)]
)
def test_exact_plans_report_no_drift(adjoint, make_field, field_gradients, state):
    monitor = Monitor(drift=torch.tensor(1.0))  # as if left by an earlier pass
    field_gradients(make_field("rough", 8), adjoint, state, monitor=monitor)
    assert monitor.drift is None


def test_drift_with_anchors_is_the_worst_segments(make_field, field_gradients, state):
    # Written out for the paper's method: from x_N, and from each anchor's exact state, down to the anchor below + 1.
    depth, every = 9, 4
    field, monitor = make_field("rough", depth, horizon=2.0), Monitor()
    field_gradients(field, Adjoint("euler", every), state, monitor=monitor)

    h = 2.0 / depth
    r = [residual.module for residual in field.residuals]
    states = [state]
    with torch.no_grad():
        for n in range(depth):
            states.append(states[n] + h * r[n](states[n]))
        drifts = []
        for anchor in range(0, depth, every):
            top = min(anchor + every, depth)
            x = states[top]
            for n in reversed(range(anchor + 1, top)):
                x = x - h * r[n](x)
            drifts.append(((x - states[anchor + 1]).norm() / states[anchor + 1].norm()).item())
    assert monitor.drift.item() == pytest.approx(max(drifts), rel=1e-10)


@pytest.mark.parametrize(("method", "scheme"), REVERSING)
def test_anchors_reduce_the_drift(method, scheme, make_field, field_gradients, state):
    field, free, anchored = make_field("tied", 16, horizon=2.0), Monitor(), Monitor()
    field_gradients(field, Adjoint(method), state, scheme=scheme, monitor=free)
    field_gradients(field, Adjoint(method, 4), state, scheme=scheme, monitor=anchored)
    assert math.isfinite(anchored.drift.item())
    assert 0 < anchored.drift.item() < free.drift.item()
