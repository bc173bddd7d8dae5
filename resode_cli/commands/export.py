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
    from ..files.hub import CARD, check_push, push
    from ..files.timm_folder import FILES
    from ..machine.atomic import check_output
    from ..quantities import finite, size
    from ..reports.model_card import model_card
    from ..reports.report import verification_line
    from ..surgery.convert import VERIFIED, like, random_batch

    output = Output(json_mode=json)
    kind = format_of(out, exporting)
    default = new_file(name_of(model) + ENDINGS.get(kind, ""), suffix=SUFFIXES[kind], force=force)
    path = default if out is None else Path(out)
    if path.resolve() == model.resolve():
        raise UsageError(f"output {str(path)!r} is the model itself")
    check_output(path, force=force, folder=kind == FOLDER)
    if exporting.push is not None:
        check_push(exporting.push)
    loaded = origin.load(model)
    images = like(random_batch(loaded.info.preprocessing, exporting.batch_size or VERIFIED), loaded)
    built_by = model_file.origin_of(loaded.info.source, origin.source, trust_source=origin.trust_source)
    graph = Graph(exporting.batch_size, exporting.dynamic_size)
    card = model_card(loaded, kind, path.name, repository=exporting.push)
    verified = export(loaded, path, images, kind=kind, graph=graph, origin=built_by, card=card).record()
    output.show(f"read back, {verification_line(verified)}")
    written = [path / name for name in FILES] if kind == FOLDER else [path]
    total = sum(file.stat().st_size for file in written)
    output.note(f"wrote {path}{'/' if kind == FOLDER else ''} ({size(total)})")
    url = None
    if exporting.push is not None:
        files: dict[str, Path | bytes] = {CARD: card.encode(), **{file.name: file for file in written}}
        url, notes = push(exporting.push, files, private=exporting.private, force=force)
        output.notes(notes)
        output.note(f"pushed to {url}")
    output.json(finite({"out": str(path), "format": kind, "bytes": total, "verified": verified, "pushed": url}))
