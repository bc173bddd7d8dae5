"""What the folder remembers in which commands run: source, current model, data and run, in `resode.toml`.

A command that makes a model writes there what it made of what. A command line that leaves these out takes them from
there, and says so. A table per command, as in a recipe, gives further defaults; `--recipe` and flags win.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer
import typer.core

from ..errors import ResodeError, UsageError, join, one_line, unknown
from ..machine.atomic import atomic_path
from ..recipe import Chosen, quoted, read_recipe
from .options import NOT_OF_A_RECIPE, RECIPE, settings_of
from .output import Output
from .parameters import Given

NAME = "resode.toml"
HEADER = (
    "# What resode's commands made and used in this folder. What a command line leaves out is taken from here.\n"
    "# Tables such as [finetune], with its flags as keys, give further defaults. Edit or delete it freely.\n"
)
KEPT = ("source", "model", "data", "run")
# What a file that is read without being asked for must not decide.
NOT_OF_A_FOLDER = (*NOT_OF_A_RECIPE, "out", "force", "source", "model", "data", "push")
# Where data is taken from the folder although the command line names the model; elsewhere data is optional, and a
# command that is written out does what it did in any other folder.
NEEDS_DATA = ("finetune", "eval", "recalibrate")
OF_NO_RUN = ("device", "json")  # which a run that goes on does not know by itself; all else stays as it has it
TAKEN = "resode folder"  # in a context's meta: the parameters that the folder filled


@dataclass(frozen=True)
class Memory:
    """What a folder remembers. kept: by the names of `KEPT`; tables: the names of the commands that have one."""

    kept: Mapping[str, str] = field(default_factory=dict)
    tables: Sequence[str] = ()


def recall() -> Memory:
    """The memory of this folder; an empty one where there is no file.

    Raises ResodeError for a file that is not TOML, UsageError for a key that it cannot have.
    """
    try:
        tables = tomllib.loads(Path(NAME).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return Memory()
    except (ValueError, RecursionError) as error:
        raise ResodeError(f"{NAME} in this folder is not TOML ({error}); mend it, or delete it") from error
    except OSError as error:
        raise ResodeError(f"{NAME} in this folder cannot be read ({error.strerror})") from error
    kept = {name: value for name, value in tables.items() if not isinstance(value, dict)}
    for name, value in kept.items():
        if name not in KEPT:
            raise unknown(f"key in {NAME}", name, KEPT)
        if not isinstance(value, str) or not value:
            raise UsageError(f"{NAME} in this folder: {name} = {value!r}: write a text in quotes")
    return Memory(kept, [name for name, value in tables.items() if isinstance(value, dict)])


def remember(output: Output, **values: str | Path | None) -> None:
    """Write to this folder's memory; None removes. Only what lies in this folder is remembered as its model or run.

    That it cannot be written is said, and no error: what was asked for is done.
    """
    changes = {name: None if values[name] is None else str(values[name]) for name in KEPT if name in values}
    own = changes.get("run") or changes.get("model")
    if own is not None and not _is_here(Path(own)):
        return
    path, new = Path(NAME), not Path(NAME).exists()
    try:
        before = HEADER if new else path.read_text(encoding="utf-8-sig")
        text = _edited(before, changes)
        if text != before:
            with atomic_path(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
    except (ResodeError, OSError, ValueError) as error:
        output.note(f"note: {NAME} does not remember this ({error})")
        return
    if new:
        output.note(f"{NAME} remembers {join([name for name, value in changes.items() if value])} for further commands")


def _is_here(path: Path) -> bool:
    return path.resolve().is_relative_to(Path.cwd().resolve())


def _edited(text: str, changes: Mapping[str, str | None]) -> str:
    """The file with some of its first keys changed, and everything else as it was.

    Raises ValueError where that cannot be told from the lines alone.
    """
    before = tomllib.loads(text)
    lines = text.splitlines(keepends=True)
    end = next((i for i, line in enumerate(lines) if line.lstrip().startswith("[")), len(lines))
    top, rest = lines[:end], lines[end:]
    for name, value in changes.items():
        places = [place for place, old in enumerate(top) if re.match(rf"\s*{name}\s*=", old)]
        filled = [place for place, old in enumerate(top) if old.strip()]
        first = places[0] if places else filled[-1] + 1 if filled else 0
        if top and not top[-1].endswith("\n"):
            top[-1] += "\n"
        top = [old for place, old in enumerate(top) if place not in places]
        if value is not None:
            top.insert(first, f"{name} = {quoted(value)}\n")
    after = "".join([*top, *rest])
    wanted = {k: v for k, v in {**before, **changes}.items() if v is not None}
    if tomllib.loads(after) != wanted:
        raise ValueError("its lines are not as resode writes them")
    return after


def name_of(model: str | Path) -> str:
    """What files that are made of a model are called after: of runs/net-1/best.safetensors, 'net-1'."""
    path = Path(model)
    if path.stem in ("best", "last", "state") and path.resolve().parent.name:
        return path.resolve().parent.name
    return path.name.removesuffix(".safetensors")


def source_name(source: str) -> str:
    """The same of a SOURCE: of timm:resnet50.a1_in1k 'resnet50.a1_in1k', of net.py:make 'make'."""
    return source.rstrip("/").rpartition(":")[2].rpartition("/")[2] or "model"


def new_file(name: str, *, force: bool, suffix: str = ".safetensors") -> Path:
    """NAME.safetensors in this folder, or NAME-2 where that exists and is not to be replaced."""
    path, count = Path(f"{name}{suffix}"), 1
    while os.path.lexists(path) and not force:
        count += 1
        path = Path(f"{name}-{count}{suffix}")
    return path


def output_for(out: Path | None, name: str, *, force: bool) -> Path:
    """The file that a command writes: the one that the user names, or a new one called NAME."""
    return new_file(name, force=force) if out is None else out


def new_run(name: str) -> Path:
    """The first of runs/NAME-1, runs/NAME-2 … that does not exist."""
    count = 1
    while os.path.lexists(path := Path("runs") / f"{name}-{count}"):
        count += 1
    return path


def check_named(ctx: Any, **values: object) -> None:
    """Raises UsageError, naming all of them, for parameters that a command needs and nobody has set."""
    missing = [name for name, value in values.items() if value is None]
    if missing:
        raise UsageError(_needs(ctx, [p for p in ctx.command.params if p.name in missing]))


def without_remembered(ctx: Any, given: Given) -> Given:
    """What the user set for this very command, without what this folder's file says."""
    return Given(given.flags, given.all - set(ctx.meta[TAKEN]))


