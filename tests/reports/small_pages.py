"""What a page on runs is made of, small, with text that would run if it were not escaped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from resode_cli.measuring.by_image import ImageResults
from resode_cli.reports.html.held_out import HeldOut, Mistake
from resode_cli.training.run_record import RunRecord

EVIL = "<script>alert(1)</script>"


def record(name: str = "run", **changes: Any) -> RunRecord:
    train = [
        {"step": step, "loss": 2.0 / step, "top1": 0.5, "lr": 0.1, "peak_bytes": 2.0**30, "drift_layer1": 1e-3 / step}
        for step in range(1, 6)
    ]
    test = [{"step": 0, "loss": 2.3, "top1": 0.1}, {"step": 5, "loss": 1.0, "top1": 0.75}]
    values: dict[str, Any] = {"folder": Path("runs") / name, "rows": {"train": train, "test": test}, "run": None}
    return RunRecord(**{**values, "info": None, "running": False, "recipe": "", **changes})


def held_out(names: list[str]) -> HeldOut:
    count = len(names)
    labels, guesses = torch.arange(count).int(), torch.zeros(count).int()
    half, ones = torch.full((count,), 0.5), torch.ones(count, dtype=torch.bool)
    results = ImageResults(count, torch.arange(count), labels, guesses, half, half, ones)
    picture = Image.new("RGB", (8, 8), (200, 10, 10))
    mistakes = [Mistake(f"{name}/{EVIL}.png", name, names[0], 0.5, 1.0, picture) for name in names[1:]]
    return HeldOut("best", f"data {EVIL}, test", names, results, mistakes, [EVIL])
