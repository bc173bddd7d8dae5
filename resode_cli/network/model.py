"""OdeResNet: a source network whose stages are OdeStages, and what is known about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Size, Tensor, nn

from ..errors import ResodeError, UsageError, first_few, unknown
from ..ode import Adjoint, Monitor, RandomState
from .between import check_state, networks_forward, refuse_to_trace
from .mixing import check_apart
from .outside import STEM, CannotCut, Opening, Reached, Stem, outside_modules
from .parts import Preprocessing, SourceSpec
from .repeat import remember
from .sharing import distinct
from .stage import OdeStage


@dataclass(frozen=True)
class ModelInfo:
    """What a model file says besides tensors and stages.

    left_out: blocks of the source that look like residual steps and are none, one of each kind, and why.
    multi_label: whether an image may have any number of the classes, by the sigmoid of each logit, in place of one.
    """

    source: SourceSpec
    preprocessing: Preprocessing
    num_classes: int
    class_names: tuple[str, ...] | None = None
    history: tuple[dict[str, object], ...] = field(default_factory=tuple)
    left_out: tuple[str, ...] = ()
    multi_label: bool = False

    def with_command(self, command: str, **settings: object) -> ModelInfo:
        """The same, with one more command in the history."""
        return replace(self, history=(*self.history, {"command": command, **settings}))

    def with_classes(self, names: Sequence[str]) -> ModelInfo:
        """The same, with the names of its classes."""
        return replace(self, class_names=tuple(names))


class OdeResNet(nn.Module):
    """Logits (B, K) of images (B, 3, H, W).

    The source network stays in charge of everything outside its stages, so its stem, its head and
    its own methods (`model.net.…`) are what they were.
    """

    def __init__(self, net: nn.Module, paths: dict[str, str], info: ModelInfo, built: dict[str, Size]) -> None:
        """built: the shapes of the source network's tensors, as its builder made it; see `saving`."""
        super().__init__()
        self.built = built
        self.net = net
        self.paths = paths  # stage name -> path of its OdeStage in the network
        self.info = info
        self.channels_last = False
        self.stem = Stem()

    def with_info(self, info: ModelInfo) -> OdeResNet:
        """The same network with other things known about it."""
        other = OdeResNet(self.net, self.paths, info, self.built)
        other.channels_last, other.stem = self.channels_last, self.stem
        return other

    def record(self, command: str, **settings: object) -> None:
        """Add a command to the model's history."""
        self.info = self.info.with_command(command, **settings)

    def name_classes(self, names: Sequence[str], *, multi_label: bool | None = None) -> None:
        """Say what its classes are called; and whether an image may have several, where that is not as it was."""
        info = self.info if multi_label is None else replace(self.info, multi_label=multi_label)
        self.info = info.with_classes(names)

    def forward(self, x: Tensor) -> Tensor:
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        if x.dtype == torch.float32 and next(self.parameters(), x).dtype == torch.float64:
            x = x.double()  # data sets give float32
        # A stage runs between the graphs of a compiled network, which nothing else is to break.
        if torch.compiler.is_dynamo_compiling() or torch.jit.is_tracing():  # type: ignore
            for name, stage in self.stages.items():
                if stage.spec.calls > 1:
                    refuse_to_trace(name)
            return self.net(x)
        result = self._run_cut(x) if self._evaluates_stem_again(x) else self._run(x)
        check_state(next(iter(self.paths), ""), result)
        return result

    def _run(self, x: Tensor, opening: Opening | None = None) -> Tensor:
        with networks_forward(opening):
            result: Tensor = self.net(x)
        return result

    def _evaluates_stem_again(self, x: Tensor) -> bool:
        return self.stem.adjoint.replays and torch.is_grad_enabled() and isinstance(x, Tensor) and bool(self.paths)

    def _run_cut(self, x: Tensor) -> Tensor:
        """Run to the first stage without keeping anything, and on from there; or plainly, where that cannot be done."""
        stem, modes = self.stem, tuple(module.training for module in self.net.modules())
        if stem.kept.get(modes):
            return self._run(x)
        if stem.adjoint.slices > 1 and modes != stem.apart:
            check_apart("what comes before the first stage", self.net, self._to_entry, x.detach())
            stem.apart = modes
        first = modes not in stem.kept
        opening = Opening(stem, x, outside_modules(self.net, set(self.stages.values())), self._to_entry, first=first)
        if not first:
            return self._run(opening.leaf, opening)
        restore, random = remember([self.net]), RandomState.everywhere(x.device, self.net.modules())
        try:
            result = self._run(opening.leaf, opening)
            stem.kept[modes] = opening.why_not(result)
        except CannotCut as reason:
            stem.kept[modes] = str(reason)
        if not stem.kept[modes]:
            return result
        restore()
        random.restore()
        return self._run(x)

    def _to_entry(self, x: Tensor) -> Tensor:
        """What the first stage is given."""
        try:
            with networks_forward(to_entry=True):
                self.net(x)
        except Reached as reached:
            return reached.state
        raise ResodeError("the network, run again for the backward pass, comes to no stage")

    @property
    def stages(self) -> dict[str, OdeStage]:
        """The stages by name, in order."""
        found = {name: self.net.get_submodule(path) for name, path in self.paths.items()}
        return {name: stage for name, stage in found.items() if isinstance(stage, OdeStage)}

    def pick(self, names: Iterable[str] | None) -> dict[str, OdeStage]:
        """The stages called `names`: names ('layer3') or places counted from 1 ('3'); 'layer1,3' is two.

        All for None.
        """
        stages = self.stages
        if not names:
            return stages
        places = {str(i): name for i, name in enumerate(stages, start=1)}
        picked = []
        for name in (part.strip() for given in names for part in given.split(",")):
            if name not in stages and name not in places:
                raise unknown("stage", name, [*stages, *places])
            picked.append(name if name in stages else places[name])
        return {name: stage for name, stage in stages.items() if name in picked}

    def replace_stage(self, name: str, stage: OdeStage) -> None:
        """Put a stage in another's place; it runs compiled if that one does."""
        compilation = self.stages[name].compilation
        if compilation is not None and stage.compilation is None:
            stage.compile_branch(**compilation.options)
        if stage is not self.stages[name]:
            take_hooks(stage, self.stages[name])
            stage.follow(self.stages[name])
        self.net = with_submodule(self.net, self.paths[name], stage)

    def forget_runs(self) -> None:
        """Find out anew, when it runs next, what can be evaluated again: other parameters are trained from now on."""
        self.stem.kept.clear()
        self.stem.apart = ()
        for stage in self.stages.values():
            stage.entry.kept.clear()
            stage.forget_modes()

    @property
    def kept_parts(self) -> dict[str, str]:
        """Parts whose activations are kept although their adjoint says otherwise, and why; known once they have run."""
        stages = self.stages.items()
        found = {STEM: self.stem.kept, **{transition_of(name): stage.entry.kept for name, stage in stages}}
        return {part: why for part, kept in found.items() for why in kept.values() if why}

    @property
    def monitors(self) -> list[Monitor]:
        """Of every part that may be evaluated again: what comes before the first stage, transitions and steps."""
        stages = self.stages.values()
        return [self.stem.monitor, *(m for stage in stages for m in (stage.entry.monitor, stage.monitor))]

    @property
    def adjoints(self) -> dict[str, Adjoint]:
        """The backward method of every part, as `use_adjoint` takes them."""
        found = {STEM: self.stem.adjoint, **{name: stage.adjoint for name, stage in self.stages.items()}}
        own = {transition_of(name): stage.entry.adjoint for name, stage in self.stages.items()}
        return found | {name: adjoint for name, adjoint in own.items() if adjoint is not None}

    def use_adjoint(self, adjoint: Adjoint | Mapping[str, Adjoint]) -> None:
        """Set the backward method of every part, or of the parts named: stages, 'stem', and 'layer2 transition'.

        What comes before the first stage, and a stage's transition, is no reversible step: under every method but
        'backprop' it is evaluated again from its input. Raises UsageError for a part that the model does not have.
        """
        if not isinstance(adjoint, Adjoint):
            parts = [STEM, *self.stages, *(transition_of(name) for name in self.stages)]
            if (other := next((part for part in adjoint if part not in parts), None)) is not None:
                raise unknown("part", other, parts)
        if isinstance(adjoint, Adjoint) or STEM in adjoint:
            self.stem.adjoint = (adjoint if isinstance(adjoint, Adjoint) else adjoint[STEM]).stem
        for name, stage in self.stages.items():
            if isinstance(adjoint, Adjoint):
                stage.use_adjoint(adjoint)
                continue
            if name in adjoint:
                stage.use_adjoint(adjoint[name])
            if transition_of(name) in adjoint:
                stage.entry.adjoint = adjoint[transition_of(name)].outside

    def use_scheme(self, scheme: str) -> None:
        """Switch the forward rule of every stage. That changes the network's function."""
        for stage in self.stages.values():
            stage.use_scheme(scheme)

    def compile_branches(self, **options: Any) -> None:
        """Run every stage's steps compiled from now on; `options` are torch.compile's. See `compilation`."""
        for stage in self.stages.values():
            stage.compile_branch(**options)

    def use_channels_last(self) -> None:
        """Keep weights, images and states in the order (B, H, W, C) in memory, which fast convolutions want.

        Images are brought into it in `forward`, and the states of the stages inherit it.
        """
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.channels_last = True

    def file_name(self, key: str) -> str:
        """A tensor's name in a model file, from its name in `self.net`.

        They differ only where a container became several stages: each then holds some of the
        children under their own names, one level further down.
        """
        for path in self.paths.values():
            if not key.startswith(path + ".") or not isinstance(stage := self.net.get_submodule(path), OdeStage):
                continue
            if (container := stage.spec.container) != path:
                return f"{container}.{key[len(path) + 1 :]}".lstrip(".")
        return key

    def file_state(self) -> dict[str, Tensor]:
        """Every tensor under its name in a model file; one that several blocks share once, under its first name.

        Raises ResodeError for two tensors of one name, of which a file could hold but one.
        """
        tensors = distinct(self.net.state_dict(keep_vars=True).items())
        found = {self.file_name(key): value.detach() for key, value in tensors.items()}
        if len(found) < len(tensors):
            twice = [name for name, count in Counter(map(self.file_name, tensors)).items() if count > 1]
            raise ResodeError(f"the model has two tensors of one name, and cannot be saved: {first_few(twice)}")
        return found

    def load_file_state(self, tensors: dict[str, Tensor]) -> None:
        """Load tensors under their file names. Raises ResodeError naming what does not fit."""
        floats = {t.dtype for t in tensors.values() if t.is_floating_point()}
        if floats == {torch.float64}:
            self.net.to(torch.float64)  # as it was saved
        state = distinct(self.net.state_dict(keep_vars=True).items())
        names = {self.file_name(key): key for key in state}
        problems = describe_misfit({name: state[key] for name, key in names.items()}, tensors, types=True)
        if problems:
            raise ResodeError(problems)
        negative = [n for n, t in tensors.items() if n.rpartition(".")[2] == "running_var" and bool((t < 0).any())]
        if negative:
            raise ResodeError(f"a variance below 0: {first_few(negative)}")
        # Not strict: the other names of a shared tensor are left out, and what fits was checked above.
        self.net.load_state_dict({names[name]: value for name, value in tensors.items()}, strict=False)

    def parameter_groups(self) -> dict[str, str]:
        """Which part each parameter of `self.net` belongs to: a stage's name, '<stage> transition', 'stem' or 'head'.

        Outside the stages, what is registered before the first of them is the stem.
        """
        stages = [(path + ".", name, self.stages[name].spec.transition) for name, path in self.paths.items()]
        groups: dict[str, str] = {}
        group = "stem"
        for key, _ in self.net.named_parameters():
            for prefix, name, transition in stages:
                if key.startswith(prefix):
                    child = key[len(prefix) :].split(".")[0]
                    groups[key] = transition_of(name) if child in transition else name
                    group = "head"
                    break
            else:
                groups[key] = group
        return groups


