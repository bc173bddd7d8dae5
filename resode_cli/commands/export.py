"""`resode export MODEL`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from ..quantities import COUNT
from .options import ForceOption, JsonOption, ModelArgument, Origin, number
from .output import Output, start
from .parameters import Fields, takes


@takes(origin=Fields(Origin()))
def export_command(
    *,
    model: ModelArgument,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help="File to write: .safetensors (the source's own state dict), .pt2 (torch.export) or .onnx.",
        ),
    ],
    batch_size: Annotated[
        int | None,
        number("--batch-size", "-b", range=COUNT, help="Of .pt2 and .onnx: this many images alone. Default: any."),
    ] = None,
    dynamic_size: Annotated[
        bool,
        typer.Option("--dynamic-size", help="Of .pt2 and .onnx: images of any size. Default: of the model's alone."),
    ] = False,
    origin: Origin,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Write a model for other programs: a plain state dict, a torch.export program or an ONNX graph."""
    start()
    from ..files import model_file
    from ..files.exporting import Graph, export
    from ..machine.atomic import check_output
    from ..quantities import finite, size
    from ..reports.report import verification_line
    from ..surgery.convert import VERIFIED, like, random_batch

    output = Output(json_mode=json)
    for flag, given in (("--batch-size", batch_size is not None), ("--dynamic-size", dynamic_size)):
        if given and out.suffix == ".safetensors":
            raise UsageError(f"{flag} is of .pt2 and .onnx; a state dict has none")
    if out.resolve() == model.resolve():
        raise UsageError(f"output {str(out)!r} is the model itself")
    check_output(out, force=force)
    loaded = origin.load(model)
    images = like(random_batch(loaded.info.preprocessing, batch_size or VERIFIED), loaded)
    built_by = model_file.origin_of(loaded.info.source, origin.source, trust_source=origin.trust_source)
    graph = Graph(batch_size, dynamic_size)
    verified = export(loaded, out, images, graph=graph, origin=built_by).record()
    output.show(f"read back, {verification_line(verified)}")
    output.note(f"wrote {out} ({size(out.stat().st_size)})")
    output.json(finite({"out": str(out), "bytes": out.stat().st_size, "verified": verified}))
