"""The settings of a fit: what a user may choose, and what is allowed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from ..errors import UsageError
from ..options import check_options, option, workers_option
from ..quantities import COUNT, COUNT_OR_NONE, NOT_NEGATIVE, POSITIVE, SEED, TEMPERATURE

TO_STATES, END_TO_END = ("blocks", "stages"), ("logits", "refine")
PHASES = TO_STATES + END_TO_END
BATCH_NORM = ("recalibrate", "keep", "batch")

fitted = partial(option, group="Fit")


@dataclass(frozen=True)
class FitSettings:
    """What a fit does, but its images, teacher and device.

    phases: they run in this order, those to states before those end to end.
    steps: for each phase, but for the last, 'refine', which takes `refine_steps`; None: as many as pay off within
        `minutes`, see `rounds`.
    images: the number to use, held-out ones included; None uses all. More cost nothing: a step reads `batch_size` of
        them.
    lr: peak learning rate of Adam where states are matched; a warm-up over a tenth of a round, then a cosine to 0.
        None: of a few rates the largest that is nearly the best over some steps, see `rounds.largest`.
    logits_lr: the same end to end ('logits', 'refine'). What fits states upsets logits.
    states: weight of the states' mean e_k beside the logits: more of it keeps the student closer to the source, less of
        it leaves it free to do better.
    smooth, contract: weights of the penalties; see `penalties`.
    bn: 'recalibrate' re-estimates the statistics on the student's own states, then freezes them; 'keep'
        freezes the source's; 'batch' re-estimates them and trains with those of the batch. With the recipes of
        the CIFAR networks these ended at 80.76, 80.70 and 77.84 % (ResNet-20 at 36 steps; 81.02 % before) and at
        82.56, 83.06 and 82.30 % (ResNet-56 at 100; 83.02 %), 5,000 images, so half a point is a standard error;
        'recalibrate' and 'keep' agree with the source on 88.7 and 88.7, 91.9 and 92.0 % of them, and in the
        largest error of `multistep` the first is ahead (0.015 against 0.021 on the ResNet-56). 'tied+norms', whose
        norms do the work, wants 'batch'.
    substeps: steps per source block in all phases but 'refine', of a rule that does nearly what the block's many Euler
        steps do; 0 takes full depth from the start, None the fewest steps that are near enough.
    """

    phases: tuple[str, ...] = fitted(
        ("blocks", "logits", "refine"),
        "What is matched, in this order: 'blocks' (each block's states), 'stages' (each stage's), 'logits' (end to"
        " end), 'refine' (the same at full depth).",
        flags=("--fit-phases",),
        commas=True,
        choices=PHASES,
    )
    minutes: float = fitted(
        20.0,
        "About what a fit may take where --fit-steps does not say how long its phases are. It ends before where no more"
        " is gained on images held out of it.",
        range=POSITIVE,
        flags=("--fit-minutes",),
    )
    steps: int | None = fitted(
        None,
        "Training steps of each phase, in place of --fit-minutes; 0: no fit.",
        range=COUNT_OR_NONE,
        flags=("--fit-steps",),
    )
    refine_steps: int | None = fitted(
        None, "Training steps of 'refine'. Default: as --fit-steps.", range=COUNT_OR_NONE, flags=("--fit-refine-steps",)
    )
    images: int | None = fitted(
        None, "Fit on this many images, evenly spaced; all by default.", range=COUNT, flags=("--fit-images",)
    )
    batch_size: int = fitted(32, "Images per training step.", range=COUNT, flags=("--fit-batch-size",))
    lr: float | None = fitted(
        None,
        "Peak learning rate, of Adam, where states are matched. Default: found by trying some.",
        range=POSITIVE,
        flags=("--fit-lr",),
    )
    logits_lr: float | None = fitted(
        None,
        "Peak learning rate in 'logits' and 'refine'. Default: found by trying some.",
        range=POSITIVE,
        flags=("--fit-logits-lr",),
    )
    clip_grad: float = fitted(5.0, "Largest norm of the gradient.", range=POSITIVE, flags=("--fit-clip-grad",))
    temperature: float | None = fitted(
        None,
        "Match softened outputs at this temperature, end to end. Default: the logits themselves, which is its limit.",
        range=TEMPERATURE,
    )
    states: float = fitted(
        0.0, "Weight of the states beside the logits, end to end.", range=NOT_NEGATIVE, flags=("--fit-states",)
    )
    smooth: float = fitted(
        0.0, "Weight of a penalty on differences between neighbouring blocks' weights.", range=NOT_NEGATIVE
    )
    contract: float = fitted(
        0.0, "Weight of a penalty on the contraction h‖J‖, which makes steps reversible.", range=NOT_NEGATIVE
    )
    bn: str = fitted(
        "recalibrate",
        "BatchNorm statistics: estimated again once and frozen, the source's, or the batch's own. `tie --depth-weights"
        " tied+norms` and `tied+stats`, whose steps have statistics of their own, take 'batch' unless told otherwise.",
        choices=BATCH_NORM,
        flags=("--fit-bn",),
    )
    substeps: int | None = fitted(
        None,
        "Steps per source block before 'refine'; 0: full depth throughout. Default: the fewest that are near enough.",
        range=COUNT_OR_NONE,
        flags=("--fit-substeps",),
    )
    augment: bool = fitted(
        False,
        "Random crops, and mirror images where fit: for many passes over few images.",
        flags=("--fit-augment",),
        off="--no-fit-augment",
    )
    seed: int = fitted(0, "Seed of the fit: order and augmentation of images.", range=SEED)
    workers: int | str = workers_option()

    def __post_init__(self) -> None:
        check_options(self)
        if list(self.phases) != sorted(set(self.phases), key=PHASES.index) or not self.phases:
            raise UsageError(f"--fit-phases {','.join(self.phases)}: name some of {', '.join(PHASES)}, in this order")

    def steps_of(self, phase: str) -> int | None:
        """Training steps of a phase; None: as many as pay off."""
        if phase != "refine" or self.refine_steps is None or self.steps == 0:
            return self.steps
        return self.refine_steps

    def lr_of(self, phase: str) -> float | None:
        """Peak learning rate of a phase; None: one is to be found."""
        return self.logits_lr if phase in END_TO_END else self.lr


# A tied stage has to learn anew what its blocks did, and starts from nothing that is near.
TIE_SETTINGS = FitSettings(phases=("stages", "logits"))
