"""torch.compile for the steps of a stage: one compilation serves all blocks of equal structure and shape.

What is compiled is the residual function r(x) and the step x + h r(x), not the stage: the engine's loop,
its re-evaluations and its saved states stay as they are, and a stage compiles as fast at 1,000 steps as
at one. The block is an argument, and its parameters and buffers are inputs of the graph, so blocks of
equal structure share it. Another graph is compiled for each

    no_grad or taped · train or eval mode · shape and dtype · autocast state · frozen parameters

The modules themselves are left alone: names in a state dict, copies and files are those of an uncompiled model.

Forward hooks inside a block run if they were there when its graph was compiled: dynamo does not look for
them again. What changes values from Python at every call (`recalibrate`: BatchNorm without momentum) is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from itertools import count
from textwrap import shorten
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from ..errors import ResodeError, UsageError
from ..ode import Residual
from ..ode.generators import RandomState

# Graphs per stage. dynamo's own limit of 8 is for code that recompiles by accident; here, drop-path at a
# rate of its own in each of 40 blocks is 40 structures.
RECOMPILE_LIMIT = 256
_numbers = count()


def _value(residual: Residual, x: Tensor) -> Tensor:
    return residual(x)


def _step(residual: Residual, x: Tensor, h: float) -> Tensor:
    return residual.step(x, h)


class Compilation:
    """r(x) and x + h r(x), compiled with one set of options; what a stage holds when it is compiled.

    options: torch.compile's keyword arguments. Beyond its defaults, a block that cannot be one graph is
    an error (fullgraph) and shapes are static (dynamic=False). Raises UsageError for options that cannot be.

    A copy is the same compilation, so that copies of a stage share the compiled graphs.
    """

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        self.options = dict(options or {})
        arguments = compile_arguments(self.options)
        self.value = _compiled(_value, arguments)
        self.step = _compiled(_step, arguments)

    def __deepcopy__(self, memo: dict[int, Any]) -> Compilation:
        return self

    def __reduce__(self) -> tuple[type[Compilation], tuple[dict[str, Any]]]:
        return Compilation, (self.options,)


class CompiledResidual(Residual):
    """A residual function that runs compiled.

    replayed: whether the backward pass evaluates r again. Then a block may not draw random numbers: the
    graph of a step and the one of r draw them in different orders (inductor does, with fallback_random too), so that
    the masks of the forward pass cannot be replayed.
    """

    def __init__(self, plain: Residual, compilation: Compilation, *, replayed: bool) -> None:
        self.plain, self.compilation, self.replayed = plain, compilation, replayed
        self.module = plain.module

    def __call__(self, x: Tensor) -> Tensor:
        return self._run(self.compilation.value, x)

    def step(self, x: Tensor, h: float) -> Tensor:
        return self._run(self.compilation.step, x, h)

    def _run(self, compiled: Callable[..., Tensor], x: Tensor, *h: float) -> Tensor:
        before = RandomState.now(x.device) if self.replayed else None
        # Detached: a stage's first state may require a gradient, the others do not, and that would be two graphs.
        result = self._guarded(compiled, x if torch.is_grad_enabled() else x.detach(), *h)
        if before is not None and not before.equals(RandomState.now(x.device)):
            raise ResodeError(
                f"block {type(self.module).__name__} draws random numbers, which a compiled block cannot draw again"
                " in the backward pass; leave out --compile, or use the adjoint method 'backprop'"
            )
        return result

    def _guarded(self, compiled: Callable[..., Tensor], *arguments: Any) -> Tensor:
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        try:
            return compiled(self.plain, *arguments)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            name = type(self.module).__name__
            raise ResodeError(f"block {name} cannot be compiled: {_reason(error)}; leave out --compile") from error


def compile_arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    """torch.compile's arguments from the user's. Raises UsageError for those that cannot be."""
    arguments = {"fullgraph": True, "dynamic": False, **options}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:  # else dynamo's own, and an error past it
        arguments.setdefault("recompile_limit", RECOMPILE_LIMIT)
    if arguments.get("backend", "inductor") != "inductor":
        return arguments
    from torch._inductor import list_mode_options

    modes = list_mode_options()
    mode = arguments.pop("mode", None) or "default"
    if mode not in modes:
        raise UsageError(f"unknown mode {mode!r} of torch.compile (allowed: {', '.join(modes)})")
    inductor = {**modes[mode], **(arguments.get("options") or {})}
    if inductor.get("triton.cudagraphs"):
        raise UsageError(
            "CUDA graphs overwrite the output of a run by that of the next, but a stage keeps its states;"
            " use mode 'default' or 'max-autotune-no-cudagraphs'"
        )
    return {**arguments, "options": inductor}


def _compiled(function: Callable[..., Tensor], arguments: Mapping[str, Any]) -> Callable[..., Tensor]:
    """torch.compile of a copy of the function.

    dynamo keeps its graphs with a function's code object, and its record of which sizes vary with the
    code's name: with a code of its own no stage searches, or is limited by, the graphs of another.
    """
    assert isinstance(function, FunctionType)
    code = function.__code__.replace(co_name=f"{function.__name__.strip('_')}_{next(_numbers)}")
    try:
        return torch.compile(FunctionType(code, function.__globals__), **arguments)
    except (RuntimeError, TypeError, ValueError) as error:  # unknown backend, option or argument
        raise UsageError(f"torch.compile: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The first line of what went wrong inside; some list every option there is."""
    error = getattr(error, "inner_exception", error)
    lines = str(error).strip().splitlines()
    return shorten(lines[0].rstrip("."), 160, placeholder=" …") if lines else type(error).__name__
