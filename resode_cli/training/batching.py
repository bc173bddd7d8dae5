"""`--batch-size auto` and `--accumulate auto`: the batches of a step that fit into memory, found before it begins."""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..data import ImageData
from ..errors import ResodeError
from ..gradients.results import OverBudgetError
from ..machine.memory import free_bytes
from ..network.model import OdeResNet
from ..ode import RandomState
from ..quantities import counted, size
from ..simulation.step import CannotSimulate
from .dry_run import Foreseen, foreseen
from .lengths import AUTO
from .settings import Settings
from .starting import make_ready

LARGEST = 256  # images of a batch: of more, steps get fewer and a learning rate harder to find
UNIT = 8  # batches of more images than that are multiples of it
# Of what is free when a batch is looked for: a little less may be free when the run begins.
OF_FREE = 0.9


@dataclass(frozen=True)
class Fits:
    """A step that fits into a budget, and the settings that ask for it."""

    settings: Settings
    step: Foreseen
    budget: int

    @property
    def line(self) -> str:
        """As in '96 images a batch (2 micro-batches), predicted peak 3.2 GiB of 4 GiB'."""
        times = f"{self.settings.accumulate} times " if self.settings.accumulate != 1 else ""
        split = f" in {self.step.micro_batches} micro-batches" if self.step.micro_batches > 1 else ""
        return (
            f"{times}{counted(self.settings.images_per_batch, 'image')} a step{split}, predicted peak"
            f" {size(self.step.bytes)} of {size(self.budget)}"
        )


class Search:
    """Looks for the batches of a step. The model stays as it is.

    teacher_bytes: what a budget has to hold too. Without a budget, most of what the device has free is one.
    """

    def __init__(
        self, model: OdeResNet, train: ImageData, settings: Settings, device: torch.device, *, teacher_bytes: int = 0
    ) -> None:
        own = copy.deepcopy(model)
        self.train, self.device, self.teacher_bytes = train, device, teacher_bytes
        if settings.batch_size == AUTO:
            settings = replace(settings, batch_size=max(LARGEST, settings.micro_batches))
        if settings.accumulate == AUTO:
            settings = replace(settings, accumulate=1)
        random = RandomState.now(device)
        self.settings = make_ready(own, settings, train, device, lambda text: None)
        random.restore()
        self.model = own.cpu()  # each step is planned on a copy of it, as new as the model will be in the run
        weights = sum(t.nbytes for t in (*own.parameters(), *own.buffers()))
        self.budget = settings.budget_bytes or int(OF_FREE * (free_bytes(device) + weights))
        self.needed = 0  # bytes of the step that was tried last

    def largest_batch(self) -> Fits:
        """The largest batch that fits, of as many images as there are, and `LARGEST`, at most.

        Raises ResodeError where not even the smallest does.
        """
        most = min(LARGEST, max(len(self.train) // self.settings.batches_per_step, 1))
        sizes = sizes_up_to(most, least=max(self.settings.micro_batches, self._smallest))
        found: dict[int, Fits | None] = {}

        def too_large(images: int) -> bool:
            if images not in found:
                found[images] = self._at(replace(self.settings, batch_size=images))
            return found[images] is None

        place = len(sizes)
        if too_large(sizes[-1]):
            if too_large(sizes[0]):  # asked before all between, which take a plan each
                raise self._refusal("--batch-size auto", sizes[0])
            place = bisect_left(sizes, True, key=too_large)
        best = found[sizes[place - 1]]
        assert best is not None
        return best

    def fewest_parts(self) -> Fits:
        """The images of a step in as few batches of one size as fit.

        Raises ResodeError where not even the smallest batch does.
        """
        whole = self.settings.images_per_batch
        least = max(self.settings.micro_batches, min(self._smallest, whole))
        counts = [k for k in range(1, whole + 1) if whole % k == 0 and whole // k >= least]
        for count in counts:
            found = self._at(replace(self.settings, batch_size=whole // count, accumulate=count))
            if found is not None:
                return found
        raise self._refusal("--accumulate auto", whole // counts[-1])

    @property
    def _smallest(self) -> int:
        """Images of a batch: one has no other to be mixed with, and no statistics where its state is one pixel."""
        mixes = self.settings.mixup or self.settings.cutmix
        return 2 if self.settings.bn != "frozen" or mixes else 1

    def _at(self, settings: Settings) -> Fits | None:
        """The step by these settings, where it fits."""
        shape = (min(settings.step_images, len(self.train)), *self.model.info.preprocessing.shape)
        random = RandomState.now(self.device)
        try:
            step = foreseen(
                copy.deepcopy(self.model).to(self.device),
                self.train,
                settings,
                self.device,
                images=shape,
                beside=self.teacher_bytes,
                of_free=OF_FREE,
            )
        except OverBudgetError as error:
            self.needed = error.needed
            return None
        except CannotSimulate as error:
            raise ResodeError(f"{error}; give --batch-size and --accumulate as numbers") from error
        finally:
            random.restore()
        self.needed = step.bytes
        return Fits(settings, step, self.budget) if step.bytes <= self.budget else None

    def _refusal(self, flag: str, images: int) -> ResodeError:
        """Of the smallest batch, which was tried last."""
        return OverBudgetError(
            self.needed,
            self.budget,
            f"so {flag} finds no batch that fits, down to {counted(images, 'image')}; raise --memory-budget, or train"
            " fewer parameters (--stage, --freeze)",
        )


def sizes_up_to(most: int, *, least: int = 1) -> Sequence[int]:
    """Sizes of a batch, ascending: 1, 2, 4, and multiples of 8. `least`, where none of them is between the two."""
    found = [n for n in (1, 2, 4, *range(UNIT, most + 1, UNIT)) if least <= n <= most]
    return found or [least]
