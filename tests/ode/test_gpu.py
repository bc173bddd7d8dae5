"""What only a GPU can show: the CUDA generator is replayed, autocast is re-entered, nothing is kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from resode_cli.ode import EULER, Adjoint, Field, Monitor, Residual, solve

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class Branch(Residual):
    def __init__(self, *, dropout: float = 0.0) -> None:
        self.module = nn.Sequential(
            nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.Dropout(dropout), nn.Conv2d(16, 16, 1)
        ).cuda()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)


def gradients(
    method: str, depth: int, *, dropout: float = 0.0, amp: bool = False, seed: int = 0
) -> tuple[list[torch.Tensor], int]:
    """Gradients of one tied stage, and the bytes allocated between its forward and backward pass."""
    torch.manual_seed(seed)
    field = Field((Branch(dropout=dropout),), (0,) * depth, 1 / depth)
    x = torch.randn(8, 16, 32, 32, device="cuda", requires_grad=True)
    before = torch.cuda.memory_allocated()
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=amp):
        y = solve(field, EULER, Adjoint(method).plan(depth, "euler"), x, monitor=Monitor())
    assert y.dtype == torch.float32
    kept = torch.cuda.memory_allocated() - before
    return list(torch.autograd.grad(y.square().sum(), [x, *field.parameters()])), kept


def difference(ours: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """Relative error of the gradients taken as one vector."""
    error = sum((a - b).square().sum() for a, b in zip(ours, exact, strict=True))
    return (error / sum(b.square().sum() for b in exact)).sqrt().item()


@pytest.mark.parametrize("amp", [False, True])
def test_dropout_masks_are_replayed(amp: bool) -> None:
    exact, _ = gradients("backprop", 8, dropout=0.3, amp=amp)
    ours, _ = gradients("checkpoint", 8, dropout=0.3, amp=amp)
    # Backprop adds the steps' gradients of the shared weights in bf16, the sweep in float32.
    assert difference(ours, exact) <= (2e-2 if amp else 1e-4)
    other, _ = gradients("checkpoint", 8, dropout=0.3, amp=amp, seed=1)
    assert difference(other, exact) > 0.1, "other masks and weights would show"


def test_memory_does_not_grow_with_depth() -> None:
    gradients("pc", 2)  # libraries take their workspaces at first use
    assert gradients("pc", 64)[1] == gradients("pc", 8)[1]
    assert gradients("backprop", 64)[1] > 4 * gradients("backprop", 8)[1]


def test_pc_is_close_to_backprop() -> None:
    exact, _ = gradients("backprop", 64)
    ours, _ = gradients("pc", 64)
    assert difference(ours, exact) <= 0.01
