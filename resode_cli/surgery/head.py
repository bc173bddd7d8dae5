"""Another head: what follows the last stage of a network made anew, for other classes."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from ..errors import ResodeError, UsageError, first_few
from ..network.model import OdeResNet, shapes_of, with_submodule
from ..sources import registry as sources
from ..sources.libraries import library_of


def replace_head(model: OdeResNet, classes: int) -> list[str]:
    """Put the head that the source's builder makes for so many classes, random as it is, in the place of the model's.

    It is those layers whose tensors have other shapes for another number of classes. The model's classes have no names
    afterwards. Returns the paths of the layers.

    Raises UsageError for a network whose builder takes no number of classes, or that was made in Python.
    """
    info = model.info
    if info.source.library == "module" or "num_classes" not in library_of(info.source.library).ARGUMENTS:
        raise UsageError(
            f"{info.source} cannot be built for {classes} classes; give it a head for them and convert it again"
        )

    def built(count: int) -> nn.Module:
        arguments = {**info.source.arguments, "num_classes": count}
        try:
            return sources.build(replace(info.source, arguments=arguments))
        except UsageError as error:
            raise UsageError(
                f"the head of {info.source} cannot be replaced by one for {classes} classes: {error}"
            ) from error

    new, other = built(classes), shapes_of(built(classes + 1))
    names = [name for name, shape in shapes_of(new).items() if other.get(name) != shape]
    paths = sorted({name.rpartition(".")[0] for name in names})
    present = dict(model.net.named_modules())
    if not paths or not all(path in present for path in paths):
        raise ResodeError(f"the head of {info.source} cannot be told from its other layers ({first_few(names)})")
    like = next(model.parameters())
    for path in paths:
        layer = new.get_submodule(path).to(like.device, like.dtype).train(present[path].training)
        model.net = with_submodule(model.net, path, layer)
        _say_classes(model.net, path, classes)
    spec = replace(info.source, arguments={**info.source.arguments, "num_classes": classes})
    model.info = replace(info, source=spec, num_classes=classes, class_names=None, multi_label=False)
    model.built = shapes_of(new)
    return paths


def _say_classes(net: nn.Module, path: str, classes: int) -> None:
    """Tell the modules around a layer, which may keep the number of classes for their own use."""
    parts = path.split(".")
    for depth in range(len(parts)):
        parent = net.get_submodule(".".join(parts[:depth]))
        if isinstance(getattr(parent, "num_classes", None), int):
            setattr(parent, "num_classes", classes)  # noqa: B010  torch declares every attribute a tensor
