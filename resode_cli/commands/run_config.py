"""`config.toml` in a run's folder: what the run was asked for, as a recipe that begins another one like it."""

from __future__ import annotations

import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import typer

from .. import __version__
from ..errors import one_line
from ..machine.atomic import atomic_path
from ..recipe import setting_line
from ..training.resuming import saved_files
from ..training.run_folder import CONFIG, CONFIG_BEGINNING, is_own
from ..training.run_log import LOG
from ..training.settings import Settings
from .options import MAY_BE_CODE, NOT_OF_A_RECIPE, is_code
from .parameters import parameters_of
from .start_of_run import Call

NOT_OF_A_RUN = (*NOT_OF_A_RECIPE, "out", "force", "json", "dry_run", "find_lr")  # of the very command
HEADER = f"{CONFIG_BEGINNING}: --recipe with this file begins another one like it, in a folder of its own.\n"
AS_IS = "# At their defaults:\n"


def config_text(ctx: typer.Context, settings: Settings, call: Call, *, resumes: Path | None = None) -> str:
    """A run's recipe: the settings that are not at their defaults, and as comments versions, commands and the rest.

    settings, call: of the run, which may have begun with others than this command's.
    resumes: the folder of a run that goes on; its recipe says what its state does not know.
    """
    before = _read(resumes / CONFIG) if resumes is not None else ""
    known: dict[str, Any] = ctx.params
    if resumes is not None:
        known = {str(parameter.name): parameter.default for parameter in ctx.command.params}
        known |= {name.replace("-", "_"): value for name, value in _table(before).items()}
    values = {**known, **parameters_of(settings), **parameters_of(call.reading)}
    values |= {"data": call.data, "test_images": call.test_images}
    chosen: list[str] = []
    default: list[str] = []
    unsaid = [line for line in before.splitlines() if line.startswith("# model = ")]
    for parameter in ctx.command.params:
        name = str(parameter.name)
        value = values.get(name)
        if name in NOT_OF_A_RUN or value is None or value == []:
            continue
        try:
            line = setting_line(name, value)
        except ValueError:
            unsaid.append(one_line(f"# {name} = {value!r}: no text, so only a command line can say it"))
            continue
        if name in MAY_BE_CODE and is_code(value):
            unsaid.append(one_line(f"# {line}  # code, which no recipe names: say it on the command line"))
        else:
            # A number that may be a word has a text for its default.
            (default if value == parameter.default or str(value) == parameter.default else chosen).append(line)
    commands = [line for line in before.splitlines() if line.startswith("# resode finetune ")]
    lines = [*versions(), *dict.fromkeys([*commands, f"# {command_line(ctx)}"]), *dict.fromkeys(unsaid)]
    body = "".join(f"{line}\n" for line in (*lines, "", "[finetune]", *chosen, ""))
    return HEADER + body + AS_IS + "".join(f"# {line}\n" for line in default)


def changed(text: str, folder: Path) -> bool:
    """Whether a recipe sets what the one in a run's folder does not. One that is not a run's is let be."""
    path = folder / CONFIG
    return not path.exists() or (is_own(path) and _table(_read(path)) != _table(text))


@contextmanager
def keeping_config(folder: Path, text: str | None) -> Iterator[Callable[[Path], None]]:
    """Keep a run's recipe in its folder: from now on, or, in place of a run before, once something of this one stands.

    Yields what is to be called with the folder after each save. text: None for a run whose recipe stays as it is.
    """
    written: Path | None = None

    def write(to: Path) -> None:
        nonlocal written
        if text is not None and to != written:
            with atomic_path(to / CONFIG) as temporary:
                temporary.write_text(text, encoding="utf-8")
            written = to

    fresh = not saved_files(folder)
    if fresh:
        write(folder)
    try:
        yield write
    finally:
        if fresh and not saved_files(folder) and not (folder / LOG).exists():  # the run never began
            (folder / CONFIG).unlink(missing_ok=True)


def command_line(ctx: typer.Context) -> str:
    """The command with the flags that it was given."""
    words = ["resode", str(ctx.info_name)]
    for parameter in ctx.command.params:
        origin = ctx.get_parameter_source(str(parameter.name))
        value = ctx.params.get(str(parameter.name))
        if origin is None or origin.name != "COMMANDLINE" or value is None:
            continue
        if parameter.param_type_name == "argument":
            words += map(str, value) if isinstance(value, (list, tuple)) else [str(value)]
        elif isinstance(value, bool):
            words.append((parameter.opts if value else parameter.secondary_opts)[0])
        else:
            for each in value if isinstance(value, (list, tuple)) else [value]:
                words += [parameter.opts[0], str(each)]
    return one_line(shlex.join(words))


def versions() -> list[str]:
    """A comment with the versions of what a run's figures depend on."""
    found = [f"resode {__version__}"]
    for name in ("torch", "torchvision", "timm"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:  # as one that was built here may be
            found.append(f"{name} of unknown version")
    return [f"# {', '.join(found)}, Python {sys.version.split()[0]}"]


def _read(path: Path) -> str:
    """The text of a run's own recipe; empty where there is none."""
    try:
        return path.read_text(encoding="utf-8-sig") if is_own(path) else ""
    except (OSError, ValueError):
        return ""


def _table(text: str) -> dict[str, Any]:
    try:
        found = tomllib.loads(text).get("finetune", {})
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
