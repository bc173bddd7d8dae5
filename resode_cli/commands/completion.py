"""What a shell offers for a value that is being typed: names of networks, methods, stages, data, recipes, optimizers.

A shell waits for it at every press of a key: nothing here imports torch, and nothing here is an error. Values that
begin otherwise than what is typed are left out by whoever asks.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
import tomllib
from collections.abc import Callable, Iterable, MutableMapping
from contextlib import redirect_stderr, redirect_stdout
from importlib.util import find_spec
from pathlib import Path

import typer

from ..options import ADJOINT_SETTINGS
from ..recipe import packaged
from ..sources import catalog

VARIABLE = "_RESODE_COMPLETE"  # which a shell sets when it asks
# Held against what defines them by a test: their modules import torch.
ADJOINTS = ("auto", "backprop", "checkpoint", "multistep", "pc", "euler", "heun", "heunnet", "midpoint", "rk4")
DATA_SETS = (
    *("digits", "cifar10", "cifar100", "mnist", "fashionmnist", "svhn", "stl10"),
    *("food101", "flowers102", "oxfordiiitpet", "imagenette"),
)
MEMORY = "resode.toml"
CIFAR = tuple(f"cifar:resnet{depth}" for depth in (20, 32, 44, 56, 110, 1202))
_OTHER_SOURCES = ("hf-hub:", "local-dir:")
_LONGEST_HEADER = 50_000_000  # bytes that are read of a model file
_BREAKS = ":="  # at which bash cuts words in parts

Complete = Callable[[typer.Context, str], list[str]]


def _safe(complete: Callable[[typer.Context, str], Iterable[str]]) -> Complete:
    """Nothing, where anything goes wrong."""

    def offered(ctx: typer.Context, incomplete: str) -> list[str]:
        try:
            with redirect_stderr(io.StringIO()):
                return [value for value in complete(ctx, incomplete) if value.startswith(incomplete)]
        except Exception:
            return []

    return offered


def _files(incomplete: str, *ends: str) -> list[str]:
    """Folders, and files that end so, that begin as what is typed."""
    folder, start = os.path.split(incomplete)
    found = []
    with os.scandir(os.path.expanduser(folder) or ".") as entries:
        for entry in entries:
            if entry.name.startswith(start) and (start or not entry.name.startswith(".")):
                path = os.path.join(folder, entry.name)
                if entry.is_dir():
                    found.append(f"{path}/")
                elif entry.name.lower().endswith(ends):
                    found.append(path)
    return sorted(found)


def _networks(incomplete: str) -> list[str]:
    """Sources: a library first, then its names, and after a name and a dot its tags. A bare name is timm's."""
    library, colon, rest = incomplete.partition(":")
    raws = [row for row in catalog.rows() if not colon or row.source.startswith(f"{library}:")]
    if colon and "." in rest:
        return [f"{row.source}.{tag}" for row in raws for tag in row.tags]
    names = [row.source for row in raws]
    if colon:
        return [*names, *CIFAR]
    libraries = [*dict.fromkeys(f"{name.partition(':')[0]}:" for name in (*names, *CIFAR)), *_OTHER_SOURCES]
    bare = [name.removeprefix("timm:") for name in names if name.startswith("timm:")] if incomplete else []
    return [*libraries, *bare]


@_safe
def sources(_: typer.Context, incomplete: str) -> list[str]:
    return [*_networks(incomplete), *_files(incomplete, ".py")]


@_safe
def models_or_sources(_: typer.Context, incomplete: str) -> list[str]:
    return [*_files(incomplete, ".safetensors", ".py"), *_networks(incomplete)]


@_safe
def models(_: typer.Context, incomplete: str) -> list[str]:
    return _files(incomplete, ".safetensors")


@_safe
def data(_: typer.Context, incomplete: str) -> list[str]:
    kinds = [*DATA_SETS, "hf:", "wds:", "torchvision:"]
    if incomplete.startswith("wds:"):
        return [f"wds:{path}" for path in _files(incomplete.removeprefix("wds:"), ".tar")]
    if incomplete.startswith("torchvision:"):
        return [f"torchvision:{name}" for name in DATA_SETS[1:]]
    return [*kinds, *_files(incomplete, ".csv", ".tsv", ".tar")]


@_safe
def recipes(_: typer.Context, incomplete: str) -> list[str]:
    return [*packaged(), *_files(incomplete, ".toml")]


@_safe
def optimizers(_: typer.Context, __: str) -> list[str]:
    """timm's, as its file names them, which is read without running it."""
    found = find_spec("timm")
    if found is None or found.origin is None:
        return []
    text = (Path(found.origin).parent / "optim" / "_optim_factory.py").read_text(encoding="utf-8")
    return sorted(set(re.findall(r"(?:\bname=|\bOptimInfo\(\s*|\bregister_alias\()'(\w+)'", text)))


