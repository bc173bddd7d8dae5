"""Load the weights of a file into a network, whatever they are wrapped in, without guessing."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import ResodeError, UsageError, first_few, join, unknown
from ..network.head import last_linear
from ..network.model import describe_misfit
from . import weight_files
from .weight_files import StateDict, WeightFile

# Entries under which training programs put a network's weights. The first of them that fits is taken, and said.
WRAPPERS = ("", "state_dict", "model", "model_ema", "state_dict_ema", "model_state_dict", "net")
# What torch puts between the names of a module that it wraps where it stands, be it inside the network: timm's
# clean_state_dict looks at the beginning of a name alone.
TRANSPARENT = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")
COUNTER = "num_batches_tracked"


@dataclass(frozen=True, eq=False)
class Fit:
    """Weights in a file whose names, without a prefix, are a network's."""

    state: StateDict
    prefix: str

    @property
    def label(self) -> str:
        """What --prefix takes: the entry and the prefix, joined by a dot."""
        return ".".join(part for part in (self.state.where, self.prefix.rstrip(".")) if part)

    @property
    def rank(self) -> tuple[int, int]:
        """Places that are known first, the outer before the inner."""
        top = self.state.where.partition(".")[0]
        return (WRAPPERS.index(top) if top in WRAPPERS else len(WRAPPERS), self.state.where.count("."))

    def tensors(self) -> dict[str, Tensor]:
        return {k[len(self.prefix) :]: v for k, v in self.state.tensors.items() if k.startswith(self.prefix)}

    def named(self, given: str) -> bool:
        """Whether a user who writes `given` may mean it: all of the label, or its end, as 'encoder_q'."""
        wanted = given.rstrip(".")
        return wanted in (self.label, self.prefix.rstrip("."), self.state.where) or self.label.endswith(f".{wanted}")


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, wrappers removed: those of the entry that `load_weights` would look at first."""
    states = weight_files.read(path).states
    return min((Fit(state, "") for state in states), key=lambda fit: fit.rank).state.tensors


def load_weights(net: nn.Module, path: Path, *, num_classes: int | None, prefix: str | None = None) -> list[str]:
    """Load a file's tensors into `net`, all of them. Returns notes on what was left, and what keeps its initial value.

    BatchNorm batch counters may be missing (old files). The last linear layer keeps its random values where
    `num_classes` asks for another number of classes than the file has, or the file has no such layer.
    prefix: what precedes the network's names in the file; without it, whatever makes all of them appear.
    """
    file = weight_files.read(path)
    file.states[:] = [_without_wrapping(state, net) for state in file.states]
    expected = net.state_dict()
    head = last_linear(net)
    own = [f"{head[0]}.{name}" for name, _ in head[1].named_parameters(recurse=False)] if head else []
    new_head = own if num_classes is not None else []
    needed = [key for key in expected if not key.endswith(COUNTER) and key not in new_head]
    fits = [Fit(state, found) for state in file.states for found in _prefixes(state, needed)]
    fitting = [fit for fit in fits if not _misshapen(fit.tensors(), expected, needed)] or fits
    if prefix is not None:
        exactly = [fit for fit in fitting if fit.label == prefix.rstrip(".")]
        fitting = exactly or [fit for fit in fitting if fit.named(prefix)]
    chosen = _choose(file, fitting, clear=prefix is None) if fitting else _nearest(file, needed, prefix)
    state = chosen.tensors()
    notes = _notes(file, chosen, fits)

    problems = _unusable(state, expected)
    if problems:
        raise ResodeError(f"{path}: {problems}")
    state |= {key: value for key, value in expected.items() if key.endswith(COUNTER) and key not in state}
    if num_classes is not None and head is not None:
        notes += _renew_head(state, expected, head, num_classes, path)
        notes += _leave_out(state, expected, head[0], path)
    problems = describe_misfit(expected, state)
    if problems:
        hint = _hint(state, head, own, num_classes, expected)
        raise ResodeError(f"{path}: does not fit {type(net).__name__}: {problems}{hint}")
    rounded = [k for k, v in state.items() if v.is_floating_point() and v.dtype.itemsize > expected[k].dtype.itemsize]
    if rounded:
        before, after = state[rounded[0]].dtype, expected[rounded[0]].dtype
        notes.append(f"{path.name} holds {_name(before)} ({len(rounded)} tensors), rounded to {_name(after)}")
    net.load_state_dict(state)
    return notes


def _without_wrapping(state: StateDict, net: nn.Module) -> StateDict:
    """The same without the names that torch inserts, unless the network has them or two names would become one."""
    tensors: dict[str, Tensor] = {}
    for key, value in state.tensors.items():
        for part in TRANSPARENT:
            if part in key and not any(part in own for own in net.state_dict()):
                key = key.replace(part, "")
        tensors[key] = value
    return StateDict(state.where, tensors, state.others) if len(tensors) == len(state.tensors) else state


def _prefixes(state: StateDict, needed: Collection[str]) -> list[str]:
    """What can stand before every one of the network's names, shortest first. Ends with a dot, or is empty."""
    if not needed:
        return [""]
    first = next(iter(needed))
    possible = {key[: -len(first)] for key in state.tensors if key.endswith(first)}
    dotted = (p for p in possible if not p or p.endswith("."))
    return sorted((p for p in dotted if all(p + key in state.tensors for key in needed)), key=lambda p: (len(p), p))


