"""Options: each setting stands once, as a field of a dataclass, with its default, range, choices, flag and help.

Commands build their signatures of these fields; recipes, histories, `--json` and `--resume` read the same.
"""

from __future__ import annotations

from dataclasses import Field, dataclass, field, fields
from typing import Any, Literal

from .errors import UsageError, unknown
from .quantities import WORKERS, Range

KEY = "option"
# The fields of a training run's settings, and of an adjoint as it is written, that go with its method.
ADJOINT_SETTINGS = ("anchors", "corrections", "snapshots", "slices", "bits")


@dataclass(frozen=True)
class Option:
    """What a setting is, beside its name, type and default.

    range: the numbers that it takes. choices: the words that it takes. word: the one that it takes besides numbers.
    flags: how a command spells it, where that is not its name; a short one may follow.
    off: the flag that says no. group: the heading in a command's help under which it stands.
    commas: the setting is a tuple, which a command takes as one text with commas; else a flag is repeated.
    resume: whether a run that goes on may be given another value ('changes', which is said) or not ('stays').
    """

    help: str
    range: Range | None = None
    choices: tuple[str, ...] = ()
    word: str | None = None
    flags: tuple[str, ...] = ()
    off: str | None = None
    group: str | None = None
    commas: bool = False
    resume: Literal["changes", "stays"] = "changes"


def option(default: Any, help: str, **more: Any) -> Any:
    """A field of a dataclass that is a setting. `more`: the fields of `Option`."""
    return field(default=default, metadata={KEY: Option(help, **more)})


def workers_option() -> Any:
    """How many processes read images, wherever images are read."""
    return option(
        "auto",
        "Processes that read images: a number, 0 for none besides this one, or 'auto'.",
        range=WORKERS,
        word="auto",
        group="Machine",
    )


def option_of(setting: Field[Any]) -> Option:
    found: Option = setting.metadata[KEY]
    return found


def flag_of(setting: Field[Any]) -> str:
    """As a command spells the setting: '--batch-size'."""
    flags = option_of(setting).flags
    return flags[0] if flags else f"--{setting.name.replace('_', '-')}"


def parameter_of(setting: Field[Any]) -> str:
    """As a command's signature and a recipe spell the setting: 'batch_size'."""
    return flag_of(setting).removeprefix("--").replace("-", "_")


def check_options(settings: Any) -> None:
    """Raises UsageError, by the name of its flag, for a field out of its range or with a word that is no choice."""
    for setting in fields(settings):
        check_option(setting, getattr(settings, setting.name))


def check_option(setting: Field[Any], value: Any) -> None:
    """The same of one setting. None is an unset one, and is let be."""
    found = option_of(setting)
    if value is None:
        return
    if found.range is not None and value != found.word:
        if isinstance(value, str):
            raise UsageError(f"{flag_of(setting)} {value!r}: write a whole number, or {found.word}")
        found.range.check(flag_of(setting), value)
    for word in value if isinstance(value, tuple) else (value,):
        if found.choices and word not in found.choices:
            raise unknown(flag_of(setting).removeprefix("--").replace("-", " "), word, found.choices)
