"""`resode info FILE`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import one_line
from .options import JsonOption, ModelArgument, Origin
from .output import Output, start
from .parameters import Fields, takes


@takes(origin=Fields(Origin()))
def info_command(
    *,
    model: ModelArgument,
    history: Annotated[
        bool, typer.Option("--history", help="Show every setting of the commands that made it.")
    ] = False,
    origin: Origin,
    json: JsonOption = False,
) -> None:
    """Show what a model file holds: source, stages, preprocessing, and the commands that made it."""
    start()
    from ..files import model_file
    from ..quantities import finite, size
    from ..reports.report import stage_rows, stage_table, verification_line

    output = Output(json_mode=json)
    loaded = origin.load(model)
    metadata = model_file.model_metadata(loaded)
    rows = stage_rows(loaded)
    parameters = sum(p.numel() for p in loaded.parameters())
    made_of, pre = loaded.info.source, loaded.info.preprocessing
    output.show(stage_table(rows, title=f"{model} ({size(model.stat().st_size)})"))
    tag = f", tag {made_of.tag}" if made_of.tag else ""
    weights = f", weights {made_of.weights}" if made_of.weights else ""
    digest = f", sha256 {made_of.weights_sha256[:12]}…" if made_of.weights_sha256 else ", random weights"
    output.show(f"source         {made_of}{tag}{weights}{digest}")
    output.show(f"parameters     {parameters:,}")
    names = loaded.info.class_names
    colours = {1: " grey", 3: ""}.get(pre.channels, f" {pre.channels} channels")
    output.show(
        f"classes        {loaded.info.num_classes}"
        + (f" ({one_line(', '.join(names[:10]))}{'…' if len(names) > 10 else ''})" if names else "")
        + (", any number of them for an image" if loaded.info.multi_label else "")
    )
    output.show(
        f"preprocessing  {pre.size_text}{colours} {pre.interpolation}, crop {pre.crop_fraction:g} ({pre.crop_mode}),"
        f" mean {pre.mean}, std {pre.std}"
    )
    for block in loaded.info.left_out:
        output.show(f"left as it is  {one_line(block)}")
    for entry in loaded.info.history:
        settings = {k: v for k, v in entry.items() if k not in ("command", "verified")}
        shown = ", ".join(f"{k}={v}" for k, v in settings.items()) if history or len(settings) <= 6 else "… (--history)"
        output.show(one_line(f"made by        {entry['command']} {shown}"))
    verified = None
    for entry in loaded.info.history:
        verified = entry["verified"] if isinstance(entry.get("verified"), dict) else verified
    for place, entry in enumerate(loaded.info.history):
        if not isinstance(verified, dict) or entry.get("verified") is not verified:
            continue
        since = [str(later["command"]) for later in loaded.info.history[place + 1 :]]
        changed = f"; not since: {', '.join(dict.fromkeys(since))} came after" if since else ""
        output.show(one_line(f"{entry['command']:<14} {verification_line(verified)}{changed}"))
    output.json(
        finite({**metadata, "stages": [vars(row) for row in rows], "parameters": parameters, "verified": verified})
    )
