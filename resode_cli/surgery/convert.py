"""Write a source network as stages of 1/N-scaled residual steps, and verify that it is the same function."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

from ..errors import ResodeError, unknown
from ..machine.memory import check_room
from ..network.assembling import assemble
from ..network.between import AnotherLoop
from ..network.block_inputs import tensors_in
from ..network.model import ModelInfo, OdeResNet
from ..network.parts import Preprocessing, Source, StageParts
from ..network.repeat import as_before, generator_states, generators_kept, repeatable
from ..network.residual import GENERIC, LINEAR, Form, as_form
from ..network.specs import BlockSpec, StageSpec
from ..ode import SCHEMES
from ..sources.find_stages import find_stages
from ..sources.registry import source_of

# Largest difference of logits, relative to their largest magnitude, that rounding explains where a
# step is not computed as the block itself (smooth activations). Random deep networks amplify
# rounding, so this is far above one unit in the last place and far below any wrong formula.
LOGITS_AGREE = 1e-3
VERIFIED = 4  # random images
SEVERAL = 2  # of them, for gradients and further seeds
SEEDS = 8
GRADIENTS_AGREE = 1e-2  # relative to a parameter's gradient, or, for one that hardly has any, to the largest


@dataclass(frozen=True)
class Verification:
    """The converted network against its source on one batch.

    max_difference: largest absolute difference of the logits. top1_agreement: fraction of images.
    """

    batch: str
    images: int
    max_difference: float
    top1_agreement: float
    function_kept: bool

    @property
    def identical(self) -> bool:
        return self.max_difference == 0.0

    def record(self) -> dict[str, object]:
        """For the model's history and for JSON."""
        return {**asdict(self), "identical": self.identical}


def convert(
    source: Source | nn.Module,
    *,
    scheme: str = "euler",
    form: Form = "exact",
    horizon: Fraction | None = None,
    images: int = VERIFIED,
    example: Tensor | None = None,
) -> tuple[OdeResNet, Verification]:
    """Convert `source`, whose network is used up, and compare logits on a batch.

    source: what `open_source` returns, or any network of one's own from images to logits, of which a
        `pretrained_cfg` or `default_cfg`, a dictionary as timm's, says how images are made its input.
    example: the batch; normal noise (images, channels, height, width), always the same, in the network's precision
        and on its device, if it is not given.

    Every step gets h = T/N with T = N, so Euler steps of exact residual functions are the source's
    blocks. horizon: another T for every stage, which is another function: 1 for training from scratch as in the
    paper, whose steps are x + f(x)/N. Raises ResodeError if they then do not agree, or if there is no residual step.
    """
    check_scheme_and_form(scheme, form)
    if not isinstance(source, Source):
        source = source_of(source)
    net = source.net
    net.eval()  # not `net = net.eval()`: a network's own `train` may return nothing
    batch = like(random_batch(source.preprocessing, images), net) if example is None else example
    with as_before(net):
        before = _logits(net, batch, str(source.spec))
    if not torch.isfinite(before).all():
        raise ResodeError(
            f"{source.spec} gives logits that are no numbers, so that a conversion could not be compared with it: its"
            " weights hold NaN or infinity, or are too large; nothing was written"
        )
    trained = _in_training(net, batch)
    with as_before(net):
        found = find_stages(net, batch[:1])
    specs = stage_specs(found.stages, scheme=scheme, form=form)
    info = ModelInfo(
        source.spec,
        source.preprocessing,
        before.shape[1],
        source.class_names,
        left_out=tuple(found.left_out),
        multi_label=source.multi_label,
    )
    model = assemble(net, specs, info).eval()
    if horizon is not None:
        for stage in model.stages.values():
            stage.use_horizon(horizon)
    with as_before(model):
        after = _logits(model, batch, "the converted network")
    changed = any(_changes_function(model, name) for name in model.stages)
    kind = "random images" if example is None else "images given"
    result = compare_logits(before, after, batch=f"{kind}, {batch.shape[-2]}×{batch.shape[-1]}", kept=not changed)
    scale = before.abs().max().item()
    if not changed and not result.max_difference <= LOGITS_AGREE * max(scale, 1.0):
        raise ResodeError(
            f"the converted network does not agree with {source.spec}:"
            f" logits differ by {result.max_difference:.3g} (largest logit {scale:.3g}); nothing was written"
        )
    if not changed and trained is not None:
        _check_in_training(trained, model, batch, str(source.spec))
    if any(stage.spec.calls > 1 for stage in model.stages.values()):
        _check_recorded(model, batch[:SEVERAL])
    return model, result


