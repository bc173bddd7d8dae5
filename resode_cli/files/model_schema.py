"""What the metadata of a model file may say: every field's type and bounds, checked before anything is built.

A model file may come from anywhere, be damaged, or be made to harm. So a field is read by a function that says what
it takes, fields that are not known are refused, and nothing here allocates or computes by a number of the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any

from torchvision.transforms import InterpolationMode

from ..errors import ResodeError, first_few
from ..network.model import ModelInfo
from ..network.parts import Preprocessing, SourceSpec
from ..network.residual import FORMS, as_form
from ..network.specs import LONGEST_HORIZON, BlockSpec, StageSpec
from ..ode import SCHEMES
from ..quantities import CROPS, LONGEST_STAGE, Range

# 2: blocks that share tensors, weights linear in depth; 3: a checksum; 4: 'heun' takes the weights of one step, and
# what was called so is 'heunnet'
FORMAT_VERSION = HEUN_RENAMED = 4

_ITEMS, _LETTERS, _DEEPEST = 1_000_000, 100_000, 32  # of a list, of a text, of lists in lists
_CLASSES = Range(1, 10**8)
_PIXELS = Range(1, 2**14)
_STEP = Range(0, 10**9)

_VERIFIED = ("images", "batch", "identical", "max_difference", "function_kept")  # what is read of a verification
_LONGEST_NAME = 500  # of a module
_LONGEST_LINE = 4096  # as the longest path

Read = Callable[[Any, str], Any]


class _Wrong(Exception):
    pass


def parse_json(text: str) -> Any:
    """The document of a metadata entry. Raises ValueError for what is no JSON, and for a name that stands twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name stands there twice")
        return found

    try:
        return json.loads(text, object_pairs_hook=once)
    except RecursionError as error:
        raise ValueError("too deep") from error


def parse_metadata(metadata: Mapping[str, Any]) -> tuple[ModelInfo, list[StageSpec]]:
    """What a file says of its model and its stages. Raises ResodeError, by the field's name, for what cannot be."""
    try:
        found = _object(
            metadata,
            "",
            needed={
                "format": _whole(Range(1, FORMAT_VERSION)),
                "source": _source,
                "preprocessing": _preprocessing,
                "num_classes": _whole(_CLASSES),
                "class_names": _or_none(_list(_text)),
                "stages": _list(_stage),
                "history": _list(_entry),
            },
            optional={"left_out": _list(_text), "multi_label": _flag},
        )
        names = found["class_names"]
        if names and len(names) != found["num_classes"]:
            raise _Wrong(f"class_names: {len(names)} names of {found['num_classes']} classes")
    except _Wrong as error:
        raise ResodeError(f"its metadata is inconsistent ({error})") from None
    info = ModelInfo(
        found["source"],
        found["preprocessing"],
        found["num_classes"],
        tuple(names) if names else None,
        tuple(found["history"]),
        tuple(found.get("left_out", ())),
        found.get("multi_label", False),
    )
    return info, [_as_named_now(spec, found["format"]) for spec in found["stages"]]


def _as_named_now(spec: StageSpec, version: int) -> StageSpec:
    return replace(spec, scheme="heunnet") if version < HEUN_RENAMED and spec.scheme == "heun" else spec


def _object(
    value: Any, where: str, *, needed: Mapping[str, Read], optional: Mapping[str, Read] | None = None
) -> dict[str, Any]:
    readers = {**needed, **(optional or {})}
    if not isinstance(value, Mapping):
        raise _Wrong(f"{where or 'the whole'}: {_shown(value)} is no table of names and values")
    missing = [name for name in needed if name not in value]
    unknown = [name for name in value if name not in readers]
    inside = f"{where}: " if where else ""
    if missing:
        raise _Wrong(f"{inside}no {first_few(missing)}")
    if unknown:
        raise _Wrong(f"{inside}unknown {first_few([_shown(name) for name in unknown])}")
    return {name: readers[name](each, f"{where}.{name}" if where else name) for name, each in value.items()}


def _list(read: Read, *, longest: int = _ITEMS) -> Read:
    def reader(value: Any, where: str) -> list[Any]:
        if not isinstance(value, list | tuple) or len(value) > longest:
            raise _Wrong(f"{where}: {_shown(value)} is no list, or one of more than {longest} entries")
        return [read(each, f"{where}[{i}]") for i, each in enumerate(value)]

    return reader


