"""`resode finetune --dry-run` and `--find-lr`: a run is looked at before it begins."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import ResodeError
from .output import Output

if TYPE_CHECKING:
    import torch

    from ..data import ImageData
    from ..machine.processes import Processes
    from ..network.model import OdeResNet
    from ..training.settings import Settings
    from ..training.teacher import Teacher


def show_dry_run(
    model: OdeResNet,
    train: ImageData,
    settings: Settings,
    device: torch.device,
    output: Output,
    teacher_bytes: int,
    processes: Processes,
) -> None:
    """Say what a run would do and take."""
    from dataclasses import asdict

    from ..machine.deterministic import deterministic
    from ..quantities import counted, size
    from ..reports.choice import choice_table
    from ..reports.report import adjoints_line
    from ..training.dry_run import dry_run

    with output.aside.status("planning"), deterministic(settings.deterministic, device):
        found = dry_run(
            model,
            train,
            settings,
            device,
            teacher_bytes=teacher_bytes,
            processes=processes,
            on_message=output.note,
            on_choice=lambda chosen: output.aside.print(choice_table(chosen)),
        )
    output.notes([f"unreadable: {name}" for name in found.skipped])
    if not settings.adjoint_choice().chooses:
        output.show(adjoints_line(found.adjoints))
    split = f" in {found.micro_batches} micro-batches" if found.micro_batches > 1 else ""
    beside = f", a teacher, averages and waiting images {size(found.beside)}" if found.beside else ""
    times = f"{found.accumulate} times " if found.accumulate > 1 else ""
    each = "" if processes.alone else f" in each of {processes.count} processes"
    output.show(
        f"dry run: {counted(found.steps, 'step')} of {times}{counted(found.batch_size, 'image')}{split}{each},"
        f" predicted peak"
        f" {size(found.predicted_bytes)} (weights {size(found.weights)}, gradients {size(found.gradients)}, optimizer"
        f" {size(found.optimizer)}, activations {size(found.activations)}{beside}, and a reserve);"
        f" {size(found.free_bytes)} are free; nothing was written"
    )
    output.json({"dry_run": True, **asdict(found)})
    if found.predicted_bytes > found.free_bytes:
        raise ResodeError(
            f"a step would take {size(found.predicted_bytes)}, and {size(found.free_bytes)} are free; use --adjoint"
            " auto, a smaller --batch-size ('auto' finds one), or --accumulate auto"
        )


def show_rates(
    model: OdeResNet,
    train: ImageData,
    settings: Settings,
    device: torch.device,
    output: Output,
    teacher: Teacher | None,
    *,
    steps: int | None,
) -> None:
    """Say at which learning rates the loss falls. steps: of the test; None for the usual number."""
    from dataclasses import asdict

    from ..quantities import finite
    from ..reports.choice import choice_table
    from ..reports.rates import rates_line, rates_table
    from ..training.find_lr import STEPS, find_lr
    from .progress import counting

    most = steps or STEPS
    with counting(output, "trying learning rates", most) as advance:
        found = find_lr(
            model,
            train,
            settings,
            device,
            steps=most,
            teacher=teacher,
            on_message=output.note,
            on_choice=lambda chosen: output.aside.print(choice_table(chosen)),
            on_step=advance,
        )
    output.show(rates_table(found))
    if found.ended:
        output.note(f"the test ended at step {len(found.curve)} of {most}: {found.ended}")
    output.show(rates_line(found, settings.lr))
    output.json(finite({"find_lr": True, "suggestion": found.steepest, "steps": most, **asdict(found)}))
