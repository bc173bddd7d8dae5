"""`resode finetune MODEL --data D`."""

from __future__ import annotations

import signal
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..machine.locks import FolderLock, NoLock
from ..machine.processes import join, meet, refuse_several, several
from ..machine.signals import exit_code
from ..quantities import COUNT
from ..training.settings import Settings
from .batches_of_run import sized
from .checks_of_run import check_is_folder, check_looks, check_resumes, check_teacher_is_named
from .end_of_run import measure_at_end, tell_of_end
from .interrupt import working
from .options import (
    DATA,
    DATA_OPTION,
    DeviceOption,
    ForceOption,
    JsonOption,
    Origin,
    Reading,
    RecipeOption,
    check_auto,
    number,
)
from .output import Output, start
from .parameters import Fields, Given, takes
from .resizing import Resizing
from .start_of_run import (
    Call,
    StartArgument,
    as_it_read,
    is_source,
    open_start,
    open_training,
    resumed_call,
    trusting,
)
from .trial_run import show_dry_run, show_rates
from .working_folder import (
    TAKEN,
    check_named,
    name_of,
    new_run,
    remember,
    run_to_resume,
    source_name,
    without_remembered,
)


@takes(settings=Fields(Settings()), reading=Fields(Reading()), resizing=Fields(Resizing()), origin=Fields(Origin()))
def finetune_command(
    *,
    ctx: typer.Context,
    model: StartArgument = None,
    data: Annotated[str | None, DATA_OPTION] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Folder for best and last model, log.csv, config.toml and state. Default: a new one, as"
            " runs/resnet50-1.",
        ),
    ] = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained/--no-pretrained", help="Of a SOURCE: fetch the library's pretrained weights.")
    ] = True,
    weights: Annotated[Path | None, typer.Option("--weights", help="Of a SOURCE: a file of weights to load.")] = None,
    new_head: Annotated[
        bool,
        typer.Option(
            "--new-head",
            help="Start with a new head for the data's classes. One without names, and for another number of classes,"
            " is replaced in any case.",
        ),
    ] = False,
    settings: Settings,
    reading: Reading,
    resizing: Resizing,
    test_images: Annotated[
        int | None,
        number("--test-images", range=COUNT, help="Evaluate on this many test images; all by default.", group=DATA),
    ] = None,
    device: DeviceOption = "auto",
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check data, weights and budget, print plan and predicted peak, and train and write nothing.",
        ),
    ] = False,
    find_lr: Annotated[
        bool,
        typer.Option(
            "--find-lr",
            help="Take 100 steps (or --max-steps) at learning rates from 1e-7 to 10, say where the loss falls fastest,"
            " and keep and write nothing.",
        ),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with a run, as if never stopped: --out, or MODEL, or this folder's last.",
        ),
    ] = False,
    origin: Origin,
    recipe: RecipeOption = None,
    force: ForceOption = False,
    json: JsonOption = False,
    given: Given,
) -> None:
    """Train a model with a backward pass that need not store activations."""
    start()
    from ..data import check_data_name, held_out_splits
    from ..machine.deterministic import set_cublas_workspace
    from ..network.model import as_device
    from ..reports.choice import choice_table
    from ..reports.report import finetune_json
    from ..training import run_folder
    from ..training.finetune import finetune
    from ..training.optimizer_state import check_optimizer
    from ..training.parallel import settings_of_one
    from ..training.results import OUT_OF_TIME, Callbacks
    from ..training.resuming import (
        check_folder,
        check_model,
        check_resumable,
        check_source,
        ends_early,
        forget_lost_best,
        kept_division,
        loaded_checksum,
        resumed,
        unknown_contents,
    )
    from ..training.teacher import open_teacher
    from ..training.trackers import open_trackers
    from ..training.trained import with_stage_names
    from .progress import training
    from .run_config import changed, config_text, keeping_config

    if settings.deterministic or (resume and several() > 1):  # before CUDA starts, as it does where processes meet
        set_cublas_workspace()
    processes, device = join(device)
    output = Output(json_mode=json, quiet=not processes.leads)
    check_looks(dry_run=dry_run, find_lr=find_lr)
    if find_lr:
        refuse_several("--find-lr")
    if resume:
        given = without_remembered(ctx, given)
        model, data = (None if name in ctx.meta[TAKEN] else value for name, value in (("model", model), ("data", data)))
        begins = bool({"new_head", "pretrained", "weights"} & given.flags)
        check_resumes(dry_run=dry_run, find_lr=find_lr, force=force, begins=begins)
        new_head = False  # which a recipe may say of how the run began
        out = run_to_resume(model, out, output)
    else:
        check_named(ctx, model=model, data=data)
        check_teacher_is_named(settings, given)
        check_auto(given, chooses=settings.adjoint_choice().chooses, sizes=settings.sizes_batches)
        if settings.sizes_batches:
            refuse_several("--batch-size auto, like --accumulate auto,")
        # One process chooses the name; to the others it means nothing.
        out = out or new_run(source_name(str(model)) if is_source(str(model)) else name_of(str(model)))
    check_optimizer(settings)
    open_trackers(settings)  # which says now that a package is missing
    source, model_file = (model, None) if model is None or is_source(model) else (None, Path(model))
    origin = trusting(origin, source)
    lock = (FolderLock if processes.leads else NoLock)(out, on_message=output.note)
    check_is_folder(out)
    ctx.with_resource(lock)
    teacher = settings.teacher
    reads = [model_file, Path(teacher) if teacher is not None and teacher.endswith(".safetensors") else None]
    if processes.leads:
        check_folder(out, resume=resume, force=force, reads=[path for path in reads if path is not None])
    if resume and run_folder.run_metadata(out)["settings"].get("deterministic"):
        set_cublas_workspace()  # before the device is looked for
    where = as_device(device)
    state = run_folder.load_state(out, source=origin.source, trust_source=origin.trust_source) if resume else None
    if state is not None:
        settings, changes = resumed(settings, given.all, state.settings, state.model)
        resizing.check_kept(state.model)
        check_teacher_is_named(settings, given)
        check_source(source, state)
        gone = check_model(model_file, out, state) if model_file is not None else None
        output.notes([gone, forget_lost_best(state, out) if processes.leads else None, *changes])
        division = kept_division(reading.val_split, reading.split_seed, state)
        call = resumed_call(state.fingerprint.get("call"), given.all, data, test_images, reading)
        call = replace(call, reading=replace(call.reading, **division))
        loaded = state.model
    else:
        call = Call(str(data), test_images, reading)
        if source is not None:
            check_data_name(call.data)  # before that is fetched and converted
        loaded = open_start(
            str(model), origin, pretrained=pretrained, weights=weights, seed=settings.seed, output=output
        )
        output.notes([resizing.apply(loaded)])
    data = call.data
    reading, called = as_it_read(call.reading, given.all, {} if state is None else state.fingerprint)
    settings = with_stage_names(settings, loaded)
    train = open_training(
        loaded,
        data,
        reading,
        new_head=new_head,
        seed=settings.seed,
        output=output,
        augment=settings.augmentation or False,
        **called,
    )
    test, *at_end = (
        reading.open(data, loaded, split, images=call.test_images, **called)
        for split in held_out_splits(data, reading.hold_out(loaded))
    )
    for split in (train, test, *at_end):
        output.notes(split.notes)
    loaded.name_classes(train.class_names)  # so that the state of the run has them too
    if at_end:
        output.note(f"{test.split} chooses the best model; {at_end[0].split} is looked at once, at the end")
    learned_from = (
        open_teacher(settings.teacher, loaded, trust_source=origin.trust_source)
        if settings.teacher is not None
        else None
    )
    if state is None:
        settings = sized(settings, given.all, loaded, train, where, learned_from, output)
    else:
        check_resumable(state, train, test, settings, learned_from)
        early = ends_early(settings, given.all, len(train))
        output.notes([unknown_contents(state), early, f"resuming at step {state.progress['step']}"])
    if dry_run:
        teacher_bytes = 0 if learned_from is None else learned_from.bytes
        if processes.leads:
            show_dry_run(loaded, train, settings, where, output, teacher_bytes, processes)
        return
    if find_lr:
        show_rates(
            loaded,
            train,
            settings,
            where,
            output,
            learned_from,
            steps=settings.max_steps if "max_steps" in given.flags else None,
        )
        return
    settings_of_one(settings, processes, train)  # or say now why not
    meet()
    config = config_text(ctx, settings, call, resumes=out if resume else None)
    if processes.leads:
        remember(output, run=out, data=data, **({} if source is None else {"source": source}))
    done = state.progress["step"] if state is not None else 0
    total = settings.steps(len(train))
    kept = config if not resume or changed(config, out) else None
    keeping = keeping_config(out, kept) if processes.leads else nullcontext(lambda folder: None)
    with keeping as on_saved, working() as stop, training(output, total, done) as on_step:
        if not processes.alone:
            stop.hold()  # a process that breaks off at a signal would leave the others waiting
        callbacks = Callbacks(
            on_step=on_step,
            on_message=output.note,
            on_choice=lambda chosen: output.aside.print(choice_table(chosen)),
            on_saved=on_saved,
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
            began_with=None if state is not None or model_file is None else loaded_checksum(model_file),
            call=call.record(),
            processes=processes,
        )
    for split in (train, test):
        split.skipped = {name: why for own in processes.exchanged(split.skipped) for name, why in own.items()}
    if processes.leads:
        tell_of_end(result, lock.folder, settings, output)
        document = finetune_json(result)
        if at_end and not result.interrupted and result.ended != OUT_OF_TIME:
            document["test"] = measure_at_end(lock.folder, loaded, at_end[0], settings, where, origin, output)
        output.notes(split.skipped_note() for split in (train, test, *at_end))
        output.json(document)
    if result.interrupted:
        output.note(f"interrupted at step {result.steps} of {result.total_steps}; --resume goes on from there")
        raise typer.Exit(exit_code(stop.number or signal.SIGINT))
