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
from ..network.model import OdeResNet, non_finite
from ..options import flag_of, option_of, parameter_of
from .run_folder import FILES, State
from .settings import Settings


def resumed(chosen: Settings, given: Iterable[str], saved: Mapping[str, Any]) -> tuple[Settings, list[str]]:
    """The settings of a run that goes on, and what to say of those that are others from now on.

    chosen: of this command; given: the flags, by parameter, that the user wrote. saved: of the run.
    Raises UsageError for one that may not change.
    """
    named = set(given)
    settings = {setting.name: setting for setting in fields(Settings)}
    known = {name: saved[name] for name in settings if name in saved}
    known["stages"] = tuple(known["stages"]) if known.get("stages") else None
    before = Settings(**known)
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


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "unset" if value is None else str(value)


def data_fingerprint(data: ImageData | None) -> dict[str, Any] | None:
    """What tells data from other data: how many images, their classes, and a digest of their names and sizes."""
    if data is None:
        return None
    digest = hashlib.sha256()
    for name, size in data.files():
        digest.update(f"{name}\0{size}\0".encode(errors="surrogateescape"))
    return {
        "name": data.name,
        "images": len(data),
        "classes": hashlib.sha256("\0".join(data.class_names).encode(errors="surrogateescape")).hexdigest(),
        "files": digest.hexdigest(),
    }


def run_fingerprint(train: ImageData, test: ImageData | None, settings: Settings) -> dict[str, Any]:
    """What must not change under a resumed run: its position in the data would mean something else."""
    return {
        "images": len(train),
        "batch_size": settings.batch_size,
        "seed": settings.seed,
        "train": data_fingerprint(train),
        "test": data_fingerprint(test),
    }


def check_resumable(state: State, train: ImageData, test: ImageData | None, settings: Settings) -> None:
    """Raises UsageError for a run whose data, batch size or seed are not the ones it began with, or that is over."""
    now = run_fingerprint(train, test, settings)
    changed = [
        f"{name} was {state.fingerprint[name]}, is {now[name]}"
        for name in ("images", "batch_size", "seed")
        if state.fingerprint.get(name) != now[name]
    ]
    if changed:
        raise UsageError(f"--resume cannot change the order of images: {'; '.join(changed)}")
    for split in ("train", "test"):
        if split in state.fingerprint and state.fingerprint[split] != now[split]:
            raise UsageError(f"--resume: {_difference(split, state.fingerprint[split], now[split])}; start a new run")
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


def check_model(path: Path, folder: Path, state: State) -> str | None:
    """What to say of the MODEL that a resumed run was given. Raises UsageError for another than it began with.

    The state holds the model, so that a file which is no longer there, or the run's own, is as good.
    """
    if path.resolve().parent == folder.resolve():
        return None
    if not path.is_file():
        return f"{path} is not there any more; the run's own state holds the model"
    began = state.fingerprint.get("model")
    if began is not None and model_file.read_metadata(path).get(model_file.CHECKSUM) != began:
        raise UsageError(f"--resume: {path} is not the model that the run in {folder} began with; start a new run")
    return None


def saved_files(folder: Path) -> list[str]:
    """What a run has saved in a folder; a log alone is no run."""
    return [name for name in FILES if name != "log.csv" and (folder / name).exists()]


def check_folder(folder: Path, *, resume: bool, force: bool) -> None:
    """Raises ResodeError for a folder that holds a run, unless it goes on, or is to be replaced."""
    existing = saved_files(folder)
    if existing and not resume and not force:
        raise ResodeError(
            f"{folder} holds a run ({first_few(existing)}); pass --resume to go on with it, or --force to replace it"
        )


def loaded_checksum(path: Path) -> str | None:
    """The checksum of a model file, by which a resumed run knows it."""
    found = model_file.read_metadata(path).get(model_file.CHECKSUM)
    return str(found) if found is not None else None


def check_finite(model: OdeResNet, what: str) -> None:
    """Raises ResodeError for weights that are no numbers. what: the message, with {} for their names."""
    if bad := non_finite(model.net.state_dict()):
        raise ResodeError(what.format(first_few(bad)))
