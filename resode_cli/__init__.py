"""resode: pretrained ResNets as discretised ODEs, with a memory-free adjoint backward that is measured.

    source model --open_source--> Source
                 --convert-----> OdeResNet: the source with OdeStages in place of its stages
                 --save/load---> one .safetensors file
                 --transfer----> tied, untied, deepened
                 --fit----------> brought back to the network it came from, on images without labels
                 --finetune----> trained by an Adjoint: backprop, checkpoint, euler, heun, pc
                 --check_gradients--> how far those gradients are from backprop

Importing this package imports neither torch nor timm; the names below do when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .adapters.sources import open_source
    from .check_grad import check_gradients
    from .conversion import convert
    from .data import open_data
    from .errors import ResodeError
    from .fit_settings import FitSettings
    from .fitting import FitData, fit
    from .model import OdeResNet, freeze_batch_norm
    from .model_file import load, save
    from .ode import Adjoint
    from .teacher import own_teacher
    from .transfer import deepen, tie, untie

_HOMES = {
    "Adjoint": "ode",
    "FitData": "fitting",
    "FitSettings": "fit_settings",
    "OdeResNet": "model",
    "ResodeError": "errors",
    "check_gradients": "check_grad",
    "convert": "conversion",
    "deepen": "transfer",
    "fit": "fitting",
    "freeze_batch_norm": "model",
    "load": "model_file",
    "open_data": "data",
    "open_source": "adapters.sources",
    "own_teacher": "teacher",
    "save": "model_file",
    "tie": "transfer",
    "untie": "transfer",
}

__all__ = [
    "Adjoint",
    "FitData",
    "FitSettings",
    "OdeResNet",
    "ResodeError",
    "check_gradients",
    "convert",
    "deepen",
    "fit",
    "freeze_batch_norm",
    "load",
    "open_data",
    "open_source",
    "own_teacher",
    "save",
    "tie",
    "untie",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
