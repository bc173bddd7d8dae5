"""The laws of tied, untied and deepened stages."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resode_cli.errors import UsageError
from resode_cli.network.assembling import assemble
from resode_cli.network.model import ModelInfo, OdeResNet
from resode_cli.network.parts import StageParts
from resode_cli.network.stage import OdeStage
from resode_cli.ode import Adjoint
from resode_cli.surgery.convert import stage_specs
from resode_cli.surgery.steps import MODES, RULES, deepened, tied, untied


@pytest.fixture
def stage(tiny: OdeResNet) -> OdeStage:
    """Three untied steps of 4 channels, no transition."""
    return tiny.stages["layer1"]


@pytest.fixture
def state() -> Tensor:
    """A state as it comes out of a ReLU."""
    return torch.rand(2, 4, 8, 8)


class SmoothStep(nn.Module):
    """x + conv(tanh(conv(x))): a smooth field, linear after the addition."""

    def __init__(self, *, after=lambda x: x) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(x + self.second(torch.tanh(self.first(x))))


def stage_of(info: ModelInfo, *blocks: nn.Module, scheme: str = "euler") -> OdeStage:
    names = tuple(str(i) for i in range(len(blocks)))
    net = nn.Sequential(nn.Sequential(*blocks))
    specs = stage_specs([StageParts("0", (), names)], scheme=scheme, form="exact")
    return assemble(net, specs, info).eval().stages["0"]


def on_every_stage(model: OdeResNet, rewrite) -> OdeResNet:
    for name, stage in model.stages.items():
        model.replace_stage(name, rewrite(stage))
    return model


def logits(model: OdeResNet, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(images)


def weights(module: nn.Module) -> dict[str, Tensor]:
    """In float64, batch counters left out."""
    return {k: v.double() for k, v in module.state_dict().items() if v.is_floating_point()}


def assert_mixture(module: nn.Module, parts: list[tuple[float, nn.Module]]) -> None:
    for name, value in weights(module).items():
        expected = sum(share * weights(part)[name] for share, part in parts)
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)


# untied


@pytest.mark.parametrize("blocks", [3, 5, 7])
def test_untie_keeps_the_function_bit_for_bit(blocks: int, tiny: OdeResNet, images):
    on_every_stage(tiny, lambda s: deepened(s, blocks))
    before = logits(tiny, images)
    on_every_stage(tiny, untied)
    assert torch.equal(logits(tiny, images), before)
    for stage in tiny.stages.values():
        assert stage.spec.schedule == tuple(range(blocks)) and stage.spec.kind == "untied"
        assert len({id(block) for block in stage.blocks}) == blocks


def test_untie_keeps_the_function_of_a_tied_network(tiny: OdeResNet, images):
    on_every_stage(tiny, tied)
    before = logits(tiny, images)
    assert torch.equal(logits(on_every_stage(tiny, untied), images), before)


def test_untied_copies_are_independent(stage: OdeStage):
    free = untied(deepened(stage, 6))
    before = free.blocks[1].conv1.weight.clone()
    with torch.no_grad():
        free.blocks[0].conv1.weight.zero_()
    assert torch.equal(free.blocks[1].conv1.weight, before)


# tied


@pytest.mark.parametrize("rule", RULES)
def test_tie_is_idempotent(rule: str, stage: OdeStage):
    once = tied(stage, rule=rule)
    twice = tied(once, rule=rule)
    assert once.spec.schedule == (0, 0, 0) == twice.spec.schedule
    assert once.spec == twice.spec
    assert all(torch.equal(v, once.state_dict()[k]) for k, v in twice.state_dict().items())


@pytest.mark.parametrize("rule, block", [("first", 0), ("middle", 1), ("last", 2)])
def test_tie_picks_the_step_it_says(rule: str, block: int, stage: OdeStage):
    picked = weights(tied(stage, rule=rule).blocks[0])
    assert all(torch.equal(value, weights(stage.blocks[block])[name]) for name, value in picked.items())
    assert not torch.equal(picked["conv1.weight"], weights(stage.blocks[(block + 1) % 3])["conv1.weight"])


def test_tie_counts_steps_not_blocks(stage: OdeStage):
    # Seven steps of three blocks: runs of 3, 2 and 2.
    deep = deepened(stage, 7)
    assert deep.spec.schedule == (0, 0, 0, 1, 1, 2, 2)
    assert_mixture(tied(deep).blocks[0], list(zip((3 / 7, 2 / 7, 2 / 7), stage.blocks, strict=True)))
    picked = tied(deep, rule="middle").blocks[0]
    assert torch.equal(picked.conv1.weight, stage.blocks[1].conv1.weight)


def test_tie_keeps_steps_and_horizon_and_its_argument(stage: OdeStage):
    before = {k: v.clone() for k, v in stage.state_dict().items()}
    one = tied(stage)
    assert (one.spec.depth, one.spec.horizon, one.spec.step_size) == (3, 3, 1.0)
    assert len(one.blocks) == 1 and one.spec.kind == "tied"
    assert all(torch.equal(v, before[k]) for k, v in stage.state_dict().items())


def test_tie_refuses_an_unknown_rule(stage: OdeStage):
    with pytest.raises(UsageError, match="unknown tie rule 'mid'; did you mean middle"):
        tied(stage, rule="mid")


# deepen by replication


def test_replication_keeps_the_parameters_themselves_and_the_horizon(stage: OdeStage):
    deep = deepened(stage, 12)
    assert all(a is b for a, b in zip(deep.blocks, stage.blocks, strict=True))
    assert [id(p) for p in deep.parameters()] == [id(p) for p in stage.parameters()]
    assert deep.spec.horizon == 3 and deep.spec.step_size == 3 / 12


@pytest.mark.parametrize("name, lengths", [("layer1", {4}), ("layer2", {4, 5})])
def test_36_steps_are_spread_evenly(name: str, lengths: set[int], build_tiny):
    stage = build_tiny("make_long").stages[name]
    schedule = deepened(stage, 36).spec.schedule
    runs = Counter(schedule)
    assert stage.spec.depth == {"layer1": 9, "layer2": 8}[name]
    assert sum(runs.values()) == 36 and set(runs.values()) == lengths
    assert list(schedule) == sorted(schedule) and set(runs) == set(range(stage.spec.depth))


def test_replication_twice_is_replication_once(stage: OdeStage):
    assert deepened(deepened(stage, 6), 24).spec == deepened(stage, 24).spec


def test_replication_is_the_euler_rule_with_smaller_steps(stage: OdeStage, state: Tensor):
    x = state
    with torch.no_grad():
        for n in range(6):
            block = stage.blocks[n // 2]
            x = x + 0.5 * (F.relu(x + block.branch(x)) - x)
        torch.testing.assert_close(deepened(stage, 6)(state), x)


def test_replicating_a_tied_smooth_field_converges_with_order_one(info):
    stage = tied(stage_of(info, SmoothStep(), SmoothStep())).double()
    state = torch.randn(1, 4, 6, 6, dtype=torch.float64)
    depths = [8, 16, 32, 64]
    with torch.no_grad():
        limit = deepened(stage, 4096)(state)
        errors = [(deepened(stage, n)(state) - limit).norm().item() for n in depths]
    slope = math.log(errors[-1] / errors[0]) / math.log(depths[-1] / depths[0])
    assert -1.15 < slope < -0.9, errors


# deepen by interpolation


def test_interpolation_at_doubling_mixes_one_to_three(stage: OdeStage):
    deep = deepened(stage, 6, mode="interpolate")
    first, second, third = stage.blocks
    expected = [
        [(1.0, first)],
        [(0.75, first), (0.25, second)],
        [(0.25, first), (0.75, second)],
        [(0.75, second), (0.25, third)],
        [(0.25, second), (0.75, third)],
        [(1.0, third)],
    ]
    for block, parts in zip(deep.blocks, expected, strict=True):
        assert_mixture(block, parts)
    assert deep.spec.schedule == tuple(range(6)) and deep.spec.horizon == 3


def test_interpolation_of_a_tied_stage_keeps_its_weights(stage: OdeStage, state: Tensor):
    one = tied(stage)
    deep = deepened(one, 5, mode="interpolate")
    for block in deep.blocks:
        assert_mixture(block, [(1.0, one.blocks[0])])
    with torch.no_grad():
        torch.testing.assert_close(deep(state), deepened(one, 5)(state))


@pytest.mark.parametrize("mode", MODES)
def test_deepening_to_the_depth_there_is_changes_nothing(mode: str, stage: OdeStage):
    same = deepened(stage, 3, mode=mode)
    assert same.spec == stage.spec and all(a is b for a, b in zip(same.blocks, stage.blocks, strict=True))


# deepen by identity


@pytest.mark.parametrize("before, blocks", [(3, 6), (3, 7), (5, 7), (7, 11)])
def test_identity_steps_change_no_logit(before: int, blocks: int, tiny: OdeResNet, images):
    on_every_stage(tiny, lambda s: deepened(s, before))
    expected = logits(tiny, images)
    on_every_stage(tiny, lambda s: deepened(s, blocks, mode="identity"))
    assert torch.equal(logits(tiny, images), expected)
    assert all(stage.spec.depth == blocks for stage in tiny.stages.values())


def test_identity_steps_beside_weights_linear_in_depth_change_no_logit(tiny: OdeResNet, images):
    on_every_stage(tiny, lambda s: deepened(s, 5, depth_weights="linear"))
    expected = logits(tiny, images)
    on_every_stage(tiny, lambda s: deepened(s, 9, mode="identity"))
    torch.testing.assert_close(logits(tiny, images), expected)
    assert all(stage.spec.depth == 9 and not stage.spec.blends for stage in tiny.stages.values())


def test_identity_keeps_the_step_size_so_the_horizon_grows(stage: OdeStage):
    deep = deepened(deepened(stage, 5), 7, mode="identity")
    assert deep.spec.horizon == Fraction(3) * 7 / 5
    assert deep.spec.step_size == deepened(stage, 5).spec.step_size == 3 / 5


def test_inserted_blocks_can_be_trained(tiny: OdeResNet, images):
    on_every_stage(tiny, lambda s: deepened(s, 7, mode="identity"))
    F.cross_entropy(tiny.eval()(images), torch.tensor([0, 1, 2, 3])).backward()
    for stage in tiny.stages.values():
        inserted = [b for spec, b in zip(stage.spec.blocks, stage.blocks, strict=True) if "+" in spec.name]
        assert len(inserted) == 7 - len([b for b in stage.spec.blocks if "+" not in b.name]) > 0
        for block in inserted:
            assert any(p.grad is not None and p.grad.abs().max() > 0 for p in block.parameters())


def test_identity_zeroes_the_last_convolution_where_there_is_no_norm(info, state: Tensor):
    stage = stage_of(info, SmoothStep(), SmoothStep())
    deep = deepened(stage, 3, mode="identity")
    with torch.no_grad():
        assert torch.equal(deep(state), stage(state))
    inserted = deep.blocks[2]
    assert inserted.second.weight.abs().max() == 0 < inserted.first.weight.abs().max()


def test_identity_is_refused_where_the_activation_changes_the_state(info):
    stage = stage_of(info, SmoothStep(after=torch.tanh), SmoothStep(after=torch.tanh))
    with pytest.raises(UsageError, match="--mode identity: block 0 .*its activation changes the state"):
        deepened(stage, 3, mode="identity")


def test_identity_is_refused_under_heun(info):
    stage = stage_of(info, SmoothStep(), SmoothStep(), scheme="heun")
    with pytest.raises(UsageError, match="--mode identity .*Euler rule only; stage 0 uses heun"):
        deepened(stage, 4, mode="identity")


# what all of them share


@pytest.mark.parametrize("blocks, message", [(0, "--blocks 0: must be 1"), (-3, "must be 1"), (2, "has 3 steps")])
@pytest.mark.parametrize("mode", MODES)
def test_too_few_blocks_are_refused(blocks: int, message: str, mode: str, stage: OdeStage):
    with pytest.raises(UsageError, match=message):
        deepened(stage, blocks, mode=mode)


def test_an_unknown_mode_is_refused_with_the_nearest(stage: OdeStage):
    with pytest.raises(UsageError, match="unknown mode 'replicat'; did you mean replicate"):
        deepened(stage, 5, mode="replicat")


def test_a_stage_without_steps_cannot_be_deepened(info):
    net = nn.Sequential(nn.Sequential(SmoothStep()))
    specs = stage_specs([StageParts("0", ("0",), ())], scheme="euler", form="exact")
    with pytest.raises(UsageError, match="stage 0 has no steps to deepen"):
        deepened(assemble(net, specs, info).stages["0"], 4)


REWRITES = {"tie": tied, "untie": untied, **{mode: lambda s, mode=mode: deepened(s, 5, mode=mode) for mode in MODES}}


@pytest.mark.parametrize("rewrite", REWRITES)
def test_transition_adjoint_and_training_flag_stay(rewrite: str, tiny: OdeResNet):
    stage = tiny.stages["layer2"].train()
    stage.use_adjoint(Adjoint("pc", 2))
    after = REWRITES[rewrite](stage)
    assert after.transition[0] is stage.transition[0] and after.spec.transition == ("0",)
    assert after.adjoint == Adjoint("pc", 2)
    assert all(module.training for module in after.modules())


def test_stages_are_picked_by_name_and_by_place(tiny: OdeResNet):
    assert list(tiny.pick(["layer2"])) == list(tiny.pick(["2"])) == ["layer2"]
    assert list(tiny.pick(["3", "layer1", "1"])) == ["layer1", "layer3"]
    assert list(tiny.pick(None)) == ["layer1", "layer2", "layer3"]
    assert tiny.pick(["1"])["layer1"] is tiny.stages["layer1"]


@pytest.mark.parametrize("name", ["layr2", "4", "0", ""])
def test_an_unknown_stage_is_refused(name: str, tiny: OdeResNet):
    with pytest.raises(UsageError, match=f"unknown stage '{name}'.*allowed: layer1, layer2, layer3, 1, 2, 3"):
        tiny.pick([name])


def test_an_unknown_stage_is_answered_with_the_nearest(tiny: OdeResNet):
    with pytest.raises(UsageError, match="did you mean .*layer2"):
        tiny.pick(["layr2"])
