"""A file of weights, of whichever program, to the state dicts in it: nothing of it runs, and little of it is believed.

Pickles are read with `weights_only=True` alone. What they hold beside tensors and plain values (a trainer's settings,
an optimizer's schedule) is built of stand-ins of ours: the classes that they name are neither imported nor called.
"""

from __future__ import annotations

import json
import pickle
import re
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.serialization import safe_globals

from ..errors import ResodeError, UsageError, first_few

SUFFIXES = (".safetensors", ".pth", ".pt", ".th", ".tar", ".bin", ".ckpt")
# Of the standard library, what settings are made of. Anything else of it, in a file of weights, is there to run code.
SETTINGS = {
    "argparse",
    "collections",
    "copyreg",
    "datetime",
    "decimal",
    "enum",
    "fractions",
    "pathlib",
    "types",
    "uuid",
}
MOST_NAMES = 256  # classes that a file may name
MOST_ENTRIES = 1_000_000  # entries of nested dictionaries that are looked at
DEEPEST = 6  # levels of them
ZIP_OVERHEAD = 2**16  # bytes by which members may sum up to more than their file, which an honest one's never do


def _check_is_of_blocks(path: Path) -> None:
    """Raises ResodeError for a model of ours whose tensors mean something else than in its source's blocks."""
    try:
        with safe_open(path, framework="pt") as file:
            stages = json.loads((file.metadata() or {}).get("resode", "{}")).get("stages", [])
        other = [
            stage["name"]
            for stage in stages
            if stage.get("form", "exact") != "exact"
            or stage.get("scheme", "euler") != "euler"
            or stage.get("blends")
            or str(stage["horizon"]) != str(len(stage["source_blocks"]))
            or len(stage["schedule"]) != len(stage["source_blocks"])
        ]
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, TypeError):
        return  # whatever it is, it is read as any other file
    if other:
        raise ResodeError(
            f"{path}: a resode model whose stage {other[0]} is not its source's blocks any more (another form, depth or"
            " rule); pass the file as MODEL"
        )


@dataclass(frozen=True, eq=False)
class StateDict:
    """Tensors by name, and where in the file they are: '' for the file itself, else keys joined by dots.

    others: the names of what is beside them and no tensor.
    """

    where: str
    tensors: dict[str, Tensor]
    others: tuple[str, ...] = ()


@dataclass
class WeightFile:
    """The state dicts of a file. left: classes of the objects that were left out, by where in the file they are."""

    path: Path
    states: list[StateDict]
    left: dict[str, str] = field(default_factory=dict)


def read(path: Path) -> WeightFile:
    """Raises UsageError for a file that is not there or of unknown kind, ResodeError for one without a state dict."""
    if not path.is_file():
        raise UsageError(f"weights file {str(path)!r} does not exist")
    if path.suffix == ".safetensors":
        _check_is_of_blocks(path)
        try:
            return WeightFile(path, [StateDict("", load_file(path))])
        except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ResodeError(f"{path}: not a complete safetensors file ({error})") from error
    if path.suffix not in SUFFIXES:
        raise UsageError(f"weights file {path.name!r}: unknown kind (allowed: {', '.join(SUFFIXES)})")
    _check_archive(path)
    content, stand_ins = _unpickle(path)
    file = WeightFile(path, [])
    kind = stand_ins.kind(content)
    if kind is not None:
        raise ResodeError(f"{path}: holds a pickled {kind}, whole: {_WHOLE}")
    if not isinstance(content, dict):
        raise ResodeError(f"{path}: holds a {type(content).__name__}, not a state dict")
    for where, inner in _dictionaries(content, stand_ins, file.left):
        tensors = {key: value for key, value in inner.items() if isinstance(key, str) and isinstance(value, Tensor)}
        if tensors:
            others = tuple(str(key) for key in inner if key not in tensors)
            file.states.append(StateDict(where, tensors, others))
    if not file.states:
        whole = next((f"{where!r} is a pickled {kind}, whole: {_WHOLE}" for where, kind in file.left.items()), None)
        keys = ", ".join(map(str, list(content)[:5]))
        raise ResodeError(f"{path}: no state dict among its entries ({keys}){f'; {whole}' if whole else ''}")
    return file


_WHOLE = (
    "Python objects other than tensors, which could run code; where its class is at hand, save its state_dict alone"
    " (torch.save(network.state_dict(), FILE)) and try again"
)


def _check_archive(path: Path) -> None:
    """Raises ResodeError for an archive that would unpack to more than it is: torch's own are not compressed."""
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return  # torch says what is wrong with it
    if any(Path(member.filename).name == "constants.pkl" for member in members):
        raise ResodeError(f"{path}: a TorchScript program; save its state_dict alone and try again")
    unpacked = sum(member.file_size for member in members)
    held = path.stat().st_size
    if any(member.compress_type != zipfile.ZIP_STORED for member in members) or unpacked > held + ZIP_OVERHEAD:
        raise ResodeError(
            f"{path}: a compressed archive of {held:,} bytes that unpacks to {unpacked:,}; torch.save compresses"
            " nothing: unpack it, if it holds a file of weights"
        )


