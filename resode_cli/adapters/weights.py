"""Read a file of weights, whatever it wraps them in, and load them without guessing."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import ResodeError, UsageError
from ..model import describe_misfit

WRAPPERS = ("state_dict", "model", "model_ema", "state_dict_ema", "model_state_dict", "net")
PREFIXES = ("module.", "model.", "_orig_mod.")
SUFFIXES = (".safetensors", ".pth", ".pt", ".th", ".tar", ".bin")


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pth, .pt, .th or .tar file by name, wrappers removed.

    Pickles are read with `weights_only=True` alone. Raises ResodeError naming the file.
    """
    if not path.is_file():
        raise UsageError(f"weights file {str(path)!r} does not exist")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise ResodeError(f"{path}: not a complete safetensors file ({error})") from error
    if path.suffix not in SUFFIXES:
        raise UsageError(f"weights file {path.name!r}: unknown kind (allowed: {', '.join(SUFFIXES)})")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "nsupported global" in str(error) or "nsupported class" in str(error) or "GLOBAL" in str(error):
            raise ResodeError(
                f"{path}: the pickle holds Python objects other than tensors, which could run code;"
                " save its state_dict alone and try again"
            ) from error
        raise ResodeError(f"{path}: not a file of weights, or cut short") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, UnicodeDecodeError) as error:
        raise ResodeError(f"{path}: not a file of weights, or cut short") from error
    return _unwrap(content, path)


def _unwrap(content: object, path: Path) -> dict[str, Tensor]:
    while isinstance(content, dict):
        if content and all(isinstance(v, Tensor) for v in content.values()):
            return content
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), dict)), None)
        if inner is None:
            keys = ", ".join(map(str, list(content)[:5]))
            raise ResodeError(f"{path}: no state dict among its entries ({keys})")
        content = inner
    raise ResodeError(f"{path}: holds a {type(content).__name__}, not a state dict")


def strip_prefixes(state: dict[str, Tensor], expected: Collection[str]) -> dict[str, Tensor]:
    """Remove wrappers' prefixes that all names carry, unless the network's own names do."""
    for prefix in PREFIXES:
        if state and all(key.startswith(prefix) for key in state):
            if expected and all(key.startswith(prefix) for key in expected):
                continue
            return strip_prefixes({key[len(prefix) :]: value for key, value in state.items()}, expected)
    return state


def load_weights(net: nn.Module, path: Path, *, num_classes: int | None) -> list[str]:
    """Load a file's tensors into `net`, all of them. Returns notes on what was left at its initial value.

    BatchNorm batch counters may be missing (old files); the last linear layer keeps its random
    values where `num_classes` asks for another number of classes than the file has.
    """
    expected = net.state_dict()
    state = strip_prefixes(read_state_dict(path), expected)
    if not state:
        raise ResodeError(f"{path}: holds no tensors")
    notes: list[str] = []
    for key, value in expected.items():
        if key.endswith("num_batches_tracked") and key not in state:
            state[key] = value
    head = _last_linear(net)
    if num_classes is not None and head is not None:
        name, layer = head
        weight = state.get(f"{name}.weight")
        if weight is not None and weight.shape[:1] != (num_classes,) and weight.shape[1:] == layer.weight.shape[1:]:
            notes.append(
                f"{path.name} has {weight.shape[0]} classes: the head {name!r} starts at random for {num_classes}"
            )
            for key in (f"{name}.weight", f"{name}.bias"):
                if key in expected:
                    state[key] = expected[key]
                else:
                    state.pop(key, None)
    problems = describe_misfit(expected, state)
    if problems:
        hint = ""
        if head is not None and num_classes is None:
            weight = state.get(f"{head[0]}.weight")
            if weight is not None and weight.shape[0] != head[1].weight.shape[0]:
                hint = f" (the file has {weight.shape[0]} classes: try --num-classes {weight.shape[0]})"
        raise ResodeError(f"{path}: does not fit {type(net).__name__}: {problems}{hint}")
    net.load_state_dict(state)
    return notes


def _last_linear(net: nn.Module) -> tuple[str, nn.Linear | nn.Conv2d] | None:
    """The classifier: the last layer, where it is linear (a 1×1 convolution in some networks)."""
    layers = [(name, m) for name, m in net.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    return layers[-1] if layers else None


def state_sha256(state: dict[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of a state dict, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
