"""The head of a network: the layer that gives its logits."""

from __future__ import annotations

from torch import nn


def last_linear(net: nn.Module) -> tuple[str, nn.Linear | nn.Conv2d] | None:
    """The classifier: the last layer, where it is linear (a 1×1 convolution in some networks)."""
    layers = [(name, m) for name, m in net.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    return layers[-1] if layers else None


def head_parameters(net: nn.Module) -> tuple[str, ...]:
    """Names of the head's parameters: of what the network calls its classifier, as timm's do, or of its last layer."""
    told = getattr(net, "get_classifier", None)
    found = told() if callable(told) else None
    modules = [m for m in (found if isinstance(found, (tuple, list)) else (found,)) if isinstance(m, nn.Module)]
    own = {id(parameter) for module in modules for parameter in module.parameters()}
    if not own and (last := last_linear(net)) is not None:
        own = {id(parameter) for parameter in last[1].parameters()}
    return tuple(name for name, parameter in net.named_parameters() if id(parameter) in own)
