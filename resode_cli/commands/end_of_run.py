"""What `resode finetune` says once a run has ended."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import join
from .options import Origin
from .output import Output
from .working_folder import remember

if TYPE_CHECKING:
    import torch

    from ..data import ImageData
    from ..network.model import OdeResNet
    from ..training.results import FinetuneResult
    from ..training.settings import Settings


def tell_of_end(result: FinetuneResult, folder: Path, settings: Settings, output: Output) -> None:
    """Say what a run made of its model, where it is, and why it ended where that was not its last step."""
    from ..quantities import counted, size
    from ..reports.report import CALLED, adjoints_line, evaluation_line
    from ..training.results import NO_PATIENCE, OUT_OF_TIME

    if result.before is not None:
        output.show(f"before: {evaluation_line(result.before)}")
    if result.after is not None:
        output.show(f"after:  {evaluation_line(result.after)}")
    if result.after is not None and 0 < result.best_step < result.steps:
        best = f"{CALLED[result.main]} {result.best_top1:.2%} at step {result.best_step}"
        output.show(f"best:   {best}, which best.safetensors is")
    if settings.adjoint_choice().names_stages:
        output.show(adjoints_line(result.adjoints))
    output.show(
        f"{result.steps} steps in {result.seconds:.0f} s with adjoint {settings.adjoint},"
        f" peak memory {size(result.peak_bytes)}; {_written(folder)} in {folder}"
    )
    remember(output, run=folder, model=_made(folder))
    if result.after is not None and result.best_step == 0:
        output.note("no evaluation was better than before training: best.safetensors is the model as it began")
    if result.skipped_steps:
        output.note(f"{result.skipped_steps} steps were skipped for a loss or gradient that was no number")
    if result.ended == NO_PATIENCE:
        output.note(
            f"the last {counted(settings.patience or 0, 'evaluation')} brought nothing better: the run ends at step"
            f" {result.steps} of {result.total_steps}"
        )
    if result.ended == OUT_OF_TIME:
        output.note(
            f"--max-time {settings.max_time} is over at step {result.steps} of {result.total_steps}; --resume goes on"
            " from there"
        )


def measure_at_end(
    out: Path,
    last: OdeResNet,
    data: ImageData,
    settings: Settings,
    device: torch.device,
    origin: Origin,
    output: Output,
) -> dict[str, Any]:
    """The best model on images that neither trained nor chose it."""
    from ..data import batches
    from ..machine.deterministic import deterministic
    from ..measuring.evaluate import evaluate
    from ..reports.report import evaluation_json, evaluation_line
    from ..training.run_folder import BEST

    best = out / BEST
    model = origin.load(best) if best.is_file() else last
    size = max(settings.images_per_batch, 100)
    images = batches(data, size, workers=settings.workers, device=device)
    with deterministic(settings.deterministic, device):
        found = evaluate(model.to(device), images, device=device)
    output.show(f"{'best' if best.is_file() else 'last'} model on {data.split}: {evaluation_line(found)}")
    return evaluation_json(found)


def _written(folder: Path) -> str:
    from ..training.run_folder import FILES, runners_up

    return join([name for name in FILES if (folder / name).is_file()] + runners_up(folder)) or "nothing"


def _made(folder: Path) -> Path | None:
    """The model that a run leaves for other commands."""
    from ..training.run_folder import BEST, LAST

    return next((folder / name for name in (BEST, LAST) if (folder / name).is_file()), None)
