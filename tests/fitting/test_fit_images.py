"""Which images a fit takes, and which it holds out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest

from resode_cli.data import open_data
from resode_cli.errors import ResodeError, UsageError
from resode_cli.fitting.images import FitData, held_out
from resode_cli.network.model import OdeResNet


def test_held_out_images_are_an_eighth_and_never_many():
    assert held_out(1) == [0] and held_out(16) == [0, 8] and len(held_out(80)) == 10
    many = held_out(50_000)
    assert len(many) == 256 and many[1] - many[0] == 50_000 // 256 and len(set(many)) == 256


def test_hardly_any_images_are_refused(pictures: FitData):
    few = copy.copy(pictures.plain)
    few.indices = few.indices[:2]
    with pytest.raises(UsageError, match="has 2 images for the fit; 3 are the fewest"):
        FitData(few, few)


def test_a_folder_without_images_is_refused(tmp_path: Path, tiny: OdeResNet):
    with pytest.raises(ResodeError, match="holds no images"):
        open_data(str(tmp_path), tiny.info.preprocessing, "train", labelled=False)


@pytest.mark.parametrize("nested", ["", "deep/er", "train", "train/one"])
def test_unlabelled_images_may_lie_anywhere(tmp_path: Path, tiny: OdeResNet, nested: str, make_folder: Callable):
    picture = next(make_folder().rglob("*.png"))
    folder = tmp_path / "loose" / nested
    folder.mkdir(parents=True)
    for i in range(3):
        (folder / f"{i}.png").write_bytes(picture.read_bytes())
    data = open_data(str(tmp_path / "loose"), tiny.info.preprocessing, "train", labelled=False)
    assert len(data) == 3 and data[0][0].shape == (3, 16, 16)
