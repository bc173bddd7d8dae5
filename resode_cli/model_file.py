"""The model file: one .safetensors file, tensors under their source names, one JSON metadata entry.

No pickle is written. Files that are truncated, foreign, newer, misshapen or inconsistent are refused
by name.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .adapters import sources
from .errors import ResodeError, UsageError
from .model import ModelInfo, OdeResNet, assemble
from .ode import SCHEMES
from .parts import Preprocessing, SourceSpec
from .residual import FORMS
from .stage import BlockSpec, StageSpec

FORMAT_VERSION = 2  # 2: blocks that share tensors, weights linear in depth
METADATA_KEY = "resode"


def check_output(path: Path, *, force: bool) -> None:
    """Refuse, before any work is done, an output that exists or cannot be written."""
    if path.is_dir():
        raise UsageError(f"output {str(path)!r} is a folder; name a file")
    if path.exists() and not force:
        raise ResodeError(f"{path} exists; pass --force to overwrite it")
    if not path.parent.is_dir():
        raise UsageError(f"output folder {str(path.parent)!r} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise ResodeError(f"output folder {str(path.parent)!r} cannot be written to")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well, and is removed when not."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write a safetensors file with one JSON metadata entry, atomically."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with atomic_path(path) as temporary:
            save_file(contiguous, temporary, metadata={METADATA_KEY: json.dumps(metadata)})
    except OSError as error:
        raise ResodeError(f"{path} cannot be written: {error.strerror or error}") from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the JSON metadata entry of a file written by `write_tensors`."""
    metadata = read_metadata(path)
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, metadata


