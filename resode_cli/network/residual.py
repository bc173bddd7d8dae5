"""The residual function of a block: what its step adds to the state.

x: state (B, C, H, W); g: the block's branch; a: the activation after the addition; B: the whole block.

| block                          | r(x)             |
| B(x) = x + g(x)                | g(x)             |
| B(x) = relu(x + g(x))          | max(g(x), −x)    |
| B(x) = a(x + g(x)), a smooth   | g + a(−(x + g)), since a(z) − a(−z) = z for SiLU, GELU, Hardswish |
| any other shape-preserving B   | B(x) − x         |
| `pre` form of a(x + g(x))      | g(a(x)): the clip is dropped, which changes the function |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ResodeError, UsageError, unknown
from ..ode import Residual, is_positive
from .sharing import tensors_of

Form = Literal["exact", "pre"]
FORMS: tuple[Form, ...] = ("exact", "pre")

# Activations with a(z) − a(−z) = z, for which the residual needs no second evaluation of the branch.
# The keys name what follows the addition in a block; they are stored in model files.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "hardswish": F.hardswish,
}
LINEAR = "linear"
GENERIC = "generic"  # the branch is not known apart from the block


_LIBRARIES = frozenset({"torch", "torchvision", "timm"})
_ACTIVATION_CLASSES = {
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "gelutanh": "gelu_tanh",
    "hardswish": "hardswish",
}


def is_called_activation(module: nn.Module) -> bool:
    """Whether a module has the name of an activation, whatever it does."""
    return type(module).__name__.lower() in {*_ACTIVATION_CLASSES, "gelu"}


def is_identity(module: nn.Module) -> bool:
    """Whether calling the module returns its argument, and does nothing else."""
    return type(module).forward is nn.Identity.forward and is_stateless(module)


def is_stateless(module: nn.Module) -> bool:
    """Whether a module learns and keeps nothing, so that leaving its call out leaves nothing else out."""
    own = module.__dict__
    return not (own["_parameters"] or own["_buffers"] or own["_modules"])


def activation_name(module: nn.Module | None) -> str:
    """The name of an activation module in ACTIVATIONS, 'linear' for none, else 'generic'."""
    if module is None or is_identity(module):
        return LINEAR
    # timm has its own classes of the same names; so do users, whose classes may do anything, and something else later.
    if not is_stateless(module) or type(module).__module__.partition(".")[0] not in _LIBRARIES:
        return GENERIC
    name = type(module).__name__.lower()
    if name == "gelu":
        return "gelu_tanh" if getattr(module, "approximate", "none") == "tanh" else "gelu"
    return _ACTIVATION_CLASSES.get(name, GENERIC)


@dataclass(frozen=True, eq=False)
class BlockResidual(Residual):
    """r of one block.

    branch: g, as a function of the block's module and the state; for a generic block, B itself.
    activation: the name of what follows the addition, 'linear' or 'generic'.
    in_place: whether the block itself adds in the memory of the branch's result.
    numbers: the values of the attributes that the branch reads as numbers (`scale = 0.5`), now. The backward pass
        evaluates r again, and must find them the same.
    """

    module: nn.Module
    branch: Callable[[nn.Module, Tensor], Tensor]
    activation: str
    form: Form = "exact"
    in_place: bool = False
    numbers: dict[str, Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        names = getattr(self.branch, "numbers", ())
        object.__setattr__(self, "numbers", {name: getattr(self.module, name) for name in names})

    def __call__(self, x: Tensor) -> Tensor:
        self._check_numbers()
        if self.activation == GENERIC:
            return self.branch(self.module, x) - x
        if self.activation == LINEAR:
            return self.branch(self.module, x)
        if self.form == "pre":
            return self.branch(self.module, ACTIVATIONS[self.activation](x))
        g = self.branch(self.module, x)
        total = x + g
        if self.activation == "relu":
            # Not torch.maximum(g, -x): it splits the gradient at ties, and zero-initialised last
            # norms (g = 0) on post-ReLU states (x = 0) make ties everywhere.
            return torch.where(is_positive(total), g, -x)
        return g + ACTIVATIONS[self.activation](-total)

    def step(self, x: Tensor, h: float) -> Tensor:
        """x + h r(x). At h = 1 that is the block itself, computed so to the last bit."""
        self._check_numbers()
        if h == 1.0 and self.activation == GENERIC:
            return self.branch(self.module, x).to(x.dtype)  # autocast may have lowered it
        if h == 1.0 and self.activation != LINEAR and self.form == "exact":
            total = self._total(x, self.branch(self.module, x))
            return F.relu_(total) if self.activation == "relu" else ACTIVATIONS[self.activation](total)
        return torch.add(x, self(x), alpha=h)

    def _total(self, x: Tensor, g: Tensor) -> Tensor:
        """x + g; in the memory of g where the block does so too."""
        fits = self.in_place and g.dtype == x.dtype and g.shape == x.shape
        return g.add_(x) if fits else x + g

    def _check_numbers(self) -> None:
        if not self.numbers or torch.compiler.is_compiling():
            return
        changed = [name for name, value in self.numbers.items() if getattr(self.module, name) != value]
        if changed:
            raise ResodeError(
                f"{changed[0]} of block {type(self.module).__name__} was changed between the forward pass and its"
                " backward pass, which evaluates the block again; run backward first"
            )


class BlockCall(Residual):
    """A block that is no residual step, such as a transition: all that it does."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        return self.module(x)  # type: ignore[no-any-return]