def _or_none(read: Read) -> Read:
    return lambda value, where: None if value is None else read(value, where)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or len(value) > _LETTERS:
        raise _Wrong(f"{where}: {_shown(value)} is no text, or a very long one")
    return value


def _name(value: Any, where: str) -> str:
    """A name of a module, as it stands in state dicts."""
    text = _text(value, where)
    if len(text) > _LONGEST_NAME or not all(part.isprintable() for part in text.split(".")):
        raise _Wrong(f"{where}: {_shown(text)} is no name of a module")
    return text


def _child(value: Any, where: str) -> str:
    """The name of a module in the one that holds it."""
    name = _name(value, where)
    if not name or "." in name:
        raise _Wrong(f"{where}: {_shown(name)} is no name of a child")
    return name


def _line(value: Any, where: str) -> str:
    """A text that is shown to people as part of a line."""
    text = _text(value, where)
    if len(text) > _LONGEST_LINE or not text.isprintable():
        raise _Wrong(f"{where}: {_shown(text)} is no short line of text")
    return text


def _different(read: Read, *, longest: int) -> Read:
    def reader(value: Any, where: str) -> list[Any]:
        found = _list(read, longest=longest)(value, where)
        if len(set(found)) < len(found):
            raise _Wrong(f"{where}: a name stands there twice")
        return found

    return reader


def _run(read: Read) -> Read:
    """Names of children that run one after the other: all different, or one that is called again and again."""

    def reader(value: Any, where: str) -> list[Any]:
        found: list[Any] = read(value, where)
        if 1 < len(set(found)) < len(found):
            raise _Wrong(f"{where}: a name stands there twice, among others")
        return found

    return reader


