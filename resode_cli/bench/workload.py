"""What `bench` measures: a network on a fixed batch, the steps of its stages run by one method or another.

C, H, W: channels, height and width of a state; N: depth; T: horizon; h = T/N: step size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
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
from ..network.parts import BlockSplit
from ..network.residual import LINEAR
from ..network.specs import BlockSpec, StageSpec
from ..network.stage import OdeStage
from ..ode import SCHEMES, Adjoint
from ..ode.field import Evaluator
from ..ode.memory import kept_bytes
from ..surgery.convert import random_batch
from ..surgery.rewrite import deepen
from ..training.settings import AMP

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


def method_record(method: Method) -> dict[str, Any]:
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


BLOCKS = ("basic", "bottleneck")
WEIGHTS = ("tied", "untied", "smooth")


@dataclass(frozen=True)
class StageShape:
    """A stage of pre-activation blocks with T = 1: what is measured where no model file is given.

    block: 'basic' (two 3×3 convolutions) or 'bottleneck' (C -> C/4 -> C).
    weights: 'tied' (one block for all steps), 'untied' (independent random blocks) or 'smooth' (blocks
        A cos t + B sin t, t = (n + ½)/N, of two random blocks' convolutions A and B).
    """

    channels: int
    height: int
    width: int
    block: str = "basic"
    weights: str = "tied"
    scheme: str = "euler"

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("block", self.block, BLOCKS),
            ("weights", self.weights, WEIGHTS),
            ("scheme", self.scheme, tuple(SCHEMES)),
        ):
            if value not in allowed:
                raise unknown(name, value, allowed)
        if min(self.channels, self.height, self.width) < 1:
            raise UsageError("--stage-shape: channels, height and width must be 1 or more")
        if self.block == "bottleneck" and self.channels % 4:
            raise UsageError(f"--block bottleneck needs channels divisible by 4, not {self.channels}")

    def __str__(self) -> str:
        return (
            f"a stage of {self.weights} pre-activation {self.block} blocks, {self.channels} channels,"
            f" {self.height}×{self.width}, T = 1, {self.scheme} rule"
        )

    def build(self, depth: int, seed: int) -> OdeStage:
        """The stage with random weights; those of 'tied' and 'smooth' are one field, whatever the depth."""
        if depth < 1:
            raise UsageError(f"--depths {depth}: must be 1 or more")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            blocks = [self._block() for _ in range({"tied": 1, "untied": depth, "smooth": 2}[self.weights])]
        if self.weights == "smooth":
            a, b = blocks
            blocks = [self._between(a, b, (n + 0.5) / depth) for n in range(depth)]
        names = tuple(f"block{b}" for b in range(len(blocks)))
        spec = StageSpec(
            name="stage",
            container="",
            transition=(),
            source_blocks=names,
            blocks=tuple(BlockSpec(name, name) for name in names),
            schedule=tuple(range(depth)) if len(blocks) == depth else (0,) * depth,
            horizon=Fraction(1),
            scheme=self.scheme,
        )
        return OdeStage(spec, transition={}, blocks=blocks, splits=[BlockSplit(_call, LINEAR)] * len(blocks))

    def _block(self) -> nn.Sequential:
        """A branch (He et al. 2016, "Identity mappings"): BatchNorm, ReLU, convolution, and so on."""
        c = self.channels
        widths = (
            [(c, c, 3), (c, c, 3)] if self.block == "basic" else [(c, c // 4, 1), (c // 4, c // 4, 3), (c // 4, c, 1)]
        )
        layers: list[nn.Module] = []
        for before, after, kernel in widths:
            convolution = nn.Conv2d(before, after, kernel, padding=kernel // 2, bias=False)
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
            # In place, as torchvision's and timm's blocks have it: plain backprop gets its due.
            layers += [nn.BatchNorm2d(before), nn.ReLU(inplace=True), convolution]
        return nn.Sequential(*layers)

    def _between(self, a: nn.Sequential, b: nn.Sequential, t: float) -> nn.Sequential:
        block = self._block()
        with torch.no_grad():
            for weight, first, second in zip(_convolutions(block), _convolutions(a), _convolutions(b), strict=True):
                weight.copy_(first * math.cos(t) + second * math.sin(t))
        return block


def _convolutions(block: nn.Module) -> list[Tensor]:
    return [layer.weight for layer in block.modules() if isinstance(layer, nn.Conv2d)]


def _call(block: nn.Module, x: Tensor) -> Tensor:
    return block(x)


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
                        model.replace_stage(name, deepen(own, depth))
            self.stages = model.stages
        self.depth = max((stage.spec.depth for stage in self.stages.values()), default=0)
        self.module.to(self.device)
        if workload.channels_last:
            self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.module.train()
        if workload.bn == "frozen":
            freeze_batch_norm(self.module)
        if workload.compiled:
            for stage in self.stages.values():
                stage.compile_branch()
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        self._buffers = [(buffer, buffer.clone()) for buffer in self.module.buffers()]
        self.wrappers: dict[str, CheckpointedStage] = {}
        self.load_batch(workload.batch_size)

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

    def counted_step(self) -> tuple[list[Tensor | None], int, float]:
        """Gradients, bytes that the graph kept between the passes, evaluations of Φ per step in the backward."""
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
        return gradients, kept, self.evaluations_per_step()

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
