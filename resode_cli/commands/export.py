"""`resode export MODEL`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from ..files.formats import FOLDER, SUFFIXES, Exporting, format_of
from .options import ForceOption, JsonOption, ModelArgument, Origin
from .output import Output, start
from .parameters import Fields, takes
from .working_folder import name_of, new_file

ENDINGS = {"safetensors": "-plain", FOLDER: "-timm"}  # of names that would be a model file's, or say nothing


@takes(exporting=Fields(Exporting()), origin=Fields(Origin()))
def export_command(
    *,
    model: ModelArgument,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            "-o",
            help="What to write: a file that ends in .safetensors, .pt2 or .onnx, or FOLDER/. Default: a new one here,"
            " named after the model.",
        ),
    ] = None,
    exporting: Exporting,
    origin: Origin,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Write a model for other programs: a plain state dict, a torch.export program, an ONNX graph or timm's folder."""
    start()
    from ..files import model_file
    from ..files.exporting import Graph, export
    from ..machine.atomic import check_output
    from ..quantities import finite, size
    from ..reports.report import verification_line
    from ..surgery.convert import VERIFIED, like, random_batch

    output = Output(json_mode=json)
    kind = format_of(out, exporting)
    default = new_file(name_of(model) + ENDINGS.get(kind, ""), suffix=SUFFIXES[kind], force=force)
    path = default if out is None else Path(out)
    if path.resolve() == model.resolve():
        raise UsageError(f"output {str(path)!r} is the model itself")
    check_output(path, force=force, folder=kind == FOLDER)
    loaded = origin.load(model)
    images = like(random_batch(loaded.info.preprocessing, exporting.batch_size or VERIFIED), loaded)
    built_by = model_file.origin_of(loaded.info.source, origin.source, trust_source=origin.trust_source)
    graph = Graph(exporting.batch_size, exporting.dynamic_size)
    verified = export(loaded, path, images, kind=kind, graph=graph, origin=built_by).record()
    output.show(f"read back, {verification_line(verified)}")
    written = sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]))
    output.note(f"wrote {path}{'/' if kind == FOLDER else ''} ({size(written)})")
    output.json(finite({"out": str(path), "format": kind, "bytes": written, "verified": verified}))
