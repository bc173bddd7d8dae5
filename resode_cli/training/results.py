"""What a training run hands out: its progress, what it tells while it runs, and its result."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..gradients.results import ChosenAdjoints
from ..measuring.evaluate import Measured
from .run_log import StepRecord

NO_PATIENCE, OUT_OF_TIME = "patience", "time"  # what may end a run before its last step
NONE_YET = -1.0  # the accuracy of the best model, before there is one


@dataclass(frozen=True)
class FinetuneResult:
    """before, after: on the test split. best_top1, best_step: of the best model, at step 0 the one that it began with.

    main: the figure that best_top1 is: 'top1', or of images with several labels 'map'.
    ended: what ended it, as `loop` and this file name it.
    adjoints: what each stage ended with. chosen: the last choice, if 'auto' was asked for in this session.
    """

    steps: int
    total_steps: int
    before: Measured | None
    after: Measured | None
    best_top1: float
    seconds: float
    peak_bytes: int
    interrupted: bool
    skipped_steps: int
    adjoints: dict[str, str]
    switched: dict[str, float] | None = None
    moved_to_anchors: tuple[str, ...] = ()
    recalibrations: int = 0
    chosen: ChosenAdjoints | None = None
    best_step: int = 0
    ended: str = "done"
    main: str = "top1"


@dataclass
class Progress:
    """How far a run is: everything that a resumed run needs besides tensors."""

    step: int = 0
    evaluated: int = 0  # the last step that was
    best_top1: float = NONE_YET  # of images with several labels: mean average precision
    best_file: str | None = None  # its checksum
    best_step: int = 0
    best_score: float | None = None  # by what makes it the best; larger is better
    waited: int = 0  # evaluations since the best one
    kept: list[list[float]] = field(default_factory=list)  # step and score of the best models, the best first
    skipped: int = 0  # steps with a loss or gradient that was no number
    switched: dict[str, float] | None = None
    guard: dict[str, Any] = field(default_factory=dict)  # a GuardState
    plateau: dict[str, Any] = field(default_factory=dict)  # what a schedule that waits for evaluations has seen
    window: list[dict[str, float]] = field(default_factory=list)  # of each step since the last log row, by column

    def __post_init__(self) -> None:
        if self.best_score is None and self.best_top1 > NONE_YET:  # of an older resode, or of a best model that is gone
            self.best_score = self.best_top1
        # In the state of a run by an older resode: (loss, accuracy, drift …).
        self.window = [row if isinstance(row, dict) else {"loss": row[0], "top1": row[1]} for row in self.window]


@dataclass(frozen=True)
class Callbacks:
    """What a caller wants to hear. `should_stop` is asked after every step.

    on_begin: the run's own token, by which it is known again, and the step that it goes on from. on_row: a row of its
    log. on_saved: the folder, after each file that was saved there.

    Steps and saves run inside `deferred()`; outside of it a signal may raise `Stopped`, and the run then ends well.
    """

    on_step: Callable[[StepRecord], None] = lambda record: None
    on_message: Callable[[str], None] = lambda message: None
    on_choice: Callable[[ChosenAdjoints], None] = lambda chosen: None
    on_begin: Callable[[str | None, int], None] = lambda run, step: None
    on_row: Callable[[dict[str, Any]], None] = lambda row: None
    on_saved: Callable[[Path], None] = lambda folder: None
    should_stop: Callable[[], bool] = lambda: False
    deferred: Callable[[], AbstractContextManager[None]] = nullcontext


def peak_bytes(device: torch.device) -> int:
    """Largest memory so far: allocated on a GPU, resident size of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
