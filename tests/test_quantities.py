"""Numbers as users write and read them."""

from __future__ import annotations

import pytest

from resode_cli.errors import UsageError
from resode_cli.quantities import counted, duration, number, parse_bytes


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (61, "61 s"),
        (89.9, "90 s"),
        (119.7, "2 min 00 s"),  # never 1 min 60 s
        (605, "10 min 05 s"),
        (5400, "1.5 h"),
    ],
)
def test_a_duration_rounds_as_a_whole(seconds, text):
    assert duration(seconds) == text


def test_figures_are_written_as_people_write_them():
    assert counted(1, "image") == "1 image"
    assert counted(5000, "image") == "5,000 images"
    assert number(float("nan")) == "not finite"
    assert number(None) == "–"
    assert number(0.01234) == "0.012"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("8GiB", 8 * 2**30), ("512 MiB", 512 * 2**20), ("2e9", 2 * 10**9), ("1.5gb", 15 * 10**8), ("100B", 100)],
)
def test_sizes(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    "text", ["", "much", "8 gigs", "-1GiB", "0", "1.2.3GiB", "1e999GiB", "1e-400GiB", "0.5B", "9e99"]
)
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UsageError, match="write a size such as 8GiB"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["8", "8.5", "1000"])
def test_bytes_that_were_meant_as_more_are_asked_for_their_unit(text):
    with pytest.raises(UsageError, match=f"add the unit, as in {text}GiB"):
        parse_bytes(text)
