"""From an image file to RGB, 8 bits a channel; whatever cannot be read so is refused by name.

Greys of 16 bits are scaled by 65535, floating-point pixels in [0, 1] by 255. An EXIF orientation is applied.
Transparency is dropped and of an animation the first picture is taken, as torchvision and timm read them.
"""

from __future__ import annotations

import io
import os
import stat
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# Formats that Pillow opens and that are no pictures, or that another program would have to draw.
_NO_PICTURES = {"EPS", "WMF", "PDF", "MPEG", "HDF5", "GRIB", "BUFR", "FITS", "IPTC"}
_USUAL = ("JPEG", "PNG")
# A strip of one pixel's height would be resized to a hundred thousand times the network's input.
_LONGEST = 250
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # TIFF's tags


class UnreadableImage(Exception):
    """Why a file is no image, in a few words."""


def shown(name: str | Path) -> str:
    """A name as it can be printed: one with control characters, or with bytes that are no text, is escaped."""
    text = str(name)
    return text if text.isprintable() else repr(text)


def extensions() -> frozenset[str]:
    """The extensions, in lower case, of what Pillow reads here."""
    known = Image.registered_extensions()
    return frozenset(e for e, name in known.items() if name in Image.OPEN and name not in _NO_PICTURES)


def read_image(path: str | Path) -> Image.Image:
    """The picture in a file, upright, as RGB. Raises UnreadableImage."""
    return _explained(lambda: _open_regular(path))


def image_of(content: bytes) -> Image.Image:
    """The same of a file's content. Raises UnreadableImage."""
    return _explained(lambda: io.BytesIO(content))


def _explained(opened: Callable[[], BinaryIO]) -> Image.Image:
    """The picture in a file that is opened here. Raises UnreadableImage, whatever went wrong."""
    try:
        with warnings.catch_warnings(), opened() as file:
            # Pillow warns of what is checked here, and of metadata that nothing reads.
            warnings.simplefilter("ignore")
            return _read(file)
    except UnreadableImage:
        raise
    except Image.DecompressionBombError as error:
        raise UnreadableImage(f"{str(error).rstrip('.')}; make it smaller") from error
    except UnidentifiedImageError as error:
        raise UnreadableImage("its content is in no image format that can be read here") from error
    except MemoryError:
        raise
    except OSError as error:
        raise UnreadableImage(error.strerror or str(error)) from error
    except Exception as error:  # decoders raise whatever a broken file makes them stumble over
        raise UnreadableImage(str(error) or type(error).__name__) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB. Raises UnreadableImage for numbers whose black and white are not known."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return _scaled(image, *_range_of_16_bits(image)).convert("RGB")
    if image.mode == "F":
        low, high = _extremes(image)
        if low >= 0 and high <= 1:
            return _scaled(image, 0, 1).convert("RGB")
    if image.mode in ("I", "F"):
        low, high = _extremes(image)
        if not (low >= 0 and high <= 255):
            raise UnreadableImage(
                f"its pixels are {'32-bit integers' if image.mode == 'I' else 'floating-point numbers'} from {low:g}"
                f" to {high:g}, and nothing says which are black and white; save it with 8 or 16 bits"
            )
    return image.convert("RGB")


def _open_regular(path: str | Path) -> BinaryIO:
    """The file for reading. A pipe or a device would wait for ever, so it is never opened."""
    _check_regular(os.stat(path))

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    file = open(path, "rb", opener=opener)  # noqa: SIM115  the caller closes it
    try:
        found = os.fstat(file.fileno())
        _check_regular(found)
        if found.st_size == 0:
            raise UnreadableImage("the file is empty")
    except BaseException:
        file.close()
        raise
    return file


def _check_regular(found: os.stat_result) -> None:
    kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
    if not stat.S_ISREG(found.st_mode):
        raise UnreadableImage(f"it is {kinds.get(stat.S_IFMT(found.st_mode), 'a device')}, not a file")


def _read(file: BinaryIO) -> Image.Image:
    image = Image.open(file, formats=_formats())
    width, height = image.size
    if max(width, height) > _LONGEST * min(width, height):
        raise UnreadableImage(f"{width}×{height} pixels: one side is more than {_LONGEST} times the other")
    limit = Image.MAX_IMAGE_PIXELS
    if image.format == "JPEG" and limit is not None and width * height > limit:
        # The decoder halves it on the way, to a quarter of the memory. Smaller ones keep their pixels to the bit.
        image.draft(image.mode, (width // 2, height // 2))
    image.load()
    return upright(image)


@cache
def _formats() -> tuple[str, ...]:
    """What files are tried as, one after the other: the usual ones first, as some of the others look long at a file."""
    Image.init()
    return tuple(name for name in dict.fromkeys([*_USUAL, *Image.OPEN]) if name not in _NO_PICTURES)


def upright(image: Image.Image) -> Image.Image:
    """A picture as RGB, turned as its EXIF orientation says. Raises UnreadableImage."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:  # metadata that cannot be read say nothing of which side is up
        return to_rgb(image)
    return to_rgb(image)


def _range_of_16_bits(image: Image.Image) -> tuple[int, int]:
    """The numbers that mean black and white."""
    tags: Any = getattr(image, "tag_v2", {})
    bits = tags.get(_BITS_PER_SAMPLE, (16,))
    white = 4095 if bits == (12,) else 65535
    return (white, 0) if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else (0, white)


def _scaled(image: Image.Image, black: float, white: float) -> Image.Image:
    numbers = np.asarray(image).astype(np.float64)
    return Image.fromarray(np.rint((numbers - black) * (255 / (white - black))).clip(0, 255).astype(np.uint8))


def _extremes(image: Image.Image) -> tuple[float, float]:
    """The smallest and the largest number; NaN where there is any, and then nothing is in a range."""
    numbers = np.asarray(image)
    return float(numbers.min()), float(numbers.max())
