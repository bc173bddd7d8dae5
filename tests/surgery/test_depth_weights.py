"""Weights linear in depth: their numbers, their gradients, their statistics; and what `deepen` makes of them."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import Tensor, nn

from resode_cli.data import Batch
from resode_cli.errors import UsageError
from resode_cli.network.model import OdeResNet
from resode_cli.network.residual import BlendedResidual
from resode_cli.network.stage import OdeStage
from resode_cli.ode import Adjoint
from resode_cli.surgery.batch_norm import recalibrate
from resode_cli.surgery.steps import deepened, tied, untied

KINDS = {"replicate": "runs", "linear": "linear", "tied": "tied", "free": "untied"}
KINDS |= {"tied+norms": "tied+norms", "tied+stats": "tied+stats"}


@pytest.fixture
def stage(tiny: OdeResNet) -> OdeStage:
    """Three untied steps of 4 channels, no transition."""
    return tiny.stages["layer1"].double()


@pytest.fixture
def state() -> Tensor:
    """A state as it comes out of a ReLU."""
    return torch.rand(3, 4, 8, 8, dtype=torch.float64)


def linear(stage: OdeStage, steps: int) -> OdeStage:
    return deepened(stage, steps, depth_weights="linear")


def weights(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and statistics, batch counters left out."""
    return {name: value.detach() for name, value in module.state_dict().items() if value.is_floating_point()}


def shares(knots: int, steps: int) -> Tensor:
    """(steps, knots): what every knot gives to every step. Both sit at the midpoints of their intervals."""
    rows = torch.zeros(steps, knots, dtype=torch.float64)
    for n in range(steps):
        place = min(max((n + 0.5) / steps * knots - 0.5, 0.0), knots - 1.0)
        for k in range(knots):
            rows[n, k] = max(0.0, 1 - abs(place - k))
    return rows


def assert_linear(steps: list[nn.Module], knots: list[nn.Module]) -> None:
    for module, row in zip(steps, shares(len(knots), len(steps)), strict=True):
        for name, value in weights(module).items():
            expected = sum(share * weights(knot)[name] for share, knot in zip(row, knots, strict=True))
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-13)


def gradients(stage: OdeStage, x: Tensor) -> dict[str, Tensor]:
    """Of a fixed function of x_N, with respect to the parameters and the input."""
    x = x.clone().requires_grad_()
    stage.zero_grad()
    out = stage(x)
    probe = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(9))
    (out * probe + out.square()).sum().backward()
    return {"input": x.grad, **{name: p.grad for name, p in stage.named_parameters()}}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert expected[name].norm() > 0, name
        assert (value - expected[name]).norm() <= 1e-10 * expected[name].norm(), name


# The weights of the steps


@pytest.mark.parametrize("steps", [4, 5, 6, 7, 9, 16])
def test_a_steps_weights_lie_on_the_lines_between_the_knots(steps: int, stage: OdeStage):
    deep = linear(stage, steps)
    assert deep.spec.kind == "linear" and (deep.spec.depth, deep.spec.horizon) == (steps, 3)
    assert deep.spec.step_size == 3 / steps
    assert_linear(list(untied(deep).blocks), list(stage.blocks))


@pytest.mark.parametrize("steps", [5, 8])
def test_they_are_the_weights_that_interpolation_gives(steps: int, stage: OdeStage):
    free = deepened(stage, steps, mode="interpolate")
    found = untied(linear(stage, steps))
    assert free.spec == found.spec and free.spec.kind == "untied"
    for one, other in zip(found.blocks, free.blocks, strict=True):
        assert all(torch.equal(value, weights(other)[name]) for name, value in weights(one).items())


@pytest.mark.parametrize("form", ["exact", "pre"])
@pytest.mark.parametrize("scheme", ["euler", "heun"])
@pytest.mark.parametrize("training", [False, True])
def test_the_function_is_that_of_the_untied_copy(form: str, scheme: str, training: bool, build_tiny, state: Tensor):
    deep = linear(build_tiny(form=form, scheme=scheme).stages["layer1"].double(), 7).train(training)
    free = untied(deep)
    with torch.no_grad():
        torch.testing.assert_close(deep(state), free(state), rtol=1e-12, atol=1e-12)


def test_the_parameters_are_those_of_the_knots_themselves(stage: OdeStage):
    deep = linear(stage, 10)
    assert [id(p) for p in deep.parameters()] == [id(p) for p in stage.parameters()]
    assert [id(b) for b in deep.buffers()] == [id(b) for b in stage.buffers()]


def test_equal_knots_are_a_tied_stage_bit_for_bit(tiny: OdeResNet, state: Tensor):
    stage = tiny.stages["layer1"]
    for block in stage.blocks[1:]:
        block.load_state_dict(stage.blocks[0].state_dict())
    found, one = linear(stage, 8), deepened(tied(stage, rule="first"), 8)
    assert found.spec.kind == "linear" and one.spec.kind == "tied"
    with torch.no_grad():
        assert torch.equal(found(state.float()), one(state.float()))


