"""Images of another size, or cropped otherwise, than a model was made for: an option of what reads images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..options import option
from ..quantities import CROPS
from .options import DATA

if TYPE_CHECKING:
    from ..network.model import OdeResNet
    from ..network.parts import Preprocessing


@dataclass(frozen=True)
class Resizing:
    """What the user says of an image's size, in place of the model's own preprocessing."""

    input_size: str | None = option(
        None,
        "Pixels of an image, in place of the model's own: 224, or height and width, 256x128. Up to 64, images are not"
        " cropped.",
        group=DATA,
    )
    crop_fraction: float | None = option(
        None,
        "Part of the resized image's side that is kept, in place of the model's own.",
        range=CROPS,
        flags=("--crop-fraction", "--crop-pct"),
        group=DATA,
    )

    def apply(self, model: OdeResNet) -> str | None:
        """Let the model have images so from now on; what to say of it, where that is another preprocessing.

        Raises ResodeError for a network that cannot run on images of that size.
        """
        from ..measuring.input_size import check_runs_on

        own, chosen = model.info.preprocessing, self._chosen(model)
        if chosen == own:
            return None
        if chosen.shape != own.shape:
            check_runs_on(model, chosen)
        model.info = replace(model.info, preprocessing=chosen)
        return f"images are {_shown(chosen)}; the model was made for {_shown(own)}"

    def check_kept(self, model: OdeResNet) -> None:
        """Raises UsageError where the model of a run that goes on has images otherwise."""
        own, chosen = model.info.preprocessing, self._chosen(model)
        if chosen == own:
            return
        flag = (
            f"--crop-fraction {self.crop_fraction:g}" if self.input_size is None else f"--input-size {self.input_size}"
        )
        raise UsageError(f"{flag}: the run has images of {_shown(own)}, and keeps them; start a new run for others")

    def _chosen(self, model: OdeResNet) -> Preprocessing:
        from ..network.parts import PreprocessingChoice, parse_size

        size = None if self.input_size is None else parse_size(self.input_size)
        return PreprocessingChoice(size=size, crop_fraction=self.crop_fraction).applied_to(model.info.preprocessing)


def _shown(preprocessing: Preprocessing) -> str:
    return f"{preprocessing.size_text}, crop {preprocessing.crop_fraction:g}"
