"""What may change under a run that goes on, and what must not."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..data import ImageData
from ..errors import ResodeError, UsageError, first_few
from ..files import model_file
from ..network.model import OdeResNet
from ..options import flag_of, option_of, parameter_of
from ..sources.registry import SAVED, parse_source
from .lengths import AUTO
from .results import NONE_YET
from .run_folder import ALONE, BEST, CONFIG, FILES, STATE, State, is_own, runner_up, runners_up, settle_first_model
from .run_log import LOG
from .settings import Settings
from .teacher import Teacher
from .trained import with_stage_names

# By how many images data is known again, and how many bytes of each: of a large set, of some that are spread over it.
LOOKED_INTO, LOOKED_AT = 2048, 2**16
BEFORE = 64  # so many, in runs of older versions


def resumed(
    chosen: Settings, given: Iterable[str], saved: Mapping[str, Any], model: OdeResNet
) -> tuple[Settings, list[str]]:
    """The settings of a run that goes on, and what to say of those that are others from now on.

    chosen: this command's settings; given: the flags, by parameter, that the user wrote. saved, model: the run's
    settings and its model.
    Raises UsageError for one that may not change.
    """
    named = set(given)
    settings = {setting.name: setting for setting in fields(Settings)}
    known = {name: saved[name] for name in settings if name in saved}
    known = {name: tuple(value) or None if isinstance(value, list) else value for name, value in known.items()}
    before, chosen = with_stage_names(Settings(**known), model), with_stage_names(chosen, model)
    chosen = decided_before(chosen, before)
    said = []
    changes: dict[str, Any] = {}
    for name, setting in settings.items():
        was, now, flag = getattr(before, name), getattr(chosen, name), flag_of(setting)
        if parameter_of(setting) not in named or now == was:
            continue
        if option_of(setting).resume == "stays":
            raise UsageError(
                f"{flag} {_shown(now)}: the run has {_shown(was)}, and keeps it; start a new run for another"
            )
        said.append(f"{flag} is {_shown(now)} from here on; it was {_shown(was)}")
        changes[name] = now
    return replace(before, **changes), said


def decided_before(chosen: Settings, before: Settings) -> Settings:
    """Settings given to a run that goes on: 'auto' stands for what was found when it began.

    With --accumulate auto, the batch size is that of the whole step, as it was when the run began.
    """
    if chosen.batch_size == AUTO:
        chosen = replace(chosen, batch_size=before.batch_size)
    if chosen.accumulate == AUTO:
        whole = chosen.batch_size == before.step_images
        chosen = replace(
            chosen,
            accumulate=before.accumulate,
            batch_size=before.batch_size if whole else chosen.batch_size,
        )
    return chosen


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "unset" if value is None else str(value)


def data_fingerprint(data: ImageData | None) -> dict[str, Any] | None:
    """What tells data from other data: how many images, their classes, a digest of names and sizes, and of contents.

    name: as the user spelled it, which is for people; the folder may be spelled otherwise later, or stand elsewhere.
    """
    if data is None:
        return None
    digest, few, many = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
    for i, (name, size) in enumerate(data.files()):
        digest.update(f"{name}\0{size}\0".encode(errors="surrogateescape"))
        of_few, of_many = (i % max(len(data) // looked_into, 1) == 0 for looked_into in (BEFORE, LOOKED_INTO))
        beginning = data.first_bytes(i, LOOKED_AT) if of_few or of_many else b""
        for contents, wanted in ((few, of_few), (many, of_many)):
            contents.update(beginning if wanted else b"")
    return {
        "name": data.name,
        "images": len(data),
        "classes": hashlib.sha256("\0".join(data.class_names).encode(errors="surrogateescape")).hexdigest(),
        "files": digest.hexdigest(),
        "contents": few.hexdigest(),
        "more_contents": many.hexdigest(),
    }


def _same_data(was: dict[str, Any] | None, now: dict[str, Any] | None) -> bool:
    """Whatever the data is called. Runs of older versions know nothing of contents, and have full names for `files`."""
    if was is None or now is None:
        return was is now
    if "contents" not in was:
        return (was["images"], was["classes"]) == (now["images"], now["classes"])
    return all(was[key] == now[key] for key in was if key != "name")


def run_fingerprint(train: ImageData, test: ImageData | None, settings: Settings) -> dict[str, Any]:
    """What must not change under a resumed run: its position in the data would mean something else."""
    return {
        "images": len(train),
        "batch_size": settings.batch_size,
        "seed": settings.seed,
        "train": data_fingerprint(train),
        "test": data_fingerprint(test),
        "division": None if train.division is None else train.division.record(),
        "class_map": train.renamed,
    }


def kept_division(share: float | None, seed: int | None, state: State) -> dict[str, Any]:
    """The share and the seed by which a run that goes on holds images out, as fields of a command's options.

    share, seed: what the user asks for now. Raises UsageError for others than the run began with.
    """
    division = state.fingerprint.get("division")  # of no run of an older version
    if division is None:
        return {}
    kept = {"val_split": division["val_split"], "split_seed": division["split_seed"]}
    for name, given in (("val_split", share), ("split_seed", seed)):
        if given is not None and given != kept[name]:
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag} {given:g}: the run has {kept[name]:g}, and keeps it; start a new run for another")
    return kept


def check_resumable(
    state: State, train: ImageData, test: ImageData | None, settings: Settings, teacher: Teacher | None = None
) -> None:
    """Raises UsageError for a run whose data, batch size, seed or teacher are not those it began with, or that is over.

    What it began with is compared by content, not by how it was spelled.
    """
    now = run_fingerprint(train, test, settings)
    changed = [
        f"{name} was {state.fingerprint[name]}, is {now[name]}"
        for name in ("images", "batch_size", "seed")
        if state.fingerprint.get(name) != now[name]
    ]
    if changed:
        raise UsageError(f"--resume cannot change the order of images: {'; '.join(changed)}")
    for split in ("train", "test"):
        if split in state.fingerprint and not _same_data(state.fingerprint[split], now[split]):
            raise UsageError(f"--resume: {_difference(split, state.fingerprint[split], now[split])}; start a new run")
    check_teacher(state, teacher)
    step, total = state.progress["step"], settings.steps(len(train))
    if total < step:
        raise UsageError(
            f"--resume: the run is at step {step} already, past the {total} of --max-steps and --epochs; ask for more"
        )


def _difference(split: str, was: dict[str, Any] | None, now: dict[str, Any] | None) -> str:
    if was is None or now is None:
        return f"the run began {'without' if was is None else 'with'} images to {split} on"
    if was["images"] != now["images"]:
        return f"the {split} images are {now['images']}, not {was['images']} as when the run began"
    if was["classes"] != now["classes"]:
        return f"the classes of the {split} images have other names than when the run began"
    return f"the {split} images are others than when the run began ({was['name']})"


def teacher_fingerprint(teacher: Teacher | None) -> str | None:
    """A digest of the weights."""
    if teacher is None:
        return None
    return model_file.checksum({name: value.cpu() for name, value in teacher.net.state_dict().items()}, {})


def check_teacher(state: State, teacher: Teacher | None) -> None:
    """Raises UsageError for another than the run began with."""
    began = state.fingerprint.get("teacher")
    if teacher is None or "teacher" not in state.fingerprint or teacher_fingerprint(teacher) == began:
        return
    what = "without a teacher" if began is None else "with a teacher of other weights"
    raise UsageError(f"--teacher {teacher.name}: the run began {what}; start a new run for another")


def unknown_contents(state: State) -> str | None:
    """What to say of a run whose record of the images knows nothing of what is in them."""
    known = all("contents" in was for split in ("train", "test") if (was := state.fingerprint.get(split)))
    if known:
        return None
    return "an older resode saved this run: of its images, only the number and the classes could be compared"


def forget_lost_best(state: State, folder: Path) -> str | None:
    """What to say of a best model that is no longer there; the run forgets it, and the next one is the best."""
    progress = state.progress
    settle_first_model(
        folder,
        state.fingerprint.get("run"),
        best_step=progress.get("best_step", 0),
        keep_best=int(state.settings.get("keep_best", 1)),
    )
    known = progress.get("best_file")  # of no run of an older version
    if progress["best_top1"] < 0 or ((folder / BEST).is_file() and known in (None, _checksum(folder / BEST))):
        return None
    before = folder / runner_up(progress.get("best_step", 0))
    if known is not None and before.is_file() and _checksum(before) == known:
        before.replace(folder / BEST)  # a run that was killed had found a better one since it saved this state
        return None
    gone = "is not the one that the run saved" if (folder / BEST).is_file() else "is not there any more"
    progress.update(best_top1=NONE_YET, best_score=None, best_file=None, kept=[])
    return f"{folder / BEST} {gone}; the best model from here on takes its place"


def _checksum(path: Path) -> str | None:
    """The checksum of a model file whose tensors have it; None for what is no whole file."""
    try:
        model_file.read_tensors(path)  # which compares them, and hands the checksum out no more
        return loaded_checksum(path)
    except ResodeError:
        return None


def ends_early(settings: Settings, given: Iterable[str], images: int) -> str | None:
    """What to say where the one length that the user gave is not what ends the run."""
    if settings.epochs is None or settings.max_steps is None:
        return None
    said, whole = {"epochs", "max_steps"} & set(given), settings.epochs * settings.per_epoch(images)
    if said == {"epochs"} and settings.max_steps < whole:
        return f"the run ends at step {settings.max_steps}, by the --max-steps that it began with"
    if said == {"max_steps"} and whole < settings.max_steps:
        return f"the run ends at step {whole}, by the --epochs {settings.epochs} that it began with"
    return None


def check_model(path: Path, folder: Path, state: State) -> str | None:
    """What to say of the MODEL that a resumed run was given. Raises UsageError for another than it began with.

    The state holds the model, so that a file which is no longer there, or the run's own, is as good.
    """
    if path.resolve() == folder.resolve() or path.resolve().parent == folder.resolve():
        return None
    if not path.is_file():
        return f"{path} is not there any more; the run's own state holds the model"
    began = state.fingerprint.get("model")
    if began is not None and model_file.read_metadata(path).get(model_file.CHECKSUM) != began:
        raise UsageError(f"--resume: {path} is not the model that the run in {folder} began with; start a new run")
    return None


def check_source(source: str | None, state: State) -> None:
    """Raises UsageError for a SOURCE that is not what a resumed run was made of; nothing is known of a saved copy."""
    if source is None:
        return
    library, name = parse_source(source)
    began = state.model.info.source
    if library not in SAVED and (library, name) != (began.library, began.name):
        raise UsageError(f"--resume: the run began with {began}, not with {source}; start a new run")


_CALLED = {LOG: "log", CONFIG: "recipe"}


def saved_files(folder: Path) -> list[str]:
    """What a run has saved in a folder; a log and settings alone are no run."""
    return [name for name in FILES if name not in ALONE and (folder / name).exists()] + runners_up(folder)


def check_folder(folder: Path, *, resume: bool, force: bool, reads: Iterable[Path] = ()) -> None:
    """Raises ResodeError for a folder that holds a run, unless it goes on, or is to be replaced.

    reads: files that the new run is made of, which it must not replace.
    """
    existing = saved_files(folder)
    if existing and not resume and not force:
        if STATE not in existing:  # killed between its first model and its first state, or the state was removed
            raise ResodeError(
                f"{folder} holds models of a run ({first_few(existing)}) that has no {STATE} to go on from; pass"
                " --force to replace it, or choose another --out"
            )
        raise ResodeError(
            f"{folder} holds a run ({first_few(existing)}); pass --resume to go on with it, or --force to replace it"
        )
    replaced = () if resume else (CONFIG,) if existing else ALONE
    for path in (folder / name for name in replaced):
        if path.exists() and not is_own(path):
            raise ResodeError(f"{path} is not the {_CALLED[path.name]} of a run; move it, or choose another --out")
    own = {(folder / name).resolve() for name in existing} if force else set()
    for path in reads:
        if path.resolve() in own:
            raise ResodeError(
                f"{path} is a file of the run that --force replaces, and this run reads it; choose another --out"
            )


def loaded_checksum(path: Path) -> str | None:
    """The checksum of a model file, by which a resumed run knows it."""
    found = model_file.read_metadata(path).get(model_file.CHECKSUM)
    return str(found) if found is not None else None
