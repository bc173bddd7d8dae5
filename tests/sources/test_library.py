"""A source library is a module of a small Protocol: whoever adds one touches that module and one table."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
from torch import nn

from resode_cli import load
from resode_cli.app import main
from resode_cli.errors import UsageError
from resode_cli.network.parts import Preprocessing
from resode_cli.sources.cifar import CifarResNet
from resode_cli.sources.library import MODULES, library_of


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