def transition_of(stage: str) -> str:
    """What the part in front of a stage's steps is called."""
    return f"{stage} transition"


def take_hooks(module: nn.Module, other: nn.Module) -> None:
    """Let `module`, which takes the place of another, take its hooks too. Their handles go on removing them."""
    for name, hooks in other.__dict__.items():
        if name in module.__dict__ and "_hook" in name and (hooks or not module.__dict__[name]):
            module.__dict__[name] = hooks


def with_submodule(net: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """The network with one submodule replaced; the module itself for the empty path."""
    if not path:
        return module
    parent, _, name = path.rpartition(".")
    net.get_submodule(parent).register_module(name, module)
    return net


def describe_misfit(expected: dict[str, Tensor], given: dict[str, Tensor], *, types: bool = False) -> str:
    """One line on missing, unexpected and wrongly shaped tensors; empty if all fit. types: on wrong types too."""
    missing = [k for k in expected if k not in given]
    unexpected = [k for k in given if k not in expected]
    shapes = [
        f"{k} {tuple(given[k].shape)} instead of {tuple(expected[k].shape)}"
        for k in expected
        if k in given and expected[k].shape != given[k].shape
    ]
    kept = [
        f"{k} {_type(given[k])} instead of {_type(expected[k])}"
        for k in expected
        if types and k in given and not _keeps_values(given[k].dtype, expected[k].dtype)
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("wrong shape", shapes), ("wrong type", kept))
    return "; ".join(f"{len(names)} {kind}: {first_few(names)}" for kind, names in kinds if names)


def shapes_of(module: nn.Module) -> dict[str, Size]:
    """The shape of every tensor of a state dict, by name."""
    return {name: tensor.shape for name, tensor in module.state_dict().items() if isinstance(tensor, Tensor)}


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _keeps_values(given: torch.dtype, expected: torch.dtype) -> bool:
    """Whether numbers of one type become the other's without being changed in kind or range.

    A complex number would lose its imaginary part, a fraction all behind the point.
    """
    if given == expected:
        return True
    floats = given.is_floating_point and expected.is_floating_point
    return floats and given.itemsize <= expected.itemsize and given in (torch.float16, torch.bfloat16, torch.float32)


def non_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinity."""
    return [name for name, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]


def check_finite(model: OdeResNet, what: str) -> None:
    """Raises ResodeError for weights that are no numbers. what: the message, with {} for their names."""
    if bad := non_finite(model.net.state_dict()):
        raise ResodeError(what.format(first_few(bad)))


def freeze_batch_norm(model: nn.Module) -> None:
    """Put BatchNorm layers in eval mode: running statistics are used and stay; scale and shift still train.

    Call it after every `model.train()`, which puts them back.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def as_device(name: str) -> torch.device:
    """The device called `name`; 'auto' is the GPU where there is one. Raises UsageError if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r} is not available: {str(error).splitlines()[0]}") from error
    return device


def autocast_dtype(name: str) -> torch.dtype | None:
    """The precision of autocast that 'bf16' or 'fp16' means; None for 'none'."""
    return {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
