"""The words that settings of a training run take, and the headings of a command's help under which they stand."""

from __future__ import annotations

from functools import partial

from ..options import option
from .contradictions import DECREASING, NO_AUG, PLATEAU, STANDARD_AUG

AUG = (NO_AUG, STANDARD_AUG, "randaugment", "trivialaugment", "augmix")
SCHEDULES = (*DECREASING, "step", PLATEAU, "constant")
# auto: top1, or map where images have several labels
BEST_BY = ("auto", "top1", "top5", "loss", "map", "micro_f1", "macro_f1")
CLIP_MODES = ("norm", "value", "agc")
AMP = ("none", "bf16", "fp16")
WEIGHTS_DTYPE = ("bf16", "bf16-master")
BATCH_NORM = ("frozen", "batch", "sync")
ON_DRIFT = ("anchors", "warn", "stop")
ON_NONFINITE = ("stop", "skip")
LEAN = "lean"  # as a memory budget

length = partial(option, group="Length of the run")
backward = partial(option, group="Backward pass")
trained = partial(option, group="What is trained")
optimisation = partial(option, group="Optimisation")
images = partial(option, group="Data")
augmentation = partial(option, group="Augmentation")
regularisation = partial(option, group="Regularisation")
teaching = partial(option, group="Teacher")
saving = partial(option, group="Saving and logging")
machine = partial(option, group="Machine")


def of_one_process(bn: str) -> str:
    """How BatchNorm normalises where one process has the whole batch: 'sync' is 'batch' there."""
    return "batch" if bn == "sync" else bn
