"""Networks of the user's own: `FILE.py:FUNCTION`, a function that returns an nn.Module."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from pathlib import Path

from torch import nn

from ..errors import ResodeError, UsageError, unknown
from ..network.parts import Preprocessing

ARGUMENTS = frozenset({"num_classes"})
WEIGHTS = "own"


def preprocessing(name: str, net: nn.Module) -> Preprocessing:
    """As `preprocessing_of` the network."""
    return preprocessing_of(net)


def preprocessing_of(net: nn.Module) -> Preprocessing:
    """What the network's `default_cfg` or `pretrained_cfg` says, a dictionary as timm's; else ImageNet's."""
    config = getattr(net, "pretrained_cfg", None) or getattr(net, "default_cfg", None)
    if not isinstance(config, dict):
        return Preprocessing()
    default = Preprocessing()
    size = config.get("input_size", (3, default.size, default.size))
    return Preprocessing(
        size=(int(size[-2]), int(size[-1])),
        mean=tuple(config.get("mean", default.mean)),
        std=tuple(config.get("std", default.std)),
        interpolation=str(config.get("interpolation", default.interpolation)),
        crop_fraction=float(config.get("crop_pct", default.crop_fraction)),
        crop_mode=str(config.get("crop_mode", default.crop_mode)),
    )


def build(name: str, *, pretrained: bool = False, num_classes: int | None = None) -> nn.Module:
    """Import the file and call the function, with `num_classes` where it was asked for.

    pretrained: not asked for; whether the function loads weights is its own affair.
    """
    file, _, function_name = name.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise UsageError(f"source file {file!r} does not exist")
    spec = importlib.util.spec_from_file_location(f"resode_source_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    # Its own folder is searched for imports while it runs, as `python FILE.py` would.
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
        function = getattr(module, function_name, None)
        if not callable(function):
            functions = [k for k, v in vars(module).items() if callable(v) and not k.startswith("_")]
            raise unknown(f"function in {path.name}", function_name, functions)
        arguments = {}
        if num_classes is not None:
            if "num_classes" not in inspect.signature(function).parameters:
                raise UsageError(f"{name} takes no argument num_classes, which says how many outputs the network has")
            arguments["num_classes"] = num_classes
        net = function(**arguments)
    except ResodeError:
        raise
    except Exception as error:
        raise ResodeError(f"{name} failed: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(path.parent.resolve()))
    if not isinstance(net, nn.Module):
        raise ResodeError(f"{name} returned a {type(net).__name__}, not an nn.Module")
    return net
