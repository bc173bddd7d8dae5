"""`resode finetune MODEL --data D`."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError, join
from ..machine.locks import FolderLock, refuse_several_processes
from ..machine.signals import exit_code
from .fit_options import TeacherOption, TemperatureOption
from .interrupt import working
from .options import (
    DATA_ROOT,
    AnchorsOption,
    BatchNormOption,
    CorrectionsOption,
    DataOption,
    DataRootOption,
    DeviceOption,
    ForceOption,
    GradTolOption,
    ImagesOption,
    JsonOption,
    MemoryBudgetOption,
    ModelArgument,
    RecipeOption,
    SkipCorruptOption,
    SnapshotsOption,
    SourceOption,
    StageOption,
    TestImagesOption,
    TrustSourceOption,
    WorkersOption,
)
from .output import Output, start

if TYPE_CHECKING:
    import torch

    from ..data import ImageData
    from ..network.model import OdeResNet
    from ..training.settings import Settings


def finetune_command(
    ctx: typer.Context,
    model: ModelArgument,
    data: DataOption,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for best and last model, log.csv and state.")],
    adjoint: Annotated[
        str,
        typer.Option(
            "--adjoint", help="Backward method: auto, backprop, checkpoint (exact), multistep, pc, euler or heun."
        ),
    ] = "auto",
    anchors: AnchorsOption = None,
    corrections: CorrectionsOption = 0,
    snapshots: SnapshotsOption = None,
    grad_tol: GradTolOption = 0.02,
    memory_budget: MemoryBudgetOption = None,
    epochs: Annotated[
        int | None, typer.Option("--epochs", help="Default: one, or as many as --max-steps needs.")
    ] = None,
    max_steps: Annotated[int | None, typer.Option("--max-steps", help="End after this many steps.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", help="Images per step.")] = 128,
    lr: Annotated[float, typer.Option("--lr", help="Largest learning rate.")] = 1e-3,
    momentum: Annotated[float, typer.Option("--momentum")] = 0.9,
    weight_decay: Annotated[float, typer.Option("--weight-decay", help="Not applied to norms and biases.")] = 5e-4,
    clip_grad: Annotated[float | None, typer.Option("--clip-grad", help="Largest norm of the gradient.")] = None,
    optimizer: Annotated[
        str, typer.Option("--optimizer", help="Any optimizer of timm; 'momentum' is SGD.")
    ] = "momentum",
    schedule: Annotated[
        str, typer.Option("--schedule", help="Learning rate: 'cosine', 'step' (a tenth at 1/2 and 3/4) or 'constant'.")
    ] = "cosine",
    warmup: Annotated[int, typer.Option("--warmup", help="Steps of linear increase of the learning rate.")] = 0,
    stage: StageOption = None,
    bn: BatchNormOption = "frozen",
    amp: Annotated[str, typer.Option("--amp", help="Autocast: 'bf16', 'fp16' or 'none'.")] = "none",
    augment: Annotated[
        bool, typer.Option("--augment/--no-augment", help="Random crops, and mirror images where fit.")
    ] = True,
    images: ImagesOption = None,
    test_images: TestImagesOption = None,
    drift_tol: Annotated[
        float, typer.Option("--drift-tol", help="Largest relative error of reconstructed states; 'auto' lowers it.")
    ] = 0.1,
    on_drift: Annotated[
        str,
        typer.Option("--on-drift", help="Past it: 'anchors' (exact stage, step redone), 'warn' or 'stop'."),
    ] = "anchors",
    on_nonfinite: Annotated[
        str,
        typer.Option("--on-nonfinite", help="With a loss or gradient that is no number: 'stop', or 'skip' the step."),
    ] = "stop",
    teacher: TeacherOption = None,
    distill: Annotated[
        float, typer.Option("--distill", help="Weight of the teacher's logits; the labels have the rest.")
    ] = 0.5,
    temperature: TemperatureOption = 2.0,
    teacher_states: Annotated[
        float, typer.Option("--teacher-states", help="Weight of the outputs of the teacher's stages.")
    ] = 0.0,
    log_every: Annotated[int, typer.Option("--log-every", help="Steps per row of log.csv.")] = 20,
    save_every: Annotated[int, typer.Option("--save-every", help="Steps between saves of the state.")] = 100,
    eval_every: Annotated[int, typer.Option("--eval-every", help="Epochs between evaluations.")] = 1,
    device: DeviceOption = "auto",
    seed: Annotated[int, typer.Option("--seed")] = 0,
    workers: WorkersOption = 0,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the branches with torch.compile.")] = False,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Keep images in that memory format.")] = False,
    skip_corrupt: SkipCorruptOption = False,
    data_root: DataRootOption = DATA_ROOT,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out, as if never stopped.")] = False,
    source: SourceOption = None,
    trust_source: TrustSourceOption = False,
    recipe: RecipeOption = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Train a model with a backward pass that need not store activations."""
    refuse_several_processes()
    start()
    from ..data import held_out_splits, open_labelled
    from ..files import model_file
    from ..network.model import as_device
    from ..quantities import size
    from ..reports.choice import calibration_table
    from ..reports.report import evaluation_line, finetune_json
    from ..training import run_folder
    from ..training.finetune import finetune
    from ..training.optimizer_state import check_optimizer
    from ..training.results import Callbacks
    from ..training.resuming import check_folder, check_model, check_resumable, loaded_checksum, resumed
    from ..training.settings import Settings
    from ..training.teacher import open_teacher
    from .progress import training

    output = Output(json_mode=json)
    chosen = Settings(
        adjoint=adjoint,
        anchors=anchors,
        corrections=corrections,
        snapshots=snapshots,
        grad_tol=grad_tol,
        memory_budget=memory_budget,
        epochs=epochs,
        max_steps=max_steps,
        batch_size=batch_size,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        clip_grad=clip_grad,
        optimizer=optimizer,
        schedule=schedule,
        warmup=warmup,
        stages=tuple(stage) if stage else None,
        bn=bn,
        amp=amp,
        augment=augment,
        seed=seed,
        drift_tolerance=drift_tol,
        on_drift=on_drift,
        on_nonfinite=on_nonfinite,
        log_every=log_every,
        save_every=save_every,
        eval_every=eval_every,
        workers=workers,
        compile=compile,
        channels_last=channels_last,
        teacher=teacher,
        distill=distill,
        temperature=temperature,
        teacher_states=teacher_states,
    )
    _check_teacher(ctx, chosen)
    check_optimizer(chosen)
    lock = FolderLock(out, on_message=output.note)
    _check_is_folder(out)
    ctx.with_resource(lock)
    check_folder(out, resume=resume, force=force)
    where = as_device(device)
    state = run_folder.load_state(out, source=source, trust_source=trust_source) if resume else None
    settings = chosen
    if state is not None:
        settings, changes = resumed(chosen, _given(ctx), state.settings)
        output.notes([check_model(model, out, state), *changes])
    loaded = state.model if state is not None else model_file.load(model, source=source, trust_source=trust_source)
    train = open_labelled(
        data,
        loaded.info,
        "train",
        augment=settings.augment,
        seed=settings.seed,
        images=images,
        skip_corrupt=skip_corrupt,
        root=data_root,
    )
    test, *at_end = (
        open_labelled(data, loaded.info, split, images=test_images, skip_corrupt=skip_corrupt, root=data_root)
        for split in held_out_splits(data)
    )
    for split in (train, test, *at_end):
        output.notes(split.notes)
    loaded.info = loaded.info.with_classes(train.class_names)  # so that the state of the run has them too
    if at_end:
        output.note(f"{test.split} chooses the best model; {at_end[0].split} is looked at once, at the end")
    if state is not None:
        check_resumable(state, train, test, settings)
        output.note(f"resuming at step {state.progress['step']}")
    learned_from = (
        open_teacher(settings.teacher, loaded, trust_source=trust_source) if settings.teacher is not None else None
    )
    done = state.progress["step"] if state is not None else 0
    total = settings.steps(len(train))
    with working() as stop, training(output, total, done) as on_step:
        callbacks = Callbacks(
            on_step=on_step,
            on_message=output.note,
            on_calibration=lambda calibration: output.aside.print(calibration_table(calibration)),
            should_stop=stop,
            deferred=stop.deferred,
        )
        result = finetune(
            loaded,
            train,
            test,
            out=out,
            settings=settings,
            device=where,
            callbacks=callbacks,
            resume=state,
            teacher=learned_from,
            lock=lock,
            began_with=None if state is not None else loaded_checksum(model),
        )
    if result.before is not None:
        output.show(f"before: {evaluation_line(result.before)}")
    if result.after is not None:
        output.show(f"after:  {evaluation_line(result.after)}")
    output.show(
        f"{result.steps} steps in {result.seconds:.0f} s with adjoint {settings.adjoint},"
        f" peak memory {size(result.peak_bytes)}; {_written(lock.folder)} in {lock.folder}"
    )
    best = max(result.best_top1, 0.0)
    if result.before is not None and result.after is not None and best < result.before.top1:
        output.note(
            f"no evaluation was better than before training: {best:.2%} at best, {result.before.top1:.2%} before"
        )
    if result.skipped_steps:
        output.note(f"{result.skipped_steps} steps were skipped for a loss or gradient that was no number")
    document = finetune_json(result)
    if at_end and not result.interrupted:
        document["test"] = _on_test(lock.folder, loaded, at_end[0], settings, where, source, trust_source, output)
    output.notes(split.skipped_note() for split in (train, test, *at_end))
    output.json(document)
    if result.interrupted:
        output.note(f"interrupted at step {result.steps} of {result.total_steps}; --resume goes on from there")
        raise typer.Exit(exit_code(stop.number or signal.SIGINT))


