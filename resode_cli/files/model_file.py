"""The model file: one .safetensors file, tensors under their source names, one JSON metadata entry.

No pickle is written. Files that are truncated, foreign, newer, misshapen or inconsistent are refused
by name.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import NonFiniteWarning, ResodeError, UsageError, first_few, join
from ..machine.atomic import atomic_path
from ..network.assembling import assemble
from ..network.model import ModelInfo, OdeResNet, non_finite
from ..network.parts import SourceSpec
from ..network.specs import StageSpec
from ..quantities import size
from ..sources import registry as sources
from ..surgery.convert import LOGITS_AGREE, like, random_batch
from .model_schema import FORMAT_VERSION, parse_json, parse_metadata
from .saving import info_to_save

METADATA_KEY = "resode"
CHECKSUM = "checksum"
CHECKED = 2  # random images on which a saved model is compared with what it loads as
# How much larger than its file a network may be: steps that share their block are one block in the file.
LARGEST_RATIO, SMALL = 64, 2**28
FEW_WITHOUT_TENSORS = 256  # blocks without parameters


TABLE_ROW = 64  # bytes of a tensor's entry beside its name, about


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write a safetensors file with one JSON metadata entry and a checksum of all, atomically."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps({**metadata, CHECKSUM: checksum(contiguous, metadata)})
    # The file begins with a table of the tensors: names, shapes and places, which of many small ones is most of it.
    table = sum(len(name) + TABLE_ROW for name in contiguous)
    need = sum(tensor.nbytes for tensor in contiguous.values()) + len(json.dumps(text)) + table
    with atomic_path(path, need=need) as temporary:
        save_file(contiguous, temporary, metadata={METADATA_KEY: text})


def checksum(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> str:
    """SHA-256 of what a file says and of its tensors: names, types, shapes and bytes."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the JSON metadata entry of a file written by `write_tensors`.

    Raises ResodeError if they are not what was written.
    """
    metadata = read_metadata(path)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    written = metadata.pop(CHECKSUM, None)  # files of the first two formats have none
    if written is None and metadata["format"] > 2:
        raise ResodeError(f"{path}: its checksum is missing")
    if written is not None and written != checksum(tensors, metadata):
        raise ResodeError(f"{path}: damaged or changed since it was written (its checksum does not agree)")
    return tensors, metadata


def read_metadata(path: Path) -> dict[str, Any]:
    """The JSON metadata entry alone, its checksum included."""
    path = Path(path)
    if path.is_dir():
        raise UsageError(_not_the_folder(path))
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
        metadata = parse_json(text)
        version = metadata["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ResodeError(f"{path}: its resode metadata cannot be read") from error
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ResodeError(
            f"{path}: format version {version}, newer than this resode reads ({FORMAT_VERSION}); upgrade resode"
        )
    return metadata


def _not_the_folder(folder: Path) -> str:
    first = ("best.safetensors", "last.safetensors")
    found = sorted(path.name for path in folder.glob("*.safetensors") if path.name != "state.safetensors")
    models = [name for name in first if name in found] + [name for name in found if name not in first]
    hint = f"; did you mean {join([str(folder / name) for name in models[:3]], 'or')}?" if models else ""
    return f"model file {str(folder)!r} is a folder{hint}"


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
        **({"multi_label": True} if info.multi_label else {}),  # which older versions do not know
    }


def write(model: OdeResNet, path: str | Path, *, source: str | None = None) -> None:
    """Write a model file, atomically, of a network that is known to be as its source builds it, but for its stages.

    Raises ResodeError, and writes nothing, where names or shapes of its tensors say otherwise.
    """
    described = model.with_info(info_to_save(model, source))
    write_tensors(Path(path), model.file_state(), model_metadata(described))


def save(model: OdeResNet, path: str | Path, *, source: str | None = None) -> None:
    """Write a model file, atomically, once it is known that `load` gives the same function from it.

    source: FILE.py:FUNCTION that builds the network as it is now, where layers were put in since its conversion. A
        new head of a network of a library needs none: its number of classes is recorded.
    Raises ResodeError, and writes nothing, for a network that loading could not build again, or that it would build as
    another function in eval mode, as after a change that is no tensor's (an eps, an activation, a hook). A network
    that Python made cannot be built here, and is not compared: `load(path, source=network)` takes what it is given.
    """
    path = Path(path)
    try:
        with atomic_path(path) as temporary:
            try:
                write(model, temporary, source=source)
                if model.info.source.library != "module" or source is not None:
                    _check_loads(model, temporary, source)
            except ResodeError as error:
                raise type(error)(str(error).replace(str(temporary), str(path))) from error
    except (ResodeError, OSError):
        raise
    except Exception as error:  # of many kinds, for a network may be changed in many ways
        raise ResodeError(f"{path}: the network as it is now cannot be written: {error}") from error


def _check_loads(model: OdeResNet, path: Path, source: str | None) -> None:
    training = {module: module.training for module in model.modules()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NonFiniteWarning)
        # Its code has run in this process already, or the model would not be here.
        loaded = load(path, source=source, trust_source=True)
    try:
        images = like(random_batch(model.info.preprocessing, CHECKED), model.eval())
        with torch.no_grad():
            expected = model(images).cpu()
            found = loaded.to(expected.dtype)(images.cpu().to(expected.dtype))
    finally:
        for module, mode in training.items():
            module.training = mode
    scale = max(expected.nan_to_num(0.0, 0.0, 0.0).abs().max().item(), 1.0)
    # NaN and infinity agree with themselves, and hide nothing of what stands beside them.
    same = torch.isclose(found, expected, rtol=0.0, atol=0.0, equal_nan=True)
    difference = torch.where(same, 0.0, expected - found).abs().max().item()
    if not difference <= LOGITS_AGREE * scale:
        raise ResodeError(
            "what would be loaded is another function than the network as it is now: outputs differ by"
            f" {difference:.3g} (the largest is {scale:.3g}); something was changed that is no tensor of it, such as a"
            " hook, an activation or a setting of a layer; `save(model, path, source='FILE.py:FUNCTION')` records a"
            " function that builds the network as it is now"
        )


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
        info, specs = parse_metadata({name: value for name, value in metadata.items() if name != "run"})
        check_classes(info, tensors)
        if source is None:
            check_room_of(info, specs, tensors)
        if isinstance(source, nn.Module):
            net = source
        else:
            net = sources.build(origin_of(info.source, source, trust_source=trust_source))
        model = assemble(net, specs, info)
        model.load_file_state(tensors)
        if unusable := non_finite(tensors):
            warnings.warn(f"{path} holds NaN or infinity in {first_few(unusable)}", NonFiniteWarning, stacklevel=3)
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
        raise ResodeError(
            f"made from {origin.name}, which is not there any more; pass --source FILE.py:FUNCTION, or, for a"
            " teacher, put it back"
        )
    return origin


def check_classes(info: ModelInfo, tensors: dict[str, Tensor]) -> None:
    """Raises ResodeError for a number of classes that no tensor of the file has: a layer of that size is not built."""
    count = info.source.arguments.get("num_classes")
    if count is not None and count not in {t.shape[0] for t in tensors.values() if t.ndim and t.numel()}:
        raise ResodeError(f"its network was built for {count} classes, but no tensor has {count} rows")


def check_room_of(info: ModelInfo, specs: Sequence[StageSpec], tensors: dict[str, Tensor]) -> None:
    """Raises ResodeError for a network that is far larger than its file, before any memory is taken for it.

    A file of a few bytes may name the largest network there is. A library's network is built without memory (on torch's
    meta device) where it can be; every distinct block has to have a tensor in the file.
    """
    owners = {".".join(name.split(".")[:depth]) for name in tensors for depth in range(1, name.count(".") + 1)}
    for spec in specs:
        inside = f"{spec.container}." if spec.container else ""
        missing = [block.name for block in spec.blocks if f"{inside}{block.name}" not in owners and not block.shares]
        if len(missing) > FEW_WITHOUT_TENSORS:
            raise ResodeError(f"stage {spec.name}: {len(missing)} of its blocks have no tensor in the file")
    if not info.source.is_packaged:
        return
    try:
        with torch.device("meta"):
            net = sources.build(info.source)
    except ResodeError:
        raise
    except Exception:  # a builder that looks at values; it is built with memory then
        return
    needed = sum(t.nbytes for t in net.state_dict().values())
    held = sum(t.nbytes for t in tensors.values())
    if needed > LARGEST_RATIO * held + SMALL:
        raise ResodeError(f"its network {info.source} has {size(needed)} of weights, and the file {size(held)}")