def largest_change(stage: OdeStage) -> float:
    """From one step's weights to the next's, relative."""
    points = [torch.cat([value.flatten() for value in weights(block).values()]) for block in untied(stage).blocks]
    return max(float((b - a).norm() / a.norm()) for a, b in zip(points, points[1:], strict=False))


@pytest.mark.parametrize("depth_weights, ratio", [("linear", 0.5), ("replicate", 1.0)])
def test_linear_weights_alone_are_continuous_in_depth(depth_weights: str, ratio: float, stage: OdeStage):
    changes = [largest_change(deepened(stage, n, depth_weights=depth_weights)) for n in (24, 48, 96)]
    for coarse, fine in zip(changes, changes[1:], strict=False):
        assert fine / coarse == pytest.approx(ratio, rel=0.05)


# Gradients


@pytest.mark.parametrize("adjoint", [Adjoint("checkpoint"), Adjoint("checkpoint", snapshots=2)], ids=lambda a: a.label)
@pytest.mark.parametrize("form", ["exact", "pre"])
@pytest.mark.parametrize("training", [False, True])
def test_checkpoints_give_the_gradient_of_backprop(adjoint, form: str, training: bool, build_tiny, state: Tensor):
    deep = linear(build_tiny(form=form).stages["layer1"].double(), 8).train(training)
    expected = gradients(deep, state)
    deep.use_adjoint(adjoint)
    assert_same(gradients(deep, state), expected)


def test_a_knots_gradient_is_that_of_its_steps_in_their_shares(stage: OdeStage, state: Tensor):
    deep = linear(stage, 7)
    free = untied(deep)
    expected = {"input": gradients(free, state)["input"]}
    for k, knot in enumerate(deep.spec.blocks):
        for name, _ in deep.blocks[k].named_parameters():
            parts = zip(shares(3, 7)[:, k], free.blocks, strict=True)
            expected[f"{knot.name}.{name}"] = sum(share * block.get_parameter(name).grad for share, block in parts)
    assert_same(gradients(deep, state), expected)


@pytest.mark.parametrize("snapshots", [None, 2])
def test_statistics_move_once_in_a_step_whatever_the_adjoint(snapshots: int | None, stage: OdeStage, state: Tensor):
    before = {name: value.clone() for name, value in stage.named_buffers()}
    plain = linear(stage, 8).train()
    other = copy.deepcopy(plain)
    other.use_adjoint(Adjoint("checkpoint", snapshots=snapshots))
    for deep in (plain, other):
        gradients(deep, state)
    for name, value in plain.named_buffers():
        torch.testing.assert_close(other.get_buffer(name), value, rtol=1e-12, atol=0)
        if value.is_floating_point():
            assert not torch.equal(value, before[name]), f"{name} did not move"


# BatchNorm statistics


STATISTICS = [f"{norm}.{name}" for norm in ("bn1", "bn2") for name in ("running_mean", "running_var")]


@pytest.mark.parametrize("weight", [0.125, 0.5, 0.75])
def test_a_blends_statistics_move_as_a_blocks_own_and_knots_in_their_shares(weight: float, stage, state: Tensor):
    lower, upper = stage.train().residuals()[:2]
    before = [copy.deepcopy(weights(knot.module)) for knot in (lower, upper)]
    own = copy.deepcopy(lower.module)
    own.load_state_dict({n: (1 - weight) * before[0][n] + weight * before[1][n] for n in before[0]}, strict=False)
    own.branch(state)
    BlendedResidual(lower, upper, weight).step(state, 0.5)
    for name in STATISTICS:
        low, high = (weights(knot.module)[name] for knot in (lower, upper))
        expected = weights(own)[name]
        torch.testing.assert_close((1 - weight) * low + weight * high, expected, rtol=1e-10, atol=1e-12)
        moved = [now - old[name] for now, old in zip((low, high), before, strict=True)]
        torch.testing.assert_close(moved[0] * weight, moved[1] * (1 - weight), rtol=1e-9, atol=1e-12)


def test_in_eval_mode_no_statistic_moves(stage: OdeStage, state: Tensor):
    deep = linear(stage, 8).eval()
    before = {name: value.clone() for name, value in deep.named_buffers()}
    gradients(deep, state)
    assert all(torch.equal(value, before[name]) for name, value in deep.named_buffers())


