"""What `bench` measures: a network on a fixed batch, the steps of its stages run by one method or another.

C, H, W: channels, height and width of a state; N: depth; T: horizon; h = T/N: step size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from ..errors import UsageError, unknown
from ..files import model_file
from ..network.model import OdeResNet, autocast_dtype, freeze_batch_norm
from ..network.outside import STEM
from ..network.stage import OdeStage
from ..ode import SCHEMES, Adjoint
from ..ode.field import Evaluator
from ..ode.memory import kept_bytes
from ..surgery.convert import random_batch
from ..surgery.steps import deepened
from ..training.choices import AMP
from .stage_shape import StageShape

# fp16 gradients of a mean over a whole batch would be zero without a scale; this one is far from overflow.
FP16_LOSS_SCALE = 1024.0


@dataclass(frozen=True)
class TorchCheckpoint:
    """torch.utils.checkpoint as a user would write it around a stage's steps.

    segments: 'step', every step by itself; 'root', about √N segments by `checkpoint_sequential`, which
        leaves the last one uncheckpointed, since its activations are the first that the backward needs.
    """

    segments: str

    @property
    def label(self) -> str:
        return "torch checkpoint" if self.segments == "step" else "torch checkpoint √N"


Method = Adjoint | TorchCheckpoint
BACKPROP = Adjoint("backprop")
BASELINES: tuple[Method, ...] = (BACKPROP, TorchCheckpoint("step"), TorchCheckpoint("root"))


def method_record(method: Any) -> dict[str, Any]:
    """The method in plain values, for a fresh process."""
    return asdict(method)


def read_method(record: dict[str, Any]) -> Method:
    return TorchCheckpoint(**record) if "segments" in record else Adjoint(**record)


class CheckpointedStage(nn.Module):
    """A stage's function, its steps run under torch.utils.checkpoint (not reentrant, random state preserved).

    The recomputation moves BatchNorm's running statistics a second time, as it does for any user of
    torch.utils.checkpoint; the gradient does not depend on them in either BatchNorm mode.
    """

    def __init__(self, stage: OdeStage, method: TorchCheckpoint) -> None:
        super().__init__()
        self.stage = stage
        self.method = method
        self.evaluator: Evaluator | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        stage, scheme = self.stage, SCHEMES[self.stage.spec.scheme]
        field = stage.field(stage.take(x, *args, **kwargs))
        x = stage.enter(x)
        self.evaluator = r = Evaluator(field)
        steps: list[Callable[[Tensor], Tensor]] = [partial(scheme.advance, r, n) for n in range(stage.spec.depth)]
        if self.method.segments == "step":
            for step in steps:
                x = checkpoint(step, x, use_reentrant=False)
        elif steps:
            segments = max(round(math.sqrt(len(steps))), 1)
            x = checkpoint_sequential(steps, segments, x, use_reentrant=False)  # type: ignore[no-untyped-call]
        return stage.leave(x)

    def evaluations(self) -> int:
        """Branch evaluations of the last backward pass."""
        assert self.evaluator is not None
        return self.evaluator.evaluations - self.stage.spec.depth * SCHEMES[self.stage.spec.scheme].evaluations

    def __iter__(self) -> Iterator[nn.Module]:
        """One module, as a stage is."""
        yield self


@dataclass(frozen=True)
class Workload:
    """Everything that decides what is measured, but depth and method. Plain values, for a fresh process to be told.

    model: a model file; source, trust_source: see `model_file.load`; input_size: pixels, if not the
        model's own. Or shape: a stage by itself.
    bn: 'batch' or 'frozen' statistics. amp: autocast, as for a training run.
    """

    model: str | None = None
    source: str | None = None
    trust_source: bool = False
    input_size: int | tuple[int, int] | None = None
    shape: StageShape | None = None
    batch_size: int = 64
    bn: str = "batch"
    amp: str = "none"
    channels_last: bool = False
    compiled: bool = False
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.model is None) == (self.shape is None):
            raise UsageError("give either a model file or --stage-shape C,H,W")
        for name, value, allowed in (("BatchNorm mode", self.bn, ("batch", "frozen")), ("amp", self.amp, AMP)):
            if value not in allowed:
                raise unknown(name, value, allowed)
        if self.batch_size < 1:
            raise UsageError(f"--batch-size {self.batch_size}: must be 1 or more")

    def record(self) -> dict[str, Any]:
        """The workload in plain values."""
        return asdict(self)

    @classmethod
    def read(cls, record: dict[str, Any]) -> Workload:
        shape = record["shape"]
        return cls(**{**record, "shape": None if shape is None else StageShape(**shape)})


@dataclass(frozen=True)
class Counted:
    """What a step gave: gradients, buffers and the state of torch's generator after it.

    kept: bytes that the graph kept between the passes. evaluations: of Φ per step in the backward pass. None where they
        are not known.
    """

    gradients: list[Tensor | None]
    buffers: list[Tensor]
    random: Tensor
    kept: int | None
    evaluations: float | None

    def leaves_as(self, other: Counted) -> bool:
        """Whether buffers and generator stand as after another's step."""
        return torch.equal(self.random, other.random) and all(
            torch.allclose(a.float(), b.float(), rtol=1e-4, atol=1e-6)
            for a, b in zip(self.buffers, other.buffers, strict=True)
        )