@dataclass(frozen=True)
class _Training:
    """What a network does in train mode, with random numbers that come again.

    outputs: by seed; of more seeds than one where it draws from the host's generators, for a loop that skips blocks by
    chance may do nothing of the kind with the first. gradients: of the sum of squares of what it returns for a few
    images, by name of the parameter.
    """

    outputs: dict[int, list[Tensor]]
    gradients: dict[str, Tensor] | None


def _in_training(net: nn.Module, batch: Tensor, name: Callable[[str], str] = str) -> _Training | None:
    """The network is left as it was. None where it does not run on this batch, as where norms want more values."""
    few = batch[:SEVERAL]
    try:
        with as_before(net), torch.no_grad():
            net.train()
            outputs = {0: tensors_in(repeatable(lambda: net(batch)))}
            for seed in range(1, SEEDS if _draws(net, few) else 1):
                outputs[seed] = tensors_in(repeatable(lambda: net(few), seed))
    except AnotherLoop:
        raise
    except Exception:  # whatever a network of one's own raises
        return None
    return _Training(outputs, _gradients(net, few, name))


def _draws(net: nn.Module, images: Tensor) -> bool:
    """Whether a pass draws random numbers."""
    with generators_kept():
        before = generator_states()
        net(images)
        return generator_states() != before


def _gradients(net: nn.Module, images: Tensor, name: Callable[[str], str]) -> dict[str, Tensor] | None:
    named = {key: p for key, p in net.named_parameters() if p.requires_grad and not p.is_meta}
    if not named:
        return None

    def run() -> tuple[Tensor | None, ...]:
        loss = sum(out.double().square().sum() for out in tensors_in(net(images)) if out.requires_grad)
        return torch.autograd.grad(loss, list(named.values()), allow_unused=True) if isinstance(loss, Tensor) else ()

    try:
        with as_before(net), torch.enable_grad():
            net.train()
            found = repeatable(run)
    except AnotherLoop:
        raise
    except Exception:
        return None
    return {name(key): g for key, g in zip(named, found, strict=False) if g is not None}


def _check_in_training(expected: _Training, model: OdeResNet, batch: Tensor, source: str) -> None:
    """Raises ResodeError if the converted network does not do in train mode what its source did."""
    found = _in_training(model, batch, lambda key: model.file_name(key.removeprefix("net.")))
    if found is None or found.outputs.keys() != expected.outputs.keys():
        raise ResodeError(f"in train mode {source} runs, but the converted network does not; nothing was written")
    for seed, outputs in expected.outputs.items():
        for a, b in zip(outputs, found.outputs[seed], strict=True):
            if not torch.isfinite(a).all():  # it overflows in train mode, and there is nothing to compare
                continue
            scale = max(float(a.abs().max()), 1.0)
            difference = float((a - b).abs().max())
            if not difference <= LOGITS_AGREE * scale:
                raise ResodeError(
                    f"in train mode the converted network does not agree with {source}: what they return differs by"
                    f" {difference:.3g} (largest value {scale:.3g}), with equal random numbers; something outside its"
                    " blocks, such as a loop that skips some of them, does more when it trains, or a block goes by what"
                    " it keeps from call to call; nothing was written"
                )
    if expected.gradients is not None:
        _check_gradients(expected.gradients, found.gradients or {}, source)


def _check_recorded(model: OdeResNet, images: Tensor) -> None:
    """Raises ResodeError where a loop over one block cannot be followed while autograd records it.

    A source that checkpoints by re-entry has no gradients to compare.
    """
    try:
        with as_before(model), torch.enable_grad():
            model.train()
            repeatable(lambda: model(images))
    except ResodeError:
        raise
    except Exception:  # whatever the network does not do in train mode, its source does not either
        return


