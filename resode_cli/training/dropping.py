"""Random layers of a network that a training run switches on: drop path in its blocks, dropout before its head."""

from __future__ import annotations

from timm.layers import DropPath
from torch import nn
from torchvision.ops import StochasticDepth

from ..errors import UsageError, first_few
from ..network.model import OdeResNet
from .settings import Settings


def use_random_layers(model: OdeResNet, settings: Settings) -> None:
    """Set the rates of drop path and of dropout, where the settings have them.

    Raises UsageError for a network that has no such layers.
    """
    if settings.drop_path is not None:
        _use_drop_path(model, settings.drop_path)
    if settings.dropout is not None:
        _use_dropout(model, settings.dropout)


def _use_drop_path(model: OdeResNet, rate: float) -> None:
    """Rates that grow linearly from 0 in the first block to `rate` in the last (Huang et al. 2016, section 3).

    timm's blocks have a place for it that is empty at rate 0; what stands there then is none of the model's file.
    """
    blocks = [places for block in _blocks(model) if (places := _places(block))]
    if not blocks:
        raise UsageError("--drop-path: the blocks of this network have no drop path (or stochastic depth)")
    for i, places in enumerate(blocks):
        own = rate * i / max(len(blocks) - 1, 1)
        for module, name in places:
            layer = getattr(module, name)
            if isinstance(layer, StochasticDepth):
                layer.p = own
            elif isinstance(layer, DropPath):
                layer.drop_prob = own
            elif own:
                pre = [n for n, s in model.stages.items() if s.spec.form == "pre" and _within(s, module)]
                if pre:
                    raise UsageError(
                        f"--drop-path adds layers to blocks, which those of {first_few(pre)} in form 'pre' cannot take;"
                        " convert with --form exact, or leave it out"
                    )
                setattr(module, name, DropPath(own))


def _within(stage: nn.Module, module: nn.Module) -> bool:
    return any(module is other for other in stage.modules())


def _blocks(model: OdeResNet) -> list[nn.Module]:
    """Distinct blocks of all stages, transitions included, in order."""
    return [block for stage in model.stages.values() for block in (*stage.transition, *stage.blocks)]


def _places(block: nn.Module) -> list[tuple[nn.Module, str]]:
    """Where a block drops paths, or may: a layer for it, or one of timm's that is empty."""
    found = []
    for module in block.modules():
        for name in ("drop_path", "drop_path1", "drop_path2", "stochastic_depth"):
            layer = getattr(module, name, module)
            empty = layer is None or isinstance(layer, nn.Identity)
            if isinstance(layer, (DropPath, StochasticDepth)) or (
                empty and type(module).__module__.startswith("timm.")
            ):
                found.append((module, name))
    return found


def _use_dropout(model: OdeResNet, rate: float) -> None:
    """The rate of what drops features behind the last stage: layers, or what timm's networks call their drop_rate."""
    net, stages = model.net, list(model.stages.values())
    modules = list(net.modules())
    last = max(modules.index(module) for stage in stages for module in stage.modules())
    layers = [module for module in modules[last + 1 :] if isinstance(module, nn.modules.dropout._DropoutNd)]
    for layer in layers:
        layer.p = rate
    head = getattr(type(net), "forward_head", None)
    by_rate = isinstance(getattr(net, "drop_rate", None), float) and "drop_rate" in getattr(
        getattr(head, "__code__", None), "co_names", ()
    )
    if by_rate:
        net.drop_rate = rate  # type: ignore[assignment]
    if not layers and not by_rate:
        raise UsageError("--dropout: this network has no dropout before its head")
