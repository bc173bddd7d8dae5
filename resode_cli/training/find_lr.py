"""A learning-rate range test: steps with a rate that grows from one to the next (L. Smith 2017, section 3.3)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import avg_pool1d

from ..data import ImageData
from ..errors import ResodeError, UsageError
from ..gradients.results import ChosenAdjoints
from ..machine.deterministic import deterministic
from ..network.model import OdeResNet
from ..ode import RandomState
from .balance import balanced_labels, class_weights
from .loop import DONE, Loop, training_batches
from .objective import Objective
from .results import Progress
from .settings import Settings
from .starting import guard_at_start, make_ready
from .step import Steps, Taken
from .teacher import Teacher

LOWEST, HIGHEST = 1e-7, 10.0  # rates
STEPS, LEAST_STEPS = 100, 20
DIVERGED = 4.0  # times the least smoothed loss so far
SMOOTH = 0.9  # decay of the running mean that is compared with that
WINDOW = 20  # a centred mean is over a part so many times smaller than the curve, to either side
LEAST_FALL = 0.01  # of the loss at the smallest rates


@dataclass(frozen=True)
class Tried:
    """A step: its learning rate (with layer decay, the head's), the loss of its batch, and the smoothed loss."""

    lr: float
    loss: float
    smoothed: float


@dataclass(frozen=True)
class FoundRates:
    """steepest: the rate at which the smoothed loss falls fastest by the logarithm of the rate; lowest: at which it is
    least. Both are None where it fell by no more than it varies. ended: why the test ended; empty at its last step.
    """

    curve: tuple[Tried, ...]
    steepest: float | None
    lowest: float | None
    ended: str = ""


class GrowingRate:
    """A schedule that takes the place of a run's: rate n before step n, in each group by the group's own factor."""

    def __init__(self, optimizer: torch.optim.Optimizer, rates: Sequence[float]) -> None:
        self.optimizer, self.rates = optimizer, rates

    def step_update(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.rates[step] * group.get("lr_scale", 1.0)


def find_lr(
    model: OdeResNet,
    train: ImageData,
    settings: Settings,
    device: torch.device,
    *,
    steps: int = STEPS,
    teacher: Teacher | None = None,
    on_message: Callable[[str], None] = lambda said: None,
    on_choice: Callable[[ChosenAdjoints], None] = lambda chosen: None,
    on_step: Callable[[int], None] = lambda step: None,
) -> FoundRates:
    """Train a copy of the model as the run of these settings would, but with rates from 1e-7 to 10.

    The test ends where the loss diverges. With --unfreeze-every it trains all that the run will in the end.
    steps: of the test, so many at most. on_step: hears of each that was taken. Raises UsageError for too few.
    """
    if steps < LEAST_STEPS:
        raise UsageError(f"--max-steps {steps}: --find-lr needs {LEAST_STEPS} steps or more for a curve")
    rates = torch.logspace(math.log10(LOWEST), math.log10(HIGHEST), steps, dtype=torch.float64).tolist()
    settings = replace(settings, on_nonfinite="skip")  # what ends a run ends the test
    model = copy.deepcopy(model)
    with same_draws(device), deterministic(settings.deterministic, device):
        settings = make_ready(model, settings, train, device, on_message)
        progress = Progress()
        loop = Loop(model, settings, device, progress, total=steps, should_stop=lambda: False, deferred=nullcontext)
        loop.scheduler, loop.plateau = GrowingRate(loop.optimizer, rates), None
        beside = 0 if teacher is None else teacher.bytes
        guard = guard_at_start(
            model, settings, train, device, beside=beside, on_message=on_message, on_choice=on_choice
        )
        weights = class_weights(train, settings, on_message)
        objective = Objective(model, None if teacher is None else teacher.to(device), settings, weights)
        taking = Steps(
            model,
            settings,
            device,
            progress,
            loop=loop,
            guard=guard,
            objective=objective,
            average=None,
            say=lambda said: None,
            advice=lambda: "",
        )
        source = training_batches(
            train,
            range(len(train)),
            settings.step_images,
            seed=settings.seed,
            epoch=0,
            workers=settings.workers,
            device=device,
            labels=balanced_labels(train, settings),
        )
        losses = Losses()

        def stepped(taken: Taken) -> None:
            losses.append(taken.loss)
            on_step(progress.step)

        try:
            ended = loop.run(source, taking.take, stepped, lambda _: losses.diverged())
        except ResodeError as error:  # as of states that are no numbers any more, or of drift that is to stop a run
            if len(losses.values) < LEAST_STEPS:
                raise
            ended = str(error)
    return read_off(rates, losses.values, "" if ended == DONE else ended)


class Losses:
    """The losses of the steps so far. One that is no number ends the test, and is not among them."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.mean, self.least, self.lost = 0.0, math.inf, False

    def append(self, loss: float) -> None:
        if not math.isfinite(loss):
            self.lost = True
            return
        self.values.append(loss)
        self.mean = SMOOTH * self.mean + (1 - SMOOTH) * loss
        self.least = min(self.least, self.smoothed)

    @property
    def smoothed(self) -> float:
        return self.mean / (1 - SMOOTH ** len(self.values))

    def diverged(self) -> str | None:
        """Why the test ends here, if it does."""
        if self.lost:
            return "the loss or a gradient is no number any more"
        return f"the loss is {DIVERGED:g} times the least" if self.smoothed > DIVERGED * self.least else None


def read_off(rates: Sequence[float], losses: Sequence[float], ended: str) -> FoundRates:
    """The smoothed curve, and what it says. losses: of as many of the rates as were tried."""
    if len(losses) < 3:
        raise ResodeError(f"--find-lr: {ended}, after {len(losses)} of the smallest rates; nothing is to be found here")
    y = torch.tensor(losses, dtype=torch.float64)
    width = max(len(losses) // WINDOW, 1)
    # Centred, since a running mean would lag by a good part of a decade.
    smooth = avg_pool1d(y[None, None], 2 * width + 1, stride=1, padding=width, count_include_pad=False)[0, 0]
    curve = tuple(Tried(*point) for point in zip(rates, losses, smooth.tolist(), strict=False))
    end = int(smooth.argmin()) + 1
    fall = float(smooth[:end].max() - smooth.min())
    noise = float((y - smooth)[:end].square().mean().sqrt())
    if end < 3 or fall <= max(LEAST_FALL * float(smooth[0]), noise):
        return FoundRates(curve, None, None, ended)
    (slope,) = torch.gradient(smooth[:end])
    return FoundRates(curve, rates[int(slope.argmin())], rates[end - 1], ended)


@contextmanager
def same_draws(device: torch.device) -> Iterator[None]:
    """After the block the generators stand as before it."""
    random = RandomState.now(device)
    try:
        yield
    finally:
        random.restore()