def remembered(ctx: Any, name: str) -> bool:
    """Whether a parameter has its value from this folder's file."""
    return name in ctx.meta[TAKEN]


def current_model(what: str, output: Output) -> Path:
    """This folder's current model, said to be taken. what: who needs it, in an error.

    Raises UsageError where there is none.
    """
    model = recall().kept.get("model")
    if model is None:
        raise UsageError(f"{what}, and no {NAME} in this folder names a current one")
    output.note(f"from {NAME}: model {one_line(model)}")
    return Path(model)


def run_to_resume(model: str | None, out: Path | None, output: Output) -> Path:
    """The folder of the run that goes on: --out, or a MODEL that is a folder, or the last run of this folder.

    Raises UsageError where none is named.
    """
    if out is not None:
        return out
    if model is not None and Path(model).is_dir():
        return Path(model)
    run = recall().kept.get("run")
    if run is None:
        raise UsageError(
            f"--resume: say which run goes on, as in --resume runs/resnet50-1; no {NAME} in this folder names the last"
        )
    output.note(f"from {NAME}: run {one_line(run)}")
    return Path(run)


class Command(typer.core.TyperCommand):
    """A command whose defaults are this folder's, and that names everything that is missing at once."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        asked = not ctx.resilient_parsing and not {*ctx.help_option_names} & {*args}
        memory = recall() if asked else Memory()
        self._fill(ctx, memory)
        try:
            rest: list[str] = super().parse_args(ctx, args)
        except Exception as error:
            if type(error).__name__ != "MissingParameter":  # typer brings its own copy of Click from some version on
                raise
            raise UsageError(self._missing(ctx)) from error
        if asked:
            self._tell(ctx)
        return rest

    def _fill(self, ctx: Any, memory: Memory) -> None:
        needed = {p.name for p in self.params if p.required}
        names = [p.name for p in self.params if p.name]
        found: dict[str, Any] = {name: value for name, value in memory.kept.items() if name in names}
        if "model" not in needed and ctx.info_name != "finetune":
            found.pop("model", None)  # what stands first may be something else; the command looks by itself
        if ctx.info_name != "convert" or found.get("source", "").rpartition(":")[0].endswith(".py"):
            found.pop("source", None)  # elsewhere it is the code that builds a network; code is named anew every time
        if ctx.info_name in memory.tables:
            allowed = [name for name in names if name not in NOT_OF_A_FOLDER]
            recipe = Chosen(Path(NAME), f"{NAME} in this folder")
            found |= settings_of(self, read_recipe(recipe, ctx.info_name, allowed), recipe.name)
        ctx.default_map = {**(ctx.default_map or {}), **found}
        ctx.meta[TAKEN] = found

    def _tell(self, ctx: Any) -> None:
        """Say what the folder has filled; let go of what is not meant: data that a command which is written out can do
        without, and what is of a run that begins where one goes on."""
        of_recipe = ctx.meta.get(RECIPE, ("", {}))[1]
        filled = [
            name
            for name in ctx.meta[TAKEN]
            if (origin := ctx.get_parameter_source(name)) is not None
            and origin.name == "DEFAULT_MAP"
            and name not in of_recipe
        ]
        if "data" in filled and "model" not in filled and ctx.info_name not in NEEDS_DATA:
            ctx.params["data"] = None
            filled.remove("data")
        if ctx.params.get("resume"):
            ctx.params |= {p.name: p.default for p in self.params if p.name in filled and p.name not in OF_NO_RUN}
        ctx.meta[TAKEN] = {name: ctx.params[name] for name in filled}
        if filled and not ctx.params.get("resume"):
            said = join([f"{name.replace('_', '-')} {one_line(str(ctx.params[name]))}" for name in filled])
            Output(json_mode=False).note(f"from {NAME}: {said}")

    def _missing(self, ctx: Any) -> str:
        missing = [p for p in self.params if p.required and p.name not in ctx.params and not ctx.lookup_default(p.name)]
        return _needs(ctx, missing)


def _needs(ctx: Any, missing: Sequence[Any]) -> str:
    names = [p.opts[0] if p.param_type_name == "option" else p.metavar or str(p.name).upper() for p in missing]
    made = (
        f"; `resode convert SOURCE` makes a model, which {NAME} remembers"
        if any("MODEL" in name for name in names)
        else ""
    )
    return f"{ctx.info_name} needs {join(names)}{made}; see `{ctx.command_path} --help`"