def _on_test(
    out: Path,
    last: OdeResNet,
    data: ImageData,
    settings: Settings,
    device: torch.device,
    source: str | None,
    trust_source: bool,
    output: Output,
) -> dict[str, Any]:
    """The best model on images that neither trained nor chose it."""
    from ..data import batches
    from ..files import model_file
    from ..measuring.evaluate import evaluate
    from ..reports.report import evaluation_json, evaluation_line

    best = out / "best.safetensors"
    model = model_file.load(best, source=source, trust_source=trust_source) if best.is_file() else last
    found = evaluate(
        model.to(device), batches(data, max(settings.batch_size, 100), workers=settings.workers), device=device
    )
    output.show(f"{'best' if best.is_file() else 'last'} model on {data.split}: {evaluation_line(found)}")
    return evaluation_json(found)


def _written(folder: Path) -> str:
    from ..training.run_folder import FILES

    return join([name for name in FILES if (folder / name).is_file()]) or "nothing"


def _given(ctx: typer.Context) -> list[str]:
    """The parameters that a flag or a recipe set."""
    origins = {name: ctx.get_parameter_source(name) for name in ctx.params}
    return [name for name, origin in origins.items() if origin is not None and origin.name != "DEFAULT"]


def _check_teacher(ctx: typer.Context, chosen: Settings) -> None:
    """Raises UsageError for a setting of the teacher without one."""
    for name in ("distill", "temperature", "teacher_states"):
        origin = ctx.get_parameter_source(name)
        given = origin is not None and origin.name != "DEFAULT"
        if given and chosen.teacher is None and not ctx.params["resume"]:
            raise UsageError(f"--{name.replace('_', '-')} is a setting of the teacher; add --teacher MODEL")


def _check_is_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {str(out)!r} is not a folder")
