"""A float32 state with branches in half precision: which gradient comes out, and of which dtype."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from resode_cli.ode import Adjoint

BACKPROP = Adjoint("backprop")
EXACT = [Adjoint("checkpoint"), Adjoint("checkpoint", 3), Adjoint("checkpoint", snapshots=2), Adjoint("multistep", 1)]
REVERSING = [Adjoint("euler"), Adjoint("pc"), Adjoint("multistep"), Adjoint("multistep", 4)]
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def vector(gradients) -> Tensor:
    return torch.cat([g.flatten() for g in gradients.values()])


def difference(found, expected) -> float:
    a, b = vector(found), vector(expected)
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture
def gradients(make_stage, images):
    """Gradients of scale · ½‖x_N‖² of a tied stage in eval mode, and the dtypes its branch returned in the backward."""

    def run(adjoint: Adjoint, dtype: torch.dtype, *, depth: int = 12, scale: float = 1.0):
        torch.manual_seed(5)
        stage, leaf = make_stage((0,) * depth, dtype=torch.float32).eval(), images.float().requires_grad_()
        stage.use_adjoint(adjoint)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            out = stage(leaf)
        assert out.dtype == torch.float32
        seen: set[torch.dtype] = set()
        stage.get_submodule("0.conv2").register_forward_hook(lambda module, args, result: seen.add(result.dtype))
        (scale * out.square().sum() / 2).backward()
        found = {"x": leaf.grad, **{name: p.grad for name, p in stage.named_parameters()}}
        assert {g.dtype for g in found.values()} == {torch.float32}
        return found, seen

    return run


@HALF
@pytest.mark.parametrize("adjoint", EXACT, ids=lambda adjoint: adjoint.label)
def test_exact_plans_give_backprops_gradient_up_to_rounding(adjoint, dtype, gradients):
    expected, _ = gradients(BACKPROP, dtype)
    found, seen = gradients(adjoint, dtype)
    assert seen == {dtype}
    # Backprop adds the steps' gradients of shared weights in half precision, the sweep in float32.
    assert difference(found, expected) < 4 * torch.finfo(dtype).eps


@HALF
def test_every_way_to_hold_a_state_gives_the_same_bits(dtype, gradients):
    first, *others = (gradients(adjoint, dtype)[0] for adjoint in EXACT)
    assert all(torch.equal(vector(first), vector(other)) for other in others)


@HALF
@pytest.mark.parametrize("adjoint", REVERSING, ids=lambda adjoint: adjoint.label)
def test_a_reconstruction_in_half_precision_is_about_as_good_as_in_float32(adjoint, dtype, gradients):
    truth, _ = gradients(BACKPROP, torch.float32, depth=32)
    in_float32 = difference(gradients(adjoint, torch.float32, depth=32)[0], truth)
    found, seen = gradients(adjoint, dtype, depth=32)
    assert seen == {dtype}
    assert difference(found, truth) < 1.5 * in_float32 + 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("adjoint", [*EXACT, *REVERSING], ids=lambda adjoint: adjoint.label)
def test_a_loss_scale_scales_fp16_gradients_and_nothing_else(adjoint, gradients):
    scale = 2.0**12
    expected, _ = gradients(adjoint, torch.float16)
    found, _ = gradients(adjoint, torch.float16, scale=scale)
    assert vector(found).isfinite().all()
    # What a small loss loses to underflow, the scaled one keeps.
    assert difference({name: g / scale for name, g in found.items()}, expected) < 2e-3
