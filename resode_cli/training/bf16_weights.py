"""`--weights-dtype`: trained weights of convolutions and linear layers in bfloat16, and the optimizer of such weights.

They are what autocast computes in bfloat16 anyway; norms and their statistics stay float32. A bfloat16 has 8 bits, so
that an update below 1/512 of a weight, rounded to the nearest, is none. Two ways around that:

    bf16          the weight is the only copy, and what an update makes of it is rounded up or down at random, so that
                  its expectation is right (Gupta et al. 2015, *Deep Learning with Limited Numerical Precision*)
    bf16-master   the optimizer keeps the weight in float32 too, updates that, and rounds it to the nearest

The optimizer sees float32 in either case: a parameter holds float32 numbers while it is stepped. So does whatever
measures or saves the model (`raised`).
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ResodeError

BF16, MASTER = "bf16", "bf16-master"
LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
PART = 2**22  # numbers that are float32 at a time while they are stepped
CUT = 16  # bits of a float32 that a bfloat16 does not have


def lower(model: nn.Module) -> None:
    """Round the trained weights of convolutions and linear layers to bfloat16.

    Raises ResodeError for a model whose weights are in float64.
    """
    for module in model.modules():
        if isinstance(module, LAYERS):
            for p in module.parameters(recurse=False):
                if p.dtype == torch.float64:
                    raise ResodeError("--weights-dtype is for a model in float32, and this one is in float64")
                if p.requires_grad and p.dtype == torch.float32:
                    _set(p, p.detach().bfloat16())


def rounded_at_random(x: Tensor, generator: torch.Generator) -> Tensor:
    """bfloat16 numbers whose expectation is x, in float32: of its two neighbours, the nearer one is the likelier.

    The bits that are cut off say how far x is from the one nearer to 0; random bits, added, carry as often as that.
    """
    noise = torch.empty_like(x, dtype=torch.int32).random_(0, 2**CUT, generator=generator)
    noise.add_(x.view(torch.int32)).bitwise_and_(-(2**CUT))
    return torch.where(x.isfinite(), noise.view(torch.float32), x).bfloat16()


class Bf16Optimizer(torch.optim.Optimizer):
    """An optimizer of parameters of which some are in bfloat16, as the module says. Their gradients are too.

    inner: the optimizer of the same parameters, which has not stepped yet. masters: whether float32 copies are kept.
    seed: of the random rounding, which follows from it and from the number of updates.
    A step uses the gradients up. Without masters, it steps a few parameters at a time.
    """

    def __init__(self, inner: torch.optim.Optimizer, model: nn.Module, *, masters: bool, seed: int) -> None:
        # As in timm's Lookahead, the groups and the state are those of another optimizer, not begun here.
        self._optimizer_step_pre_hooks: OrderedDict[int, Any] = OrderedDict()
        self._optimizer_step_post_hooks: OrderedDict[int, Any] = OrderedDict()
        self.inner, self.defaults = inner, inner.defaults
        self.param_groups, self.state = inner.param_groups, inner.state
        self.seed, self.updates, self.raised = seed, 0, False
        whole = {id(p): p.detach() for p in model.parameters() if p.dtype == torch.float32}
        lower(model)
        stepped = [p for group in inner.param_groups for p in group["params"]]
        self.low = [p for p in stepped if p.dtype == torch.bfloat16]
        self.others = [p for p in stepped if p.dtype != torch.bfloat16]
        self.masters: dict[int, Tensor] | None = None
        if masters:
            self.masters = {id(p): whole[id(p)] if id(p) in whole else p.detach().float() for p in self.low}

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        self.updates += 1
        gradients = {id(p): p.grad for p in (*self.others, *self.low) if p.grad is not None}
        for p in (*self.others, *self.low):
            p.grad = None
        parts = [[*self.others, *self.low]] if self.masters is not None else [self.others, *_parts(self.low)]
        generator = None
        if self.masters is None and self.low:
            digest = hashlib.sha256(f"{self.seed}/{self.updates}".encode()).digest()
            generator = torch.Generator(self.low[0].device).manual_seed(int.from_bytes(digest[:7], "big"))
        for part in parts:
            held = [p for p in part if id(p) in gradients]
            if held:
                self._step(held, gradients, generator)

    def _step(
        self, part: Sequence[nn.Parameter], gradients: dict[int, Tensor], generator: torch.Generator | None
    ) -> None:
        low = [p for p in part if p.dtype == torch.bfloat16]
        try:
            for p in low:
                self._raise(p)
            for p in part:
                p.grad = gradients.pop(id(p)).to(p.dtype)
            self.inner.step()
        finally:
            for p in part:
                p.grad = None
            for p in low:
                self._lower(p, generator)

    def raise_all(self) -> None:
        """Every parameter holds float32 numbers: the masters, where there are any."""
        if not self.raised:
            self.raised = True
            for p in self.low:
                self._raise(p)

    def lower_all(self) -> None:
        """Every parameter is as it was before `raise_all`; what was changed since is rounded to the nearest."""
        if self.raised:
            for p in self.low:
                self._lower(p, None)
            self.raised = False

    def _raise(self, p: nn.Parameter) -> None:
        if p.dtype == torch.bfloat16:
            _set(p, p.detach().float() if self.masters is None else self.masters[id(p)])

    def _lower(self, p: nn.Parameter, generator: torch.Generator | None) -> None:
        whole = p.detach()
        if whole.dtype == torch.bfloat16:
            return
        if self.masters is not None:
            self.masters[id(p)] = whole
        _set(p, whole.bfloat16() if generator is None else rounded_at_random(whole, generator))

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The inner one's, and the number of updates. The masters are the model's weights while they are raised."""
        return {**self.inner.state_dict(), "updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        inner = dict(state_dict)
        self.updates = int(inner.pop("updates"))
        with raised(self):  # or the state would be brought to bfloat16
            self.inner.load_state_dict(inner)
        self.param_groups, self.state = self.inner.param_groups, self.inner.state


@contextmanager
def raised(
    optimizer: torch.optim.Optimizer, deferred: Callable[[], AbstractContextManager[None]] = nullcontext
) -> Iterator[None]:
    """The model is in float32 inside the block, if it is trained in bfloat16: to be measured, averaged or saved.

    deferred: keeps signals from cutting a change in two.
    """
    if not isinstance(optimizer, Bf16Optimizer) or optimizer.raised:
        yield
        return
    try:
        with deferred():
            optimizer.raise_all()
        yield
    finally:
        with deferred():
            optimizer.lower_all()


def leave_in_float32(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """A run is over, and the model is one as any other: with the optimizer's masters, where there are any."""
    if isinstance(optimizer, Bf16Optimizer):
        optimizer.raise_all()
    for p in model.parameters():
        if p.dtype == torch.bfloat16:
            _set(p, p.detach().float())


def steps_part_by_part(create: Callable[[nn.Module], torch.optim.Optimizer]) -> bool:
    """Whether an optimizer does to each tensor alone what it does to all together: whether it looks at no other.

    create: makes it, for a module.
    """
    together, apart = (nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 3)) for _ in range(2))
    apart.load_state_dict(together.state_dict())
    one, other = create(together), create(apart)
    for _ in range(8):
        for p, q in zip(together.parameters(), apart.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
            other.step()
            q.grad = None
        one.step()
    pairs = zip(together.parameters(), apart.parameters(), strict=True)
    return all(torch.allclose(p, q, rtol=1e-5, atol=1e-7) for p, q in pairs)


def _parts(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """The parameters in turn, so many together as have no more than `PART` numbers, or one."""
    part: list[nn.Parameter] = []
    for p in parameters:
        if part and sum(q.numel() for q in part) + p.numel() > PART:
            yield part
            part = []
        part.append(p)
    if part:
        yield part


def _set(p: nn.Parameter, numbers: Tensor) -> None:
    """The same parameter with other numbers, of another type. A gradient is of the old type, and goes."""
    p.grad = None
    p.data = numbers