def noise(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(5)
    return [Batch(torch.randn(16, 3, 16, 16, generator=generator), torch.zeros(16)) for _ in range(count)]


def recalibrated(model: OdeResNet, batches: list[Batch]) -> tuple[OdeResNet, OdeResNet]:
    """Linear in depth, and its untied copy, which has the steps' true statistics: no weight depends on them."""
    for name, stage in model.stages.items():
        model.replace_stage(name, linear(stage, 6))
    free = copy.deepcopy(model)
    for name, stage in free.stages.items():
        free.replace_stage(name, untied(stage))
    for one in (model, free):
        recalibrate(one, batches)
    return model, free


def test_recalibration_fits_the_steps_statistics_about_as_well_as_knots_can(tiny: OdeResNet):
    deep, free = recalibrated(tiny, noise(24))
    for key, stage in deep.stages.items():
        rows = shares(len(stage.blocks), 6)
        for name in STATISTICS:
            knots = torch.stack([weights(block)[name].double() for block in stage.blocks])
            true = torch.stack([weights(block)[name].double() for block in free.stages[key].blocks])
            best = rows @ torch.linalg.lstsq(rows, true).solution
            error, least = ((fit - true).norm() / true.norm() for fit in (rows @ knots, best))
            assert error <= least + 0.05, (key, name, float(error), float(least))


@pytest.mark.parametrize("count", [1, 2])
def test_recalibration_on_few_batches_leaves_no_negative_variance(count: int, tiny: OdeResNet):
    deep, _ = recalibrated(tiny, noise(count))
    for stage in deep.stages.values():
        for block in untied(stage).blocks:
            assert block.bn1.running_var.min() > 0 and block.bn2.running_var.min() > 0


# What deepen and tie make of them


@pytest.mark.parametrize("depth_weights", KINDS)
def test_deepening_gives_the_depth_weights_asked_for(depth_weights: str, stage: OdeStage):
    deep = deepened(stage, 7, depth_weights=depth_weights)
    assert deep.spec.kind == KINDS[depth_weights] and (deep.spec.depth, deep.spec.horizon) == (7, 3)


@pytest.mark.parametrize("depth_weights", [None, "linear"])
def test_deepening_again_keeps_the_knots(depth_weights: str | None, stage: OdeStage):
    deep = deepened(linear(stage, 5), 11, depth_weights=depth_weights)
    assert deep.spec == linear(stage, 11).spec
    assert all(a is b for a, b in zip(deep.blocks, stage.blocks, strict=True))
    assert_linear(list(untied(deep).blocks), list(stage.blocks))


def test_a_run_of_steps_is_one_knot(stage: OdeStage):
    deep = linear(deepened(stage, 7), 10)
    assert all(a is b for a, b in zip(deep.blocks, stage.blocks, strict=True))
    assert_linear(list(untied(deep).blocks), list(stage.blocks))


def test_a_tied_stage_has_one_knot_and_stays_tied(stage: OdeStage):
    deep = linear(tied(stage), 6)
    assert deep.spec.kind == "tied" and deep.spec.schedule == (0,) * 6


def test_tying_takes_the_mean_over_steps_and_not_over_knots(stage: OdeStage):
    deep = linear(stage, 4)
    (one,) = tied(deep).blocks
    mean = shares(3, 4).mean(0)
    assert mean[1] != pytest.approx(1 / 3)
    for name, value in weights(one).items():
        expected = sum(share * weights(knot)[name] for share, knot in zip(mean, stage.blocks, strict=True))
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-13)


def test_replicating_gives_every_step_a_run_of_its_own_weights(stage: OdeStage):
    deep = deepened(linear(stage, 6), 12, depth_weights="replicate")
    assert deep.spec.schedule == tuple(n // 2 for n in range(12)) and deep.spec.kind == "runs"
    assert_linear(list(deep.blocks), list(stage.blocks))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"depth_weights": "linar"}, "unknown depth weights 'linar'; did you mean linear?"),
        ({"depth_weights": "tied-norms"}, "unknown depth weights 'tied-norms'; did you mean tied+norms"),
        ({"mode": "identity", "depth_weights": "linear"}, "--mode identity inserts blocks of their own"),
        ({"mode": "interpolate", "depth_weights": "replicate"}, "--mode interpolate gives every step other weights"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments: dict[str, str], message: str, stage: OdeStage):
    with pytest.raises(UsageError, match=re.escape(message)):
        deepened(stage, 6, **arguments)


def test_linear_weights_cannot_be_compiled(stage: OdeStage, tiny: OdeResNet):
    with pytest.raises(UsageError, match="stage layer1 has weights linear in depth, which cannot be compiled"):
        linear(stage, 6).compile_branch()
    tiny.compile_branches()
    with pytest.raises(UsageError, match="stage layer1 .* cannot be compiled"):
        tiny.replace_stage("layer1", linear(stage, 6))


def test_a_layer_under_two_names_is_not_blended(stage: OdeStage):
    for block in stage.blocks:
        block.alias = block.bn1
    with pytest.raises(UsageError, match="holds a tensor under two names"):
        deepened(stage, 5, depth_weights="linear")
    x = torch.rand(2, 4, 6, 6, dtype=torch.float64)
    deep = deepened(stage, 5, mode="interpolate").eval()
    for block in stage.blocks:
        del block.alias
    torch.testing.assert_close(deep(x), deepened(stage, 5, mode="interpolate").eval()(x))
