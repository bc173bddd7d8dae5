"""From image files as people have them to pixels; what is no image is named, and skipped on request."""

from __future__ import annotations

import os
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from resode_cli.data import batches, open_data
from resode_cli.data.images import UnreadableImage, extensions, read_image
from resode_cli.errors import ResodeError
from resode_cli.measuring.evaluate import evaluate
from resode_cli.network.parts import Preprocessing

PLAIN = Preprocessing(size=16, crop_fraction=1.0)
Make = Callable[..., Path]

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)  # every grey


def grey(path: Path) -> np.ndarray:
    """The pixels of a grey picture, once it has been read."""
    image = read_image(path)
    pixels = np.asarray(image)
    assert image.mode == "RGB" and (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


# numbers of more than 8 bits


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm", "a.jp2"])
def test_sixteen_bits_are_scaled(name: str, tmp_path: Path):
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(
        tmp_path / name, **({"irreversible": False} if "jp2" in name else {})
    )
    assert np.array_equal(grey(tmp_path / name), RAMP)


def test_sixteen_bits_big_endian_and_white_at_zero_are_scaled(tmp_path: Path):
    numbers = RAMP.astype(np.uint16) * 257
    Image.frombytes("I;16B", (16, 16), numbers.astype(">u2").tobytes()).save(tmp_path / "big.tif")
    assert np.array_equal(grey(tmp_path / "big.tif"), RAMP)
    Image.fromarray(numbers).save(tmp_path / "white.tif", tiffinfo={262: 0})
    assert np.array_equal(grey(tmp_path / "white.tif"), 255 - RAMP)


@pytest.mark.parametrize("dtype, scale", [(np.float32, 1 / 255), (np.float32, 1), (np.int32, 1)])
def test_numbers_whose_range_is_clear_are_scaled(dtype, scale: float, tmp_path: Path):
    Image.fromarray((RAMP * scale).astype(dtype)).save(tmp_path / "a.tif")
    assert np.array_equal(grey(tmp_path / "a.tif"), RAMP)


@pytest.mark.parametrize(
    "numbers, message",
    [
        (RAMP.astype(np.float32) * 4, "floating-point numbers from 0 to 1020"),
        (RAMP.astype(np.float32) - 1, "floating-point numbers from -1 to 254"),
        (np.full((4, 4), np.nan, np.float32), "floating-point numbers from nan to nan"),
        (np.full((4, 4), np.inf, np.float32), "floating-point numbers from inf to inf"),
        (RAMP.astype(np.int32) * 100, "32-bit integers from 0 to 25500"),
        (RAMP.astype(np.int32) - 9, "32-bit integers from -9 to 246"),
    ],
)
def test_numbers_whose_range_nobody_knows_are_refused(numbers: np.ndarray, message: str, tmp_path: Path):
    Image.fromarray(numbers).save(tmp_path / "a.tif")
    with pytest.raises(UnreadableImage, match=message):
        read_image(tmp_path / "a.tif")


# modes, formats, orientation


def noise(size: int) -> Image.Image:
    generator = torch.Generator().manual_seed(0)
    return Image.fromarray(torch.randint(0, 256, (size, size, 3), generator=generator, dtype=torch.uint8).numpy())


@pytest.mark.parametrize(
    "mode, name", [(m, "0.png") for m in ("1", "L", "LA", "P", "RGB", "RGBA")] + [("CMYK", "0.jpg")]
)
def test_images_of_eight_bits_are_those_of_torchvision(mode: str, name: str, tmp_path: Path):
    from torchvision.datasets.folder import default_loader

    image = noise(16).convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(noise(16).convert("L"))
    image.save(tmp_path / name)
    assert np.array_equal(np.asarray(read_image(tmp_path / name)), np.asarray(default_loader(tmp_path / name)))


def test_a_palette_with_transparent_colours_is_read_without_a_warning(tmp_path: Path):
    image = noise(16).quantize(16)
    image.save(tmp_path / "0.png", transparency=bytes(range(0, 160, 10)))
    assert np.array_equal(np.asarray(read_image(tmp_path / "0.png")), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif", "a.avif"])
def test_of_an_animation_the_first_picture_is_read(name: str, tmp_path: Path):
    if Path(name).suffix not in extensions():
        pytest.skip(f"this Pillow does not read {name}")
    pictures = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "green")]
    lossless = {"quality": 100} if name == "a.avif" else {"lossless": True} if name == "a.webp" else {}
    pictures[0].save(tmp_path / name, save_all=True, append_images=pictures[1:], **lossless)
    pixel = np.asarray(read_image(tmp_path / name))[8, 8].astype(int)
    assert abs(pixel - (255, 0, 0)).max() <= 3


