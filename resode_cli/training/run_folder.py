"""The folder of a training run: log.csv, best and last model, and the state that a resumed run needs.

The state is one safetensors file, written atomically: tensors of the model, the optimizer and the
generators, and everything else as JSON. No pickle.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from ..errors import ResodeError, UsageError, first_few
from ..files import model_file
from ..files.model_schema import HEUN_RENAMED
from ..network.model import OdeResNet
from .optimizer_state import OptimizerState, Saved
from .plateau import is_state
from .run_log import LOG
from .settings import Settings

STATE, BEST, LAST = "state.safetensors", "best.safetensors", "last.safetensors"
CONFIG = "config.toml"
FILES = (STATE, BEST, LAST, LOG, CONFIG)
ALONE = (LOG, CONFIG)  # which are there from the start of a run, and are none by themselves
_RUNNER_UP, _FIRST = re.compile(r"best-step-\d+\.safetensors"), re.compile(r"\.best\.safetensors\.[0-9a-f]{8}")


def runner_up(step: int) -> str:
    """The file of one of the best models that is not the best."""
    return f"best-step-{step}.safetensors"


def runners_up(folder: Path) -> list[str]:
    """The files of that kind that a folder holds."""
    return sorted(path.name for path in folder.glob("best-step-*.safetensors") if _RUNNER_UP.fullmatch(path.name))


def first_model(folder: Path, run: str | None) -> Path:
    """Where a run keeps the model that it began with until its first save stands. run: tells it from other runs."""
    return folder / f".{BEST}.{run}"


def forget_first_models(folder: Path) -> None:
    """Remove those of runs that were killed before they saved anything."""
    for path in folder.glob(f".{BEST}.*"):
        if _FIRST.fullmatch(path.name):
            path.unlink(missing_ok=True)


def settle_first_model(folder: Path, run: str | None, *, best_step: int, keep_best: int) -> None:
    """Give the model that a run began with its name, now that a save stands: as the best, or one of the best."""
    first = first_model(folder, run)
    if not first.is_file():
        return
    if best_step == 0:
        first.replace(folder / BEST)
    elif keep_best > 1:
        first.replace(folder / runner_up(0))
    else:
        first.unlink()


@dataclass(frozen=True)
class State:
    """A saved run. `restore` puts the optimizer, the scaler and the generators back.

    average: of the weights, by name; empty where the run has none.
    """

    model: OdeResNet
    progress: dict[str, Any]
    settings: dict[str, Any]
    fingerprint: dict[str, Any]
    optimizer: Saved
    scaler: dict[str, Any]
    generators: dict[str, Tensor]
    average: dict[str, Tensor]

    def restore(self, optimizer: OptimizerState, scaler: torch.amp.GradScaler, device: torch.device) -> None:
        """Put optimizer, loss scale and generators where they were. Raises ResodeError for what does not fit them."""
        try:
            optimizer.restore(self.optimizer)
            if self.scaler and scaler.is_enabled():
                scaler.load_state_dict(self.scaler)
            torch.set_rng_state(self.generators["cpu"])
            if "cuda" in self.generators and device.type == "cuda":
                torch.cuda.set_rng_state(self.generators["cuda"], device)
        except ResodeError:
            raise
        except Exception as error:  # whatever torch makes of what a state holds
            reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
            raise ResodeError(f"the state of the run cannot be restored ({reason}); start a new run") from error


def save_state(
    path: Path,
    model: OdeResNet,
    *,
    optimizer: OptimizerState,
    scaler: torch.amp.GradScaler,
    average: Mapping[str, Tensor],
    progress: dict[str, Any],
    settings: dict[str, Any],
    fingerprint: dict[str, Any],
) -> None:
    """Write everything a resumed run needs, atomically."""
    tensors = {f"model/{name}": value for name, value in model.file_state().items()}
    packed = optimizer.pack()
    tensors |= {f"optimizer/{name}": tensor for name, tensor in packed.tensors.items()}
    tensors |= {f"average/{name}": tensor.detach() for name, tensor in average.items()}
    tensors["generator/cpu"] = torch.get_rng_state()
    if next(model.parameters()).is_cuda:
        tensors["generator/cuda"] = torch.cuda.get_rng_state(next(model.parameters()).device)
    metadata = {
        **model_file.model_metadata(model),
        "run": {
            "progress": progress,
            "settings": settings,
            "fingerprint": fingerprint,
            "optimizer": packed.values,
            "optimizer_by": "name",
            "scaler": scaler.state_dict(),
        },
    }
    model_file.write_tensors(path, tensors, metadata)


def run_metadata(folder: Path) -> dict[str, Any]:
    """What a saved run says of itself, without its tensors. Raises UsageError if there is none."""
    if not (folder / STATE).is_file():
        begin = "; begin the run anew, with --force" if (folder / BEST).exists() or runners_up(folder) else ""
        raise UsageError(f"nothing to resume: {str(folder / STATE)!r} does not exist{begin}")
    metadata = model_file.read_metadata(folder / STATE)
    if "run" not in metadata:
        raise ResodeError(f"{folder / STATE}: not the state of a run")
    problem = _run_problem(metadata["run"])
    if problem:
        raise ResodeError(f"{folder / STATE}: not the state of a run that can go on ({problem})")
    return _as_named_now(metadata["run"]) if metadata["format"] < HEUN_RENAMED else metadata["run"]


def _as_named_now(run: Any) -> Any:
    """What an older file says of a run, with the adjoint of the forward rule that was called 'heun' by its new name."""
    if not isinstance(run, dict):
        return run
    return {
        key: "heunnet" if key in ("adjoint", "method") and value == "heun" else _as_named_now(value)
        for key, value in run.items()
    }


_PARTS = ("progress", "settings", "fingerprint", "optimizer", "scaler")
_COUNTS = ("step", "evaluated", "skipped", "best_step", "waited")


def _run_problem(run: Any) -> str:
    """What is wrong with what a file says of a run; empty for nothing."""
    if not isinstance(run, dict) or not all(isinstance(run.get(part), dict) for part in _PARTS):
        return f"{' or '.join(_PARTS)} is missing"
    progress = run["progress"]
    odd = [name for name in _COUNTS if type(progress.get(name, 0)) is not int or progress.get(name, 0) < 0]
    best = progress.get("best_top1", 0.0)
    if type(best) not in (int, float) or not -1 <= best <= 1:
        odd.append("best_top1")
    kinds: dict[str, Any] = {
        "window": list,
        "guard": dict,
        "switched": (dict, type(None)),
        "best_file": (str, type(None)),
        "best_score": (int, float, type(None)),
        "kept": list,
        "plateau": dict,
    }
    odd += [name for name, kind in kinds.items() if name in progress and not isinstance(progress[name], kind)]
    if "kept" not in odd and not all(map(_is_kept, progress.get("kept", []))):
        odd.append("kept")
    if not is_state(progress.get("plateau", {})):
        odd.append("plateau")
    odd += sorted(progress.keys() - {*_COUNTS, "best_top1", *kinds})
    if odd:
        return f"progress: {first_few(odd)}"
    odd = [name for name, value in run["settings"].items() if not _suits_setting(name, value)]
    return f"settings: {first_few(odd)}" if odd else ""


def _is_kept(entry: Any) -> bool:
    return isinstance(entry, list) and [type(value) in (int, float) for value in entry] == [True, True]


def _suits_setting(name: str, value: Any) -> bool:
    """Whether a setting, if it is one, may have a value by its type; ranges are its own affair."""
    hint = _SETTING_TYPES.get(name)
    if hint is None:  # of another version
        return True
    wanted = get_args(hint) or (hint,)
    if name == "anchors" and type(value) is int:  # as older versions wrote it
        return True
    if type(value) is list:
        return any(get_origin(kind) is tuple for kind in wanted) and all(type(v) in (str, int, float) for v in value)
    return type(value) in wanted or (type(value) is int and float in wanted)


_SETTING_TYPES = get_type_hints(Settings)


def load_state(folder: Path, *, source: str | None = None, trust_source: bool = False) -> State:
    """The run saved in `folder`. Raises UsageError if there is none.

    source, trust_source: see `model_file.load`.
    """
    run = run_metadata(folder)
    tensors, metadata = model_file.read_tensors(folder / STATE)
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "generator": {}, "average": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition("/")
        if part not in parts:
            raise ResodeError(f"{folder / STATE}: not the state of a run that can go on (it holds {name!r})")
        parts[part][rest] = tensor
    model = model_file.from_tensors(folder / STATE, parts["model"], metadata, source=source, trust_source=trust_source)
    return State(
        model,
        run["progress"],
        run["settings"],
        run["fingerprint"],
        Saved(parts["optimizer"], run["optimizer"], by_place=run.get("optimizer_by") != "name"),
        run["scaler"],
        parts["generator"],
        parts["average"],
    )


def is_own(path: Path) -> bool:
    """Whether a file begins as a run's file of that name does."""
    beginning = _BEGINNINGS[path.name]
    try:
        with path.open("rb") as file:
            return file.read(len(beginning)) == beginning
    except OSError:
        return False


CONFIG_BEGINNING = "# A run of resode finetune"
_BEGINNINGS = {LOG: b"split,step,epoch", CONFIG: CONFIG_BEGINNING.encode()}
