"""The terms that make a stage more like an ODE: their numbers by hand, their gradients, what they leave out."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from resode_cli.fitting.penalties import contraction, penalty, roughness
from resode_cli.network.model import OdeResNet
from resode_cli.network.stage import OdeStage
from resode_cli.surgery.rewrite import deepen, tie

H = 0.25


@dataclass
class Field:
    """What `contraction` reads of a stage: the residual functions, their order, the step size."""

    residuals: list[Callable[[Tensor], Tensor]]
    schedule: tuple[int, ...] = (0,)
    step_size: float = H

    def field(self) -> Field:
        return self


def flat(block: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in block.parameters()])


def rough(one: nn.Module, other: nn.Module) -> float:
    a, b = flat(one), flat(other)
    return float((a - b) @ (a - b) / ((a @ a + b @ b) / 2))


@pytest.fixture
def stage(tiny: OdeResNet) -> OdeStage:
    return tiny.stages["layer1"].double()


def test_roughness_is_the_mean_over_neighbouring_blocks(stage: OdeStage):
    b = stage.blocks
    expected = (rough(b[0], b[1]) + rough(b[1], b[2])) / 2
    assert expected > 0.5
    assert roughness(stage).item() == pytest.approx(expected, rel=1e-12)
    # Steps of a run do not differ, and more of them are not smoother weights.
    assert roughness(deepen(stage, 12)).item() == pytest.approx(expected, rel=1e-12)
    # Knots are neighbours whether or not a step sits on them.
    assert roughness(deepen(stage, 7, depth_weights="linear")).item() == pytest.approx(expected, rel=1e-12)


def test_roughness_counts_changes_relative_to_the_weights(stage: OdeStage):
    equal = copy.deepcopy(stage)
    for block in equal.blocks[1:]:
        block.load_state_dict(equal.blocks[0].state_dict())
    assert roughness(equal).item() == 0
    with torch.no_grad():
        for p in equal.blocks[1].parameters():
            p.mul_(1.1)
    one = 0.1**2 / ((1 + 1.1**2) / 2)  # between the blocks 0 and 1, and 1 and 2
    assert roughness(equal).item() == pytest.approx(one, rel=1e-9)


def test_what_is_shared_is_not_rough(stage: OdeStage):
    assert roughness(tie(stage)).item() == 0
    shared = tie(stage, depth_weights="tied+norms")
    size = flat(shared.blocks[0])
    norms = sum(p.numel() for m in stage.blocks[0].modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters())
    assert 0 < norms < size.numel()
    expected = (rough(shared.blocks[0], shared.blocks[1]) + rough(shared.blocks[1], shared.blocks[2])) / 2
    assert 0 < expected < roughness(stage).item()
    assert roughness(shared).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_contraction_is_the_square_of_step_size_times_spectral_radius(scale: float):
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)  # of eigenvalues of modulus 1
    rotate = Field([lambda x: scale * torch.einsum("ij,bjhw->bihw", turn, x)])
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    assert contraction(rotate, 0, x).item() == pytest.approx((H * scale) ** 2, rel=1e-12)


def test_contraction_finds_the_largest_of_unequal_eigenvalues():
    scales = torch.tensor([4.0, 0.4, 0.1, -0.2], dtype=torch.float64).view(1, 4, 1, 1)
    x = torch.randn(5, 4, 2, 2, dtype=torch.float64)
    assert contraction(Field([lambda x: scales * x]), 0, x).item() == pytest.approx((H * 4) ** 2, rel=1e-3)


def test_contraction_is_that_of_the_step_and_the_state_asked_for():
    field = Field([lambda x: 2 * x, lambda x: x**3 / 3], schedule=(0, 1, 1))
    x = torch.full((2, 1, 3, 3), 1.5, dtype=torch.float64)
    assert contraction(field, 0, x).item() == pytest.approx((H * 2) ** 2, rel=1e-12)
    assert contraction(field, 2, x).item() == pytest.approx((H * 1.5**2) ** 2, rel=1e-12)


def test_the_gradient_of_the_contraction_lowers_it():
    weight = nn.Parameter(torch.tensor(3.0, dtype=torch.float64))
    value = contraction(Field([lambda x: weight * x]), 0, torch.randn(2, 1, 2, 2, dtype=torch.float64))
    value.backward()
    assert float(weight.grad) == pytest.approx(2 * H**2 * 3.0, rel=1e-12)  # of (h w)²


def states(model: OdeResNet) -> dict[str, list[Tensor]]:
    shapes = {"layer1": (4, 16), "layer2": (8, 8), "layer3": (8, 4)}
    return {
        name: [torch.rand(2, shapes[name][0], shapes[name][1], shapes[name][1]) for _ in range(stage.spec.depth + 1)]
        for name, stage in model.stages.items()
    }


def test_the_penalty_weighs_both_and_averages_stages(tiny: OdeResNet):
    found = states(tiny)

    def of(smooth: float, contract: float) -> float | None:
        torch.manual_seed(1)  # the directions that power iteration starts from
        value = penalty(tiny, found, smooth=smooth, contract=contract, generator=torch.Generator().manual_seed(3))
        return None if value is None else value.item()

    mean = sum(roughness(stage).item() for stage in tiny.stages.values()) / len(tiny.stages)
    assert of(0, 0) is None
    assert of(2.0, 0) == pytest.approx(2 * mean, rel=1e-5)
    alone = of(0, 1.0)
    assert alone is not None and alone > 0
    assert of(2.0, 3.0) == pytest.approx(2 * mean + 3 * alone, rel=1e-5)


def test_the_contraction_penalty_reaches_every_stage_and_no_other_weight(tiny: OdeResNet):
    value = penalty(tiny, states(tiny), smooth=0, contract=1.0, generator=torch.Generator().manual_seed(3))
    assert value is not None
    value.backward()
    reached = {name.split(".")[0] for name, p in tiny.net.named_parameters() if p.grad is not None}
    inside = {
        name
        for name, stage in tiny.stages.items()
        if any(p.grad is not None and p.grad.norm() > 0 for block in stage.blocks for p in block.parameters())
    }
    assert inside == set(tiny.stages)
    assert not reached & {"conv1", "bn1", "linear"}
    assert math.isfinite(value.item())