@pytest.mark.parametrize("suffix", [".gif", ".avif", ".jp2", ".tga", ".jfif", ".JPG", ".Png"])
def test_what_pillow_reads_is_taken(suffix: str, make_folder: Make):
    if suffix.lower() not in extensions():
        pytest.skip(f"this Pillow does not read {suffix}")
    folder = make_folder(each=1)
    noise(16).save(folder / "train" / "cat" / f"picture{suffix}")
    for labelled in (True, False):
        data = open_data(str(folder), PLAIN, "train", labelled=labelled)
        assert len(data) == 4 and not data.notes
        assert len(next(batches(data, 4)).labels) == 4


@pytest.mark.parametrize("suffix", [".eps", ".pdf", ".h5", ".wmf", ".mpg"])
def test_what_is_no_picture_is_not(suffix: str):
    assert suffix not in extensions()


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "a.webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright_once(name: str, orientation: int, tmp_path: Path):
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    image = Image.new("RGB", (32, 16), "black")
    image.paste("white", (0, 0, 16, 8))  # the upper left quarter
    exif = Image.Exif()
    exif[274] = orientation
    image.save(tmp_path / name, exif=exif, **({"lossless": True} if name == "a.webp" else {}))
    expected = image.transpose(turns[orientation]) if orientation in turns else image
    found = read_image(tmp_path / name)
    assert found.size == expected.size
    assert abs(np.asarray(found).astype(int) - np.asarray(expected)).max() < 40


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"]
)
def test_an_image_with_broken_metadata_is_read_as_it_is(exif: bytes, tmp_path: Path):
    noise(16).save(tmp_path / "with.jpg", exif=exif)
    noise(16).save(tmp_path / "without.jpg")
    assert np.array_equal(*(np.asarray(read_image(tmp_path / name)) for name in ("with.jpg", "without.jpg")))


# sizes