@_safe
def trackers(_: typer.Context, incomplete: str) -> list[str]:
    from ..training.written import NO_TRACKER, TRACKERS

    return _listed(incomplete, [*TRACKERS, NO_TRACKER])


@_safe
def devices(_: typer.Context, __: str) -> list[str]:
    return ["auto", "cpu", "cuda"]


@_safe
def splits(_: typer.Context, __: str) -> list[str]:
    return ["test", "val", "train", "all"]


@_safe
def stages(ctx: typer.Context, incomplete: str) -> list[str]:
    """The stages of the model file on the line, or of this folder's."""
    return _listed(incomplete, _stages(ctx))


@_safe
def adjoints(ctx: typer.Context, incomplete: str) -> list[str]:
    """Methods with commas between them, each with a stage before it, or with settings of its own behind it."""
    begun = incomplete.rpartition(",")[0]
    entry = incomplete[len(begun) + 1 :] if begun else incomplete
    before = f"{begun}," if begun else ""
    if ":" in entry:
        start = entry.rpartition(":")[0]
        return [f"{before}{start}:{name}=" for name in ADJOINT_SETTINGS]
    stage, equals, _ = entry.partition("=")
    if equals:
        return [f"{before}{stage}={name}" for name in ADJOINTS]
    return [f"{before}{name}" for name in (*ADJOINTS, *(f"{stage}=" for stage in stages(ctx, "")))]


def _listed(incomplete: str, words: Iterable[str]) -> list[str]:
    """Words after those that stand before the last comma, each once."""
    begun, comma, _ = incomplete.rpartition(",")
    return [f"{begun}{comma}{word}" for word in words if word not in begun.split(",")]


def _stages(ctx: typer.Context) -> list[str]:
    """Their names, from the beginning of the file, which holds what is said beside the tensors."""
    # A flag without its value ends the parsing of a line before its arguments are told apart.
    path = ctx.params.get("model") or next((word for word in ctx.args if word.endswith(".safetensors")), None)
    if path is None:
        path = tomllib.loads(Path(MEMORY).read_text(encoding="utf-8-sig")).get("model")
    if path is None or not Path(path).is_file():
        return []
    with Path(path).open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _LONGEST_HEADER:
            return []
        said = json.loads(json.loads(file.read(length))["__metadata__"]["resode"])
    return [
        name for name in (stage["name"] for stage in said["stages"]) if isinstance(name, str) and name.isprintable()
    ]


# By the name of the parameter, for those that stand as fields of settings.
BY_PARAMETER: dict[str, Complete] = {
    "adjoint": adjoints,
    "stage": stages,
    "optimizer": optimizers,
    "track": trackers,
    "teacher": models_or_sources,
    "data": data,
    "fit": data,
    "device": devices,
}


def asked(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Whether it is a shell that runs the command, for what a word may become."""
    return VARIABLE in environment


def answer(complete: Callable[[], object], environment: MutableMapping[str, str] = os.environ) -> int:
    """Print what `complete` prints, as the shell that asks takes it; returns the exit code.

    bash cuts 'timm:resnet50' and '--schedule=cosine' in parts, and puts what it is given in place of the last one.
    """
    printed = io.StringIO()
    code: object = 0
    typed = _joined(environment) if environment.get(VARIABLE) == "complete_bash" else ""
    try:
        with redirect_stdout(printed):
            complete()
    except SystemExit as end:
        code = end.code
    except Exception:
        return 1
    whole = typed[: max(map(typed.rfind, _BREAKS)) + 1]  # which stands there already
    kept = [whole, whole.partition("=")[2]] if typed.startswith("--") else [whole]
    for line in filter(None, printed.getvalue().splitlines()):
        begun = next((part for part in kept if part and line.startswith(part)), "")
        sys.stdout.write(f"{line[len(begun) :]}\n")
    return code if isinstance(code, int) else 0


def _joined(environment: MutableMapping[str, str]) -> str:
    """Put the parts of words together again in what bash says; returns the word that is being typed."""
    said = environment.get("COMP_WORDS", "")
    words = said.split("\n") if "\n" in said else said.split(" ")
    try:
        place = int(environment.get("COMP_CWORD", ""))
    except ValueError:
        return ""
    found: list[str] = []
    own, glue = 0, False
    for number, word in enumerate(words):
        breaks = word != "" and not word.strip(_BREAKS)
        if found and number > 1 and (breaks or glue):
            found[-1] += word
        else:
            found.append(word)
        glue = breaks
        if number <= place:
            own = len(found) - 1
    if place >= len(words):
        found.append("")
        own = len(found) - 1
    environment["COMP_WORDS"], environment["COMP_CWORD"] = "\n".join(found), str(own)
    return found[own]
