"""SOURCE, as the command line takes it, to a network with its weights."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch
from torch import nn

from ..errors import ResodeError, UsageError, join, unknown
from ..machine.memory import check_room
from ..network.head import head_parameters
from ..network.parts import Preprocessing, PreprocessingChoice, Source, SourceSpec
from . import saved_models, user_file
from .libraries import MODULES, library_of
from .weights import describe_not_finite, load_weights, state_sha256

SAVED = ("hf-hub", "local-dir")  # networks of timm in a place of their own
LIBRARIES = (*MODULES, *SAVED)
RANDOM_NOTE = "no pretrained weights: the network is random; to train it from scratch, --horizon 1 is the paper's form"
AS_IT_IS = PreprocessingChoice()


def parse_source(text: str) -> tuple[str, str]:
    """'timm:resnet50' → ('timm', 'resnet50'); 'net.py:make' → ('file', 'net.py:make')."""
    library, separator, name = text.partition(":")
    library = "hf-hub" if library == "hf_hub" else library
    if separator and name and library in LIBRARIES and library != "file":
        return library, name
    file, _, function = text.rpartition(":")
    if file.endswith(".py") and function:
        return "file", text
    if text.endswith(".py"):
        raise UsageError(f"source {text!r}: name the function that builds the network, {text}:FUNCTION")
    if not separator and "/" not in text and text:
        return "timm", _bare(text)
    if not separator or file.endswith(".py"):
        raise UsageError(
            f"source {text!r}: write timm:NAME, torchvision:NAME, hf-hub:REPO, local-dir:FOLDER,"
            " cifar:NAME or FILE.py:FUNCTION"
        )
    raise unknown("source library", library, [known for known in LIBRARIES if known != "file"])


def _bare(name: str) -> str:
    """A name without a library, which is timm's. Raises UsageError, with the nearest sources, for any other."""
    from torchvision import models

    from . import cifar, timm_models

    if timm_models.is_known(name):
        return name
    others = {f"torchvision:{other}" for other in models.list_models(module=models)}
    others |= {f"cifar:{other}" for other in cifar.DEPTHS}
    sources = {other.partition(":")[2]: other for other in sorted(others, reverse=True)}
    sources |= {other: f"timm:{other}" for other in timm_models.names()}
    nearest = [sources[n] for n in difflib.get_close_matches(name, sources, n=3, cutoff=0.6)]
    hint = f"; did you mean {join(nearest, 'or')}?" if nearest else ""
    raise UsageError(f"unknown source {name!r}{hint} (`resode list` names what converts)")


def open_source(
    text: str,
    *,
    pretrained: bool = True,
    weights: Path | None = None,
    num_classes: int | None = None,
    stem: str | None = None,
    shortcut: str | None = None,
    preprocessing: PreprocessingChoice = AS_IT_IS,
    prefix: str | None = None,
) -> Source:
    """Build the source network and load its weights.

    weights: a file; it takes the place of the library's pretrained weights.
    prefix: what precedes the network's names in that file, where several would do.
    stem: 'cifar' for a 3×3 stem of stride 1 without pooling, on timm's and torchvision's networks.
    shortcut: 'A' or 'B', of the CIFAR networks.
    preprocessing: what differs from the source's own.

    Raises UsageError for a source that does not exist, ResodeError for weights that cannot be had.
    """
    library, name = parse_source(text)
    if prefix is not None and weights is None:
        raise UsageError(f"--prefix {prefix}: goes with --weights FILE, in which names begin so")
    if num_classes is not None and num_classes < 1:
        raise UsageError(f"--num-classes {num_classes}: must be 1 or more")
    if stem not in (None, "cifar"):
        raise unknown("stem", str(stem), ["cifar"])
    arguments = {"num_classes": num_classes, "stem": stem, "shortcut": shortcut}
    spec = SourceSpec(library, name, arguments={k: v for k, v in arguments.items() if v is not None})
    if library in SAVED:
        with _clear_download_errors(text, "pass a copy of it as local-dir:FOLDER"):
            return _open_saved(
                spec, text, num_classes, pretrained=pretrained, weights=weights, chosen=preprocessing, prefix=prefix
            )
    offers = library_of(library)
    from_library = pretrained and weights is None and offers.WEIGHTS != "own"
    if from_library and offers.WEIGHTS == "none":
        raise UsageError(f"{text} has no weights to fetch; pass --weights FILE or --no-pretrained")
    with _clear_download_errors(text, "pass --weights FILE, or --no-pretrained for a random network"):
        net = build(spec, pretrained=from_library)
    notes: list[str] = [] if ":" in text else [f"{text} is taken as {library}:{name}"]
    fresh = () if offers.WEIGHTS == "own" else head_parameters(net)
    if weights is not None:
        found, fresh = _load_weights(net, weights, num_classes=num_classes, prefix=prefix)
        notes += found
        spec = replace(spec, weights=weights.name)
    elif from_library:
        spec = replace(spec, tag=offers.tag(name))
        classes = offers.pretrained_classes(name)
        if num_classes not in (None, classes):
            notes.append(_head_note(classes, num_classes))
        else:
            fresh = ()
    if stem == "cifar":
        notes.append("the 3×3 stem starts at random")
    if from_library or weights is not None or offers.WEIGHTS == "own":
        spec = replace(spec, weights_sha256=state_sha256(net.state_dict()))
    else:
        notes.append(RANDOM_NOTE)
    notes += _not_finite(net)
    _check_scripts(net, str(spec))
    known = _preprocessing(spec, net)
    own = channelled(known, net, preprocessing)
    if library == "file" and known == Preprocessing() and preprocessing.size is None:
        notes.append(
            f"images are taken as {own.size_text} with {_whose(own)};"
            " --input-size, --mean and --std, or a default_cfg of the network, say otherwise"
        )
    elif own.channels != known.channels:
        notes += _channel_note(own, preprocessing)
    return Source(spec, net, preprocessing.applied_to(own), tuple(notes), fresh)


