"""A network's training step on tensors without numbers, piece by piece."""

from __future__ import annotations

import copy
import functools
import gc
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from ..errors import ResodeError
from ..network.model import OdeResNet, autocast_dtype, transition_of
from ..network.outside import STEM
from ..network.stage import OdeStage
from ..ode import SCHEMES, Adjoint, Monitor
from .ledger import CPU, CUDA, Ledger
from .recall import Call, Key

REST = "rest"
# What operations returned, in any simulation of this process: it follows from the kinds of their arguments alone.
_calls: dict[Key, Call] = {}


@dataclass
class PieceUse:
    """What one piece of a network takes in a step.

    kept, left: bytes more that are alive after its forward pass, its backward pass, than before it. forward, backward:
    the most alive in its passes, above what was when they began. seconds: of both, on the simulated machine.
    once: of the forward pass alone. state: bytes of one state of a stage's steps. evaluations: of Φ per step, in the
    backward pass.
    """

    kept: int = 0
    left: int = 0
    forward: int = 0
    backward: int = 0
    seconds: float = 0.0
    once: float = 0.0
    state: int = 0
    evaluations: float = 0.0


@dataclass
class StepUse:
    """What a training step takes: bytes, seconds on the simulated machine, and both by piece, in order.

    peak: the most bytes alive at a time, with weights, gradients and what the optimizer keeps. fixed: weights, buffers,
    images and the optimizer's.
    """

    peak: int
    fixed: int
    seconds: float
    pieces: dict[str, PieceUse] = field(default_factory=dict)


# Of what a step holds beside weights and the optimizer's numbers, what a library may take for itself.
RESERVE = 0.1


def optimizer_bytes(p: Tensor) -> int:
    """Of a number that an optimizer keeps for each of a parameter's: in float32 at least."""
    return p.numel() * max(p.element_size(), torch.float32.itemsize)


def predicted(use: StepUse) -> int:
    """Bytes of a simulated step, with a reserve for what libraries take for themselves."""
    return use.fixed + round((1 + RESERVE) * (use.peak - use.fixed))


