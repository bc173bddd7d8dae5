"""Shards of WebDataset: which ones a name means, their classes and splits, random reads, and what hostile ones hold."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from resode_cli.data import batches, held_out_splits, labelled_splits, open_data
from resode_cli.errors import ResodeError, UsageError
from resode_cli.files import model_file
from resode_cli.network.model import OdeResNet
from resode_cli.network.parts import Preprocessing
from resode_cli.training.resuming import data_fingerprint

PLAIN = Preprocessing(size=8, crop_fraction=1.0)
Member = tuple[str, bytes]


def png(shade: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(content, "PNG")
    return content.getvalue()


def write(path: str | Path, members: list[Member | tarfile.TarInfo]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            archive.addfile(info, io.BytesIO(member[1]))


def pairs(first: int, count: int, *, classes: int = 2, text: str = "{}") -> list[Member]:
    """Images whose red is 20 times their number, and their classes."""
    found = []
    for i in range(first, first + count):
        found += [(f"{i:04d}.PNG", png(20 * i)), (f"{i:04d}.cls", f"{text.format(i % classes)}\n".encode())]
    return found


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two shards of training images, 0 to 4 and 5 to 8, and one of validation images, 9 to 11."""
    monkeypatch.chdir(tmp_path)
    for name, first, count in (("train-000", 0, 5), ("train-001", 5, 4), ("val-000", 9, 3)):
        write(f"wds/{name}.tar", pairs(first, count))
    return Path("wds")


def seen(name: str | Path, split: str = "train", **arguments) -> dict[int, str]:
    """Number of each image, by its red, to its class."""
    data = open_data(str(name), PLAIN, split, **arguments)
    return {round(data.picture(i).getpixel((0, 0))[0] / 20): data.class_names[data[i][1]] for i in range(len(data))}


@pytest.mark.parametrize(
    "name, images",
    [
        ("wds", range(9)),
        ("wds:wds", range(9)),
        ("wds:wds/train-{000..001}.tar", range(9)),
        ("wds:wds/{train-001,val-000}.tar", range(5, 9)),
        ("wds:wds/train-*.tar", range(9)),
        ("wds/train-001.tar", range(5, 9)),
    ],
)
def test_names_mean_shards_in_order(name: str, images: range, shards: Path):
    assert seen(name) == {i: str(i % 2) for i in images} and list(seen(name)) == list(images)


def test_splits_are_the_shards_names_or_a_share_is_held_out(shards: Path):
    assert set(seen(shards, "val")) == {9, 10, 11} == set(seen(shards, "test"))
    assert labelled_splits("wds") == ("train", "val") and held_out_splits("wds") == ("test",)
    with pytest.raises(UsageError, match="--val-split 0.2: wds has a val split of its own"):
        open_data("wds", PLAIN, "train", val_split=0.2)
    only = "wds:wds/train-*.tar"
    assert set(seen(only, "train", val_split=0.3)) | set(seen(only, "val", val_split=0.3)) == set(range(9))
    with pytest.raises(ResodeError, match="no shards of the val split, only train; --val-split 0.2"):
        open_data(only, PLAIN, "val")
    for path in shards.iterdir():
        path.rename(path.with_name(path.name.replace("train", "part").replace("val", "rest")))
    train, val = seen("wds"), seen("wds", "val")
    assert len(val) == 4 and not set(train) & set(val) and len(train | val) == 12  # ⌈6/5⌉ of each class
    assert set(seen("wds", "train", labelled=False)) == set(train)
    (shards / "rest-000.tar").rename(shards / "val-000.tar")
    with pytest.raises(ResodeError, match="named after a split .*, not: part-000.tar, part-001.tar"):
        open_data("wds", PLAIN, "train")


def test_shards_in_folders_of_splits(tmp_path: Path, shards: Path):
    write(tmp_path / "nested/train/0.tar", pairs(0, 4))
    write(tmp_path / "nested/test/0.tar", pairs(4, 2))
    (tmp_path / "nested/classes.txt").write_text("cat\ndog\nowl\n")
    assert seen(tmp_path / "nested", "test") == {4: "cat", 5: "dog"}
    assert open_data(str(tmp_path / "nested"), PLAIN, "train").class_names == ("cat", "dog", "owl")


def test_a_folder_of_classes_with_an_archive_beside_them_stays_one(make_folder: Callable[..., Path]):
    folder = make_folder()
    write(folder / "all.tar", pairs(0, 2))
    write(folder / "train" / "more.tar", pairs(0, 2))
    assert open_data(str(folder), PLAIN, "train").class_names == ("cat", "dog", "owl")


