"""OdeStage: a transition followed by N residual steps, held as distinct blocks and a schedule."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from ..errors import ResodeError, UsageError, first_few
from ..ode import SCHEMES, Adjoint, Evaluator, Field, Monitor, Residual, Scheme, solve, trajectory
from .between import (
    Emptied,
    InOnePiece,
    StandIn,
    call_again,
    check_not_its_own,
    check_state,
    enter_stage,
    is_watched,
    mark_as_own,
    refuse_to_trace,
    stand_in_for,
)
from .block_inputs import WithArguments, further_arguments, keep_channels_last, tensors_in
from .compilation import Compilation, CompiledResidual
from .entry import Entry
from .mixing import check_apart
from .parts import BlockSplit
from .premises import has_hooks
from .reading import read_again, whole
from .residual import ACTIVATIONS, GENERIC, LINEAR, BlendedResidual, BlockResidual, Form, check_form
from .specs import StageSpec


@dataclass(frozen=True)
class Tap:
    """A look at the states x_n of the given steps, 0 to N, as they pass.

    see: gets n and x_n, and returns the state to go on with: x_n itself, or for instance a detached one.
    """

    steps: tuple[int, ...]
    see: Callable[[int, Tensor], Tensor]


class OdeStage(InOnePiece, nn.Module):
    """x_0 = transition(x); x_{n+1} = x_n + h Φ_n(x_n), n = 0 … N-1; returns x_N.

    In `pre` form the steps' clip is dropped and the activation is applied once, to x_N.
    The state (B, C, H, W) is float32 under autocast, whatever dtype the branches compute in.
    Children keep the names they have in the source network, so parameters do too.

    The stage holds its blocks, `stage.blocks`, and runs the code of their branches, as read from their forward. It
    looks again at each call: numbers of a block's own are read as they are then, and a block that has changed
    otherwise since it was read, in an attribute, a child, a function that its forward uses, is called itself.

    Hooks on a block fire whenever it is evaluated: under the adjoint methods other than 'backprop' in the backward
    pass too, as `torch.utils.checkpoint` has it, and in the forward pass without a gradient then. Where steps have
    weights of their own, linear in depth, those of the lower of two blocks fire.

    adjoint: the method of the backward pass; see `resode_cli.ode.METHODS`.
    splits: how each block is run, as found when the stage last ran.
    monitor: what the last passes did (drift, evaluations). entry: the transition, as a part by itself.
    compilation: the compiled residual functions, if the steps run compiled.
    further: what the blocks were called with beside the state, the last time that the stage ran: for looks at
        the stage by itself, as `stage(x, **stage.further)`.
    is_first: whether the stage stands in the place of the first of its blocks, and `emptied` in those of the others.
    rule: a forward rule in place of its own, which no file keeps; see `ode.composed_euler`.
    tap: sees states as they pass; without a tap the steps are one run of the engine, with one they are
        cut into runs where it looks.
    """

    def __init__(
        self,
        spec: StageSpec,
        *,
        transition: Mapping[str, nn.Module],
        blocks: Sequence[nn.Module],
        splits: Sequence[BlockSplit],
    ) -> None:
        super().__init__()
        for name, module in transition.items():
            self._add(name, module)
        for block, module in zip(spec.blocks, blocks, strict=True):
            self._add(block.name, module)
        self.spec = spec
        self.splits = self._checked(splits)
        self.adjoint = Adjoint("backprop")
        self.monitor = Monitor()
        self.entry = Entry()
        self.compilation: Compilation | None = None
        self.tap: Tap | None = None
        self.rule: Scheme | None = None
        self._apart: tuple[bool, ...] = ()  # the modes in which it was seen to keep images apart
        self.further: dict[str, Any] = {}
        self.is_first = False
        self.emptied: tuple[Emptied, ...] = ()  # no children of the stage

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The stage's result, or what stands for it until the last of the emptied blocks that follow."""
        name, calls = self.spec.name, self.spec.calls
        if torch.compiler.is_dynamo_compiling():
            if calls > 1:
                refuse_to_trace(name)
            return super().__call__(*args, **kwargs)
        if calls > 1 and args and isinstance(args[0], StandIn):
            return call_again(name, calls, args[0], self.take(*args, **kwargs))
        check_state(name, (args, kwargs))
        if args and isinstance(args[0], Tensor):
            if calls > 1:
                check_not_its_own(self, args[0])
            args = (enter_stage(args[0]), *args[1:])  # before hooks on the stage, which wrap what it is given
        result = super().__call__(*args, **kwargs)
        if calls == 1 and not (self.is_first and self.emptied):
            return result
        if calls > 1 and not is_watched():
            mark_as_own(self, result)
        return stand_in_for(name, result, self.take(*args, **kwargs))

    def follow(self, other: OdeStage) -> None:
        """Take the place of another stage among its emptied blocks."""
        self.is_first, self.emptied = other.is_first, other.emptied
        first_of = {block.origin: self.get_submodule(block.name) for block in reversed(self.spec.blocks)}
        names = (*self.spec.transition, *dict.fromkeys(self.spec.source_blocks))
        for name, emptied in zip(names[1:], self.emptied, strict=True):
            emptied.block = [first_of[name]] if name in first_of else []

    def __getattr__(self, name: str) -> Any:
        """What a network's loop asks its first block for."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or not self.__dict__.get("is_first") or not is_watched():
                raise
            return getattr((*self.transition, *self.blocks)[0], name)

    def _add(self, name: str, module: nn.Module) -> None:
        if hasattr(self, name):
            raise ResodeError(f"the block name {name!r} clashes with another block or an attribute of a stage")
        self.add_module(name, module)

    def _checked(self, splits: Sequence[BlockSplit]) -> tuple[BlockSplit, ...]:
        """The splits, if the stage's form suits them."""
        spec = self.spec
        for block, split in zip(spec.blocks, splits, strict=True):
            check_form(spec.form, split.activation, f"{spec.name}.{block.origin}", split.reason)
        if spec.form == "pre" and len({split.activation for split in splits}) > 1:
            endings = ", ".join(f"{b.origin}: {split.activation}" for b, split in zip(spec.blocks, splits, strict=True))
            raise UsageError(f"form 'pre' needs blocks that end alike, but those of {spec.name} do not ({endings})")
        return tuple(splits)

    def _look_again(self, blocks: Sequence[nn.Module]) -> None:
        """Read anew the blocks that are no longer what their splits rest on."""
        splits = [
            split if split.premises is None or split.premises.hold(block) else self._read_again(block, split)
            for block, split in zip(blocks, self.splits, strict=True)
        ]
        if any(new is not old for new, old in zip(splits, self.splits, strict=True)):
            self.splits = self._checked(splits)

    def _read_again(self, block: nn.Module, split: BlockSplit) -> BlockSplit:
        return read_again(block, split, as_branch=self.spec.form == "pre" and split.activation != LINEAR)

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The distinct residual blocks."""
        return tuple(self.get_submodule(block.name) for block in self.spec.blocks)

    @property
    def transition(self) -> tuple[nn.Module, ...]:
        return tuple(self.get_submodule(name) for name in self.spec.transition)

    @property
    def scheme(self) -> Scheme:
        """The forward rule."""
        return SCHEMES[self.spec.scheme] if self.rule is None else self.rule

    @property
    def activation(self) -> str:
        """What follows the addition in the source's blocks."""
        return self.splits[0].activation if self.splits else "linear"

    def residuals(self, further: Mapping[str, Any] | None = None) -> tuple[BlockResidual, ...]:
        """The distinct blocks' residual functions, not compiled.

        further: what the blocks are called with beside the state; what the stage last ran with by default.
        """
        given = self.further if further is None else further
        if given.keys() != set(self.spec.further):
            raise ResodeError(
                f"stage {self.spec.name} takes {first_few(self.spec.further) or 'nothing'} beside the state,"
                f" but was given {first_few(list(given)) or 'nothing'}"
            )
        if added := self._modules.keys() - {*self.spec.transition, *(block.name for block in self.spec.blocks)}:
            raise ResodeError(
                f"stage {self.spec.name} was given {first_few(sorted(added))}, which is none of its blocks, so that it"
                " would not run; put what is new into a block, or before or after the stage"
            )
        blocks = self.blocks
        if not torch.compiler.is_dynamo_compiling():  # dynamo guards what it sees by itself
            self._look_again(blocks)
        return tuple(
            self._residual(name.origin, block, split, given)
            for name, block, split in zip(self.spec.blocks, blocks, self.splits, strict=True)
        )

    def _residual(self, name: str, block: nn.Module, split: BlockSplit, given: Mapping[str, Any]) -> BlockResidual:
        if given:
            return BlockResidual(block, WithArguments(given), split.activation, self.spec.form)
        if split.activation == GENERIC or not has_hooks(block):
            return BlockResidual(block, split.branch, split.activation, self.spec.form, split.in_place)
        if self.spec.form == "pre" and split.activation != LINEAR:
            raise ResodeError(
                f"block {self.spec.name}.{name} has hooks, but in form 'pre' only its branch runs, never the block;"
                " put them on its children, or convert with form 'exact'"
            )
        return BlockResidual(block, whole, GENERIC, self.spec.form)  # only the block itself calls them

    def field(self, further: Mapping[str, Any] | None = None) -> Field:
        """What the engine runs: the residual functions, compiled if the stage is, and the schedule."""
        blocks = self.residuals(further)
        residuals: tuple[Residual, ...] = blocks
        schedule = self.spec.schedule
        if self.spec.blends:
            residuals, schedule = self._blended(blocks), tuple(range(self.spec.depth))
        if self.compilation is not None:
            if self.adjoint.bits is not None:
                raise UsageError(
                    f"stage {self.spec.name} runs compiled, where the signs of its rectifiers cannot be seen: leave out"
                    " --compile, or the bits"
                )
            replayed = self.adjoint.replays
            # Compiled code keeps the hooks that it was compiled with, so blocks that have any run as they are.
            residuals = tuple(
                r if has_hooks(r.module) else CompiledResidual(r, self.compilation, replayed=replayed)
                for r in residuals
            )
        names = tuple(f"{self.spec.container}.{block.name}" for block in self.spec.blocks)
        if self.spec.blends:
            names = tuple(names[b] for b in self.spec.schedule)
        return Field(residuals, schedule, self.spec.step_size, names)

    def _blended(self, knots: tuple[BlockResidual, ...]) -> tuple[Residual, ...]:
        """Each step's residual function, where weights are linear in depth."""
        steps = zip(self.spec.schedule, self.spec.blends, strict=True)
        return tuple(BlendedResidual(knots[b], knots[b + 1], w) if w else knots[b] for b, w in steps)

    def compile_branch(self, **options: Any) -> None:
        """Run the steps' residual functions compiled from now on; `options` are torch.compile's.

        Call it once depth, form and modes are settled. Raises UsageError for options that cannot be, and
        for weights that are linear in depth.
        """
        if self.spec.blends:
            raise UsageError(
                f"stage {self.spec.name} has weights linear in depth, which cannot be compiled; leave out --compile,"
                " or give every step its own weights with `resode untie`"
            )
        self.compilation = Compilation(options)

    def use_scheme(self, scheme: str) -> None:
        """Switch the forward rule. That changes the network's function."""
        self.spec = replace(self.spec, scheme=scheme)

    def use_horizon(self, horizon: Fraction) -> None:
        """Let the stage run over another time T, in steps of T/N. That changes the network's function."""
        self.spec = replace(self.spec, horizon=horizon)

    def use_form(self, form: Form) -> None:
        """Switch to `exact` or `pre` form. Raises UsageError for a form that the blocks' activation does not have."""
        check_form(form, self.activation, self.spec.name)
        self.spec = replace(self.spec, form=form)

    def use_adjoint(self, adjoint: Adjoint) -> None:
        """Set the method of the backward pass. Raises UsageError if the forward rule does not suit it.

        The transition's is what goes with it, until `entry.adjoint` says otherwise.
        """
        adjoint.plan(self.spec.depth, self.spec.scheme)
        self.adjoint, self.entry.adjoint = adjoint, None

    # A compiled network runs its stages as they are, between its own graphs: the engine counts, looks at states and
    # evaluates again, and `compile_branch` compiles what there is to gain from.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """args, kwargs: what the blocks take beside the state."""
        if getattr(self, "_is_replica", False):
            raise ResodeError("nn.DataParallel is not supported; use DistributedDataParallel")
        if isinstance(x, torch.fx.Proxy):
            raise ResodeError("an OdeStage cannot be traced by torch.fx; name it among the tracer's leaf modules")
        field = self.field(self.take(x, *args, **kwargs))
        state = [self.enter(x)]
        del x
        return self.leave(self._solve(field, state) if self.tap is None else self._tapped(self.tap, field, state.pop()))

    def take(self, *args: Any, **kwargs: Any) -> Mapping[str, Any]:
        """What a call of the stage hands to its blocks beside the state, noted in `further`.

        Raises ResodeError where it needs a gradient: the backward sweeps give one to states and parameters alone.
        """
        further = further_arguments(self.blocks[0], args, kwargs) if self.spec.depth else {}
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors_in(further)):
            raise ResodeError(
                f"stage {self.spec.name}: {first_few(list(further))} needs a gradient, which no stage gives it;"
                " freeze what makes it (requires_grad_(False))"
            )
        if further and not torch.compiler.is_exporting():
            self.further = further
        return further

    def _check_slices(self, x: Tensor) -> None:
        """Raises ResodeError where the adjoint asks for slices and the stage, in its present mode, mixes images."""
        modes = tuple(module.training for module in self.modules())
        slices = max(self.adjoint.slices, self.entry_adjoint.slices)
        if slices == 1 or modes == self._apart or not torch.is_grad_enabled():
            return
        if self.spec.further:
            raise ResodeError(
                f"stage {self.spec.name} takes {first_few(self.spec.further)} beside the state, and cannot be run in"
                " slices of the batch"
            )

        compilation, self.compilation = self.compilation, None  # which is of another batch size
        try:
            check_apart(f"stage {self.spec.name}", self, self._run_plainly, x.detach())
        finally:
            self.compilation = compilation
        self._apart = modes

    def keeps_apart(self) -> None:
        """Take it as known that in its present mode the stage mixes no images."""
        self._apart = tuple(module.training for module in self.modules())

    def forget_modes(self) -> None:
        """Find out anew whether it mixes images."""
        self._apart = ()

    def _run_plainly(self, x: Tensor) -> Tensor:
        x = self._run_transition(x)
        return solve(self.field(), self.scheme, None, x, monitor=Monitor())

    def _solve(self, field: Field, x: Tensor | list[Tensor]) -> Tensor:
        plan = self.adjoint.plan(field.depth, self.spec.scheme)
        return solve(field, self.scheme, plan, x, monitor=self.monitor)

    def _tapped(self, tap: Tap, field: Field, x: Tensor) -> Tensor:
        """The same, stopping for the tap. A rule that looks beyond its step is then recorded by autograd."""
        scheme, here = self.scheme, 0
        for n in sorted({*tap.steps, self.spec.depth}):
            if scheme.stays_in_step:
                x = self._solve(replace(field, schedule=field.schedule[here:n]), x)
            else:
                x = deque([x, *trajectory(Evaluator(field), scheme, x, here, n)], maxlen=1).pop()
            here = n
            if n in tap.steps:
                x = tap.see(n, x)
        return x

    def enter(self, x: Tensor) -> Tensor:
        """x_0: the transition's output, in float32 even under autocast."""
        self._check_slices(x)
        x = self._pass_transition(x)
        low = x.dtype in (torch.float16, torch.bfloat16)
        return x.float() if self.spec.depth and low and torch.is_autocast_enabled(x.device.type) else x

    def _pass_transition(self, x: Tensor) -> Tensor:
        """The transition's output, which is evaluated again in the backward pass unless that is found not to do."""
        adjoint = self.entry_adjoint
        if not adjoint.replays:
            return self._run_transition(x)
        names = [f"{self.spec.container}.{name}" for name in self.spec.transition]
        return self.entry.run(self.transition, names, adjoint, self._run_transition, x)

    @property
    def entry_adjoint(self) -> Adjoint:
        """The method of the transition's backward pass."""
        return self.entry.adjoint or self.adjoint.outside

    def _run_transition(self, x: Tensor) -> Tensor:
        for block in self.transition:
            x = block(x)
        return x

    def leave(self, x: Tensor) -> Tensor:
        """What follows x_N: in `pre` form the activation, once."""
        if self.spec.depth and x.requires_grad:
            keep_channels_last(x)
        if self.spec.depth and self.spec.form == "pre" and self.activation in ACTIVATIONS:
            return ACTIVATIONS[self.activation](x)
        return x

    def extra_repr(self) -> str:
        spec = self.spec
        return f"steps={spec.depth}, horizon={spec.horizon}, scheme={spec.scheme}, form={spec.form}"
