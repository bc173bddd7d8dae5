"""What makes a stage more like an ODE that can be run backwards, as terms of a loss.

θ_n: weights of step n; h: step size; J_n = ∂r_n/∂x.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..network.model import OdeResNet
from ..network.stage import OdeStage
from .states import run_ends

IMAGES = 8  # of a batch, on which the contraction is estimated
POWER_STEPS = 3


def roughness(stage: OdeStage) -> Tensor:
    """How much weights change from one block to the next in depth: the mean over neighbouring blocks b, c of

        ‖θ_b − θ_c‖² / ½ (‖θ_b‖² + ‖θ_c‖²)

    0 for a tied stage, about 2 for unrelated weights. What is shared counts as equal.
    """
    pairs = list(_neighbours(stage))
    if not pairs:
        return torch.zeros((), device=next(stage.parameters()).device)
    terms = []
    for one, other in pairs:
        couples = list(zip(one.parameters(), other.parameters(), strict=True))
        difference = sum((a - b).square().sum() for a, b in couples)
        size = sum((a.square().sum() + b.square().sum()) / 2 for a, b in couples)
        terms.append(difference / size)
    return torch.stack([torch.as_tensor(term) for term in terms]).mean()


def _neighbours(stage: OdeStage) -> Iterator[tuple[nn.Module, nn.Module]]:
    spec, blocks = stage.spec, stage.blocks
    order = range(len(blocks)) if spec.blends else spec.schedule
    for b, c in zip(order, list(order)[1:], strict=False):
        if b != c:
            yield blocks[b], blocks[c]


def contraction(stage: OdeStage, n: int, state: Tensor) -> Tensor:
    """(h ρ)², ρ the spectral radius of J_n at a state (B, C, H, W), averaged over images.

    By power iteration v ← J_nᵀ v / ‖J_nᵀ v‖, which takes vector-Jacobian products alone. Corrections of a
    reversed step, x̂ ← x_{n+1} − h r_n(x̂), shrink its error by about h ρ each, and diverge where it is above 1.
    """
    field = stage.field()
    x = state.detach().requires_grad_()
    value = field.residuals[field.schedule[n]](x)
    v = torch.randn_like(value)
    for k in range(POWER_STEPS):
        last = k == POWER_STEPS - 1
        v = v / _norm(v)
        (v,) = torch.autograd.grad(value, x, v.detach(), create_graph=last, retain_graph=True)
    return (field.step_size * _norm(v)).square().mean()


def _norm(v: Tensor) -> Tensor:
    """Of each image, shaped to divide by."""
    return v.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, *[1] * (v.ndim - 1))


def penalty(
    model: OdeResNet, states: Mapping[str, list[Tensor]], *, smooth: float, contract: float, generator: torch.Generator
) -> Tensor | None:
    """smooth · mean roughness + contract · mean (h ρ)² of the stages with steps; None if both weights are 0.

    The contraction is taken at the start of one run of steps per stage, drawn anew at every call; the field of
    a `pre` stage reads a(x) alone, so that the teacher's states serve whatever is negative in the student's.
    """
    stages = {name: stage for name, stage in model.stages.items() if stage.spec.depth}
    total = None
    if smooth:
        if not any(True for stage in stages.values() for _ in _neighbours(stage)):
            raise UsageError("--smooth compares neighbouring blocks of a stage, and every stage here has a single one")
        total = smooth * torch.stack([roughness(stage) for stage in stages.values()]).mean()
    if contract:
        terms = []
        for name, stage in stages.items():
            ends = run_ends(stage.spec.depth, len(states[name]) - 1)
            k = int(torch.randint(len(ends) - 1, (), generator=generator))
            terms.append(contraction(stage, ends[k], states[name][k][:IMAGES]))
        weighted = contract * torch.stack(terms).mean()
        total = weighted if total is None else total + weighted
    return total