class Simulation:
    """A copy of a network without numbers, to take steps with.

    The copy has the network's modes. What was found out about images that mix holds for it: a plan in slices is for
    the caller to ask about. device: 'cpu' or 'cuda', which need not be there; its precisions are those of autocast.
    """

    def __init__(self, model: OdeResNet, device: str, *, channels_last: bool = False) -> None:
        self.device, self.machine = device, CUDA if device == "cuda" else CPU
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.calls = _calls
        self.looked = False
        self.channels_last = channels_last or model.channels_last
        self.model = self._copied(model)
        self.model.channels_last = self.channels_last

    def _copied(self, model: OdeResNet) -> OdeResNet:
        memo: dict[int, Any] = {}
        with self.mode:
            for tensor in (*model.parameters(), *model.buffers()):
                empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
                if self.channels_last and tensor.ndim == 4:
                    empty = empty.contiguous(memory_format=torch.channels_last)
                trained = isinstance(tensor, nn.Parameter)
                memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if trained else empty
        for stage in model.stages.values():
            memo[id(stage.further)] = {}
        try:
            copied: OdeResNet = copy.deepcopy(model, memo)
        except Exception as error:
            raise CannotSimulate(" ".join(f"{type(error).__name__}: {error}".split())[:300]) from error
        for stage in copied.stages.values():
            stage.compilation, stage.monitor, stage.entry.monitor = None, Monitor(), Monitor()
            stage.keeps_apart()
        copied.stem.monitor = Monitor()
        copied.stem.apart = tuple(module.training for module in copied.net.modules())
        return copied

    def step(
        self,
        adjoints: Adjoint | Mapping[str, Adjoint],
        images: tuple[int, ...],
        *,
        amp: str = "none",
        optimizer_slots: int = 1,
        micro_batches: int = 1,
        accumulates: bool = False,
    ) -> StepUse:
        """One step by these adjoints. images: the shape (B, C, H, W) of a batch.

        optimizer_slots: numbers that the optimizer keeps for each trained one. accumulates: whether there are gradients
        of other batches already.
        """
        model = self.model
        model.use_adjoint(adjoints)
        parts = -(-images[0] // micro_batches)
        dtype = torch.float64 if next(model.parameters()).dtype == torch.float64 else torch.float32
        with self.mode:
            batch, labels = torch.empty(images, dtype=dtype), torch.empty(parts, dtype=torch.long)
        own = [*model.parameters(), *model.buffers()]
        fixed = sum(t.nbytes for t in own) + batch.nbytes
        fixed += optimizer_slots * sum(optimizer_bytes(p) for p in model.parameters() if p.requires_grad)
        repeats = 2 if micro_batches > 1 or accumulates else 1
        ledger = Ledger(self.machine, [*own, batch, labels], self.mode, self.calls)
        try:
            pieces, peak = self._run(ledger, batch, labels, amp, repeats=repeats)
            self._look_for_leaks([*own, batch, labels])
        except ResodeError:
            raise
        except Exception as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise CannotSimulate(why) from error
        finally:
            for p in model.parameters():
                p.grad = None
        seconds = ledger.seconds / repeats * micro_batches
        return StepUse(fixed + peak, fixed, seconds, pieces)

    def _look_for_leaks(self, own: list[Tensor]) -> None:
        """Empty the caches of functions that now hold tensors without numbers, which a real step would take.

        Raises CannotSimulate where something else holds them: a list, or a module's table of positions. Once.
        """
        if self.looked:
            return
        self.looked = True
        for p in self.model.parameters():
            p.grad = None
        for monitor in self.model.monitors:
            monitor.clear()
        known = {id(tensor) for tensor in own}
        for last in (False, True):
            gc.collect()
            left = [t for t in gc.get_objects() if type(t) is FakeTensor and t.fake_mode is self.mode]
            left = [t for t in left if id(t) not in known and not _is_of(t, self.model)]
            if not left:
                return
            if last:
                raise CannotSimulate("it keeps tensors that it computes, outside of its modules")
            for holder in [*_caches_beside(self.model), *(cache for tensor in left for cache in _holders(tensor))]:
                holder.cache_clear()
            del left

    def _run(
        self, ledger: Ledger, images: Tensor, labels: Tensor, amp: str, *, repeats: int
    ) -> tuple[dict[str, PieceUse], int]:
        """Steps on the first images, as many as there are labels, whose gradients add up."""
        with ExitStack() as stack:
            stack.enter_context(self.mode)
            watch = stack.enter_context(_Watch(self.model, ledger).hooked())
            stack.enter_context(ledger)
            if self.device == "cuda":
                stack.enter_context(_InFloat32())
            for _ in range(repeats):
                watch.begin()
                with _autocast(amp):
                    logits = self.model(images[: len(labels)])
                loss = F.cross_entropy(logits.float(), labels)
                watch.turn()
                torch.autograd.backward(loss)
                watch.end()
                watch.count_evaluations()
                del logits, loss
        return watch.pieces, watch.peak


class CannotSimulate(ResodeError):
    """A network that does not run without numbers."""

    def __init__(self, why: str) -> None:
        super().__init__(f"this network cannot be run without numbers, to predict its memory: {why}")


def _caches_beside(model: nn.Module) -> list[Any]:
    """Caches of functions in the files that the classes of a network's modules are from."""
    names = {kind.__module__ for module in model.modules() for kind in type(module).__mro__}
    files = [sys.modules[name] for name in names if name in sys.modules and not name.startswith(("torch.", "builtins"))]
    return [value for file in files for value in vars(file).values() if isinstance(value, functools._lru_cache_wrapper)]


def _holders(tensor: Tensor) -> list[Any]:
    """Caches of functions that hold a tensor, by itself or within a tuple or a list."""
    found = []
    for referrer in gc.get_referrers(tensor):
        further = gc.get_referrers(referrer) if type(referrer) in (tuple, list) else ()
        found += [holder for holder in (referrer, *further) if isinstance(holder, functools._lru_cache_wrapper)]
    return found


def _is_of(tensor: Tensor, model: nn.Module) -> bool:
    """Whether a module of the copy holds a tensor as an attribute."""
    attributes = {id(module.__dict__) for module in model.modules()}
    return any(id(referrer) in attributes for referrer in gc.get_referrers(tensor))


def piece_names(model: OdeResNet) -> list[str]:
    """The pieces of a network in order: what comes before the first stage, each stage's transition and steps, the rest.

    What lies between stages belongs to the piece before it.
    """
    names = [STEM]
    for name, stage in model.stages.items():
        names += [transition_of(name)] if stage.transition else []
        names += [name] if stage.spec.depth else []
    return [*names, REST]


class _Watch:
    """Reads a ledger where a step goes from one piece to the next."""

    def __init__(self, model: OdeResNet, ledger: Ledger) -> None:
        self.model, self.ledger = model, ledger
        self.names = piece_names(model)
        self.pieces = {name: PieceUse() for name in self.names}
        self.peak = 0
        self.place = 0
        self.start = 0
        self.seconds = 0.0
        self.turned = False

    @contextmanager
    def hooked(self) -> Iterator[_Watch]:
        """Listen at the network's stages."""
        for name, stage in self.model.stages.items():
            self._listen(name, stage)
        try:
            yield self
        finally:
            for stage in self.model.stages.values():
                for wrapped in ("_pass_transition", "_solve"):
                    stage.__dict__.pop(wrapped, None)

    def _listen(self, name: str, stage: OdeStage) -> None:
        pass_transition, solve = stage._pass_transition, stage._solve

        def transition(x: Tensor) -> Tensor:
            self._enter(transition_of(name), x)
            return pass_transition(x)

        def steps(stage_field: Any, state: list[Tensor]) -> Tensor:
            self._enter(name, state[0])
            if name in self.pieces:
                self.pieces[name].state = state[0].nbytes
            result = solve(stage_field, state)
            self._enter(self._after(name), result)
            return result

        stage.__dict__["_pass_transition"], stage.__dict__["_solve"] = transition, steps

    def _after(self, stage: str) -> str:
        name = stage if stage in self.pieces else transition_of(stage)
        return self.names[min(self.names.index(name) + 1, len(self.names) - 1)]

    def begin(self) -> None:
        """The forward pass begins."""
        self.place, self.turned = 0, False
        self._start()

    def _enter(self, name: str, x: Tensor) -> None:
        """The forward pass comes to a piece, with its input."""
        if name not in self.pieces or self.turned:
            return
        place = self.names.index(name)
        if place > self.place:
            self._finish_forward()
            self.place = place
            self._start()
        if x.requires_grad:
            x.register_hook(lambda _: self._leave(place))  # type: ignore[no-untyped-call]

    def turn(self) -> None:
        """The forward pass is done, and the backward pass begins."""
        self._finish_forward()
        self.turned, self.place = True, len(self.names) - 1
        self._start()

    def _leave(self, place: int) -> None:
        """The backward pass has come through the input of a piece."""
        if place <= self.place:
            self._finish_backward()
            self.place = place - 1
            self._start()

    def end(self) -> None:
        """The backward pass is done."""
        if self.place >= 0:
            self._finish_backward()

    def count_evaluations(self) -> None:
        for name, stage in self.model.stages.items():
            if name in self.pieces:
                done = stage.monitor.evaluations / SCHEMES[stage.spec.scheme].evaluations
                self.pieces[name].evaluations = done / stage.spec.depth

    def _start(self) -> None:
        self.start, self.seconds = self.ledger.now, self.ledger.seconds
        self.ledger.restart_peak()

    def _finish_forward(self) -> None:
        piece = self.pieces[self.names[self.place]]
        piece.kept, piece.forward = self.ledger.now - self.start, self.ledger.peak - self.start
        piece.seconds = piece.once = self.ledger.seconds - self.seconds
        self.peak = max(self.peak, self.ledger.peak)

    def _finish_backward(self) -> None:
        piece = self.pieces[self.names[self.place]]
        piece.left, piece.backward = self.ledger.now - self.start, self.ledger.peak - self.start
        piece.seconds += self.ledger.seconds - self.seconds
        self.peak = max(self.peak, self.ledger.peak)


def _autocast(amp: str) -> AbstractContextManager[Any]:
    dtype = autocast_dtype(amp)
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype)


class _InFloat32(torch.overrides.TorchFunctionMode):
    """On a GPU, autocast takes some functions to float32 that it leaves as they are on a CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") not in _FLOAT32_ON_CUDA or not torch.is_autocast_enabled("cpu"):
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            args, kwargs = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.float(), (args, kwargs))
            return func(*args, **kwargs)


_FLOAT32_ON_CUDA = frozenset(
    "layer_norm group_norm softmax log_softmax softmin pow norm sum prod cumsum exp log".split()
)