class _StandIns:
    """What the objects of a pickle become that are neither tensors nor plain values.

    forms: what a class's objects are built as, by its name: an object at first, a dictionary or a list where the pickle
        fills them like one.
    """

    def __init__(self) -> None:
        self.forms: dict[str, str] = {}
        self.made: dict[int, tuple[object, str]] = {}  # the objects are held, so that their ids stay theirs

    def kind(self, value: object) -> str | None:
        """The class that an object of the file was of, or None for a plain value."""
        return self.made[id(value)][1] if id(value) in self.made else None

    def globals(self) -> list[Any]:
        return [(self._class(i, name, form), name) for i, (name, form) in enumerate(self.forms.items())]

    def _class(self, i: int, name: str, form: str) -> type:
        made = self.made

        def new(cls: type, *_: object, **__: object) -> object:
            kinds = {"mapping": OrderedDict, "list": list}
            value = kinds[form]() if form in kinds else object.__new__(cls)
            made[id(value)] = value, name
            return value

        # Its setters take anything: what an object held is not looked at. (torch of 2.9 sets items of any object.)
        members: dict[str, Any] = {"__new__": new, "__init__": _ignore, "__setstate__": _ignore, "__setitem__": _ignore}
        return type(f"StandIn_{i}_", (), members)

    def learn(self, message: str) -> bool:
        """Whether a refusal says something new: another class, or that one is filled as a dictionary or a list."""
        unknown = re.search(r"Unsupported global: GLOBAL (\S+) was not an allowed global", message)
        if unknown:
            name = unknown[1]
            if name in self.forms or len(self.forms) >= MOST_NAMES or not _is_setting(name):
                return False
            self.forms[name] = "object"
            return True
        stand_in = re.search(r"StandIn_(\d+)_", message)
        if not stand_in:
            return False
        name = list(self.forms)[int(stand_in[1])]
        if self.forms[name] != "object":
            return False
        self.forms[name] = "mapping" if "SETITEM" in message else "list"
        return True


def _ignore(self: object, *_: object, **__: object) -> None:
    pass


def _is_setting(name: str) -> bool:
    """Whether a class is left out without a word of warning: none of the interpreter's own, but of its plain ones."""
    module, _, _ = name.rpartition(".")
    top = module.partition(".")[0]
    if top == "torch":
        return not module.startswith("torch.storage")
    return name == "builtins.object" or top in SETTINGS or (top not in sys.stdlib_module_names and bool(module))


def _unpickle(path: Path) -> tuple[object, _StandIns]:
    stand_ins = _StandIns()
    while True:
        stand_ins.made.clear()
        try:
            with safe_globals(stand_ins.globals()), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what torch deprecates is refused later, by name
                return torch.load(path, map_location="cpu", weights_only=True), stand_ins
        except pickle.UnpicklingError as error:
            message = str(error)
            if stand_ins.learn(message):
                continue
            if any(
                word in message
                for word in ("nsupported global", "nsupported class", "GLOBAL", "StandIn_", "persistent")
            ):
                raise ResodeError(
                    f"{path}: the pickle holds Python objects other than tensors, which could run code;"
                    " save its state_dict alone and try again"
                ) from error
            raise ResodeError(f"{path}: not a file of weights, or cut short") from error
        except Exception as error:  # of many kinds: what is malformed inside a pickle fails where it is built
            raise ResodeError(f"{path}: not a file of weights, or cut short") from error


def _dictionaries(
    content: dict[Any, Any], stand_ins: _StandIns, left: dict[str, str]
) -> Iterator[tuple[str, dict[Any, Any]]]:
    """The dictionaries inside, each once, from the outside in, with their places; stand-ins are noted in `left`."""
    seen, entries = {id(content)}, 0
    level: list[tuple[str, dict[Any, Any]]] = [("", content)]
    for _ in range(DEEPEST):
        below: list[tuple[str, dict[Any, Any]]] = []
        for where, inner in level:
            yield where, inner
            for key, value in inner.items():
                entries += 1
                place = f"{where}.{key}" if where else str(key)
                kind = stand_ins.kind(value)
                if kind is not None:
                    left[place] = kind
                elif isinstance(value, dict) and id(value) not in seen and not place.startswith("optim"):
                    seen.add(id(value))
                    below.append((place, value))
                if entries > MOST_ENTRIES:
                    return
        level = below


def describe_left(left: dict[str, str]) -> str:
    """The objects that were left out, in one line."""
    return first_few([f"{where} ({kind})" for where, kind in left.items()])
