"""Blocks that hold some of their tensors in common: the convolutions of one, norms of their own."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from ..errors import ResodeError

# The norm layers of timm and of most others derive from these.
NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
)


def norm_names(module: nn.Module) -> set[str]:
    """Names of the parameters and buffers that belong to norms: scales, shifts and statistics."""
    norms = {prefix for prefix, layer in module.named_modules() if isinstance(layer, NORMS)}
    return {name for name in tensors_of(module) if name.rpartition(".")[0] in norms}


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under their names; a tensor held twice comes twice."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def share_layers(module: nn.Module, base: nn.Module, *, norms: bool = False) -> None:
    """Let `module` hold the parameters of `base` itself, but for those of norms; with `norms` those too.

    Raises ResodeError if the two are not built alike.
    """
    own = set() if norms else norm_names(module)
    others = dict(base.named_parameters(remove_duplicate=False))
    for name, parameter in list(module.named_parameters(remove_duplicate=False)):
        if name in own:
            continue
        if name not in others or others[name].shape != parameter.shape:
            raise ResodeError(f"blocks differ in {name!r}, so they cannot share it")
        path, _, last = name.rpartition(".")
        setattr(module.get_submodule(path), last, others[name])


def distinct(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Each tensor once, under the first of its names."""
    seen: set[int] = set()
    found = {}
    for name, tensor in named:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found
