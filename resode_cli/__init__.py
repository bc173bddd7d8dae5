"""resode: pretrained ResNets as discretised ODEs, with a memory-free adjoint backward that is measured.

    source model --open_source--> Source
                 --convert-----> OdeResNet: the source with OdeStages in place of its stages
                 --save/load---> one .safetensors file
                 --tie, untie, deepen--> of other steps
                 --fit----------> brought back to the network it came from, on images without labels
                 --finetune----> trained by an Adjoint: backprop, checkpoint, euler, heun, pc
                 --predict--> the likeliest classes of images
                 --check_gradients--> how far those gradients are from backprop

Importing this package imports neither torch nor timm; the names below do when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .data import batches, open_data
    from .errors import ResodeError
    from .files.model_file import load, save
    from .fitting.fit import fit
    from .fitting.images import FitData
    from .fitting.settings import FitSettings
    from .gradients.check_grad import check_gradients
    from .measuring.evaluate import evaluate
    from .measuring.predict import Prediction, predict
    from .network.model import OdeResNet, freeze_batch_norm
    from .network.parts import PreprocessingChoice
    from .ode import Adjoint
    from .sources.registry import open_source
    from .surgery.batch_norm import recalibrate
    from .surgery.convert import convert
    from .surgery.rewrite import deepen, tie, untie
    from .training.finetune import finetune
    from .training.settings import Settings
    from .training.teacher import own_teacher

_HOMES = {
    "Adjoint": "ode",
    "FitData": "fitting.images",
    "FitSettings": "fitting.settings",
    "OdeResNet": "network.model",
    "Prediction": "measuring.predict",
    "PreprocessingChoice": "network.parts",
    "ResodeError": "errors",
    "Settings": "training.settings",
    "batches": "data",
    "check_gradients": "gradients.check_grad",
    "convert": "surgery.convert",
    "deepen": "surgery.rewrite",
    "evaluate": "measuring.evaluate",
    "finetune": "training.finetune",
    "fit": "fitting.fit",
    "freeze_batch_norm": "network.model",
    "load": "files.model_file",
    "open_data": "data",
    "open_source": "sources.registry",
    "own_teacher": "training.teacher",
    "predict": "measuring.predict",
    "recalibrate": "surgery.batch_norm",
    "save": "files.model_file",
    "tie": "surgery.rewrite",
    "untie": "surgery.rewrite",
}

__all__ = [
    "Adjoint",
    "FitData",
    "FitSettings",
    "OdeResNet",
    "Prediction",
    "PreprocessingChoice",
    "ResodeError",
    "Settings",
    "batches",
    "check_gradients",
    "convert",
    "deepen",
    "evaluate",
    "finetune",
    "fit",
    "freeze_batch_norm",
    "load",
    "open_data",
    "open_source",
    "own_teacher",
    "predict",
    "recalibrate",
    "save",
    "tie",
    "untie",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