class BlendedResidual(Residual):
    """r of a block whose parameters and statistics lie between those of two others, (1 − w) θ_0 + w θ_1.

    Its gradient goes to both in these shares. Statistics that a norm updates are handed on to both so that
    the blend moves as far as the norm moved it, and they as little as possible (the minimum-norm solution).
    """

    def __init__(self, lower: BlockResidual, upper: BlockResidual, weight: float) -> None:
        self.lower, self.upper, self.weight = lower, upper, weight
        self.module = nn.ModuleList([lower.module, upper.module])  # all that the engine looks after

    def __call__(self, x: Tensor) -> Tensor:
        return self._blended(lambda residual: residual(x))

    def step(self, x: Tensor, h: float) -> Tensor:
        """x + h r(x)."""
        return self._blended(lambda residual: residual.step(x, h))

    def _blended(self, run: Callable[[BlockResidual], Tensor]) -> Tensor:
        lower, upper = tensors_of(self.lower.module), tensors_of(self.upper.module)
        tensors = {
            name: torch.lerp(a, upper[name], self.weight) if a.is_floating_point() else a for name, a in lower.items()
        }
        # Not by their versions, which F.batch_norm leaves as they are.
        before = {
            name: tensors[name].clone() for name in _updated(self.lower.module) if lower[name].is_floating_point()
        }
        call = _Call(self.lower, run)
        result: Tensor = torch.func.functional_call(call, {f"module.{n}": t for n, t in tensors.items()})
        with torch.no_grad():
            for name, old in before.items():
                share = (tensors[name] - old) / ((1 - self.weight) ** 2 + self.weight**2)
                # Unseen by autograd, as F.batch_norm does it: nothing in train mode reads them backward.
                lower[name].data.add_(share, alpha=1 - self.weight)
                upper[name].data.add_(share, alpha=self.weight)
        return result


def _updated(module: nn.Module) -> list[str]:
    """The buffers of submodules in train mode, which may write to them."""
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, part in module.named_modules()
        if part.training
        for name, _ in part.named_buffers(recurse=False)
    ]


class _Call(nn.Module):
    """A residual function as a module's forward, which is what `functional_call` calls."""

    def __init__(self, residual: BlockResidual, run: Callable[[BlockResidual], Tensor]) -> None:
        super().__init__()
        self.module, self.residual, self.run = residual.module, residual, run

    def forward(self) -> Tensor:
        return self.run(self.residual)


def as_form(name: str) -> Form:
    """Raises UsageError for a form that there is none of."""
    for form in FORMS:
        if form == name:
            return form
    raise unknown("form", name, FORMS)


def check_form(form: Form, activation: str, block: str, reason: str = "") -> None:
    """Refuse the `pre` form for a block whose branch is not known apart from the block; `reason`: why it is not."""
    if form == "pre" and activation == GENERIC:
        why = f", since its code {reason}" if reason else ""
        raise UsageError(
            f"form 'pre' needs the branch of block {block}, but only the block as a whole is known{why};"
            " use --form exact"
        )
