"""From the fields of settings to the parameters of a command, and back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import Field, dataclass, fields, replace
from functools import wraps
from types import NoneType, SimpleNamespace
from typing import Annotated, Any, get_args, get_type_hints

import typer

from ..options import Option, check_option, flag_of, option_of, parameter_of
from .completion import BY_PARAMETER


@dataclass(frozen=True)
class Fields:
    """Some fields of a settings dataclass as parameters of a command.

    defaults: an instance, whose values are the defaults. but: names of fields that keep these.
    only: names of the fields that a command takes without the rest; it then gets them in a plain namespace.
    """

    defaults: Any
    only: tuple[str, ...] = ()
    but: tuple[str, ...] = ()

    def chosen(self) -> list[Field[Any]]:
        names = self.only or [setting.name for setting in fields(self.defaults)]
        return [setting for setting in fields(self.defaults) if setting.name in names and setting.name not in self.but]

    def build(self, values: Mapping[str, Any]) -> Any:
        """The settings from a command's parameters. Raises UsageError for a value out of its range or choices."""
        chosen = self.chosen()
        given = {setting.name: _from_text(setting, values[parameter_of(setting)]) for setting in chosen}
        for setting in chosen:
            check_option(setting, given[setting.name])
        return SimpleNamespace(**given) if self.only else replace(self.defaults, **given)


@dataclass(frozen=True)
class Given:
    """Names of the parameters that the user set: `flags` on the command line, `all` there or in a recipe."""

    flags: frozenset[str]
    all: frozenset[str]


def takes(**groups: Fields) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let a command's parameters of these names stand for all fields of some settings.

    The command is called with the settings built. A parameter that it calls `given` gets the `Given`.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(command, include_extras=True)
        parameters: dict[str, inspect.Parameter] = {"ctx": _parameter("ctx", typer.Context)}
        wanted = inspect.signature(command).parameters
        for name, parameter in wanted.items():
            if name in groups:
                for setting in groups[name].chosen():
                    added = _of_setting(groups[name].defaults, setting)
                    parameters.setdefault(added.name, added)
            elif name != "given":
                parameters[name] = _parameter(name, hints[name], parameter.default)

        @wraps(command)
        def run(**values: Any) -> None:
            context = values["ctx"]
            passed = {name: values[name] for name in wanted if name in values}
            passed |= {name: group.build(values) for name, group in groups.items()}
            if "given" in wanted:
                passed["given"] = _given(context)
            command(**passed)

        del run.__wrapped__  # type: ignore[attr-defined]  # Typer would look at the command's own signature
        run.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
        run.__annotations__ = {name: parameter.annotation for name, parameter in parameters.items()}
        return run

    return decorate


def _parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _of_setting(defaults: Any, setting: Field[Any]) -> inspect.Parameter:
    found, kind = option_of(setting), get_type_hints(type(defaults))[setting.name]
    default = getattr(defaults, setting.name)
    if tuple in _origins(kind):
        kind = str if found.commas else list[str] | None
        default = ",".join(default) if found.commas else default
    if found.word is not None:
        kind, default = str, str(default)
    flag = flag_of(setting)
    flags = [f"{flag}/{found.off}" if found.off else flag, *found.flags[1:]]
    words: dict[str, Any] = (
        {"metavar": f"[{'|'.join(found.choices)}]", "autocompletion": _completion(found)} if found.choices else {}
    )
    if not words and (complete := BY_PARAMETER.get(parameter_of(setting))) is not None:
        words = {"autocompletion": complete}
    declared = typer.Option(*flags, help=_help(found), rich_help_panel=found.group, **words)
    return _parameter(parameter_of(setting), Annotated[kind, declared], default)


def _origins(kind: Any) -> set[Any]:
    return {getattr(part, "__origin__", part) for part in (kind, *get_args(kind)) if part is not NoneType}


def _help(found: Option) -> str:
    return f"{found.help} ({found.range.words})" if found.range is not None and found.range.words else found.help


def _completion(found: Option) -> Callable[[str], list[str]]:
    return lambda incomplete: [word for word in found.choices if word.startswith(incomplete)]


def _from_text(setting: Field[Any], value: Any) -> Any:
    """A field's value from a parameter's: a tuple of what was repeated or separated by commas, a number of its text."""
    if option_of(setting).word is not None:
        with suppress(ValueError):
            return int(value)
        return value
    if option_of(setting).commas:
        return tuple(part.strip() for part in value.split(","))
    return tuple(value) or None if isinstance(value, list) else value


def parameters_of(settings: Any) -> dict[str, Any]:
    """The values of a command's parameters from which `Fields.build` makes these settings."""
    found = {setting: getattr(settings, setting.name) for setting in fields(settings)}
    return {
        parameter_of(setting): value
        if not isinstance(value, tuple)
        else ",".join(map(str, value))
        if option_of(setting).commas
        else list(value)
        for setting, value in found.items()
    }


def _given(context: typer.Context) -> Given:
    origins = {name: context.get_parameter_source(name) for name in context.params}
    named = {name: origin.name for name, origin in origins.items() if origin is not None}
    return Given(
        frozenset(name for name, origin in named.items() if origin == "COMMANDLINE"),
        frozenset(name for name, origin in named.items() if origin != "DEFAULT"),
    )
