"""The settings of a fit: what a user may choose, and what is allowed."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UsageError, unknown
from ..quantities import COUNT, COUNT_OR_NONE, NOT_NEGATIVE, POSITIVE, SEED, WORKERS, check_ranges, ranged

TO_STATES, END_TO_END = ("blocks", "stages"), ("logits", "refine")
PHASES = TO_STATES + END_TO_END
BATCH_NORM = ("recalibrate", "keep", "batch")


@dataclass(frozen=True)
class FitSettings:
    """phases: in this order. After as many steps of 'blocks' as here, 'logits' at a smaller depth and the rate of the
    states made both of the CIFAR networks worse. steps: of each; the last, 'refine', takes `refine_steps`.

    images: to use, held-out ones included; None: all. More cost nothing: a step reads `batch_size` of them.

    lr: largest, of Adam, where states are matched; a warm-up over a tenth of a phase, then a cosine to 0.
    logits_lr: the same end to end ('logits', 'refine'). What fits states upsets logits: at the higher rate a phase of
        some hundred steps ended no better than it began, on a ResNet-56 tied or at 100 steps per stage.
    clip_grad: largest norm.
    temperature: of the logits. states: weight of the states' mean e_k beside the logits: more of it keeps the
        student closer to the source, less of it leaves it free to do better.
    smooth, contract: weights of the penalties; see `penalties`.
    bn: 'recalibrate' re-estimates the statistics on the student's own states, then freezes them; 'keep'
        freezes the source's; 'batch' re-estimates them and trains with those of the batch. With the recipes of
        the CIFAR networks these ended at 80.76, 80.70 and 77.84 % (ResNet-20 at 36 steps; 81.02 % before) and at
        82.56, 83.06 and 82.30 % (ResNet-56 at 100; 83.02 %), 5,000 images, so half a point is a standard error;
        'recalibrate' and 'keep' agree with the source on 88.7 and 88.7, 91.9 and 92.0 % of them, and in the
        largest error of `multistep` the first is ahead (0.015 against 0.021 on the ResNet-56). 'tied+norms', whose
        norms do the work, wants 'batch'.
    substeps: steps per source block in all phases but 'refine'; 0: full depth from the start.
    """

    phases: tuple[str, ...] = ("blocks", "refine")
    steps: int = ranged(400, COUNT_OR_NONE, flag="--fit-steps")
    refine_steps: int = ranged(120, COUNT_OR_NONE, flag="--fit-refine-steps")
    images: int | None = ranged(None, COUNT, flag="--fit-images")
    batch_size: int = ranged(32, COUNT, flag="--fit-batch-size")
    lr: float = ranged(4e-4, POSITIVE, flag="--fit-lr")
    logits_lr: float = ranged(1.2e-4, POSITIVE, flag="--fit-logits-lr")
    clip_grad: float = ranged(5.0, POSITIVE, flag="--fit-clip-grad")
    temperature: float = ranged(2.0, POSITIVE)
    states: float = ranged(0.0, NOT_NEGATIVE, flag="--fit-states")
    smooth: float = ranged(0.0, NOT_NEGATIVE)
    contract: float = ranged(0.0, NOT_NEGATIVE)
    bn: str = "recalibrate"
    substeps: int = ranged(2, COUNT_OR_NONE, flag="--fit-substeps")
    augment: bool = False
    seed: int = ranged(0, SEED)
    workers: int = ranged(0, WORKERS)

    def __post_init__(self) -> None:
        for phase in self.phases:
            if phase not in PHASES:
                raise unknown("fit phase", phase, PHASES)
        if list(self.phases) != sorted(set(self.phases), key=PHASES.index) or not self.phases:
            raise UsageError(f"--fit-phases {','.join(self.phases)}: name some of {', '.join(PHASES)}, in this order")
        if self.bn not in BATCH_NORM:
            raise unknown("fit BatchNorm mode", self.bn, BATCH_NORM)
        check_ranges(self)

    def steps_of(self, phase: str) -> int:
        return self.refine_steps if phase == "refine" and self.steps else self.steps

    def lr_of(self, phase: str) -> float:
        return self.logits_lr if phase in END_TO_END else self.lr


# A tied stage has to learn anew what its blocks did, and starts from nothing that is near.
TIE_SETTINGS = FitSettings(phases=("stages", "logits"), steps=900, lr=2e-3, logits_lr=2e-4)
