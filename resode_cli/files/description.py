"""What an exported file says besides numbers: its classes, and how images become its input.

One JSON document, under the same name in every format: an entry of the metadata of .safetensors and .onnx, an extra
file of .pt2.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .. import __version__
from ..network.model import OdeResNet
from ..network.parts import SourceSpec

KEY = "resode.json"


def describe(model: OdeResNet) -> dict[str, Any]:
    """Classes and preprocessing, as plain values. mean and std are of values in [0, 1]; input_size is (C, H, W).

    multi_label: the sigmoid of each logit is that class's probability; else the softmax of all.
    """
    info, pre = model.info, model.info.preprocessing
    return {
        "num_classes": info.num_classes,
        "class_names": None if info.class_names is None else list(info.class_names),
        "multi_label": info.multi_label,
        "input_size": list(pre.shape),
        "channels": pre.channels,
        "mean": list(pre.mean),
        "std": list(pre.std),
        "interpolation": pre.interpolation,
        "crop_fraction": pre.crop_fraction,
        "crop_mode": pre.crop_mode,
        "source": public_name(info.source),
        "resode_version": __version__,
    }


def as_text(description: dict[str, Any]) -> str:
    """As it stands in a file."""
    return json.dumps(description, ensure_ascii=False)


def public_name(source: SourceSpec) -> str:
    """The source with its tag. Of a file of the user's own, its folders are nobody else's business."""
    if source.library == "file":
        file, _, function = source.name.rpartition(":")
        return f"{Path(file).name}:{function}"
    if source.tag and "." not in source.name:
        return f"{source}.{source.tag}"
    return str(source)