def read_metadata(path: Path) -> dict[str, Any]:
    """The JSON metadata entry alone."""
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"model file {str(path)!r} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
    except (SafetensorError, OSError) as error:
        raise ResodeError(f"{path}: not a safetensors file, or cut short ({error})") from error
    if text is None:
        raise ResodeError(f"{path}: a safetensors file, but not a resode model; `resode convert` makes one")
    try:
        metadata = json.loads(text)
        version = metadata["format"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ResodeError(f"{path}: its resode metadata cannot be read") from error
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ResodeError(
            f"{path}: format version {version}, newer than this resode reads ({FORMAT_VERSION}); upgrade resode"
        )
    return metadata


def model_metadata(model: OdeResNet) -> dict[str, Any]:
    """What the file says besides tensors."""
    info = model.info
    return {
        "format": FORMAT_VERSION,
        "source": asdict(info.source),
        "preprocessing": asdict(info.preprocessing),
        "num_classes": info.num_classes,
        "class_names": info.class_names,
        "left_out": info.left_out,
        "stages": [{**asdict(stage.spec), "horizon": str(stage.spec.horizon)} for stage in model.stages.values()],
        "history": info.history,
    }


def save(model: OdeResNet, path: Path) -> None:
    """Write a model file, atomically."""
    write_tensors(Path(path), model.file_state(), model_metadata(model))


def load(path: str | Path, *, source: str | nn.Module | None = None, trust_source: bool = False) -> OdeResNet:
    """Read a model file. The result is an nn.Module: images (B, 3, H, W) to logits (B, K).

    Its parameters are plain parameters, each distinct block once, and its backward is autograd's
    until `model.use_adjoint(Adjoint("pc"))` says otherwise. Long reconstructions on a CPU are much
    faster after `torch.set_flush_denormal(True)`, which the commands call at start-up.

    source: FILE.py:FUNCTION that builds the network, for a model made by a file of the user's own; or the network
        that was converted, built anew, which is used up. A file made of a network from Python needs the latter.
    trust_source: run the FILE.py that the model file itself names. A model file is data: nothing that it names is
        run without this.
    Raises ResodeError if the file is not whole, not ours, newer or inconsistent, or if it names code.
    """
    path = Path(path)
    tensors, metadata = read_tensors(path)
    if "run" in metadata:
        raise ResodeError(f"{path}: the state of a run, not a model; its folder holds best and last models")
    return from_tensors(path, tensors, metadata, source=source, trust_source=trust_source)


def from_tensors(
    path: Path,
    tensors: dict[str, Tensor],
    metadata: dict[str, Any],
    *,
    source: str | nn.Module | None = None,
    trust_source: bool = False,
) -> OdeResNet:
    """The model that a file's metadata describes, with the given tensors."""
    try:
        info, specs = _parse(metadata)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ResodeError(f"{path}: its metadata is inconsistent ({type(error).__name__}: {error})") from error
    for spec in specs:
        _check(spec, path)
    try:
        if isinstance(source, nn.Module):
            net = source
        else:
            net = sources.build(origin_of(info.source, source, trust_source=trust_source))
        model = assemble(net, specs, info)
        model.load_file_state(tensors)
    except ResodeError as error:
        raise ResodeError(f"{path}: {error}") from error
    return model.eval()


def origin_of(origin: SourceSpec, source: str | None, *, trust_source: bool) -> SourceSpec:
    """What to build a model's network of: what the user names now, or else what its file names.

    Raises ResodeError where the file names code and the user has not said that it may run.
    """
    if source is not None:
        library, name = sources.parse_source(source)
        return SourceSpec(library, name, arguments=origin.arguments)
    if origin.library == "module":
        raise ResodeError(
            f"made of a network from Python ({origin.name}); load it there, load(path, source=the network), or pass"
            " --source FILE.py:FUNCTION that builds it"
        )
    if origin.library != "file":
        return origin
    file, _, function = origin.name.rpartition(":")
    if not trust_source:
        raise ResodeError(
            f"its network is built by the function {function} of {Path(file).absolute()}, which a model file must not"
            f" run by itself; if you trust that code, pass --source {origin.name} or --trust-source (in Python:"
            " source= or trust_source=True)"
        )
    if not Path(file).is_file():
        raise ResodeError(f"made from {origin.name}, which is not there any more; pass --source FILE.py:FUNCTION")
    return origin


def _parse(metadata: dict[str, Any]) -> tuple[ModelInfo, list[StageSpec]]:
    preprocessing = dict(metadata["preprocessing"])
    for name in ("mean", "std"):
        preprocessing[name] = tuple(preprocessing[name])
    names = metadata["class_names"]
    info = ModelInfo(
        SourceSpec(**metadata["source"]),
        Preprocessing(**preprocessing),
        metadata["num_classes"],
        tuple(names) if names else None,
        tuple(metadata["history"]),
        tuple(metadata.get("left_out", ())),
    )
    specs = []
    for raw in metadata["stages"]:
        fields = dict(raw)
        fields["blocks"] = tuple(BlockSpec(**block) for block in fields["blocks"])
        fields["horizon"] = Fraction(fields["horizon"])
        for name in ("transition", "source_blocks", "schedule", "blends", "further"):
            fields[name] = tuple(fields.get(name, ()))
        specs.append(StageSpec(**fields))
    return info, specs


def _check(spec: StageSpec, path: Path) -> None:
    n_blocks = len(spec.blocks)
    if any(not isinstance(b, int) or not 0 <= b < n_blocks for b in spec.schedule):
        raise ResodeError(f"{path}: stage {spec.name}: schedule out of range of its {n_blocks} blocks")
    if spec.blends and (
        len(spec.blends) != spec.depth
        or not all(isinstance(w, (int, float)) and 0 <= w < 1 for w in spec.blends)
        or any(w and b + 1 >= n_blocks for b, w in zip(spec.schedule, spec.blends, strict=True))
    ):
        raise ResodeError(f"{path}: stage {spec.name}: weights linear in depth reach beyond its {n_blocks} blocks")
    used = set(spec.schedule) | {b + 1 for b, w in zip(spec.schedule, spec.blends, strict=False) if w}
    if used != set(range(n_blocks)):
        raise ResodeError(f"{path}: stage {spec.name}: a block is not in the schedule")
    if spec.scheme not in SCHEMES:
        raise ResodeError(f"{path}: stage {spec.name}: unknown forward rule {spec.scheme!r}")
    if spec.form not in FORMS:
        raise ResodeError(f"{path}: stage {spec.name}: unknown form {spec.form!r}")