def png_header(width: int, height: int) -> bytes:
    """A PNG of any size, without its pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize("pixels", [101 * 50, 199 * 50])
def test_large_jpegs_are_halved_by_their_decoder_and_others_keep_their_pixels(pixels: int, tmp_path: Path, monkeypatch):
    image = Image.new("RGB", (pixels // 50, 50), (200, 100, 50))
    image.save(tmp_path / "a.jpg", quality=95)
    image.save(tmp_path / "a.png")
    whole = read_image(tmp_path / "a.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    half = read_image(tmp_path / "a.jpg")
    assert whole.size == image.size and read_image(tmp_path / "a.png").size == image.size
    assert half.size == ((image.width + 1) // 2, 25)
    assert abs(np.asarray(half).astype(int) - (200, 100, 50)).max() <= 2


# corrupt images


def write(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None


def cut_short(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def replace(path: Path) -> None:
        path.unlink()
        make(path)

    return replace


def bind(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the path of a socket must be short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


CORRUPT: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (write(b""), "the file is empty"),
    "text": (write(b"not an image"), "in no image format that can be read here"),
    "cut short": (cut_short, "truncated"),
    "a bomb": (write(png_header(40_000, 30_000)), r"1200000000 pixels\) exceeds limit of \d+ .*make it smaller"),
    "400 megapixels": (write(png_header(20_000, 20_000)), r"400000000 pixels\) exceeds limit of \d+ .*make it smaller"),
    "a strip": (write(png_header(100_000, 1)), "100000×1 pixels: one side is more than 250 times the other"),
    "no size": (write(png_header(0, 0)), ".+"),
    "a pipe": (replaced(os.mkfifo), "it is a pipe, not a file"),
    "a socket": (replaced(bind), "it is a socket, not a file"),
    "a device": (replaced(lambda path: path.symlink_to("/dev/zero")), "it is a device, not a file"),
    "a broken link": (replaced(lambda path: path.symlink_to("nowhere.png")), "No such file or directory"),
    "a link to itself": (replaced(lambda path: path.symlink_to(path.name)), "symbolic links"),
    "postscript": (write(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "in no image format"),
}


@pytest.fixture(params=CORRUPT)
def corrupt(request: pytest.FixtureRequest, make_folder: Make) -> tuple[Path, Path, str]:
    """A folder, the file in it that cannot be read, and why."""
    make, why = CORRUPT[request.param]
    folder = make_folder()
    path = folder / "test" / "dog" / "1.png"
    make(path)
    return folder, path, why


def test_a_corrupt_image_is_named(corrupt: tuple[Path, Path, str]):
    folder, path, why = corrupt
    data = open_data(str(folder), PLAIN, "test")
    with pytest.raises(ResodeError, match=rf"{path}: not a readable image \(.*{why}.*\); --skip-corrupt leaves"):
        list(batches(data, 4))


def test_corrupt_images_are_skipped_and_counted_on_request(corrupt: tuple[Path, Path, str]):
    folder, path, _ = corrupt
    data = open_data(str(folder), PLAIN, "test", skip_corrupt=True)
    for _ in range(2):  # a second epoch counts nothing twice
        found = list(batches(data, 4))
        assert [name for batch in found for name in batch.skipped] == [str(path)]
        assert [int(label) for batch in found for label in batch.labels] == [0, 0, 0, 1, 1, 2, 2, 2]
        assert [len(batch.images) for batch in found] == [4, 3, 1]
        assert data.skipped_note() == f"skipped 1 corrupt file of {folder}, test: {path}"


def test_workers_say_the_same(make_folder: Make):
    folder = make_folder()
    path = folder / "test" / "dog" / "1.png"
    path.write_bytes(b"")
    messages = []
    for workers in (0, 1):
        with pytest.raises(ResodeError) as error:
            list(batches(open_data(str(folder), PLAIN, "test"), 4, workers=workers))
        messages.append(str(error.value))
    assert messages[0] == messages[1] and "\n" not in messages[0]
    data = open_data(str(folder), PLAIN, "test", skip_corrupt=True)
    assert len(list(batches(data, 4, workers=1))) == 3 and list(data.skipped) == [str(path)]


def test_a_file_that_vanished_after_listing_is_named(make_folder: Make):
    folder = make_folder()
    data = open_data(str(folder), PLAIN, "test")
    (folder / "test" / "owl" / "2.png").unlink()
    with pytest.raises(ResodeError, match=r"owl/2.png: not a readable image \(No such file or directory\)"):
        list(batches(data, 4))


@pytest.mark.parametrize("name", ["a\nb.png", "a\x1b[31mb.png", "a\u202eb.png", "a\udcffb.png"])
def test_names_that_would_garble_the_terminal_are_escaped(name: str, make_folder: Make):
    folder = make_folder(each=1)
    try:
        (folder / "test" / "dog" / name).write_bytes(b"")
    except (OSError, UnicodeError):
        pytest.skip("this file system does not take such names")
    with pytest.raises(ResodeError) as error:
        list(batches(open_data(str(folder), PLAIN, "test"), 4))
    assert str(error.value).isprintable()
    data = open_data(str(folder), PLAIN, "test", skip_corrupt=True)
    assert sum(len(batch.labels) for batch in batches(data, 4)) == 3
    assert str(data.skipped_note()).isprintable()


@pytest.mark.parametrize(
    "error", [struct.error("unpack"), KeyError(3), ZeroDivisionError(), RuntimeError("odd"), EOFError()]
)
def test_whatever_a_decoder_stumbles_over_is_a_corrupt_image(error: Exception, make_folder: Make, monkeypatch):
    def stumble(self):
        raise error

    folder = make_folder(each=1)
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", stumble)
    with pytest.raises(ResodeError, match=r"cat/0.png: not a readable image \(.+\); --skip-corrupt"):
        next(batches(open_data(str(folder), PLAIN, "test"), 4))


def test_too_little_memory_is_not_a_corrupt_image(make_folder: Make, monkeypatch):
    def refuse(self):
        raise MemoryError

    folder = make_folder(each=1)
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", refuse)
    with pytest.raises(ResodeError, match=r"cat/0.png: not enough memory to read this image"):
        next(batches(open_data(str(folder), PLAIN, "test", skip_corrupt=True), 4))


def test_a_batch_of_corrupt_images_alone_is_empty_and_evaluation_counts_it(make_folder: Make, tiny):
    folder = make_folder()
    (folder / "test" / "dog" / "1.png").write_bytes(b"text")
    found = list(batches(open_data(str(folder), PLAIN, "test", skip_corrupt=True), 1))
    assert [len(batch.labels) for batch in found] == [1, 1, 1, 1, 0, 1, 1, 1, 1]
    result = evaluate(tiny, found)
    assert result.images == 8 and len(result.skipped) == 1
