"""A source library is a module of a small Protocol: whoever adds one touches that module and one table."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torchvision
from torch import nn

from resode_cli import load
from resode_cli.app import main
from resode_cli.errors import UsageError
from resode_cli.network.parts import Preprocessing
from resode_cli.sources.cifar import CifarResNet
from resode_cli.sources.libraries import MODULES, library_of
from resode_cli.sources.registry import open_source
from resode_cli.surgery.convert import convert


@pytest.mark.parametrize("name", MODULES)
def test_every_library_offers_what_the_protocol_asks(name: str) -> None:
    library = library_of(name)
    assert library.WEIGHTS in ("fetched", "none", "own") and "num_classes" in library.ARGUMENTS
    needed = ["build", "preprocessing", *(["tag", "pretrained_classes"] if library.WEIGHTS == "fetched" else [])]
    assert all(callable(getattr(library, function, None)) for function in needed)


def test_a_library_is_a_module_and_an_entry(tmp_path: Path, monkeypatch, capsys) -> None:
    """From the command line to a file and back, with a flag of its own refused where it takes none."""
    toys = ModuleType("resode_cli.sources.toys")

    def build(name: str, *, pretrained: bool = False, num_classes: int = 10) -> nn.Module:
        if name != "small":
            raise UsageError(f"no toy is called {name}")
        return CifarResNet(1, widths=(2, 4, 4), num_classes=num_classes)

    toys.__dict__.update(
        ARGUMENTS=frozenset({"num_classes"}),
        WEIGHTS="none",
        build=build,
        preprocessing=lambda name, net: Preprocessing(size=8, crop_fraction=1.0),
    )
    monkeypatch.setitem(sys.modules, "resode_cli.sources.toys", toys)
    monkeypatch.setitem(MODULES, "toys", "toys")
    monkeypatch.setattr("resode_cli.sources.registry.LIBRARIES", (*MODULES, "hf-hub", "local-dir"))
    out = tmp_path / "toy.safetensors"
    assert main(["convert", "toys:small", "--no-pretrained", "--num-classes", "7", "-o", str(out)]) == 0
    loaded = load(out)
    assert (loaded.info.num_classes, loaded.info.preprocessing.size) == (7, 8)
    assert main(["convert", "toys:small", "-o", str(out), "--force"]) == 2
    assert "toys:small has no weights to fetch" in capsys.readouterr().err
    assert main(["convert", "toys:small", "--no-pretrained", "--stem", "cifar", "-o", str(out), "--force"]) == 2
    assert "--stem does not apply to toys:small" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["timm:resnet18", "timm:resnet18d", "timm:resnetv2_18", "timm:resnetv2_18d", "torchvision:resnet18"]
)
def test_a_stem_for_small_images_keeps_their_size_and_all_else(name: str) -> None:
    """A 3×3 convolution of stride 1 and no pooling: the first stage sees every pixel."""
    plain = open_source(name, pretrained=False, num_classes=10)
    source = open_source(name, pretrained=False, num_classes=10, stem="cifar")
    assert source.preprocessing.size == 32 and source.preprocessing.crop_fraction == 1.0
    first = next(module for module in source.net.modules() if isinstance(module, nn.Conv2d))
    assert first.kernel_size == (3, 3) and first.stride == (1, 1) and first.in_channels == 3
    model, verification = convert(source)
    assert verification.max_difference == 0
    shapes = []
    stage = next(iter(model.stages.values()))
    stage.register_forward_hook(lambda module, given, out: shapes.append(out.shape[-2:]))
    with torch.no_grad():
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert shapes == [(32, 32)]
    blocks = {key for key in plain.net.state_dict() if "layer" in key or "stages" in key}
    assert blocks and blocks <= source.net.state_dict().keys()


@pytest.mark.parametrize("name", ["timm:regnety_002", "torchvision:regnet_y_400mf"])
def test_a_stem_for_small_images_is_refused_where_it_is_not_known(name: str) -> None:
    with pytest.raises(UsageError, match="--stem cifar is for"):
        open_source(name, pretrained=False, stem="cifar")


def test_torchvisions_weights_keep_their_layers_under_another_head(monkeypatch) -> None:
    """The download is replaced: the weights are those of a network made here."""
    torch.manual_seed(0)
    weights = torchvision.models.resnet18().state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *given, **more: dict(weights))
    source = open_source("torchvision:resnet18.IMAGENET1K_V1", num_classes=7)
    assert source.spec.tag == "IMAGENET1K_V1" and source.spec.weights_sha256
    assert "the pretrained head has 1000 classes: the head starts at random for 7" in source.notes
    loaded = source.net.state_dict()
    assert loaded["fc.weight"].shape == (7, 512)
    assert all(torch.equal(loaded[key], value) for key, value in weights.items() if not key.startswith("fc."))
    with pytest.raises(UsageError, match="unknown pretrained tag of resnet18 'NONE'"):
        open_source("torchvision:resnet18.NONE")
