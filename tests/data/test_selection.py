"""Which files the names of a command line mean: files, folders and patterns, each file once, in order."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from resode_cli.data.selection import select_images
from resode_cli.errors import ResodeError, UsageError


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("b.png", "a.jpg", "sub/c.png", "sub/deep/d.png", ".trash/e.png", ".f.png"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    return tmp_path / "photos"


ALL = ("photos/a.jpg", "photos/b.png", "photos/sub/c.png", "photos/sub/deep/d.png")


def test_a_folder_is_walked_and_what_was_left_out_is_counted(photos: Path) -> None:
    found = select_images([Path("photos")])
    assert found.paths == ALL
    assert found.notes == ("left out of photos: 1 .txt, 1 hidden images, hidden folders (.trash)",)


@pytest.mark.parametrize(
    ("pattern", "paths", "notes"),
    [
        ("photos/*.png", ALL[1:2], ()),
        ("photos/**/*.png", ALL[1:], ()),
        ("photos/sub/**", ALL[2:], ()),
        ("photos/[ab].*", ALL[:2], ()),
        ("photos/*", ALL, ("left out of photos/*: 1 .txt",)),
        ("photos/.*", ("photos/.trash/e.png",), ("left out of photos/.*: 1 .png",)),
        ("phot*", ALL, ("left out of phot*: photos: 1 .txt, 1 hidden images, hidden folders (.trash)",)),
    ],
)
def test_patterns_take_images_and_walk_folders(pattern: str, paths: tuple, notes: tuple, photos: Path) -> None:
    found = select_images([pattern])
    assert (found.paths, found.notes) == (paths, notes)


def test_names_keep_their_order_and_a_file_is_read_once(photos: Path) -> None:
    found = select_images(["photos/b.png", str(photos / "b.png"), "./photos/a.jpg", "photos/*.jpg"])
    assert found.paths == ("photos/b.png", "./photos/a.jpg")
    assert found.notes == (f"named more than once, and read once: {photos / 'b.png'}, photos/a.jpg",)


def test_a_file_whose_name_looks_like_a_pattern_is_a_file(photos: Path) -> None:
    (photos / "a.jpg").rename(photos / "[1].jpg")
    assert select_images(["photos/[1].jpg"]).paths == ("photos/[1].jpg",)


def test_what_is_named_is_taken_whatever_it_is_called(photos: Path) -> None:
    os.symlink("nowhere", "broken.png")
    assert select_images(["photos/notes.txt", "photos/.f.png", "broken.png"]).paths == (
        "photos/notes.txt",
        "photos/.f.png",
        "broken.png",
    )


def test_an_empty_folder_is_said(photos: Path) -> None:
    Path("empty").mkdir()
    assert select_images(["empty", "photos/b.png"]).notes == ("empty holds no images",)
    with pytest.raises(ResodeError, match="there is no image to read: empty holds no images"):
        select_images(["empty"])
    (Path("empty") / "read.me").write_text("")
    with pytest.raises(ResodeError, match=r"there is no image to read: left out of empty: 1 \.me"):
        select_images(["empty"])


@pytest.mark.parametrize(("name", "says"), [("none.png", "no such image or folder"), ("*.gif", "nothing fits")])
def test_a_name_that_nothing_has_is_refused(name: str, says: str, photos: Path) -> None:
    with pytest.raises(UsageError, match=says):
        select_images(["photos", name])