def _flag(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise _Wrong(f"{where}: {_shown(value)} is neither true nor false")
    return value


def _one_of(allowed: tuple[str, ...], what: str) -> Read:
    def reader(value: Any, where: str) -> str:
        if value not in allowed:
            raise _Wrong(f"{where}: unknown {what} {_shown(value)} (allowed: {', '.join(allowed)})")
        return str(value)

    return reader


def _whole(range: Range) -> Read:
    def reader(value: Any, where: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value not in range:
            raise _Wrong(f"{where}: {_shown(value)} is no whole number {range}")
        return value

    return reader


def _real(range: Range) -> Read:
    def reader(value: Any, where: str) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or value not in range:
            raise _Wrong(f"{where}: {_shown(value)} is no number {range}")
        return value

    return reader


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """Anything that JSON has, within bounds: what a command noted in the history, what a builder was called with."""
    if depth > _DEEPEST:
        raise _Wrong(f"{where}: too deep")
    if isinstance(value, Mapping):
        if len(value) > _ITEMS:
            raise _Wrong(f"{where}: more than {_ITEMS} entries")
        return {_text(name, where): _plain(each, f"{where}.{name}", depth + 1) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each, where, depth + 1) for each in value[:_ITEMS]]
    if isinstance(value, str):
        return _text(value, where)
    if isinstance(value, int) and abs(value) >= 2**64:
        raise _Wrong(f"{where}: a number of more than 64 bits")
    return value


def _entry(value: Any, where: str) -> dict[str, Any]:
    """One command of the history."""
    found = _plain(value, where)
    if not isinstance(found, dict) or not isinstance(found.get("command"), str):
        raise _Wrong(f"{where}: {_shown(value)} names no command")
    if (verified := found.get("verified")) is not None:
        missing = [] if not isinstance(verified, dict) else [name for name in _VERIFIED if name not in verified]
        if missing or not isinstance(verified, dict):
            raise _Wrong(f"{where}.verified: no {first_few(missing or list(_VERIFIED))}")
        if not isinstance(verified["max_difference"], int | float):
            raise _Wrong(f"{where}.verified: {_shown(verified['max_difference'])} is no number")
    return found


def _arguments(value: Any, where: str) -> dict[str, Any]:
    found = _plain(value, where)
    if not isinstance(found, dict):
        raise _Wrong(f"{where}: {_shown(value)} is no table of arguments")
    if (classes := found.get("num_classes")) is not None:
        _whole(_CLASSES)(classes, f"{where}.num_classes")
    return found


def _source(value: Any, where: str) -> SourceSpec:
    fields = _object(
        value,
        where,
        needed={"library": _line, "name": _line},
        optional={
            "tag": _or_none(_line),
            "arguments": _arguments,
            "weights": _or_none(_line),
            "weights_sha256": _or_none(_line),
        },
    )
    return SourceSpec(**fields)


def _preprocessing(value: Any, where: str) -> Preprocessing:
    channels = Range(-1e6, 1e6)
    fields = _object(
        value,
        where,
        needed={"mean": _list(_real(channels)), "std": _list(_real(Range(0, 1e6, above=True)))},
        optional={
            "size": _size,
            "interpolation": _one_of(tuple(mode.value for mode in InterpolationMode), "interpolation"),
            "crop_fraction": _real(CROPS),
            "crop_mode": _one_of(("center", "squash", "border"), "way of cropping"),
        },
    )
    if len(fields["mean"]) != len(fields["std"]) or not fields["mean"]:
        raise _Wrong(f"{where}: a mean of {len(fields['mean'])} channels, a deviation of {len(fields['std'])}")
    return Preprocessing(**{**fields, "mean": tuple(fields["mean"]), "std": tuple(fields["std"])})


def _size(value: Any, where: str) -> int | tuple[int, ...]:
    if isinstance(value, list | tuple) and len(value) == 2:
        return tuple(_whole(_PIXELS)(side, where) for side in value)
    side: int = _whole(_PIXELS)(value, where)
    return side


def _horizon(value: Any, where: str) -> Fraction:
    # Text alone, and not much of it: Fraction('1e999999999') would compute for ever.
    if not isinstance(value, str) or not re.fullmatch(r"\d{1,18}(/\d{1,18})?", value, re.ASCII):
        raise _Wrong(f"{where}: {_shown(value)} is no fraction of two whole numbers")
    numerator, _, denominator = value.partition("/")
    if denominator and not int(denominator):
        raise _Wrong(f"{where}: {_shown(value)} divides by zero")
    horizon = Fraction(int(numerator), int(denominator or 1))
    if horizon > LONGEST_HORIZON:
        raise _Wrong(f"{where}: {_shown(value)} is more than {LONGEST_HORIZON}")
    return horizon


def _block(value: Any, where: str) -> BlockSpec:
    optional: dict[str, Read] = {"shares": _or_none(_child), "shares_norms": _flag}
    return BlockSpec(**_object(value, where, needed={"name": _child, "origin": _child}, optional=optional))


def _stage(value: Any, where: str) -> StageSpec:
    if isinstance(value, Mapping) and isinstance(value.get("name"), str):
        where = f"stage {_shown(value['name'])[1:-1]}"
    names = _list(_name, longest=LONGEST_STAGE)
    children = _different(_child, longest=LONGEST_STAGE)
    fields = _object(
        value,
        where,
        needed={
            "name": _name,
            "container": _name,
            "transition": children,
            "source_blocks": _run(_list(_child, longest=LONGEST_STAGE)),
            "blocks": _list(_block, longest=LONGEST_STAGE),
            "schedule": _list(_whole(_STEP), longest=LONGEST_STAGE),
            "horizon": _horizon,
        },
        optional={
            "scheme": _one_of(tuple(SCHEMES), "forward rule"),
            "form": _one_of(tuple(FORMS), "form"),
            "blends": _list(_real(Range(0, 1, below=True)), longest=LONGEST_STAGE),
            "further": names,
        },
    )
    horizon = fields.pop("horizon")
    form = as_form(fields.pop("form", "exact"))
    lists: dict[str, Any] = {name: tuple(each) if isinstance(each, list) else each for name, each in fields.items()}
    spec = StageSpec(**lists, horizon=horizon, form=form)
    _check(spec, where)
    return spec


def _check(spec: StageSpec, where: str) -> None:
    n_blocks = len(spec.blocks)
    if any(b >= n_blocks for b in spec.schedule):
        raise _Wrong(f"{where}: schedule out of range of its {n_blocks} blocks")
    if spec.blends and (
        len(spec.blends) != spec.depth
        or any(w and b + 1 >= n_blocks for b, w in zip(spec.schedule, spec.blends, strict=True))
    ):
        raise _Wrong(f"{where}: weights linear in depth reach beyond its {n_blocks} blocks")
    used = set(spec.schedule) | {b + 1 for b, w in zip(spec.schedule, spec.blends, strict=False) if w}
    if used != set(range(n_blocks)):
        raise _Wrong(f"{where}: a block is not in the schedule")
    if spec.depth and not spec.horizon:
        raise _Wrong(f"{where}: a horizon of 0, with which its {spec.depth} steps do nothing")
    if not spec.transition and not spec.source_blocks:
        raise _Wrong(f"{where}: it has no block of the source")


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str | int | float | None) else type(value).__name__
    return text if len(text) <= 60 else text[:57] + "…"