def _load_weights(
    net: nn.Module, path: Path, *, num_classes: int | None, prefix: str | None
) -> tuple[list[str], tuple[str, ...]]:
    """What to say of a weight file that was loaded, and the head's parameters, where it has left them at random."""
    head = {name: net.get_parameter(name).detach().clone() for name in head_parameters(net)}
    notes = load_weights(net, path, num_classes=num_classes, prefix=prefix)
    left = all(torch.equal(net.get_parameter(name), value) for name, value in head.items())
    return notes, tuple(head) if left else ()


def _open_saved(
    spec: SourceSpec,
    text: str,
    num_classes: int | None,
    *,
    pretrained: bool,
    weights: Path | None,
    chosen: PreprocessingChoice,
    prefix: str | None,
) -> Source:
    """A network that timm saved. Its spec names the architecture, so that it can be built again without the hub."""
    from . import timm_models

    for name in ("stem", "shortcut"):
        if name in spec.arguments:
            raise UsageError(f"--{name} does not apply to {text}, whose layers are as they were saved")
    folder = spec.library == "local-dir"
    saved = saved_models.read_folder(spec.name) if folder else saved_models.read_hub(spec.name)
    timm_models.check_name(saved.architecture)
    arguments = {**spec.arguments, **({"model_args": saved.arguments} if saved.arguments else {})}
    if num_classes is None and saved.classes is not None:
        arguments["num_classes"] = saved.classes
    built = SourceSpec("timm", saved.architecture, arguments=arguments)
    notes = [f"{text} is a {saved.architecture}"]
    own_head = pretrained and weights is None and num_classes in (None, saved.classes)  # names are of its outputs
    notes += saved.notes if own_head else []
    file = weights or (saved.weights if pretrained else None)
    if pretrained and folder and file is None:
        raise ResodeError(f"{spec.name} holds no weights ({' or '.join(saved_models.WEIGHTS)}); pass --weights FILE")
    from_hub = pretrained and file is None
    net = (
        build(built)
        if not from_hub
        else timm_models.build_from_hub(spec.name, saved.architecture, saved.config, arguments)
    )
    fresh = head_parameters(net)
    if file is not None:
        found, fresh = _load_weights(net, file, num_classes=num_classes, prefix=prefix)
        notes += found
    elif from_hub and num_classes not in (None, saved.classes):
        notes.append(_head_note(saved.classes, num_classes))
    elif from_hub:
        fresh = ()
    if file is None and not from_hub:
        notes.append(RANDOM_NOTE)
    else:
        origin = weights.name if weights is not None else text
        built = replace(built, weights=origin, weights_sha256=state_sha256(net.state_dict()))
    notes += _not_finite(net)
    own = channelled(timm_models.preprocessing_of(saved.config), net, chosen)
    if own.channels not in (len(saved.config.get("mean", ())), 3):
        notes += _channel_note(own, chosen)
    names, several = (saved.names, saved.multi_label) if own_head else (None, False)
    return Source(built, net, chosen.applied_to(own), tuple(notes), fresh, names, several)