@pytest.mark.parametrize(
    "text, file, content, names",
    [
        ("{}", "classes.txt", "cat\ndog\nowl\n", ["cat", "dog", "owl"]),
        ("{}", "classes.json", '["cat", "dog"]', ["cat", "dog"]),
        ("{}", "classes.json", '{"0": "cat", "1": "dog"}', ["cat", "dog"]),
        ("n0{}", "classes.json", '{"n00": "cat", "n01": "dog"}', ["cat", "dog"]),
        ("n0{}", "classes.txt", "n01\nn00\n", ["n01", "n00"]),
        ("n0{}", None, "", ["n00", "n01"]),
        ("{}", None, "", ["0", "1"]),
    ],
)
def test_classes_are_called_as_a_file_beside_the_shards_says(
    text: str, file: str | None, content: str, names: list[str], tmp_path: Path
):
    write(tmp_path / "a.tar", pairs(0, 10, text=text))
    if file is not None:
        (tmp_path / file).write_text(content)
    data = open_data(str(tmp_path), PLAIN, "train")
    assert list(data.class_names) == names
    called = {text.format(0): names[0], text.format(1): names[1]}
    if file == "classes.txt" and text == "n0{}":
        called = {"n00": "n00", "n01": "n01"}
    assert set(seen(tmp_path).items()) <= {(i, called[text.format(i % 2)]) for i in range(10)}


def test_too_few_names_are_refused(tmp_path: Path):
    write(tmp_path / "a.tar", pairs(0, 4, classes=3))
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(ResodeError, match="names 2 classes, and an image is of class 2"):
        open_data(str(tmp_path), PLAIN, "train")
    (tmp_path / "classes.txt").write_text("")
    with pytest.raises(UsageError, match=r"^\S*classes.txt: it is empty"):
        open_data(str(tmp_path), PLAIN, "train")


def test_any_order_is_read_by_any_number_of_workers(shards: Path):
    data = open_data("wds", PLAIN, "train", augment=True)
    order = [8, 0, 5, 3, 1, 7]
    here, there = (
        [batch.images for batch in batches(pickle.loads(pickle.dumps(data)), 2, order=order, workers=workers)]
        for workers in (0, 2)
    )
    assert all(torch.equal(one, other) for one, other in zip(here, there, strict=True))


def test_a_run_knows_its_shards_again_by_their_content(shards: Path):
    before = data_fingerprint(open_data("wds", PLAIN, "train"))
    assert before == data_fingerprint(open_data("wds", PLAIN, "train"))
    write("wds/train-001.tar", [(n, png(7) if n == "0005.PNG" else c) for n, c in pairs(5, 4)])
    after = data_fingerprint(open_data("wds", PLAIN, "train"))
    assert after["contents"] != before["contents"] and after["images"] == before["images"]


def test_a_command_measures_on_shards(pico: OdeResNet, shards: Path, answer: Callable[..., tuple[dict, str]]):
    (shards / "classes.json").write_text("[" + ",".join(f'"{k}"' for k in range(10)) + "]")
    model_file.save(pico, "m.safetensors")
    found, said = answer("eval", "m.safetensors", "--data", "wds", "--split", "all")
    assert {split: own["images"] for split, own in found["splits"].items()} == {"train": 9, "val": 3}
    training = ("--adjoint", "backprop", "--batch-size", 4, "--max-steps", 1)
    answer(
        "finetune", "m.safetensors", "--data", "wds:wds/train-{000..001}.tar", "--val-split", 0.3, "-o", "r", *training
    )
    found, said = answer("finetune", "--resume", "r", "--max-steps", 2)
    assert found["steps"] == 2 and "resuming at step 1" in said


@pytest.mark.parametrize(
    "name, message",
    [
        ("wds:none-{0..2}.tar", "there is no shard none-0.tar, none-1.tar, none-2.tar"),
        ("wds:none*.tar", "there is no .tar file"),
        ("wds:", "write wds:FOLDER, or 'wds:a-{000..009}.tar'"),
        ("wds:a-{0..999999999}.tar", "more than 100000 shards"),
        ("wds:{0..9}{0..9}{0..9}{0..9}{0..9}{0..9}", "more than 100000 shards"),
    ],
)
def test_names_of_no_shards_are_refused(name: str, message: str, shards: Path):
    with pytest.raises(UsageError, match=message):
        open_data(name, PLAIN, "train")


