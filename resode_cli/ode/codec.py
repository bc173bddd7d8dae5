"""Tensors as codes of few bits, in groups with a range of their own, packed.

    q = round((x − lo) / scale),   x̂ = lo + q scale,   scale = (hi − lo) / (2^K − 1)

lo, hi: of GROUP neighbouring numbers; lo and scale are bfloat16, rounded outwards so that no q leaves 0 … 2^K − 1.
A number takes K + 32 / GROUP bits. One bit alone, the sign of a rectifier's input, takes one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .generators import is_simulated

GROUP = 64
WIDTHS = range(2, 9)  # bits


@dataclass(frozen=True)
class Code:
    """Coded numbers. packed: uint8, chunk after chunk; ranges: (2, groups), lo and scale."""

    packed: Tensor
    ranges: Tensor
    bits: int
    numbers: int

    @classmethod
    def of_difference(cls, x: Tensor, estimate: Tensor, bits: int) -> Code:
        """The code of x − estimate, flat float32 numbers; what it stands for is added to the estimate, in place.

        In chunks that stay in a processor's cache, so that no further tensor of that size is made.
        """
        if is_simulated(x):
            _pretend(estimate, CODING)
            groups = -(-len(x) // GROUP)
            sizes = x.new_empty(groups * GROUP * bits // 8, dtype=torch.uint8), x.new_empty(2, groups).bfloat16()
            return cls(*sizes, bits, len(x))
        packed, ranges = [], []
        for a in range(0, len(x), CHUNK):
            rows = _rows(x[a : a + CHUNK] - estimate[a : a + CHUNK])
            low, high = torch.aminmax(rows, dim=1, keepdim=True)
            low = (low - low.abs() * 2**-8).bfloat16()
            step = ((high - low.float()) * ((1 + 2**-7) / (2**bits - 1))).bfloat16()
            lo, scale = low.float(), step.float()
            inverse = torch.where(scale > 0, 1 / scale, 0)
            q = torch.addcmul(0.5 - lo * inverse, rows, inverse).to(torch.uint8)  # cut after adding a half: rounded
            _add(estimate[a : a + CHUNK], q, lo, scale)
            packed.append(_pack(q.view(-1), bits))
            ranges.append(torch.cat([low, step], 1).T)
        return cls(torch.cat(packed), torch.cat(ranges, 1).contiguous(), bits, len(x))

    def add_to(self, estimate: Tensor, sign: int = 1) -> None:
        """Add what it stands for to flat float32 numbers, in place, or subtract it."""
        if is_simulated(estimate):
            _pretend(estimate, DECODING)
            return
        for a in range(0, self.numbers, CHUNK):
            count = min(CHUNK, self.numbers - a)
            groups = -(-count // GROUP)
            first, size = a * self.bits // 8, groups * GROUP * self.bits // 8
            q = _unpack(self.packed[first : first + size], self.bits).view(groups, GROUP)
            lo, scale = self.ranges[:, a // GROUP : a // GROUP + groups].float().mul_(sign).unsqueeze(-1)
            _add(estimate[a : a + CHUNK], q, lo, scale)


# How often the numbers are gone through, as additions of two tensors count.
CODING, DECODING = 5, 3


def _pretend(estimate: Tensor, times: int) -> None:
    """In a simulation, take the time of coding, in no more memory."""
    for _ in range(times):
        estimate.add_(estimate)


CHUNK = 2**18  # numbers; a multiple of GROUP and of 8


def _rows(numbers: Tensor) -> Tensor:
    """In groups, the last one filled up with copies of the last number."""
    missing = -len(numbers) % GROUP
    return (torch.cat([numbers, numbers[-1:].expand(missing)]) if missing else numbers).view(-1, GROUP)


def _add(estimate: Tensor, q: Tensor, lo: Tensor, scale: Tensor) -> None:
    estimate += torch.addcmul(lo, q, scale).view(-1)[: len(estimate)]


@dataclass(frozen=True)
class Layout:
    """The shape of a tensor, and whether its channels are last in memory."""

    shape: tuple[int, ...]
    channels_last: bool

    @classmethod
    def of(cls, x: Tensor) -> Layout:
        last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        return cls(tuple(x.shape), last)

    def flat(self, x: Tensor) -> Tensor:
        """A tensor's numbers in this order, in float32; those of the tensor itself, where they are."""
        return (x.permute(0, 2, 3, 1) if self.channels_last else x).reshape(-1).float()

    def shaped(self, numbers: Tensor) -> Tensor:
        """Numbers in this order as a tensor of this shape."""
        if not self.channels_last:
            return numbers.view(self.shape)
        batch, channels, height, width = self.shape
        return numbers.view(batch, height, width, channels).permute(0, 3, 1, 2)


def _pack(q: Tensor, bits: int) -> Tensor:
    """Codes of the width in whole bytes: two halves for 4 bits, bit planes else."""
    if bits == 8:
        return q
    if bits == 4:
        half = len(q) // 2
        return q[half:].bitwise_left_shift(4).bitwise_or_(q[:half])
    return torch.cat([pack_bits(q.bitwise_right_shift(k).bitwise_and_(1)) for k in range(bits)])


def _unpack(packed: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return packed
    if bits == 4:
        return torch.cat([packed.bitwise_and(15), packed.bitwise_right_shift(4)])
    planes = packed.view(bits, -1)
    q = unpack_bits(planes[0], 8 * planes.shape[1])
    for k in range(1, bits):
        q.bitwise_or_(unpack_bits(planes[k], len(q)).bitwise_left_shift_(k))
    return q


def pack_bits(flags: Tensor) -> Tensor:
    """Numbers 0 and 1, or truth values, eight to a byte."""
    if flags.device.type == "cpu":
        if is_simulated(flags):
            return flags.new_empty(-(-len(flags) // 8), dtype=torch.uint8)
        return torch.from_numpy(np.packbits(flags.view(torch.uint8).numpy(), bitorder="little"))
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=flags.device)
    packed = flags.new_empty(-(-len(flags) // 8), dtype=torch.uint8)
    for a in range(0, len(flags), CHUNK):
        part = flags[a : a + CHUNK].view(torch.uint8)
        rows = torch.nn.functional.pad(part, (0, -len(part) % 8)).view(-1, 8)
        packed[a // 8 : a // 8 + len(rows)] = (rows * weights).sum(1, dtype=torch.uint8)
    return packed


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """The first numbers 0 and 1, as uint8."""
    if packed.device.type == "cpu":
        if is_simulated(packed):
            return packed.new_empty(count)
        return torch.from_numpy(np.unpackbits(packed.numpy(), count=count, bitorder="little"))
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return packed.unsqueeze(1).bitwise_right_shift(shifts).bitwise_and_(1).view(-1)[:count]
