"""What a run is and was asked for: final figures, settings, the backward pass that was chosen, the model's history."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...errors import join, one_line
from ...quantities import number, size
from ..report import CALLED
from .curves import percent
from .markup import Markup, element, folded, joined, paragraph, section, table

if TYPE_CHECKING:
    from ...training.run_record import RunRecord

NONE = "–"


def overview(runs: Sequence[RunRecord], names: Sequence[str], on_images: Sequence[str]) -> Markup:
    """A row of final figures for each run. on_images: what its model was worth on the images looked at."""
    main = join(list(dict.fromkeys(CALLED[run.main] for run in runs)), "or")
    header = [
        "run",
        "state",
        "steps",
        f"{main} before",
        f"best {main}",
        f"last {main}",
        "last loss",
        "images/s",
        "peak memory",
    ]
    rows = []
    for run, name in zip(runs, names, strict=True):
        before, last = run.evaluation(0), run.evaluation(-1)
        before = before if before is not None and before["step"] == 0 else None
        steps = f"{run.step:,}" if run.total is None else f"{run.step:,} of {run.total:,}"
        speed, peak = run.images_per_second, run.peak_bytes
        rows.append(
            [
                *(name, run.standing, steps, _main(before, run.main), NONE if run.best is None else percent(run.best)),
                *(_main(last, run.main), NONE if last is None or "loss" not in last else f"{last['loss']:.4f}"),
                *(NONE if speed is None else f"{speed:,.0f}", NONE if peak is None else size(peak)),
            ]
        )
    if any(on_images):
        header.append(f"{main} below")
        rows = [[*row, figure or NONE] for row, figure in zip(rows, on_images, strict=True)]
    skipped = [
        f"{name} skipped {run.progress['skipped']} steps, whose loss or gradient was no number."
        for run, name in zip(runs, names, strict=True)
        if run.progress.get("skipped")
    ]
    notes = [paragraph(note, class_="note") for note in (*skipped, *(note for run in runs for note in run.notes))]
    caption = "Evaluations are of the run's held-out images; images per second are the median of the log's rows."
    return section("Figures", table(caption, header, rows, words=2), *notes)


def differences(runs: Sequence[RunRecord], names: Sequence[str]) -> Markup:
    """The settings in which runs differ."""
    asked = [_asked(run) for run in runs]
    rows = [
        [name, *(_shown(own.get(name)) for own in asked)]
        for name in dict.fromkeys(name for own in asked for name in own)
        if len({_shown(own.get(name)) for own in asked}) > 1
    ]
    if not rows:
        return section("Settings that differ", paragraph("None that the runs have saved."))
    made = table("What one run was asked for and another was not", ["setting", *names], rows, words=1 + len(names))
    return section("Settings that differ", made)


def _asked(run: RunRecord) -> dict[str, Any]:
    """Settings, data and model of a run, by the names of flags."""
    found = {name.replace("_", "-"): value for name, value in run.settings.items()}
    call = {} if run.run is None else _mapping(run.run["fingerprint"].get("call"))
    try:
        recipe = _mapping(tomllib.loads(run.recipe).get("finetune"))
    except (ValueError, RecursionError):
        recipe = {}
    more = {name: recipe[name] for name in ("model",) if name in recipe}
    if run.info is not None:
        more["source"] = str(run.info.source)
    if "data" in call:
        more["data"] = call["data"]
    return {**more, **found}


def _main(row: Mapping[str, float] | None, main: str) -> str:
    return NONE if row is None or main not in row else percent(row[main])


def _shown(value: Any) -> str:
    if value is None:
        return NONE
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(each)}" for name, each in value.items())
    return one_line(f"{value:.6g}" if isinstance(value, float) else str(value))


def backward(run: RunRecord, name: str) -> Markup:
    """What each piece is run backwards by, with the gradient errors and bytes that this rests on."""
    parts: list[Markup] = []
    for place, entry in enumerate(reversed(run.calibrations)):
        made = _calibration(entry)
        parts.append(made if place == 0 else folded(f"Before that, at step {entry.get('step', 0)}", made))
    guard = _mapping(run.progress.get("guard"))
    if run.adjoints:
        allowed = _mapping(guard.get("allowed"))
        rows = [[stage, label, _number(allowed.get(stage))] for stage, label in run.adjoints.items()]
        parts.append(table("What stages are run backwards by now", ["stage", "method", "drift allowed"], rows, words=2))
    if moved := guard.get("moved_to_anchors"):
        parts.append(paragraph(f"Moved to anchors, as states drifted: {_shown(moved)}."))
    if guard.get("recalibrations"):
        parts.append(paragraph(f"Calibrated again {guard['recalibrations']} times."))
    if not parts:
        parts.append(paragraph("Nothing is saved yet of how the run goes backwards.", class_="note"))
    return section(f"Backward pass: {name}", *parts)


def _calibration(entry: Mapping[str, Any]) -> Markup:
    pieces = {piece: each for piece, each in entry["pieces"].items() if isinstance(each, dict)}
    rows = [
        [
            *(piece, each.get("adjoint", NONE), _number(each.get("error"))),
            *(_bytes(each.get("bytes")), _bytes(each.get("backprop_bytes"))),
        ]
        for piece, each in pieces.items()
    ]
    header = ["piece", "method", "gradient error", "held", "backprop would hold"]
    about = [f"Chosen at step {entry.get('step', 0)}"]
    if isinstance(entry.get("tolerance"), float):
        about.append(f"gradient tolerance {entry['tolerance']:g}")
    if isinstance(entry.get("predicted_bytes"), int):
        about.append(f"predicted peak of a step {size(entry['predicted_bytes'])}")
        about.append(f"backprop {_bytes(entry.get('backprop_bytes'))}")
        about.append("no budget" if entry.get("budget") is None else f"budget {_bytes(entry['budget'])}")
    if isinstance(entry.get("time"), float):
        about.append(f"{entry['time']:.2f} times backprop's time")
    if isinstance(entry.get("micro_batches"), int) and entry["micro_batches"] > 1:
        about.append(f"{entry['micro_batches']} micro-batches")
    return table(", ".join(about), header, rows, words=2)


def _mapping(value: Any) -> Mapping[str, Any]:
    """What a file says by names; nothing where it says something else."""
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> str:
    return number(value) if isinstance(value, (int, float)) else NONE


def _bytes(count: Any) -> str:
    return size(count) if isinstance(count, (int, float)) else NONE


def origin(run: RunRecord, name: str) -> Markup:
    """Source, recipe, settings and the commands that made the model."""
    parts: list[Markup] = []
    if run.info is not None:
        pre = run.info.preprocessing
        rows = [
            ["source", str(run.info.source)],
            ["classes", f"{run.info.num_classes:,}"],
            ["images", f"{pre.size_text}, {pre.interpolation}, mean {pre.mean}, deviation {pre.std}"],
            ["folder", str(run.folder)],
        ]
        parts.append(table("The model", ["what", "is"], rows, words=2))
    if run.recipe:
        parts.append(folded("config.toml: versions, commands and settings", element("pre", run.recipe)))
    if run.settings:
        rows = [[setting.replace("_", "-"), _shown(value)] for setting, value in run.settings.items()]
        parts.append(folded("All settings", table("As the run's state has them", ["setting", "value"], rows, words=2)))
    if run.history:
        items = [element("li", element("code", entry["command"]), " ", _entry(entry)) for entry in run.history]
        parts.append(folded("Commands that made the model", element("ol", joined(items))))
    return section(f"Settings and origin: {name}", *parts) if parts else Markup()


def _entry(entry: Mapping[str, Any]) -> str:
    said = {name: value for name, value in entry.items() if name not in ("command", "verified", "pieces")}
    return ", ".join(f"{name} {_shown(value)}" for name, value in said.items() if value is not None)
