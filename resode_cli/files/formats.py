"""Formats of exported models, by name, and which of them an output's name means."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError
from ..options import option
from ..quantities import COUNT

FOLDER = "timm"  # of files that timm reads
SUFFIXES = {"safetensors": ".safetensors", "pt2": ".pt2", "onnx": ".onnx", FOLDER: ""}
GRAPHS = ("pt2", "onnx")
EVERYWHERE = "pt2"  # what any model can be, without further packages


@dataclass(frozen=True)
class Exporting:
    """What is written of a model, and where it goes. format: None for what the output's name says."""

    format: str | None = option(
        None,
        "safetensors (the source's own state dict), pt2 (torch.export), onnx, or timm (a folder that timm loads)."
        " Default: by the ending of --out, or pt2.",
        choices=tuple(SUFFIXES),
    )
    batch_size: int | None = option(
        None,
        "Of .pt2 and .onnx: this many images alone. Default: any.",
        range=COUNT,
        flags=("--batch-size", "-b"),
    )
    dynamic_size: bool = option(False, "Of .pt2 and .onnx: images of any size. Default: of the model's alone.")
    push: str | None = option(
        None, "Then upload it to this repository of the Hugging Face hub (OWNER/NAME), with a model card."
    )
    private: bool = option(False, "With --push: a new repository is private.")


def format_of(out: str | None, exporting: Exporting) -> str:
    """The format of an output of this name, as typed: a folder's ends in a slash, or is there.

    Raises UsageError for a name that says none or another than `--format`, and for options that are not of the format.
    """
    if exporting.private and exporting.push is None:
        raise UsageError("--private goes with --push OWNER/NAME")
    named = None if out is None else _named(out)
    chosen = exporting.format or named
    if out is not None and chosen is None:
        raise UsageError(
            f"output {out!r}: the suffix names the format (allowed: .safetensors, .pt2, .onnx; or FOLDER/, for timm)"
        )
    chosen = chosen or EVERYWHERE
    if named is not None and named != chosen:
        raise UsageError(f"--format {chosen}: the output {out!r} is named as one of {named}")
    if out is not None and named is None and chosen != FOLDER:
        raise UsageError(f"--format {chosen}: the output {out!r} must end in {SUFFIXES[chosen]}")
    if chosen not in GRAPHS:
        for flag, given in (("--batch-size", exporting.batch_size), ("--dynamic-size", exporting.dynamic_size)):
            if given:
                raise UsageError(f"{flag} is of .pt2 and .onnx; a state dict has none")
    return chosen


def _named(out: str) -> str | None:
    if out.endswith("/") or Path(out).is_dir():
        return FOLDER
    return next((name for name, suffix in SUFFIXES.items() if suffix and Path(out).suffix == suffix), None)
