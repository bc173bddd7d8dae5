"""The splits of a data set, and what people call them."""

from __future__ import annotations

from typing import Literal

Split = Literal["train", "val", "test"]
SPLIT_FOLDERS: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid", "dev"),
    "test": ("test", "testing"),
}
MEANT: dict[str, Split] = {name: split for split, names in SPLIT_FOLDERS.items() for name in names}
