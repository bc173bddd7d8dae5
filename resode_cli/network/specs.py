"""What a model file says of a stage: everything but its tensors."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from ..errors import UsageError
from .residual import Form

LONGEST_HORIZON = 10**9


def as_horizon(text: str) -> Fraction:
    """T from text: '1', '0.5' or '1/3'. Raises UsageError for what is none, or not above 0."""
    # Not much of it, and no exponents: Fraction('1e999999999') would compute for ever.
    known = re.fullmatch(r"\d{1,12}(\.\d{1,12})?|\d{1,12}/0*[1-9]\d{0,11}", text.strip(), re.ASCII)
    horizon = Fraction(text.strip()) if known else Fraction(0)
    if not 0 < horizon <= LONGEST_HORIZON:
        raise UsageError(f"--horizon {text}: must be a number above 0, at most {LONGEST_HORIZON}, as in 1, 0.5 or 1/3")
    return horizon


@dataclass(frozen=True)
class BlockSpec:
    """One distinct block: its name in the file, and the source block whose structure it has.

    shares: name of the block whose parameters it holds, all but those of norms, instead of its own.
    shares_norms: whether it holds those of norms too, so that the norms' running statistics alone are its own.
    """

    name: str
    origin: str
    shares: str | None = None
    shares_norms: bool = False


@dataclass(frozen=True)
class StageSpec:
    """Everything about a stage but its tensors; this is what a model file stores.

    name: unique in the model: the container, and '#2' and so on where it holds several stages.
    container: path in the source network of the sequence of blocks, e.g. 'layer1'.
    transition: names of the transition blocks.
    source_blocks: names of the container's children that the source's own steps were, or the same name as often as
        the source calls that child in a row.
    blocks: the distinct blocks.
    schedule: which distinct block step n uses; its length is the depth N.
    horizon: T; a fraction, so that T/N is the same number however it was reached.
    blends: where weights are linear in depth, the share w_n in which step n has the weights of block
        schedule[n] + 1; those of block schedule[n] make up the rest. Else empty.
    scheme: forward rule. form: form of the residual functions.
    further: names of the arguments that the blocks take beside the state, each the same for all of them; such
        blocks are steps taken as a whole.
    """

    name: str
    container: str
    transition: tuple[str, ...]
    source_blocks: tuple[str, ...]
    blocks: tuple[BlockSpec, ...]
    schedule: tuple[int, ...]
    horizon: Fraction
    scheme: str = "euler"
    form: Form = "exact"
    blends: tuple[float, ...] = ()
    further: tuple[str, ...] = ()

    @property
    def depth(self) -> int:
        return len(self.schedule)

    @property
    def calls(self) -> int:
        """How often the source calls what the stage stands for in a row, as a loop over one block does."""
        return len(self.source_blocks) if len(set(self.source_blocks)) == 1 else 1

    @property
    def step_size(self) -> float:
        """h = T/N, rounded once."""
        return float(self.horizon / self.depth) if self.depth else 0.0

    @property
    def kind(self) -> str:
        """How the steps share weights: untied, tied, tied+stats, tied+norms, linear in depth, or in runs of steps."""
        if self.blends:
            return "linear"
        if len({block.shares or block.name for block in self.blocks}) == 1 < len(self.blocks):
            return "tied+stats" if any(block.shares_norms for block in self.blocks) else "tied+norms"
        if self.schedule == tuple(range(self.depth)):
            return "untied"
        return "tied" if len(set(self.schedule)) == 1 else "runs"