def _check_scripts(net: nn.Module, name: str) -> None:
    """Raises ResodeError for TorchScript inside: stages are found by hooks, which it does not have."""
    for path, module in net.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ResodeError(
                f"{name}: {path or 'the network'} is a ScriptModule, whose layers can be neither watched nor replaced;"
                " build it of plain modules"
            )


def _not_finite(net: nn.Module) -> list[str]:
    problem = describe_not_finite(net.state_dict())
    return [f"warning: {problem}"] if problem else []


def channelled(own: Preprocessing, net: nn.Module, given: PreprocessingChoice = AS_IT_IS) -> Preprocessing:
    """The preprocessing for as many channels as the network takes, at the size that the user gave.

    Grey images have the mean of the colours' means; of other channels nothing is known.
    """
    channels = _channels(net, replace(own, size=given.size or own.size))
    if channels == own.channels:
        return own
    if channels == 1:
        return replace(own, mean=(fmean(own.mean),), std=(fmean(own.std),))
    return replace(own, mean=(0.0,) * channels, std=(1.0,) * channels)


def _channels(net: nn.Module, own: Preprocessing) -> int:
    """How many channels the network's input has: as many as its first convolution, unless it takes others.

    That one does not decide where a stem puts pixels into channels, or layers are registered in another order.
    """
    first = next((m for m in net.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d))), None)
    if not isinstance(first, nn.Conv2d) or first.in_channels == own.channels:
        return own.channels
    check_room(1, *own.shape)
    weight = first.weight
    training = {module: module.training for module in net.modules()}
    net.eval()
    try:
        for channels in (own.channels, first.in_channels):
            image = torch.zeros(1, channels, own.height, own.width, dtype=weight.dtype, device=weight.device)
            try:
                with torch.no_grad():
                    net(image)
            except Exception:  # of whatever kind a network raises for an input that is not its own
                continue
            return channels
    finally:
        for module, mode in training.items():
            module.training = mode
    return own.channels


def _head_note(known: int | None, wanted: int | None) -> str:
    return f"the pretrained head has {known} classes: the head starts at random for {wanted}"


def _channel_note(own: Preprocessing, given: PreprocessingChoice) -> list[str]:
    known = given.mean is not None and given.std is not None
    return [] if known else [f"images are taken with {_whose(own)}; --mean and --std say otherwise"]


def _whose(own: Preprocessing) -> str:
    """The mean and the standard deviation of images, where no one says."""
    if own.channels == 3:
        return "ImageNet's mean and std"
    if own.channels == 1:
        return f"one channel, grey, mean {own.mean[0]:.3g} and std {own.std[0]:.3g}"
    return f"{own.channels} channels, mean 0 and std 1"


def source_of(net: nn.Module) -> Source:
    """A network made in Python. Its file can be loaded again beside the same network alone."""
    kind = type(net)
    spec = SourceSpec("module", f"{kind.__module__}.{kind.__qualname__}", weights_sha256=state_sha256(net.state_dict()))
    _check_scripts(net, str(spec))
    return Source(spec, net, channelled(user_file.preprocessing_of(net), net))


def build(spec: SourceSpec, *, pretrained: bool = False) -> nn.Module:
    """The network of a SourceSpec, with random weights unless `pretrained`."""
    library = library_of(spec.library)
    for name in spec.arguments:
        if name not in library.ARGUMENTS:
            raise UsageError(f"--{name} does not apply to {spec}")
    return library.build(spec.name, pretrained=pretrained, **spec.arguments)


def _preprocessing(spec: SourceSpec, net: nn.Module) -> Preprocessing:
    own = library_of(spec.library).preprocessing(spec.name, net)
    return replace(own, size=32, crop_fraction=1.0) if "stem" in spec.arguments else own


@contextmanager
def _clear_download_errors(source: str, instead: str) -> Iterator[None]:
    """Say in one line that a source cannot be fetched, whichever of the many errors says so."""
    try:
        with redirect_stdout(sys.stderr):  # libraries announce downloads there
            yield
    except ResodeError:
        raise
    except Exception as error:
        chain: list[BaseException] = [error]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
            chain.append(cause)
        modules = {type(e).__module__.partition(".")[0] for e in chain}
        network = modules & {"urllib", "requests", "httpx", "httpx2", "httpcore", "huggingface_hub", "socket"}
        if network or any(isinstance(e, OSError) for e in chain):
            raise ResodeError(
                f"the weights of {source} cannot be fetched ({_first_line(error)});"
                f" connect to the network, or {instead}"
            ) from error
        raise


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    line = text.splitlines()[0]
    return line if len(line) <= 120 else line[:117] + "…"
