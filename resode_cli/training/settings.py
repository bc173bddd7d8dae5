"""The settings of a training run: what a user may choose, and what is allowed."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from ..options import ADJOINT_SETTINGS, check_options, workers_option
from ..quantities import (
    AVERAGING,
    BITS,
    CORRECTIONS,
    COUNT,
    COUNT_OR_NONE,
    DECAYING,
    FRACTION,
    LAYER_DECAY,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    TEMPERATURE,
    parse_duration,
)
from . import choices as words
from .choices import (
    augmentation,
    backward,
    images,
    length,
    machine,
    optimisation,
    regularisation,
    saving,
    teaching,
    trained,
)
from .contradictions import BALANCED, NO_AUG, STANDARD_AUG, refuse_contradictions
from .lengths import AUTO, Lengths
from .written import budget_bytes, parse_betas, parse_milestones, parse_trackers

if TYPE_CHECKING:
    from ..data import Augmentation
    from ..gradients.stage_adjoints import AdjointsByStage


@dataclass(frozen=True)
class Settings(Lengths):
    """Everything that decides what a run does, but model, data and device.

    The run ends at `epochs` or `max_steps`, whichever comes first, after one epoch if neither is given; the schedule
    of the learning rate ends there too. `stages` names the stages whose parameters are trained, transitions included;
    None trains everything. For `adjoint` and what goes with it, down to `slices`, see `stage_adjoints`.
    `drift_tolerance` bounds ‖x̃ − x‖ / ‖x‖ where 'auto' does not know better. For the teacher's weights see
    `Objective`.
    """

    adjoint: str = backward(
        "auto",
        "Backward method: auto, backprop, checkpoint (exact), multistep, pc, euler; or the reversal of a forward rule"
        " of that name: heun, heunnet (the paper's), midpoint, rk4. By stage, with settings of their own:"
        " pc,layer3=euler or layer1=pc:anchors=10; what no entry names goes by the one without a name, or by auto.",
        resume="stays",
    )
    anchors: str | None = backward(
        None,
        "Hold every K-th state; 'auto': as many as --grad-tol needs; 'none'. Default: the method's own.",
        resume="stays",
    )
    corrections: int = backward(0, "Extra evaluations per reversed step.", range=CORRECTIONS, resume="stays")
    snapshots: int | None = backward(
        None, "For checkpoint: hold this many states, optimally placed.", range=COUNT, resume="stays"
    )
    bits: int | None = backward(
        None,
        "For checkpoint: hold states as codes of so many bits a number, with the rectifiers' signs. A bit more halves"
        " the gradient error.",
        range=BITS,
        resume="stays",
    )
    slices: int | None = backward(
        None,
        "For checkpoint: run the batch in so many slices, one after the other, where a network mixes no images.",
        range=COUNT,
        resume="stays",
    )
    micro_batches: int = backward(
        1,
        "Split every batch in so many parts, one after the other, whose gradients add up: the same step, so refused"
        " where images mix (--bn batch; see --accumulate). --adjoint auto chooses more where a budget asks for it.",
        range=COUNT,
        resume="stays",
    )
    grad_tol: float = backward(
        0.02, "Relative gradient error of a stage that 'auto' may accept.", range=POSITIVE, resume="stays"
    )
    memory_budget: str | None = backward(
        None,
        "Memory of a training step for 'auto', e.g. 8GiB. Default: what the device has free. 'lean': activations are"
        " kept by no stage for speed alone.",
        resume="stays",
    )
    epochs: int | None = length(
        None,
        "Passes over the images. Default: one, with 200 steps at least; or as many as --max-steps needs.",
        range=COUNT,
    )
    max_steps: int | None = length(None, "End after this many steps.", range=COUNT)
    patience: int | None = length(None, "End after this many evaluations in a row without a better one.", range=COUNT)
    max_time: str | None = length(
        None, "End at a step after so long (30m, 2h, 1h30m), counted anew by each command; --resume goes on."
    )
    batch_size: int | str = length(
        128,
        "Images per batch, of which each of several processes has a part; for few images the default is less. 'auto':"
        " as many as fit into --memory-budget, or into what is free, with the --adjoint asked for, 256 at most. --lr is"
        " per step and is not scaled: for a batch k times as large, k times the --lr, or with Adam √k times, is where"
        " to begin.",
        range=COUNT,
        word=AUTO,
        flags=("--batch-size", "-b"),
        resume="stays",
    )
    accumulate: int | str = length(
        1,
        "Batches whose gradients add up to one step, as of a batch so many times as large; steps count as one."
        " With --bn batch each is normalised by itself. 'auto': as few as make --batch-size images fit into memory.",
        range=COUNT,
        word=AUTO,
        resume="stays",
    )
    lr: float = optimisation(1e-3, "Peak learning rate.", range=POSITIVE)
    momentum: float = optimisation(0.9, "Momentum of SGD.", range=DECAYING)
    weight_decay: float = optimisation(5e-4, "Weight decay; not applied to norms and biases.", range=NOT_NEGATIVE)
    clip_grad: float | None = optimisation(
        None, "Bound of the gradient, by --clip-mode. Default: no clipping.", range=POSITIVE
    )
    clip_mode: str = optimisation(
        "norm",
        "Bound the norm of the whole gradient, the value of every entry, or each unit's norm relative to its weights'"
        " (agc, Brock et al. 2021; not the head's).",
        choices=words.CLIP_MODES,
    )
    optimizer: str = optimisation(
        "momentum", "Any optimizer of timm; 'momentum' is classical SGD with momentum.", resume="stays"
    )
    opt_betas: str | None = optimisation(None, "Betas of the optimizer, as in 0.9,0.95. Default: the optimizer's own.")
    opt_eps: float | None = optimisation(None, "Epsilon of the optimizer. Default: its own.", range=POSITIVE)
    layer_decay: float | None = optimisation(
        None,
        "Factor by which the learning rate falls from the head to the last stage, from there to the one before, and"
        " so on to the stem.",
        range=LAYER_DECAY,
        resume="stays",
    )
    schedule: str = optimisation(
        "cosine",
        "Learning rate: down to --min-lr as a cosine, linearly, as a square (poly) or a tanh; a tenth of it at each of"
        " --milestones (step); lower where evaluations get no better (plateau); or constant.",
        choices=words.SCHEDULES,
    )
    min_lr: float = optimisation(0.0, "Learning rate that the schedule ends at.", range=NOT_NEGATIVE)
    plateau_evaluations: int = optimisation(
        3, "Of --schedule plateau: evaluations in a row without a better one, after which the rate falls.", range=COUNT
    )
    plateau_factor: float = optimisation(
        0.1, "Of --schedule plateau: the share of the rate that is left then.", range=AVERAGING
    )
    milestones: str | None = optimisation(
        None, "Of --schedule step: the shares of the run's steps after which it falls. Default: 1/2,3/4."
    )
    warmup: int = optimisation(0, "Steps of linear increase of the learning rate from 0.", range=COUNT_OR_NONE)
    class_weights: str = optimisation(
        "none",
        "Weights of classes in the loss: 'balanced' weighs n images of K classes by n / (K times a class's own).",
        choices=("none", BALANCED),
        resume="stays",
    )
    stages: tuple[str, ...] | None = trained(
        None,
        "Stages to train, by name (layer3) or place (3), comma-separated or given again; with them a head that started"
        " at random. Default: everything.",
        flags=("--stage",),
        resume="stays",
    )
    freeze: tuple[str, ...] | None = trained(
        None,
        "Parameters that are not trained, by patterns of their names or their modules' (layer1, '*.bias', stem),"
        " comma-separated or given again.",
        resume="stays",
    )
    unfreeze_every: int | None = trained(
        None,
        "Train the head alone at first, and every so many steps one more part: from the last stage to the first, then"
        " the stem.",
        range=COUNT,
        resume="stays",
    )
    linear_probe: bool = trained(False, "Train the head alone, on features that stay as they are.", resume="stays")
    bn: str = trained(
        "frozen",
        "BatchNorm: normalise by the running statistics, which stay, or by the batch's own; of several processes each"
        " by its part's, or (sync) all by the whole batch's.",
        choices=words.BATCH_NORM,
        resume="stays",
    )
    drop_path: float | None = regularisation(
        None,
        "Probability that a block of the network's last stage is left out for an image; it grows from 0 in the first.",
        range=DECAYING,
        resume="stays",
    )
    dropout: float | None = regularisation(
        None, "Probability that a feature is dropped before the head.", range=DECAYING, resume="stays"
    )
    ema: float | None = regularisation(
        None,
        "Decay, per step, of a moving average of the weights, of which evaluations, best and last model are then.",
        range=AVERAGING,
        resume="stays",
    )
    ema_warmup: bool = regularisation(
        False, "Let the decay of --ema grow with the steps, for short runs.", resume="stays"
    )
    amp: str = machine("none", "Autocast.", choices=words.AMP, resume="stays")
    weights_dtype: str | None = machine(
        None,
        "Hold trained weights of convolutions and linear layers, and their gradients, in bfloat16, which implies --amp"
        " bf16: bf16 alone (2 bytes a weight; updates round at random, right on average), or with a float32 copy that"
        " is updated (bf16-master). Models are measured and saved in float32. Default: as the model is.",
        choices=words.WEIGHTS_DTYPE,
        resume="stays",
    )
    sampler: str = images(
        "shuffle",
        "Order of images: every one once per epoch, or each class equally often.",
        choices=("shuffle", BALANCED),
        resume="stays",
    )
    augment: bool = augmentation(
        True,
        "Random crops, and mirror images where fit; --no-augment is --aug none.",
        flags=("--augment",),
        off="--no-augment",
        resume="stays",
    )
    aug: str = augmentation(
        STANDARD_AUG,
        "What images are augmented by: nothing, crops and mirror images, or these and a policy of torchvision's.",
        choices=words.AUG,
        resume="stays",
    )
    color_jitter: float = augmentation(
        0.0,
        "Change brightness, contrast and saturation by factors up to so far from 1.",
        range=FRACTION,
        resume="stays",
    )
    random_erasing: float = augmentation(
        0.0, "Probability that a rectangle of an image is replaced by noise.", range=FRACTION, resume="stays"
    )
    mixup: float = augmentation(
        0.0,
        "Mix pairs of images and of labels by shares from the distribution Beta(α, α) of this α; 0: none.",
        range=NOT_NEGATIVE,
        resume="stays",
    )
    cutmix: float = augmentation(
        0.0,
        "The same by a rectangle of the other image; with --mixup each takes half of the batches.",
        range=NOT_NEGATIVE,
        resume="stays",
    )
    mixup_prob: float = augmentation(
        1.0, "Share of the batches that are mixed by --mixup or --cutmix.", range=FRACTION, resume="stays"
    )
    label_smoothing: float = regularisation(
        0.0, "Share of every label that all classes have alike.", range=DECAYING, resume="stays"
    )
    bce_loss: bool = regularisation(
        False, "Binary cross-entropy of every class by itself, in place of the cross-entropy.", resume="stays"
    )
    seed: int = images(
        0, "Seed of the order of images, their augmentation and random layers.", range=SEED, resume="stays"
    )
    drift_tolerance: float = backward(
        0.1,
        "Largest relative error of reconstructed states; 'auto' lowers it.",
        range=POSITIVE,
        flags=("--drift-tol",),
    )
    on_drift: str = backward(
        "anchors",
        "Past it: move the stage to anchors (exact, more memory) and redo the step, warn once per stage, or stop.",
        choices=words.ON_DRIFT,
    )
    on_nonfinite: str = optimisation(
        "stop",
        "With a loss or gradient that is no number: stop, or skip the step; too many in a row stop a run.",
        choices=words.ON_NONFINITE,
    )
    log_every: int = saving(20, "Steps per row of log.csv.", range=COUNT)
    save_every: int = saving(100, "Steps between saves of the state.", range=COUNT)
    eval_every: int = saving(1, "Epochs between evaluations.", range=COUNT)
    best_by: str = saving(
        AUTO,
        "What makes a model the best: its accuracy, top-5 accuracy or loss; of several labels an image mean average"
        " precision (map), micro_f1, macro_f1 or loss. 'auto': top1, or map. The model as it began is one of them.",
        choices=words.BEST_BY,
        resume="stays",
    )
    keep_best: int = saving(
        1, "Keep so many of the best models: best.safetensors, and best-step-N.safetensors.", range=COUNT
    )
    track: str | None = saving(
        None,
        "Send the log's rows to trackers of experiments too: tensorboard, wandb, mlflow, trackio; comma-separated, or"
        " none.",
    )
    workers: int | str = workers_option()
    compile: bool = machine(False, "Compile the branches with torch.compile.")
    deterministic: bool = machine(
        False,
        "Deterministic kernels alone: the same bits each time on one machine. A kernel that has none ends the run.",
    )
    channels_last: bool = machine(False, "Keep images and states in that memory format.")
    teacher: str | None = teaching(None, "Model file or SOURCE to learn from.")
    distill: float = teaching(0.5, "Weight of the teacher's logits; the labels have the rest.", range=FRACTION)
    temperature: float = teaching(2.0, "Temperature of the logits that are distilled.", range=TEMPERATURE)
    teacher_states: float = teaching(0.0, "Weight of the outputs of the teacher's stages.", range=NOT_NEGATIVE)

    def __post_init__(self) -> None:
        check_options(self)
        _ = self.budget_bytes, self.milestone_shares, self.betas, self.most_seconds, self.trackers
        if self.freeze is not None:
            parts = tuple(part.strip() for given in self.freeze for part in given.split(","))
            object.__setattr__(self, "freeze", parts)
        refuse_contradictions(self)
        given = (self.anchors, self.snapshots, self.bits, self.slices)
        if self.adjoint != "auto" or self.corrections or any(value is not None for value in given):
            self.adjoint_choice()  # which is a mistake if there is no such; it needs torch, and help does not

    @property
    def augmentation(self) -> Augmentation | None:
        """How images are augmented; None for not at all."""
        from ..data import Augmentation

        return Augmentation(self.aug, self.color_jitter, self.random_erasing) if self.augments else None

    @property
    def augments(self) -> bool:
        return self.augment and self.aug != NO_AUG

    @property
    def precision(self) -> str:
        """Of the forward pass: a word of `amp`."""
        return self.amp if self.weights_dtype is None else "bf16"

    @property
    def betas(self) -> tuple[float, ...] | None:
        """Those of the optimizer; None for its own."""
        return None if self.opt_betas is None else parse_betas(self.opt_betas)

    @property
    def budget_bytes(self) -> int | None:
        """Of the memory budget; None if there is none, or 'lean'. Raises UsageError for anything else."""
        return budget_bytes(self.memory_budget)

    @property
    def most_seconds(self) -> float | None:
        """Of one command's steps. Raises UsageError for what is no time."""
        return None if self.max_time is None else parse_duration(self.max_time)

    @property
    def milestone_shares(self) -> tuple[Fraction, ...]:
        """Shares of the run, each between 0 and 1, ascending."""
        return parse_milestones("1/2,3/4" if self.milestones is None else self.milestones)

    @property
    def trackers(self) -> tuple[str, ...]:
        """The trackers' names, each once."""
        return () if self.track is None else parse_trackers(self.track)

    def adjoint_choice(self) -> AdjointsByStage:
        from ..gradients.stage_adjoints import parse_adjoints_by_stage

        return parse_adjoints_by_stage(self.adjoint, **{name: getattr(self, name) for name in ADJOINT_SETTINGS})
