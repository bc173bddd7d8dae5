"""What an operation on tensors without numbers returned, for when it is called again on tensors of the same kind.

A step repeats few operations many times, and to find out what one returns takes torch several times as long as to make
a tensor of a kind that is known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

Key = tuple[Any, ...]

# Operations whose result follows from numbers, or that give their argument another shape.
_UNKNOWN = frozenset((torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view))
# Arguments that say by themselves what they are; a generator or a module, say, does not.
_PLAIN = frozenset((int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format))


@dataclass(frozen=True)
class _Returned:
    """A tensor that an operation returns.

    source: the place of the argument that it is itself, or shows a part of; None if it is new.
    """

    kind: Key
    source: int | None
    itself: bool


@dataclass(frozen=True)
class Cost:
    """What an operation costs. moved: bytes of its tensors, each once. flops: of its arithmetic.

    copied: bytes of the copies that a library for processors makes for it at a time.
    """

    moved: int
    flops: int
    copied: int


@dataclass(frozen=True)
class Call:
    """What an operation returns: several tensors where `sequence` is a tuple or a list. cost: None if it is free."""

    returned: tuple[_Returned | None, ...]
    sequence: type[tuple[Any, ...]] | type[list[Any]] | None
    cost: Cost | None

    def repeat(self, mode: FakeTensorMode, tensors: Sequence[FakeTensor]) -> Any:
        """What it returns for these tensors of its arguments."""
        made = [None if one is None else _made(mode, one, tensors) for one in self.returned]
        return made[0] if self.sequence is None else self.sequence(made)


def key_of(
    mode: FakeTensorMode, func: Any, args: Any, kwargs: Mapping[str, Any], tensors: list[FakeTensor]
) -> Key | None:
    """What the result of an operation follows from. tensors: a list to which those of its arguments are added.

    None if it does not follow from kinds alone: of a tensor whose number is known, or that is none of the mode's.
    """
    key: list[Any] = [func, torch.get_default_dtype(), torch.is_inference_mode_enabled()]
    if not _describe(mode, args, key, tensors):
        return None
    if kwargs:
        key += kwargs
        if not _describe(mode, kwargs.values(), key, tensors):
            return None
    if len(tensors) > 1:  # the bytes that it moves follow from which of them are one
        key.append(len({id(t) for t in tensors}))
    return tuple(key)


def _describe(mode: FakeTensorMode, args: Any, key: list[Any], tensors: list[FakeTensor]) -> bool:
    for arg in args:
        kind = type(arg)
        if kind is FakeTensor:
            if arg.constant is not None or arg.fake_mode is not mode:
                return False
            tensors.append(arg)
            key.append(_kind_of(arg))
        elif kind in _PLAIN:
            key.append(kind)  # 1, 1.0 and True are equal
            key.append(arg)
        elif kind is list or kind is tuple:
            key.append(len(arg))
            if not _describe(mode, arg, key, tensors):
                return False
        else:
            return False
    return True


def _kind_of(tensor: FakeTensor) -> Key:
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.fake_device


def call_of(key: Key, tensors: Sequence[FakeTensor], out: Any, cost: Cost | None) -> Call | None:
    """What to remember of an operation that was called; None where it may not return the same again."""
    func = key[0]
    if func.namespace != "aten" or not _UNKNOWN.isdisjoint(func.tags):
        return None
    if [_kind_of(t) for t in tensors] != [part for part in key if type(part) is tuple]:
        return None  # an argument was given another shape
    sequence = type(out) if type(out) in (tuple, list) else None
    own = [t.untyped_storage()._cdata for t in tensors]
    returned: list[_Returned | None] = []
    seen: set[int] = set()
    for tensor in out if sequence is not None else (out,):
        if tensor is None:
            returned.append(None)
            continue
        if type(tensor) is not FakeTensor or tensor.constant is not None or tensor.layout is not torch.strided:
            return None
        if tensor.dtype.is_complex or tensor.is_neg():
            return None
        same = [place for place, t in enumerate(tensors) if t is tensor]
        storage = tensor.untyped_storage()
        if same:
            source = same[0]
        elif storage._cdata in own:
            source = own.index(storage._cdata)
        elif storage._cdata in seen or storage.nbytes() != _least_bytes(tensor):
            return None
        else:
            source = None
            seen.add(storage._cdata)
        returned.append(_Returned(_kind_of(tensor), source, bool(same)))
    return Call(tuple(returned), sequence, cost)


def _least_bytes(tensor: Tensor) -> int:
    """Bytes of a storage that is made for a tensor alone; less than any, where it is one's part."""
    if tensor.storage_offset():
        return -1
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size() if tensor.numel() else 0


def _made(mode: FakeTensorMode, one: _Returned, tensors: Sequence[FakeTensor]) -> FakeTensor:
    if one.itself:
        assert one.source is not None
        return tensors[one.source]
    shape, stride, offset, dtype, device = one.kind
    with torch._C._DisableTorchDispatch():
        if one.source is None:
            plain = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        else:
            plain = torch.empty(0, dtype=dtype, device="meta")
            plain.set_(tensors[one.source].untyped_storage(), offset, shape, stride)
    return FakeTensor(mode, plain, device)
