"""A run of three steps of a tiny network, which tests begin, stop, change and resume."""

from __future__ import annotations

from pathlib import Path

SMALL = ["--no-pretrained", "--input-size", "8", "--num-classes", "10"]
TRAIN = ["--images", "24", "--test-images", "8", "--batch-size", "8", "--adjoint", "backprop", "--device", "cpu"]
NET = """
from resode_cli.sources.cifar import CifarResNet
def small(num_classes=10):
    return CifarResNet(1, widths=(2, 4, 4), num_classes=num_classes)
"""


def run(*more: str, model: str = "m.safetensors", steps: int = 3) -> list[str]:
    flags = [] if "--max-steps" in more else ["--max-steps", str(steps)]
    data = [] if "--data" in more else ["--data", "digits"]
    return ["finetune", model, "--trust-source", *data, *TRAIN, *flags, *more]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
