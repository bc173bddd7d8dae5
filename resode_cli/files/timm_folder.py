"""A folder as timm saves networks: config.json and model.safetensors.

`timm.create_model("local-dir:FOLDER", pretrained=True)` loads it, and so does the source `local-dir:FOLDER`.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import timm
from timm.models import save_for_hf
from torch import Tensor, nn

from ..errors import ResodeError
from ..network.model import OdeResNet
from ..network.parts import SourceSpec
from ..sources.licences import licence_of

FILES = ("config.json", "model.safetensors")
# What timm's configuration of an architecture says of its layers; the rest is of weights that these are not.
_OF_LAYERS = ("architecture", "fixed_input_size", "first_conv", "classifier")


def check_timm(origin: SourceSpec) -> None:
    """Raises ResodeError, with the reason, for a network that timm does not build by name and arguments."""
    reason = ""
    if origin.library != "timm":
        reason = f"{origin} is no network of timm"
    elif "stem" in origin.arguments:
        reason = f"timm builds no {origin.name} with the stem that --stem made"
    if reason:
        raise ResodeError(f"{reason}; export to .safetensors, .pt2 or .onnx instead")


def write_folder(model: OdeResNet, net: nn.Module, folder: Path, origin: SourceSpec) -> None:
    """Write the source network `net`, which has the model's weights, with the model's classes and preprocessing."""
    info, pre = model.info, model.info.preprocessing
    config: Any = net.pretrained_cfg
    own = {name: config[name] for name in _OF_LAYERS if config.get(name) is not None}
    own["architecture"] = origin.name.partition(".")[0]
    own |= {
        "num_classes": info.num_classes,
        "input_size": list(pre.shape),
        "mean": list(pre.mean),
        "std": list(pre.std),
        "interpolation": pre.interpolation,
        "crop_pct": pre.crop_fraction,
        "crop_mode": pre.crop_mode,
    }
    if licence := licence_of(info.source):
        own["license"] = licence
    net.pretrained_cfg = own  # type: ignore[assignment]
    arguments: Any = origin.arguments.get("model_args") or {}
    said: dict[str, Any] = {"label_names": list(info.class_names)} if info.class_names else {}
    if info.multi_label:  # a word of ours, which timm leaves alone
        said["multi_label"] = True
    save_for_hf(
        net,
        str(folder),
        model_config={"pretrained_cfg": own, **said},
        model_args=dict(arguments),
        safe_serialization=True,
    )


def read_folder(folder: Path, images: Tensor) -> nn.Module:
    """What timm makes of it, in the precision of the images."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True)
    return net.to(images.dtype).eval()