def _misshapen(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], needed: Iterable[str]) -> bool:
    return any(_shape(state[key]) != tuple(expected[key].shape) for key in needed)


def _shape(tensor: Tensor) -> tuple[int, ...] | None:
    return None if tensor.is_nested else tuple(tensor.shape)


def _choose(file: WeightFile, fits: list[Fit], *, clear: bool) -> Fit:
    """The one that fits. Raises UsageError, with the candidates, where it is not clear which is meant.

    clear: whether an entry that is known, and names that are the network's own, go before others.
    """
    if clear:
        best = min(fit.rank for fit in fits)
        fits = [fit for fit in fits if fit.rank == best]
        fits = [fit for fit in fits if not fit.prefix and fit.rank[0] < len(WRAPPERS)] or fits
    if len(fits) > 1:
        labels = join([repr(fit.label) for fit in fits], "or")
        raise UsageError(f"{file.path}: several weights in it fit; say which with --prefix: {labels}")
    return fits[0]


def _nearest(file: WeightFile, needed: Collection[str], prefix: str | None) -> Fit:
    """The weights whose names come closest, for a message of what does not fit."""
    if prefix is not None:
        given = prefix.rstrip(".") + "." if prefix else ""
        for state in sorted(file.states, key=lambda state: Fit(state, "").rank):
            inner = {key[: key.index(f".{given}") + 1 + len(given)] for key in state.tensors if f".{given}" in key}
            for found in (given, given.removeprefix(f"{state.where}."), *sorted(inner)):
                if any(key.startswith(found) for key in state.tensors):
                    return Fit(state, found)
        tops = {Fit(s, f"{key.partition('.')[0]}.").label for s in file.states for key in s.tensors if "." in key}
        raise unknown(f"prefix in {file.path.name}", prefix, sorted(tops))
    counts: dict[Fit, int] = {}
    names = list(needed)[:: max(len(needed) // 50, 1)]
    for state in file.states:
        places: Counter[str] = Counter({"": 0})
        for key in state.tensors:
            for name in names:
                before = key[: -len(name)]
                if key.endswith(name) and (not before or before.endswith(".")):
                    places[before] += 1
        counts |= {Fit(state, place): count for place, count in places.items()}
    return min(counts, key=lambda fit: (-counts[fit], fit.rank, len(fit.prefix)))


def _notes(file: WeightFile, chosen: Fit, fits: list[Fit]) -> list[str]:
    """What of the file is not loaded."""
    notes = []
    others = sorted({fit.label for fit in fits if fit is not chosen and fit.label != chosen.label})
    if others:
        notes.append(
            f"{file.path.name}: {chosen.label or 'its own names'!r} is loaded;"
            f" {join([repr(label) for label in others])} would fit too (--prefix takes one)"
        )
    beside = [key for key in chosen.state.tensors if not key.startswith(chosen.prefix)]
    if beside:
        told = f"names that begin with {chosen.prefix!r} are loaded;"
        notes.append(f"{file.path.name}: {told} {len(beside)} others are left out ({first_few(beside)})")
    if file.left:
        notes.append(
            f"{file.path.name}: objects beside the weights are left out: {weight_files.describe_left(file.left)}"
        )
    return notes


def _unusable(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """One line on tensors that cannot become the network's, whatever their shape; empty if there are none."""
    kinds: dict[str, list[str]] = {}
    for key, value in state.items():
        if key in expected and (problem := _problem(value, expected[key].dtype)):
            kinds.setdefault(problem, []).append(key)
    return "; ".join(f"{len(names)} {kind}: {first_few(names)}" for kind, names in kinds.items())


def _problem(value: Tensor, wanted: torch.dtype) -> str:
    if value.is_meta:
        return "on the meta device, without values"
    if value.is_nested or value.layout != torch.strided:
        return f"{'nested' if value.is_nested else _name(value.layout)} instead of dense (save value.to_dense())"
    if value.is_quantized:
        return "quantized (save value.dequantize())"
    if value.dtype == wanted or (value.is_floating_point() and wanted.is_floating_point):
        return ""
    if not value.is_floating_point() and not value.is_complex() and wanted == torch.int64:
        return ""
    return f"of type {_name(value.dtype)} instead of {_name(wanted)}"


def _name(kind: torch.dtype | torch.layout) -> str:
    return str(kind).removeprefix("torch.")


def _renew_head(
    state: dict[str, Tensor],
    expected: Mapping[str, Tensor],
    head: tuple[str, nn.Linear | nn.Conv2d],
    num_classes: int,
    path: Path,
) -> list[str]:
    """Give the head its initial values in `state` where the file has none, or others in number."""
    name, layer = head
    weight = state.get(f"{name}.weight")
    if weight is None:
        told = f"{path.name} has no head: {name!r} starts at random for {num_classes} classes"
    elif weight.shape[:1] != (num_classes,) and weight.shape[1:] == layer.weight.shape[1:]:
        told = f"{path.name} has {weight.shape[0]} classes: the head {name!r} starts at random for {num_classes}"
    else:
        return []
    for key in (f"{name}.weight", f"{name}.bias"):
        if key in expected:
            state[key] = expected[key]
        else:
            state.pop(key, None)
    return [told]


def _leave_out(state: dict[str, Tensor], expected: Mapping[str, Tensor], head: str, path: Path) -> list[str]:
    """Drop what another head was made of: below the head's own name, or below one that the network does not have."""
    tops = {key.partition(".")[0] for key in expected}
    others = [
        key
        for key in state
        if key not in expected and (key.startswith(f"{head}.") or key.partition(".")[0] not in tops)
    ]
    for key in others:
        del state[key]
    return [f"{path.name}: what follows the backbone is left out ({first_few(others)})"] if others else []


def _hint(
    state: Mapping[str, Tensor],
    head: tuple[str, nn.Linear | nn.Conv2d] | None,
    own: list[str],
    num_classes: int | None,
    expected: Mapping[str, Tensor],
) -> str:
    if head is None or num_classes is not None:
        return ""
    weight = state.get(f"{head[0]}.weight")
    if weight is None and all(key in state for key in expected if key not in own):
        return " (a backbone without a head: --num-classes K starts one at random)"
    if weight is not None and weight.shape[0] != head[1].weight.shape[0]:
        return f" (the file has {weight.shape[0]} classes: try --num-classes {weight.shape[0]})"
    return ""


def describe_not_finite(state: Mapping[str, Tensor]) -> str:
    """One line on tensors with values that are not finite; empty if all are."""
    names = [k for k, v in state.items() if v.is_floating_point() and not v.is_meta and not bool(v.isfinite().all())]
    return f"not finite (NaN or infinite) in {len(names)} tensors of the weights: {first_few(names)}" if names else ""


def state_sha256(state: dict[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of a state dict, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