def link(name: str, to: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    return info


def test_nothing_of_a_hostile_archive_is_written_or_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    (tmp_path / "secret.png").write_bytes(png(200))
    hostile: list[Member | tarfile.TarInfo] = [
        ("../../up.png", png(20)),
        ("../../up.cls", b"0"),
        ("/etc/passwd.png", png(40)),
        ("/etc/passwd.cls", b"1"),
        link("linked.png", "../secret.png"),
        ("linked.cls", b"1"),
        link("hard.png", "../secret.png", tarfile.LNKTYPE),
        link("device.png", "", tarfile.CHRTYPE),
        link("pipe.png", "", tarfile.FIFOTYPE),
        ("note.html", b"<script>"),
    ]
    write("a.tar", hostile)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    data = open_data("a.tar", PLAIN, "train", val_split=0.5)
    whole = {**seen("a.tar", "train", val_split=0.5)}
    assert whole == {1: "0", 2: "1"}  # each alone of its class, so that nothing is held out
    assert any("4 links or devices" in note and "1 .html" in note for note in data.notes)
    assert [size for _, size in data.files()] == [len(png(20)), len(png(40))]
    assert data.first_bytes(1, 4) == b"\x89PNG"
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def _damaged(kind: str) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, data in pairs(0, 4):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    whole = bytearray(content.getvalue())
    if kind == "cut":
        return bytes(whole[:1300])
    if kind == "none":
        return b"no archive at all" * 100
    size = b"77777777777\0" if kind == "huge" else b"\xff" * 11 + b"\x00"  # the second is −256
    whole[124:136] = size
    whole[148:156] = b" " * 8
    whole[148:156] = f"{sum(whole[:512]):06o}\0 ".encode()
    return bytes(whole)


@pytest.mark.parametrize("kind", ["cut", "none", "huge", "negative"])
def test_a_damaged_archive_is_one_line(kind: str, tmp_path: Path):
    (tmp_path / "a.tar").write_bytes(_damaged(kind))
    with pytest.raises(ResodeError, match="a.tar is no whole .tar file") as error:
        open_data(str(tmp_path), PLAIN, "train")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "members, message",
    [
        ([("a.png", png(1))], "1 of 1 images have no class, a member KEY.cls beside them"),
        ([("a.png", png(1)), ("a.cls", b"\xff\xfe")], "a.cls is no number and no name of a class"),
        ([("a.png", png(1)), ("a.cls", b"9" * 5000)], "a.cls is no number and no name of a class"),
        ([("a.png", png(1)), ("a.cls", b"99999999")], "a class has the number 99999999"),
        ([("a.png", png(1)), ("a.jpg", png(1)), ("a.cls", b"1")], "there are two images of the key a"),
        ([("a.txt", b"x")], "its shards hold no images, only 1 .txt; images are called as in KEY.jpg"),
        ([("a.seg.png", png(1))], "no images, only 1 .seg.png; images are called as in KEY.jpg, and a key ends at its"),
        ([], "its shards hold no images$"),
        ([("a.png", png(1)), ("a.json", b"{}")], "what is there is not read: 1 .json"),
    ],
)
def test_what_is_no_image_with_a_class_is_refused(members: list[Member], message: str, tmp_path: Path):
    write(tmp_path / "a.tar", members)
    with pytest.raises(ResodeError, match=message):
        open_data(str(tmp_path), PLAIN, "train")


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_a_compressed_archive_is_named_as_one(compress: Callable[[bytes], bytes], tmp_path: Path):
    write(tmp_path / "a.tar", pairs(0, 4))
    (tmp_path / "a.tar").write_bytes(compress((tmp_path / "a.tar").read_bytes()))
    with pytest.raises(ResodeError, match="a.tar is no whole .tar file: it is compressed, as shards are not"):
        open_data(str(tmp_path), PLAIN, "train")


def test_the_case_of_a_shards_ending_says_nothing(shards: Path):
    (shards / "train-001.tar").rename(shards / "train-001.TAR")
    assert len(open_data(str(shards), PLAIN, "train")) == 9


def test_an_image_that_cannot_be_read_is_named_by_its_shard(tmp_path: Path):
    write(tmp_path / "a.tar", [*pairs(0, 4), ("bad.png", b"no picture"), ("bad.cls", b"0")])
    data = open_data(str(tmp_path), PLAIN, "train", val_split=0.01)
    with pytest.raises(ResodeError, match=r"a\.tar/bad\.png: not a readable image"):
        list(batches(data, 8))
    data = open_data(str(tmp_path), PLAIN, "train", val_split=0.01, skip_corrupt=True)
    assert sum(len(batch.labels) for batch in batches(data, 8)) == len(data) - 1
    assert [os.path.basename(name) for name in data.skipped] == ["bad.png"]
