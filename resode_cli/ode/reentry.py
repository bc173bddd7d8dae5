"""The conditions of the forward pass, to be restored around its re-evaluations: autocast, modes, buffers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ResodeError


def version(x: Tensor) -> int:
    """How often x was written to; not tracked in inference mode."""
    return 0 if x.is_inference() else x._version


@dataclass(frozen=True)
class Autocast:
    """The autocast state of the forward pass, to be entered again in the backward pass.

    Without its weight cache: a weight cast under no_grad and then reused on the tape has lost its
    gradient, silently.
    """

    device_type: str
    enabled: bool
    dtype: torch.dtype | None

    @classmethod
    def now(cls, device_type: str) -> Autocast:
        if not torch.amp.is_autocast_available(device_type):
            return cls(device_type, False, None)
        return cls(device_type, torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type))

    def enter(self) -> AbstractContextManager[Any]:
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.enabled, cache_enabled=False)


@dataclass(frozen=True)
class Modes:
    """Train or eval mode of every module in the forward pass, and the versions of the buffers read in eval mode."""

    training: tuple[tuple[nn.Module, bool], ...]
    versions: tuple[tuple[Tensor, int], ...]

    @classmethod
    def now(cls, blocks: Sequence[nn.Module]) -> Modes:
        modules = [m for block in blocks for m in block.modules()]
        read = [b for m in modules if not m.training for b in m._buffers.values() if b is not None]
        return cls(tuple((m, m.training) for m in modules), tuple((b, version(b)) for b in read))

    @contextmanager
    def enter(self) -> Iterator[None]:
        """The modes of the forward pass. Raises ResodeError if a buffer that it read was written to since."""
        if any(version(buffer) != before for buffer, before in self.versions):
            raise ResodeError(
                "statistics that the forward pass normalised by were changed before the backward pass;"
                " run backward first"
            )
        changed = [(m, m.training) for m, training in self.training if m.training != training]
        try:
            for module, training in self.training:
                module.training = training
            yield
        finally:
            for module, training in changed:
                module.training = training


def buffer_versions(blocks: Sequence[nn.Module]) -> dict[Tensor, int]:
    """How often each buffer of a module in eval mode was written to."""
    found = {}
    for module in (m for block in blocks for m in block.modules()):
        if not module.training:
            found.update({buffer: version(buffer) for buffer in module._buffers.values() if buffer is not None})
    return found


@contextmanager
def without_tensor_hooks(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Gradients that are sums in the making do not run into the hooks on parameters; autograd hands the sum to them."""
    hooked = [(p._backward_hooks, dict(p._backward_hooks)) for p in parameters if p._backward_hooks]
    try:
        for hooks, _ in hooked:
            hooks.clear()
        yield
    finally:
        for hooks, own in hooked:
            hooks.update(own)


@contextmanager
def fixed_buffers(modules: Sequence[nn.Module], *, written: Collection[Tensor] = ()) -> Iterator[None]:
    """Let modules in train mode update copies of their buffers, so that re-evaluations leave no trace.

    BatchNorm's running statistics and counters then move once, in the forward pass, whatever the
    number of evaluations; the same holds for any other module that keeps state in buffers.

    written: buffers of modules in eval mode that the forward pass wrote to all the same, as counters.
    """
    known = {id(buffer) for buffer in written}
    originals: list[tuple[nn.Module, str, Tensor]] = []
    seen: set[int] = set()
    for module in (m for block in modules for m in block.modules()):
        if id(module) not in seen and (module.training or known):
            seen.add(id(module))
            for name, buffer in module._buffers.items():
                if buffer is not None and (module.training or id(buffer) in known):
                    originals.append((module, name, buffer))
    try:
        for module, name, buffer in originals:
            module._buffers[name] = buffer.clone()
        yield
    finally:
        for module, name, buffer in originals:
            module._buffers[name] = buffer
