"""Layers that draw, normalise or attend inside a stage: the same gradient as under backprop, in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from timm.layers import DropBlock2d, DropPath, EcaModule, SEModule
from torch import Tensor, nn

from resode_cli.ode import Adjoint

CHANNELS = 4
BACKPROP = Adjoint("backprop")
# Every state is the forward pass's own, by whichever way it is kept.
EXACT = [
    Adjoint("checkpoint"),
    Adjoint("checkpoint", 3),
    Adjoint("checkpoint", snapshots=2),
    Adjoint("euler", 1),
    Adjoint("pc", 1),
    Adjoint("multistep", 1),
]
REVERSING = [Adjoint("euler"), Adjoint("pc"), Adjoint("multistep")]
DRAWING = {
    "dropout": lambda: nn.Dropout(0.3),
    "dropout of channels": lambda: nn.Dropout2d(0.3),
    "drop-path": lambda: DropPath(0.4),
    "drop-block": lambda: DropBlock2d(0.3, block_size=3),
}
CALM = {
    "batch norm": lambda: nn.BatchNorm2d(CHANNELS),
    "group norm": lambda: nn.GroupNorm(2, CHANNELS),
    "squeeze-excite": lambda: SEModule(CHANNELS, rd_channels=2),
    "channel attention": lambda: EcaModule(CHANNELS, kernel_size=3),
}
LAYERS = {**DRAWING, **CALM}


class Block(nn.Module):
    """x + layer(tanh(conv(x)))."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.conv, self.layer = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), layer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(torch.tanh(self.conv(x)))


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def error(found, truth):
    difference = sum((found[name] - truth[name]).square().sum() for name in truth)
    return math.sqrt(difference / sum(g.square().sum() for g in truth.values()))


@pytest.fixture
def build(make_stage, randomise):
    def make(layer: str, schedule: tuple[int, ...], *, horizon: int = 1):
        blocks = [Block(LAYERS[layer]()) for _ in range(max(schedule) + 1)]
        return randomise(make_stage(schedule, blocks=blocks, horizon=horizon))

    return make


@pytest.mark.parametrize("adjoint", EXACT, ids=lambda adjoint: adjoint.label)
@pytest.mark.parametrize("scheme", ["euler", "heun"])
@pytest.mark.parametrize("layer", LAYERS)
def test_exact_plans_give_backprops_gradient(layer, scheme, adjoint, build, images, stage_gradients):
    stage = build(layer, (0, 0, 0, 1, 1), horizon=3)
    stage.use_scheme(scheme)
    expected = stage_gradients(stage, BACKPROP, images)
    assert_same(stage_gradients(stage, adjoint, images), expected)


@pytest.mark.parametrize("layer", DRAWING)
def test_other_masks_would_show(layer, build, images, stage_gradients):
    # Guards the test above: without a replay the masks of the backward pass would be others.
    stage = build(layer, (0, 0, 0, 1, 1), horizon=3)
    expected = stage_gradients(stage, BACKPROP, images)
    leaf = images.clone().requires_grad_()
    torch.manual_seed(4)
    stage(leaf).square().sum().div(2).backward()
    assert error({"x": leaf.grad}, {"x": expected["x"]}) > 1e-3


@pytest.mark.parametrize("adjoint", [*EXACT[:3], *REVERSING], ids=lambda adjoint: adjoint.label)
@pytest.mark.parametrize("training", [True, False], ids=["batch", "frozen"])
def test_batch_norm_in_both_modes(training, adjoint, build, images, stage_gradients):
    stage = build("batch norm", (0, 0, 0, 1)).train(training)
    reference = copy.deepcopy(stage)
    before = {name: b.clone() for name, b in stage.named_buffers()}
    expected, found = stage_gradients(reference, BACKPROP, images), stage_gradients(stage, adjoint, images)
    if adjoint in EXACT:
        assert_same(found, expected)
    for name, buffer in stage.named_buffers():
        assert torch.equal(buffer, reference.get_buffer(name)), name
        assert torch.equal(buffer, before[name]) != training, name


@pytest.mark.parametrize("adjoint", REVERSING, ids=lambda adjoint: adjoint.label)
@pytest.mark.parametrize("layer", LAYERS)
def test_the_error_of_a_reconstruction_falls_with_depth(layer, adjoint, build, images, stage_gradients):
    errors = []
    for depth in (8, 32):
        torch.manual_seed(0)
        stage = build(layer, (0,) * depth).eval()
        for module in stage.modules():
            module.train(layer in DRAWING)
        truth = stage_gradients(stage, BACKPROP, images)
        errors.append(error(stage_gradients(stage, adjoint, images), truth))
    assert 0 < errors[1] < errors[0] / (2 if adjoint.method == "euler" else 3)
    assert errors[1] < 0.05


@pytest.mark.parametrize("adjoint", EXACT, ids=lambda adjoint: adjoint.label)
def test_frozen_parameters_beside_layers_that_draw(adjoint, build, images, stage_gradients):
    stage = build("dropout", (0, 1, 0, 1))
    expected = stage_gradients(stage, BACKPROP, images)
    stage.get_parameter("0.conv.weight").requires_grad_(False)
    found = stage_gradients(stage, adjoint, images)
    assert expected.keys() - found.keys() == {"0.conv.weight"}
    assert_same(found, {name: expected[name] for name in found})


@pytest.mark.parametrize("adjoint", EXACT, ids=lambda adjoint: adjoint.label)
def test_two_forwards_before_one_backward_replay_their_own_masks(adjoint, build, images):
    stage, other = build("dropout", (0, 1, 0, 0)), images.flip(0).sqrt()

    def run(chosen: Adjoint) -> tuple[Tensor, ...]:
        stage.use_adjoint(chosen)
        torch.manual_seed(6)
        loss = stage(images).square().sum() + stage(other).square().sum()
        return torch.autograd.grad(loss, list(stage.parameters()))

    assert_same(run(adjoint), run(BACKPROP))


@pytest.mark.parametrize("adjoint", [*EXACT, *REVERSING], ids=lambda adjoint: adjoint.label)
def test_a_gradient_for_some_of_the_inputs_is_the_same(adjoint, build, images, stage_gradients):
    stage = build("group norm", (0, 1, 0, 0))
    expected = stage_gradients(stage, adjoint, images)
    leaf = images.clone().requires_grad_()
    for names in (["1.conv.bias"], ["0.layer.weight", "x"], ["x"]):
        inputs = [leaf if name == "x" else stage.get_parameter(name) for name in names]
        found = torch.autograd.grad(stage(leaf).square().sum() / 2, inputs)
        assert_same(dict(zip(names, found, strict=True)), {name: expected[name] for name in names})
