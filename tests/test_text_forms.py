"""Properties of sizes and sources as users write them: read as what they say, or refused by a mistake of ours.

Hypothesis makes up the values.
"""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from resode_cli.errors import UsageError
from resode_cli.network.parts import parse_size
from resode_cli.quantities import parse_bytes, size
from resode_cli.sources.registry import LIBRARIES, parse_source

PLAIN = settings(deadline=None, derandomize=True, max_examples=150)


BYTES = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TB": 10**12,
    "TiB": 2**40,
}
units = st.sampled_from(sorted(BYTES))
decimals = st.decimals(min_value=1, max_value=10**5, places=3).map(str)


@st.composite
def spellings(draw: st.DrawFn, number: str, unit: str) -> str:
    """One of the ways to write a number and its unit."""
    unit = draw(st.sampled_from([unit, unit.lower(), unit.upper()]))
    before, between, after = (draw(st.sampled_from(["", " ", "\t"])) for _ in range(3))
    return f"{before}{number}{between}{unit}{after}"


@PLAIN
@given(st.data(), decimals, units, st.none() | st.integers(0, 4))
def test_a_size_is_read_as_its_number_times_its_unit(data, number, unit, exponent):
    """To a byte, and as nearly as a float says it."""
    written = number if exponent is None else f"{number}{data.draw(st.sampled_from('eE'))}{exponent}"
    exact = Fraction(number) * 10 ** (exponent or 0) * BYTES[unit]
    text = data.draw(spellings(written, unit))
    if exact > 2**60:
        with pytest.raises(UsageError):
            parse_bytes(text)
    else:
        assert abs(parse_bytes(text) - exact) <= 1 + exact * Fraction(1, 2**52)


@PLAIN
@given(st.integers(1, 10**6), units, st.integers(1, 10**6), units)
@example(1024, "KiB", 1, "MiB")
@example(1000, "KB", 1, "MB")
def test_of_two_sizes_the_larger_is_read_as_the_larger(first, its_unit, second, other_unit):
    a, b = first * BYTES[its_unit], second * BYTES[other_unit]
    found, other = parse_bytes(f"{first}{its_unit}"), parse_bytes(f"{second} {other_unit}")
    assert (found < other, found == other) == (a < b, a == b)


@PLAIN
@given(decimals, decimals, units)
def test_more_of_a_unit_is_never_read_as_less(first, second, unit):
    smaller, larger = sorted((first, second), key=Fraction)
    assert parse_bytes(smaller + unit) <= parse_bytes(larger + unit)


@PLAIN
@given(st.integers(1, 2**59), st.integers(1, 2**59))
@example(2**20 - 1, 2**20)
@example(999, 1000)
def test_a_written_size_is_read_again_to_three_digits_and_in_order(a, b):
    found = [parse_bytes(size(count)) for count in sorted((a, b))]
    assert found[0] <= found[1]
    for count, again in zip(sorted((a, b)), found, strict=True):
        assert abs(again - count) <= 1 + count * 0.005 * 1.001


no_size = st.one_of(
    st.builds("{}{}{}".format, st.sampled_from("+-~$"), decimals, units),
    st.builds("{}.{}{}".format, decimals, st.integers(0, 9), units),  # two points
    st.builds("{} {} {}".format, decimals, decimals, units),
    st.builds("{}{}".format, decimals, st.text("abcdefghijklmnopqrstuvwxyz", min_size=3).filter(lambda t: t[1] != "i")),
    st.builds("{}{}".format, st.text("٠١٢³½", min_size=1), units),
    st.builds("{}{}".format, st.sampled_from(["", ".", "e", "e5", "nan", "inf", "0", "0.0", "1e-30"]), units),
    st.builds("{}e{}{}".format, st.integers(1, 9), st.integers(20, 10**6), units),
    st.integers(0, 2**20 - 1).map(str),  # a unit was forgotten
)


@PLAIN
@given(no_size)
def test_what_is_no_size_is_always_a_mistake_of_the_users(text):
    with pytest.raises(UsageError, match="memory budget"):
        parse_bytes(text)


def test_equal_sizes_are_read_as_equal_whatever_their_unit():
    assert parse_bytes("1.001KB") == parse_bytes("1001B")


def test_a_tebibyte_is_written_without_a_power_of_ten():
    assert "e" not in size(2**40)


@PLAIN
@given(st.integers(-5, 10**10), st.none() | st.integers(-5, 10**10), st.sampled_from(["x", "×", ",", " x ", ", "]))
def test_a_size_in_pixels_is_read_as_it_is_written(height, width, between):
    """Of up to nine digits, and never as anything else."""
    text = str(height) if width is None else f"{height}{between}{width}"
    sides = [side for side in (height, width) if side is not None]
    if all(1 <= side < 10**9 for side in sides):
        assert parse_size(text) == (height if width in (None, height) else (height, width))
    else:
        with pytest.raises(UsageError, match="must be 1 or more pixels"):
            parse_size(text)


# --- sources ---


@PLAIN
@given(st.text() | st.builds("{}:{}".format, st.sampled_from(LIBRARIES), st.text()))
def test_any_text_is_a_source_or_a_mistake(text: str) -> None:
    """The name is what stands after the first colon, and a file keeps the whole text."""
    try:
        library, name = parse_source(text)
    except UsageError:
        return
    assert library in LIBRARIES and name == (text if library == "file" else text.partition(":")[2])
