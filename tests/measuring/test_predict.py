"""Predictions are the model's own softmax on the images as its preprocessing has them, whatever surrounds it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as F

import resode_cli
from resode_cli.errors import ResodeError, ResodeWarning, UsageError

NAMES = ("cat", "dog", "owl", "newt", "wasp")
FEW = 1e-6  # rounding of float32 logits


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    """Nine pictures of noise, of several sizes."""
    draw = np.random.default_rng(0)
    for i in range(9):
        pixels = draw.integers(0, 256, (20 + 3 * i, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    return [str(tmp_path / f"{i}.png") for i in range(9)]


def picture(path: str | Path) -> Image.Image:
    with Image.open(path) as file:
        file.load()
        return file


def by_hand(path: str) -> Tensor:
    """One picture as a batch of the tiny network's input, by torchvision's functions one by one."""
    image = F.center_crop(F.resize(picture(path), [16]), [16, 16])
    return F.normalize(F.to_tensor(image), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])[None]


def test_probabilities_are_the_softmax_of_the_logits(tiny, paths: list[str]) -> None:
    tiny.name_classes(NAMES)
    found = resode_cli.predict(tiny, paths, top=5, batch_size=4)
    assert [p.path for p in found] == paths
    tiny.eval()
    for prediction in found:
        with torch.no_grad():
            expected = torch.exp(torch.log_softmax(tiny(by_hand(prediction.path))[0].double(), 0))
        own = {name: value.item() for name, value in zip(NAMES, expected, strict=True)}
        assert prediction.probabilities == pytest.approx(sorted(own.values(), reverse=True), abs=FEW)
        assert [own[name] for name in prediction.classes] == pytest.approx(prediction.probabilities, abs=FEW)
        assert sum(prediction.probabilities) == pytest.approx(1)
        assert prediction.error is None


def test_fewer_classes_are_the_first_of_all(tiny, paths: list[str]) -> None:
    every, few = (resode_cli.predict(tiny, paths, top=top) for top in (5, 2))
    for one, other in zip(every, few, strict=True):
        assert (one.classes[:2], one.probabilities[:2]) == (other.classes, other.probabilities)
        assert sum(other.probabilities) <= 1 and other.probabilities[0] >= other.probabilities[1]
        assert set(one.classes) == {"0", "1", "2", "3", "4"}


@pytest.mark.parametrize("workers", [0, 2])
def test_neither_batches_nor_workers_change_anything(workers: int, tiny, paths: list[str]) -> None:
    """BatchNorm of the batch would: the model is in train mode when it is handed over."""
    tiny.train()
    apart = resode_cli.predict(tiny, paths, top=5, batch_size=1)
    together = resode_cli.predict(tiny, paths, top=5, batch_size=7, workers=workers)
    for one, other in zip(apart, together, strict=True):
        assert (one.path, one.classes) == (other.path, other.classes)
        assert one.probabilities == pytest.approx(other.probabilities, abs=FEW)


def test_every_module_gets_its_own_mode_back(tiny, paths: list[str]) -> None:
    tiny.train()
    resode_cli.freeze_batch_norm(tiny)
    modes = {module: module.training for module in tiny.modules()}
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    resode_cli.predict(tiny, paths)
    assert {module: module.training for module in tiny.modules()} == modes and len(set(modes.values())) == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.state_dict().items())


def test_a_network_of_float64(tiny, paths: list[str]) -> None:
    single = resode_cli.predict(tiny, paths[0], top=5)[0]
    double = resode_cli.predict(tiny.double(), paths[0], top=5)[0]
    assert double.classes == single.classes
    assert double.probabilities == pytest.approx(single.probabilities, abs=1e-5)


def test_files_pictures_and_tensors_give_the_same(tiny, paths: list[str]) -> None:
    files = resode_cli.predict(tiny, paths[:3], top=5)
    pictures = resode_cli.predict(tiny, [picture(path) for path in paths[:3]], top=5)
    tensors = resode_cli.predict(tiny, torch.cat([by_hand(path) for path in paths[:3]]), top=5, batch_size=2)
    for file, own, tensor in zip(files, pictures, tensors, strict=True):
        assert (own.path, tensor.path) == (None, None)
        assert file.classes == own.classes == tensor.classes
        assert file.probabilities == pytest.approx(own.probabilities, abs=FEW)
        assert file.probabilities == pytest.approx(tensor.probabilities, abs=FEW)


def test_an_orientation_is_heeded_in_files_and_pictures(tiny, tmp_path: Path, paths: list[str]) -> None:
    exif = Image.Exif()
    exif[274] = 6
    picture(paths[0]).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    turned = picture(tmp_path / "turned.png")
    (upright,) = resode_cli.predict(tiny, paths[0], top=5)
    (file,), (own,) = (resode_cli.predict(tiny, x, top=5) for x in (tmp_path / "turned.png", turned))
    assert upright.probabilities == file.probabilities == own.probabilities
    assert turned.getexif()[274] == 6, "the user's picture was changed"


def test_an_image_that_cannot_be_read_keeps_its_place(tiny, paths: list[str]) -> None:
    Path(paths[1]).write_bytes(b"text")
    Path(paths[2]).unlink()
    Path(paths[2]).symlink_to("nowhere.png")
    found = resode_cli.predict(tiny, paths, batch_size=2, workers=1)
    assert [p.path for p in found] == paths
    assert [i for i, p in enumerate(found) if p.error] == [1, 2]
    assert found[1].error == "its content is in no image format that can be read here"
    assert found[2].error == "No such file or directory" and found[2].classes == ()


def test_a_picture_from_memory_that_cannot_be_read_keeps_its_place(tiny, paths: list[str]) -> None:
    Path(paths[1]).write_bytes(Path(paths[1]).read_bytes()[:300])  # its header is whole
    with Image.open(paths[0]) as good, Image.open(paths[1]) as broken:
        found = resode_cli.predict(tiny, [broken, good, good])
    assert [p.error is None for p in found] == [False, True, True] and "truncated" in str(found[0].error)
    assert found[1] == found[2]


def test_what_a_folder_leaves_out_is_a_warning(tiny, tmp_path: Path, paths: list[str]) -> None:
    with pytest.warns(ResodeWarning, match=r"left out of .*: 1 \.py"):  # the network's own file
        assert [p.path for p in resode_cli.predict(tiny, tmp_path)] == paths


def test_what_cannot_be_meant_is_refused(tiny, paths: list[str]) -> None:
    with pytest.raises(UsageError, match="--top 6: the model tells 5 classes apart"):
        resode_cli.predict(tiny, paths, top=6)
    with pytest.raises(UsageError, match="--top 0"):
        resode_cli.predict(tiny, paths, top=0)
    with pytest.raises(UsageError, match="not some of each"):
        resode_cli.predict(tiny, [paths[0], Image.new("RGB", (16, 16))])
    with pytest.raises(UsageError, match=r"images are \(B, C, H, W\)"):
        resode_cli.predict(tiny, torch.zeros(3, 16, 16))
    with pytest.raises(ResodeError, match="there is no image to read"):
        resode_cli.predict(tiny, [])
    tiny.name_classes(NAMES[:3])
    with pytest.raises(ResodeError, match="tells 5 classes apart, and 3 have names"):
        resode_cli.predict(tiny, paths)


def test_logits_that_are_no_numbers_are_an_error(tiny, paths: list[str]) -> None:
    with torch.no_grad():
        next(tiny.parameters()).fill_(torch.nan)
    with pytest.raises(ResodeError, match="0.png: the model's logits are no numbers"):
        resode_cli.predict(tiny, paths)
