"""Networks of timm: `timm:NAME` or `timm:NAME.TAG`."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import timm
from timm.data import resolve_data_config
from torch import nn

from ..errors import ResodeError, UsageError, unknown
from ..network.parts import Preprocessing
from . import timm_arguments
from .stems import three_by_three

ARGUMENTS = frozenset({"num_classes", "stem", "model_args"})
WEIGHTS = "fetched"


def check_name(name: str) -> None:
    """Raises UsageError, with the nearest matches, for a name that timm does not have."""
    architecture, _, tag = name.partition(".")
    if not is_known(name):
        raise unknown("timm model", name, names())
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise unknown(f"pretrained tag of {architecture}", tag, tags)


def is_known(name: str) -> bool:
    """Whether timm has an architecture of that name; a tag may follow it."""
    return bool(timm.is_model(name.partition(".")[0]))


def names() -> list[str]:
    """Those of all architectures."""
    return list(timm.list_models())


def build(
    name: str,
    *,
    pretrained: bool = False,
    num_classes: int | None = None,
    stem: str | None = None,
    model_args: dict[str, Any] | None = None,
) -> nn.Module:
    """The network, with the tag's weights where `pretrained`.

    model_args: of the architecture's function, named by a file. Raises ResodeError for those that a file may not set.
    """
    check_name(name)
    named = timm_arguments.check(model_args or {}, name)
    arguments = {**named, **({} if num_classes is None else {"num_classes": num_classes})}
    try:
        with offline_if_unreachable():
            net = timm_arguments.build(name, lambda: timm.create_model(name, pretrained=pretrained, **arguments), named)
    except RuntimeError as error:
        if pretrained and "No pretrained weights exist" in str(error):
            raise ResodeError(f"timm:{name} has no pretrained weights; pass --no-pretrained or --weights") from error
        raise
    if stem == "cifar":
        _use_cifar_stem(net)
    return net


def build_from_hub(repository: str, architecture: str, config: dict[str, Any], arguments: dict[str, Any]) -> nn.Module:
    """A network of the hub with its weights, which come from that repository alone.

    config, arguments: what its config.json says, of which only what shapes layers and images is passed on: timm
        would read other files, from elsewhere, where it names some.
    """
    named = timm_arguments.check(arguments.get("model_args", {}), architecture)
    wanted = {**named, **{name: value for name, value in arguments.items() if name == "num_classes"}}
    origin = {**config, "architecture": architecture, "hf_hub_id": repository, "source": "hf-hub"}

    def create(pretrained: bool = True) -> nn.Module:
        return timm.create_model(architecture, pretrained=pretrained, pretrained_cfg=dict(origin), **wanted)

    with offline_if_unreachable():
        timm_arguments.build(architecture, lambda: create(False), named)
        return create()


@contextmanager
def offline_if_unreachable() -> Iterator[None]:
    """Where the hub's name does not resolve, look in its cache alone: the hub itself retries for a minute."""
    from huggingface_hub import constants

    host = urlsplit(constants.ENDPOINT).hostname
    offline = constants.HF_HUB_OFFLINE
    if host is not None and not getproxies():
        try:
            socket.getaddrinfo(host, 443)
        except OSError:
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline


def pretrained_classes(name: str) -> int:
    """How many classes the pretrained head tells apart."""
    config = timm.get_pretrained_cfg(name)
    return config.num_classes if config else 0


def tag(name: str) -> str | None:
    """The pretrained tag that the name stands for."""
    config = timm.get_pretrained_cfg(name)
    return config.tag if config else None


def preprocessing(name: str, net: nn.Module) -> Preprocessing:
    """What timm says of the name's pretrained weights."""
    config = timm.get_pretrained_cfg(name)
    return preprocessing_of(config.to_dict() if config else {})


def preprocessing_of(config: dict[str, Any]) -> Preprocessing:
    """What timm's pretrained_cfg says of images."""
    data = resolve_data_config(pretrained_cfg=config)
    return Preprocessing(
        size=data["input_size"][-2:],
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        interpolation=data["interpolation"],
        crop_fraction=data["crop_pct"],
        crop_mode=data["crop_mode"],
    )


def _use_cifar_stem(net: nn.Module) -> None:
    """A 3×3 convolution of stride 1 and no pooling, for small images. Its weights start at random."""
    if isinstance(net, timm.models.resnet.ResNet):
        net.conv1 = three_by_three(net.conv1)
        net.maxpool = nn.Identity()
    elif isinstance(net, timm.models.resnetv2.ResNetV2):
        first = net.stem[0] if isinstance(net.stem, nn.Sequential) else net.stem
        kept = [m for m in net.stem.modules() if isinstance(m, nn.Conv2d)]
        net.stem = nn.Sequential()
        net.stem.add_module("conv", three_by_three(nn.Sequential(first, *kept[1:])))
    else:
        raise UsageError(f"--stem cifar is for timm's ResNet and ResNetV2, not {type(net).__name__}")
