"""Properties of what users write: every text is read as what it says, or refused by a mistake of ours, never another.

Hypothesis makes up the texts.
"""

from __future__ import annotations

import math
from contextlib import suppress

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from resode_cli.errors import UsageError
from resode_cli.gradients.adjoint_choice import NAMES, SETTINGS, parse_adjoints
from resode_cli.ode import Adjoint
from resode_cli.ode.plans import Prediction
from resode_cli.quantities import UNITS, parse_bytes, size
from resode_cli.sources.registry import LIBRARIES, parse_source

PLAIN = settings(deadline=None, derandomize=True, max_examples=200)

units = st.sampled_from(["KB", "MB", "GB", "KiB", "MiB", "GiB", "gib", "Mib"])
counts = st.integers(1, 10**6)


@PLAIN
@given(counts, units, st.sampled_from(["", " ", "  "]))
def test_a_size_is_its_number_times_its_unit(count: int, unit: str, space: str) -> None:
    factor = {"K": 1, "M": 2, "G": 3}[unit[0].upper()]
    base = 1024 if "i" in unit.lower() else 1000
    assert parse_bytes(f"{count}{space}{unit}") == count * base**factor


@PLAIN
@given(st.integers(2**20, 2**50))
def test_a_size_that_is_written_is_read_as_nearly_the_same(count: int) -> None:
    """Three digits are written."""
    assert parse_bytes(size(count).replace(",", "")) == pytest.approx(count, rel=6e-3)


@PLAIN
@given(st.text() | st.from_regex(r"[0-9.eE+-]{1,12} ?[A-Za-z]{0,4}", fullmatch=True))
@example("1e9999GiB")
@example("." * 50)
@example("٣GiB")
def test_any_text_is_a_size_or_a_mistake(text: str) -> None:
    with suppress(UsageError):
        count = parse_bytes(text)
        assert 1 <= count < math.inf and text.strip().upper().rstrip("0123456789.E+- ") in ("", *UNITS)


specs = st.builds(
    lambda name, own: ":".join([name, *(f"{key}={value}" for key, value in own)]),
    st.sampled_from(NAMES),
    st.lists(
        st.tuples(
            st.sampled_from(SETTINGS), st.sampled_from(["0", "1", "7", "-3", "auto", "none", "", "x", "9" * 5000])
        ),
        max_size=3,
    ),
)


@PLAIN
@given(st.lists(specs, min_size=1, max_size=3) | st.lists(st.text(), min_size=1, max_size=2))
def test_any_text_is_a_list_of_adjoints_or_a_mistake(entries: list[str]) -> None:
    text = ",".join(entries)
    with suppress(UsageError):
        found = parse_adjoints(text)
        assert len(found) == text.count(",") + 1
        for entry, choice in zip(text.split(","), found, strict=True):
            assert choice.name == entry.split(":")[0].strip()
            if choice.fixed is not None:  # what was written is what is set
                written = dict(part.strip().split("=") for part in entry.split(":")[1:])
                for key, value in written.items():
                    expected = None if value == "none" else int(value)
                    assert getattr(choice.fixed, key) == expected


@PLAIN
@given(
    st.sampled_from(["checkpoint", "multistep", "pc", "euler"]),
    st.integers(1, 40),
    st.none() | st.integers(1, 45),
    st.integers(0, 2),
    st.none() | st.integers(1, 45),
)
def test_every_plan_reverses_every_step_with_states_that_it_holds(
    method: str, depth: int, anchors: int | None, corrections: int, snapshots: int | None
) -> None:
    """Walked from the last step to the first: a state that a replay starts from is there, and no more are than said."""
    with suppress(UsageError):
        plan = Adjoint(method, anchors=anchors, corrections=corrections, snapshots=snapshots).plan(depth, "euler")
        assert plan is not None and len(plan.steps) == depth
        held = set(plan.anchors)
        assert held <= set(range(depth + 1))
        most = len(held)
        for n in reversed(range(depth)):
            step = plan.steps[n]
            if step.prediction is Prediction.REPLAY:
                assert any(k <= n for k in held), f"nothing to run step {n} forward from"
                assert all(k <= n for k in step.hold)
            held |= set(step.hold)
            most = max(most, len(held))
            held.discard(n + 1)
        assert most <= plan.most_states_held
        if snapshots is not None:
            assert most <= snapshots, "more states are held than were asked for"


@PLAIN
@given(st.text() | st.builds("{}:{}".format, st.sampled_from(LIBRARIES), st.text()))
def test_any_text_is_a_source_or_a_mistake(text: str) -> None:
    with suppress(UsageError):
        library, name = parse_source(text)
        assert library in LIBRARIES and name and text.endswith(name)