def _check_gradients(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], source: str) -> None:
    largest = max((float(g.double().norm()) for g in expected.values()), default=0.0)
    for name in expected.keys() | found.keys():
        g, h = expected.get(name), found.get(name)
        if g is None or h is None:
            difference = float((g if h is None else h).double().norm())  # type: ignore[union-attr]
        else:
            difference = float((g.double() - h.double()).norm())
        size = float(g.double().norm()) if g is not None else 0.0
        # NaN, where the network itself overflows, compares as false.
        if difference > GRADIENTS_AGREE * max(size, GRADIENTS_AGREE * largest):
            raise ResodeError(
                f"the gradients of the converted network do not agree with those of {source}: {name} is off by"
                f" {difference:.3g} (its size is {size:.3g}); something between its blocks changes gradients, such as a"
                " detach, torch.no_grad or a hook on a state; nothing was written"
            )


def check_scheme_and_form(scheme: str, form: str) -> None:
    """Raises UsageError for a forward rule or form that does not exist."""
    if scheme not in SCHEMES:
        raise unknown("scheme", scheme, SCHEMES)
    as_form(form)


def _changes_function(model: OdeResNet, name: str) -> bool:
    stage = model.stages[name]
    clipped = stage.activation not in (LINEAR, GENERIC)
    return stage.spec.depth > 0 and (
        stage.spec.scheme != "euler" or stage.spec.horizon != stage.spec.depth or (stage.spec.form == "pre" and clipped)
    )


def stage_specs(parts: list[StageParts], *, scheme: str, form: Form) -> list[StageSpec]:
    """Stages with T = N: untied, or tied as far as the source's steps share blocks."""
    seen: Counter[str] = Counter()
    specs = []
    for part in parts:
        seen[part.container] += 1
        count = seen[part.container]
        blocks = [part.same.get(name, name) for name in part.blocks]
        distinct = list(dict.fromkeys(blocks))
        specs.append(
            StageSpec(
                name=(part.container or "net") + (f"#{count}" if count > 1 else ""),
                container=part.container,
                transition=part.transition,
                source_blocks=part.blocks,
                blocks=tuple(BlockSpec(name, name) for name in distinct),
                schedule=tuple(distinct.index(name) for name in blocks),
                horizon=Fraction(len(part.blocks)),
                scheme=scheme,
                form=form,
                further=part.further,
            )
        )
    return specs


def random_batch(preprocessing: Preprocessing, images: int, *, seed: int = 0) -> Tensor:
    """A fixed batch of normal noise (B, C, H, W), for where there is no real data.

    Raises ResodeError for one that would not leave memory for a network to run on it.
    """
    check_room(images, *preprocessing.shape)
    return torch.randn(images, *preprocessing.shape, generator=torch.Generator().manual_seed(seed))


def like(batch: Tensor, net: nn.Module) -> Tensor:
    """The batch on the network's device, in the precision of its weights."""
    own = next((t for t in (*net.parameters(), *net.buffers()) if t.is_floating_point()), batch)
    return batch.to(own.device, own.dtype)


def _logits(net: nn.Module, batch: Tensor, name: str) -> Tensor:
    with torch.no_grad():
        try:
            logits = net(batch)
        except ResodeError:
            raise
        except Exception as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ResodeError(f"{name} fails on a batch of shape {tuple(batch.shape)}: {first}") from error
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ResodeError(
            f"{name} returns {shape} where logits (images, classes) are needed; convert it with its head, and take"
            " features from the result (`model.net.forward_intermediates`, hooks)"
        )
    return logits


def compare_logits(before: Tensor, after: Tensor, *, batch: str, kept: bool) -> Verification:
    """kept: whether the function is the same by what was done; NaN and infinity agree where they are alike."""
    differ = torch.where((before == after) | (before.isnan() & after.isnan()), 0.0, (before - after).abs())
    return Verification(
        batch=batch,
        images=len(before),
        max_difference=differ.nan_to_num(nan=math.inf).max().item(),
        top1_agreement=(before.argmax(1) == after.argmax(1)).double().mean().item(),
        function_kept=kept,
    )
