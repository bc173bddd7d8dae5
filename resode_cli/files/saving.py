"""Will a model file load again? Loading builds the source's network anew, so what was changed in it since must fit."""

from __future__ import annotations

from dataclasses import replace

from torch import Size

from ..errors import ResodeError, first_few
from ..network.model import ModelInfo, OdeResNet, shapes_of
from ..network.parts import SourceSpec
from ..sources import registry as sources

_ANEW = (
    "; `save(model, path, source='FILE.py:FUNCTION')` records a function that builds the network as it is now, and"
    " `load(path, source=…)` takes it"
)


def info_to_save(model: OdeResNet, source: str | None) -> ModelInfo:
    """What to write of the model, so that loading builds the network that it is now.

    A head for another number of classes, which the source's builder knows to make, is recorded. source:
    FILE.py:FUNCTION that builds the network as it is now; it is called, and its network compared.

    Raises ResodeError, naming what does not fit, for any other change.
    """
    info = model.info
    if source is not None:
        library, name = sources.parse_source(source)
        spec = SourceSpec(library, name, weights_sha256=info.source.weights_sha256)
        changed = _changed(model, shapes_of(sources.build(spec)))
        if changed:
            raise ResodeError(f"{source} does not build the network that is to be saved: {first_few(changed)}")
        return replace(info, source=spec)
    changed = _changed(model, model.built)
    if not changed or not model.built:
        return info
    with_head = _with_head_of_now(model, changed)
    if with_head is None:
        raise ResodeError(
            f"the network is no longer the one that {info.source} builds: {first_few(changed)}; a file of it would not"
            f" load{_ANEW}"
        )
    return with_head


def _with_head_of_now(model: OdeResNet, changed: list[str]) -> ModelInfo | None:
    """The info with the classes of a new head, if that is all that has changed; else None."""
    info = model.info
    if not info.source.is_packaged:
        return None  # a file of the user's own is not run unasked
    tensors = model.net.state_dict()
    counts = {tensors[name].shape[0] for name in (line.split(" ")[0] for line in changed) if name in tensors}
    if len(counts) != 1:
        return None
    (classes,) = counts
    spec = replace(info.source, arguments={**info.source.arguments, "num_classes": classes})
    if _changed(model, shapes_of(sources.build(spec))):
        return None
    names = info.class_names if info.class_names and len(info.class_names) == classes else None
    return replace(info, source=spec, num_classes=classes, class_names=names)


def _changed(model: OdeResNet, built: dict[str, Size]) -> list[str]:
    """Tensors that are not where the builder's network has them, or not of that shape."""
    expected: dict[str, Size] = {}
    found: dict[str, Size] = {}
    inside: set[str] = set()
    for stage in model.stages.values():
        container = f"{stage.spec.container}.".lstrip(".")
        inside.update(f"{container}{name}." for name in stage.spec.source_blocks)
        for spec, block in zip(stage.spec.blocks, stage.blocks, strict=True):
            origin = f"{container}{spec.origin}."
            label = f"{container}{spec.name}."
            expected |= {label + k[len(origin) :]: shape for k, shape in built.items() if k.startswith(origin)}
            found |= {label + name: shape for name, shape in shapes_of(block).items()}
    own = tuple(f"{model.paths[name]}." for name in model.stages)
    blocks = {
        f"{path}{spec.name}."
        for path, stage in zip(own, model.stages.values(), strict=True)
        for spec in stage.spec.blocks
    }
    expected |= {name: shape for name, shape in built.items() if not name.startswith(tuple(inside))}
    found |= {
        model.file_name(name): shape
        for name, shape in shapes_of(model.net).items()
        if not name.startswith(tuple(blocks))
    }
    return [
        f"{name} {_shape(found.get(name))} instead of {_shape(expected.get(name))}"
        for name in {**found, **expected}
        if found.get(name) != expected.get(name)
    ]


def _shape(shape: Size | None) -> str:
    return "nothing" if shape is None else str(tuple(shape))
