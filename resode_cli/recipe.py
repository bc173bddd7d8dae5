"""Recipes: TOML files with one table per command, its keys spelled like the command's flags."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import ResodeError, UsageError, unknown


def read_recipe(path: Path, command: str, allowed: Iterable[str]) -> dict[str, Any]:
    """The settings of `command` in a recipe, by parameter name ('batch_size').

    Raises UsageError for a file that is missing or not TOML, a table that is missing, and a key
    that is not a flag of the command: a misspelt setting must not be ignored.
    """
    if not path.is_file():
        raise UsageError(f"recipe {str(path)!r} does not exist")
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # of a number too long to read, too, and of tables in tables
        raise ResodeError(f"recipe {path}: not TOML ({error})") from error
    except OSError as error:
        raise ResodeError(f"recipe {path}: cannot be read ({error.strerror})") from error
    table = tables.get(command)
    if not isinstance(table, dict):
        found = ", ".join(f"[{name}]" for name, table in tables.items() if isinstance(table, dict)) or "none"
        raise UsageError(f"recipe {path} has no table [{command}] (found: {found})")
    flags = {name.replace("_", "-"): name for name in allowed}
    settings = {}
    for key, value in table.items():
        if key.replace("_", "-") not in flags:
            raise unknown(f"key of [{command}] in recipe {path.name}", key, flags)
        settings[flags[key.replace("_", "-")]] = value
    return settings
