"""Settings of a training run that cannot be meant together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import UsageError, join
from .lengths import AUTO

if TYPE_CHECKING:
    from .settings import Settings

BALANCED = "balanced"  # of class weights, and of the sampler
NO_AUG, STANDARD_AUG = "none", "standard"
DECREASING = ("cosine", "linear", "poly", "tanh")  # the schedules that end at a rate of one's choice
PLATEAU = "plateau"


def refuse_contradictions(settings: Settings) -> None:
    """Raises UsageError, by the names of their flags, for settings of which one would have no effect."""
    for told in (*_of_what_is_trained(settings), *_of_images(settings), *_of_steps(settings), *_of_batches(settings)):
        if told:
            raise UsageError(told)


OF_ONE = ("top1", "top5")  # figures of images that are of one class each
OF_SEVERAL = ("map", "micro_f1", "macro_f1")


def refuse_of_other_labels(settings: Settings, *, multi_label: bool) -> None:
    """Raises UsageError for what has no meaning for images with several labels, or for those of one class each."""
    s = settings
    if not multi_label:
        if s.best_by in OF_SEVERAL:
            raise UsageError(f"--best-by {s.best_by} is of images with several labels; of one class each there is top1")
        return
    mixes = "--mixup" if s.mixup else "--cutmix"
    for told in (
        f"--best-by {s.best_by} is of images of one class each; of several labels there is map"
        if s.best_by in OF_ONE
        else "",
        f"{mixes} mixes the labels of images of one class, and these have several: leave it out"
        if s.mixup or s.cutmix
        else "",
        "--label-smoothing shares one label among all classes, and images have several: leave it out"
        if s.label_smoothing
        else "",
        "--sampler balanced draws each class equally often, and images are of several; --class-weights balanced weighs"
        " rare labels"
        if s.sampler == BALANCED
        else "",
    ):
        if told:
            raise UsageError(told)


def _of_what_is_trained(s: Settings) -> list[str]:
    probe = s.linear_probe
    return [
        "--linear-probe trains the head alone, --stage a stage: leave out one"
        if probe and s.stages is not None
        else "",
        f"--linear-probe keeps BatchNorm as it is: leave out --bn {s.bn}" if probe and s.bn != "frozen" else "",
        "--layer-decay is of several layers, and --linear-probe trains one: leave out one"
        if probe and s.layer_decay is not None
        else "",
        f"--unfreeze-every trains all parts in turn, {'--linear-probe one' if probe else '--stage some'}: leave out one"
        if s.unfreeze_every is not None and (probe or s.stages is not None)
        else "",
        "--clip-mode agc leaves the head's gradient as it is, and --linear-probe trains the head alone: leave out one"
        if probe and s.clip_mode == "agc"
        else "",
        "--weights-dtype is bfloat16, and --amp fp16 computes in float16: leave out one"
        if s.weights_dtype is not None and s.amp == "fp16"
        else "",
        "--ema-warmup is of --ema DECAY: give it" if s.ema_warmup and s.ema is None else "",
    ]


def _of_images(s: Settings) -> list[str]:
    weighs = s.class_weights == BALANCED
    jitter = "--color-jitter" if s.color_jitter else "--random-erasing"
    return [
        f"--no-augment and --aug {s.aug} contradict each other: leave out one"
        if not s.augment and s.aug not in (NO_AUG, STANDARD_AUG)
        else "",
        f"{jitter} augments images, which --no-augment and --aug none do not: leave out one"
        if not s.augments and (s.color_jitter or s.random_erasing)
        else "",
        "--mixup-prob is of --mixup and --cutmix: give one of them"
        if s.mixup_prob != 1 and not (s.mixup or s.cutmix)
        else "",
        f"{'--mixup' if s.mixup else '--cutmix'} mixes the images of a batch with each other, and a step has one"
        if (s.mixup or s.cutmix) and s.batch_size == s.accumulate == 1
        else "",
        "--distill 1 leaves the labels out, which --label-smoothing, --bce-loss and --class-weights are about"
        if s.teacher is not None and s.distill == 1 and (s.label_smoothing or s.bce_loss or weighs)
        else "",
        "--class-weights balanced weighs what --sampler balanced evens out: leave out one"
        if weighs and s.sampler == BALANCED
        else "",
        "--class-weights is of the cross-entropy; with --bce-loss every class has a loss of its own: leave out one"
        if weighs and s.bce_loss
        else "",
    ]


def _of_steps(s: Settings) -> list[str]:
    of_plateau = [f"--{n.replace('_', '-')}" for n in ("plateau_evaluations", "plateau_factor") if _is_set(s, n)]
    return [
        f"{join(of_plateau)}: of --schedule plateau, and --schedule {s.schedule} looks at no evaluation"
        if of_plateau and s.schedule != PLATEAU
        else "",
        f"--milestones are of --schedule step; --schedule {s.schedule} has none"
        if s.milestones is not None and s.schedule != "step"
        else "",
        f"--min-lr is where a schedule ends ({', '.join((*DECREASING, PLATEAU))}), and --schedule {s.schedule} does not"
        if s.min_lr and s.schedule not in (*DECREASING, PLATEAU)
        else "",
        f"--min-lr {s.min_lr:g} is above --lr {s.lr:g}, from which the schedule falls" if s.min_lr > s.lr else "",
        f"--clip-mode {s.clip_mode} needs its bound: give --clip-grad"
        if s.clip_mode != "norm" and s.clip_grad is None
        else "",
    ]


def _of_batches(s: Settings) -> list[str]:
    whole = "--teacher-states compares whole batches, which {} splits: leave out one"
    return [
        f"--micro-batches {s.micro_batches}: a batch has {s.batch_size} images"
        if isinstance(s.batch_size, int) and s.micro_batches > s.batch_size
        else "",
        whole.format("--micro-batches") if s.micro_batches > 1 and s.teacher_states else "",
        whole.format("--accumulate") if s.accumulate != 1 and s.teacher_states else "",
        "--batch-size auto looks for the largest batch, and --accumulate auto splits a given one: leave out one"
        if s.batch_size == s.accumulate == AUTO
        else "",
    ]


def _is_set(s: Settings, name: str) -> bool:
    """Whether a setting is not at its default."""
    return bool(getattr(s, name) != getattr(type(s), name))