class Trial:
    """A workload at one depth, ready to take steps by any method.

    Raises UsageError for a depth below that of one of the model's stages.
    """

    def __init__(self, workload: Workload, depth: int | None) -> None:
        self.workload = workload
        self.device = torch.device(workload.device)
        self.module: nn.Module
        if workload.shape is not None:
            assert depth is not None
            self.module = stage = workload.shape.build(depth, workload.seed)
            self.stages = {"stage": stage}
        else:
            assert workload.model is not None
            self.module = model = model_file.load(
                Path(workload.model), source=workload.source, trust_source=workload.trust_source
            )
            if depth is not None:
                check_depth(model, depth)
                for name, own in model.stages.items():
                    if own.spec.depth:
                        model.replace_stage(name, deepened(own, depth))
            self.stages = model.stages
        self.depth = max((stage.spec.depth for stage in self.stages.values()), default=0)
        self.model = self.module
        self._set_up(self.module)
        self._name_buffers()
        if workload.compiled:
            for stage in self.stages.values():
                stage.compile_branch()
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.wrappers: dict[str, CheckpointedStage] = {}
        self.load_batch(workload.batch_size)

    def _set_up(self, net: nn.Module) -> None:
        """The network on its device and in its modes; remembers its buffers."""
        net.to(self.device)
        if self.workload.channels_last:
            net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        net.train()
        if self.workload.bn == "frozen":
            freeze_batch_norm(net)
        self._buffers = [(buffer, buffer.clone()) for buffer in net.buffers()]

    def _name_buffers(self) -> None:
        """The buffers by the names that they have in a model file: the order in which `buffers` gives them."""
        model = self.model
        net, name_of = (model.net, model.file_name) if isinstance(model, OdeResNet) else (model, str)
        found = [
            (name_of(f"{path}.{name}".lstrip(".")), module, name)
            for path, module in net.named_modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self._named_buffers = sorted(found, key=lambda item: item[0])

    def buffers(self) -> list[Tensor]:
        """The buffers as they are."""
        return [getattr(module, name).clone() for _, module, name in self._named_buffers]

    def load_batch(self, images: int) -> None:
        """A fixed batch of so many random images, or states of a stage by itself."""
        self.images = images
        generator = torch.Generator().manual_seed(self.workload.seed)
        shape = self.workload.shape
        if shape is not None:
            size = (images, shape.channels, shape.height, shape.width)
            inputs = torch.randn(size, generator=generator).to(self.device)
        else:
            assert isinstance(self.module, OdeResNet)
            own = self.module.info.preprocessing
            pixels = self.workload.input_size or own.size
            inputs = random_batch(replace(own, size=pixels), images).to(self.device)
            classes = self.module.info.num_classes
            self.labels = torch.randint(classes, (images,), generator=generator).to(self.device)
        if self.workload.channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        # A stage by itself passes the gradient on, as one in a network does.
        self.inputs = inputs.requires_grad_(shape is not None)

    def use(self, method: Method) -> None:
        """Run the stages by this method from now on. Raises UsageError if the forward rule does not suit it."""
        self.wrappers = {}
        adjoint = BACKPROP if isinstance(method, TorchCheckpoint) else method
        if isinstance(self.module, OdeResNet):
            self.module.use_adjoint({STEM: adjoint})
        for name, stage in self.stages.items():
            running: nn.Module = stage
            stage.use_adjoint(adjoint)
            if isinstance(method, TorchCheckpoint):
                running = self.wrappers[name] = CheckpointedStage(stage, method)
            if not isinstance(self.module, OdeResNet):
                self.module = running
            elif path := self.module.paths[name]:
                parent, _, child = path.rpartition(".")
                self.module.net.get_submodule(parent).register_module(child, running)
            else:
                self.module.net = running

    def clear(self) -> None:
        """Forget the gradients."""
        self.inputs.grad = None
        for p in self.parameters:
            p.grad = None

    def reset(self) -> None:
        """The buffers and the random numbers of the beginning."""
        torch.manual_seed(self.workload.seed)
        with torch.no_grad():
            for buffer, value in self._buffers:
                buffer.copy_(value)

    def loss(self) -> Tensor:
        """Cross-entropy of a model; mean square of a stage's output."""
        with self._autocast():
            output = self.module(self.inputs)
        loss = output.float().square().mean() if self.workload.shape else F.cross_entropy(output.float(), self.labels)
        return loss * FP16_LOSS_SCALE if self.workload.amp == "fp16" else loss

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = autocast_dtype(self.workload.amp)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)

    def step(self) -> None:
        """One forward and backward pass, finished when this returns."""
        torch.autograd.backward(self.loss())
        self.wait()

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def counted_step(self) -> Counted:
        """A step, looked at."""
        self.clear()
        self.reset()
        with kept_bytes(self.module.parameters()) as count:
            loss = self.loss()
            kept = count()
        assert kept is not None
        torch.autograd.backward(loss)
        self.wait()
        gradients = [p.grad for p in self.parameters]
        self.clear()
        return Counted(gradients, self.buffers(), torch.get_rng_state(), kept, self.evaluations_per_step())

    def evaluations_per_step(self) -> float:
        done, steps = 0.0, 0
        for name, stage in self.stages.items():
            wrapper = self.wrappers.get(name)
            evaluations = wrapper.evaluations() if wrapper is not None else stage.monitor.evaluations
            done += evaluations / SCHEMES[stage.spec.scheme].evaluations
            steps += stage.spec.depth
        return done / steps if steps else 0.0


def check_depth(model: OdeResNet, depth: int) -> None:
    """Raises UsageError for a depth below a stage's own, or where there is nothing to deepen."""
    deepest = max(model.stages.items(), key=lambda item: item[1].spec.depth, default=None)
    if deepest is None or deepest[1].spec.depth == 0:
        raise UsageError("no stage of this model has a step to deepen; leave --depths out")
    name, stage = deepest
    if depth < stage.spec.depth:
        raise UsageError(f"--depths {depth}: stage {name} has {stage.spec.depth} steps already")
