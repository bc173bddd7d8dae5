"""Recipes: TOML files with one table per command, its keys spelled like the command's flags.

Some come with resode. They stand in the folder `recipes` of the project, which an installed wheel holds as
`resode_cli/recipes`.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ResodeError, UsageError, unknown

NAMED_BY = "`resode recipes list` names those that come with resode"


@dataclass(frozen=True)
class Packaged:
    """A recipe that comes with resode.

    name: its file's name without .toml. commands: those that it has tables for. about: its first line, a comment.
    """

    name: str
    commands: list[str]
    about: str


@dataclass(frozen=True)
class Chosen:
    """The file that `--recipe` means.

    name: what messages call it. note: what the user is told where the file has another name than the one given.
    """

    path: Path
    name: str
    note: str | None = None


def folders() -> list[Path]:
    """Where the recipes may stand that come with resode: in the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    found = [package / "recipes"]
    if (package.parent / "pyproject.toml").is_file():  # beside an installed package the folder would be another's
        found.append(package.parent / "recipes")
    return found


def packaged() -> dict[str, Path]:
    """The files of the recipes that come with resode, by name."""
    for folder in folders():
        found = {path.stem: path for path in sorted(folder.glob("*.toml"))}
        if found:
            return found
    return {}


def packaged_file(name: str) -> Path:
    """The file of a recipe that comes with resode. Raises UsageError for a name that none has."""
    found = packaged()
    if name not in found:
        raise unknown("recipe", name, found, named_by=NAMED_BY)
    return found[name]


def describe(name: str, path: Path) -> Packaged:
    """What a recipe is for."""
    text = path.read_text(encoding="utf-8")
    comments = (line.lstrip("# ").rstrip() for line in text.splitlines() if line.startswith("#"))
    commands = [command for command, table in tomllib.loads(text).items() if isinstance(table, dict)]
    return Packaged(name, commands, next(comments, ""))


def choose(given: Path) -> Chosen:
    """The file that `--recipe` means: a file of this name, or NAME.toml for NAME, or what comes with resode.

    Raises UsageError for a bare name that is none of these, and for a path to a file that does not exist.
    """
    if given.is_file():
        return Chosen(given, str(given))
    found = packaged()
    if given.name != str(given) or given.suffix == ".toml":
        known = f"; resode comes with one that is named so: --recipe {given.stem}" if given.stem in found else ""
        raise UsageError(f"recipe {str(given)!r} does not exist{known}")
    name = given.name
    own = Path(f"{name}.toml")
    if own.is_file():
        return Chosen(own, str(own), f"Recipe: the file {own} in this folder")
    if name not in found:
        raise unknown("recipe", name, found, named_by=f"no file has this name here; {NAMED_BY}")
    return Chosen(
        found[name], name, f"Recipe: {name}, which comes with resode (`resode recipes show {name}` prints it)"
    )


def read_recipe(recipe: Chosen, command: str, allowed: Iterable[str]) -> dict[str, Any]:
    """The settings of `command` in a recipe, by parameter name ('batch_size').

    Raises ResodeError for a file that is not TOML or cannot be read, and UsageError for a table that is missing and a
    key that is not a flag of the command: a misspelt setting must not be ignored.
    """
    try:
        tables = tomllib.loads(recipe.path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # of a number too long to read, too, and of tables in tables
        raise ResodeError(f"recipe {recipe.name}: not TOML ({error})") from error
    except OSError as error:
        raise ResodeError(f"recipe {recipe.name}: cannot be read ({error.strerror})") from error
    table = tables.get(command)
    if not isinstance(table, dict):
        found = ", ".join(f"[{name}]" for name, table in tables.items() if isinstance(table, dict)) or "none"
        raise UsageError(f"recipe {recipe.name} has no table [{command}] (found: {found})")
    flags = {name.replace("_", "-"): name for name in allowed}
    settings = {}
    for key, value in table.items():
        if key.replace("_", "-") not in flags:
            raise unknown(f"key of [{command}] in recipe {recipe.name}", key, flags)
        settings[flags[key.replace("_", "-")]] = value
    return settings


def quoted(text: str) -> str:
    """A text as TOML has it, which is written as JSON's but for one character."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def setting_line(name: str, value: Any) -> str:
    """A setting as a line of a recipe, from its parameter's name ('batch_size') and value.

    Raises ValueError for a text that no file of text can hold.
    """
    return f"{name.replace('_', '-')} = {_as_toml(value)}"


def _as_toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_as_toml, value))}]"
    found = quoted(str(value))
    found.encode()  # a file's name may hold bytes that are no text
    return found
