"""Properties of adjoints as users write them, against the rules said again in other words.

Hypothesis makes up the values.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from resode_cli.errors import UsageError
from resode_cli.gradients.adjoint_choice import parse_adjoint, parse_adjoints
from resode_cli.ode import METHODS, Adjoint

PLAIN = settings(deadline=None, derandomize=True, max_examples=150)


counts = st.integers(-2, 50)
EXACT = {"backprop": set(), "checkpoint": {"anchors", "snapshots", "slices", "bits"}}  # all others reverse


def taken(method: str) -> set[str]:
    return EXACT.get(method, {"anchors", "corrections"})


def is_meant(
    method: str,
    anchors: int | None,
    corrections: int,
    snapshots: int | None,
    slices: int | None = None,
    bits: int | None = None,
) -> bool:
    """Whether there is such an adjoint, in other words than the package's."""
    written = {"anchors": anchors, "corrections": corrections or None, "snapshots": snapshots, "bits": bits}
    chosen = {name: value for name, value in written.items() if value is not None}
    if method == "checkpoint" and len(chosen) > 1:
        return False
    if bits is not None and not 2 <= bits <= 8:
        return False
    chosen |= {} if slices is None else {"slices": slices}
    return chosen.keys() <= taken(method) and all(value >= 1 for value in chosen.values())


LABELLED = (
    r"anchors (?P<anchors>\d+)|(?P<snapshots>\d+) snapshots|(?P<corrections>\d+) corrections?"
    r"|(?P<slices>\d+) slices|(?P<bits>\d) bits"
)
DEFAULTS = {"anchors": None, "corrections": 0, "snapshots": None, "slices": 1, "bits": None}


def read_label(label: str) -> dict[str, object]:
    """The fields of an adjoint from what a table shows."""
    method, *parts = label.split(", ")
    found: dict[str, object] = {"method": method, **DEFAULTS}
    for part in parts:
        match = re.fullmatch(LABELLED, part)
        assert match is not None, part
        found |= {name: int(value) for name, value in match.groupdict().items() if value is not None}
    return found


@PLAIN
@given(
    st.sampled_from(METHODS),
    st.none() | counts,
    st.integers(-2, 4),
    st.none() | counts,
    st.none() | st.integers(-1, 20),
    st.none() | st.integers(0, 10),
    st.randoms(),
)
@example("pc", None, -1, None, None, None, Random(0))
@example("pc", 0, 1, None, None, None, Random(0))
@example("checkpoint", None, 0, 0, None, None, Random(0))
@example("checkpoint", 2, 0, 2, None, None, Random(0))
@example("checkpoint", None, 0, None, 4, 3, Random(0))
@example("checkpoint", None, 0, None, 0, 9, Random(0))
@example("checkpoint", 2, 0, None, None, 4, Random(0))
@example("pc", None, 0, None, 2, None, Random(0))
def test_settings_are_an_adjoint_that_says_what_it_is_or_a_mistake(
    method, anchors, corrections, snapshots, slices, bits, order
):
    written = [f"slices={slices}"] * (slices is not None) + [f"bits={bits}"] * (bits is not None)
    written += [f"anchors={anchors}"] * (anchors is not None) + [f"snapshots={snapshots}"] * (snapshots is not None)
    written += [f"corrections={corrections}"] * bool(corrections)
    order.shuffle(written)
    text, words = ":".join([method, *written]), None if anchors is None else str(anchors)
    ways = [
        lambda: Adjoint(method, anchors, corrections, snapshots, 1 if slices is None else slices, bits),
        lambda: (
            parse_adjoint(
                method, anchors=words, corrections=corrections, snapshots=snapshots, slices=slices, bits=bits
            ).fixed
        ),
        lambda: parse_adjoints(text)[0].fixed,
        lambda: parse_adjoints(text.replace(":", " : "))[0].fixed,
    ]
    if not is_meant(method, anchors, corrections, snapshots, slices, bits):
        if slices == 1 and is_meant(method, anchors, corrections, snapshots, None, bits):
            ways = ways[1:]  # written out, it is a setting that the method does not take
        for way in ways:
            with pytest.raises(UsageError):
                way()
        return
    fields = {"method": method, "anchors": anchors, "corrections": corrections, "snapshots": snapshots}
    fields |= {"slices": 1 if slices is None else slices, "bits": bits}
    for way in ways:
        adjoint = way()
        assert asdict(adjoint) == fields
        assert read_label(adjoint.label) == fields
        assert Adjoint(**json.loads(json.dumps(asdict(adjoint)))) == adjoint


@PLAIN
@given(
    st.sampled_from(("auto", *METHODS)),
    st.sampled_from([None, "auto", "none", "3"]),
    st.integers(0, 2),
    st.none() | st.integers(1, 9),
)
def test_what_is_left_to_calibration_is_left_whole(name, anchors, corrections, snapshots):
    """Beside 'auto' nothing is set; 'none' is what a method does by itself, and checkpoint cannot do without."""
    has_more = bool(corrections) or snapshots is not None
    if name == "auto":
        mistaken = has_more or anchors in ("auto", "3")
    elif anchors == "auto":
        mistaken = has_more or name == "backprop"
    elif anchors == "none":
        mistaken = name == "checkpoint" or not is_meant(name, None, corrections, snapshots)
    else:
        mistaken = not is_meant(name, None if anchors is None else int(anchors), corrections, snapshots)
    if mistaken:
        with pytest.raises(UsageError):
            parse_adjoint(name, anchors=anchors, corrections=corrections, snapshots=snapshots)
        return
    choice = parse_adjoint(name, anchors=anchors, corrections=corrections, snapshots=snapshots)
    calibrated = name == "auto" or anchors == "auto"
    assert (choice.fixed is None) == calibrated
    assert choice.methods == (None if name == "auto" or not calibrated else (name,))
    assert choice.label.split(",")[0] == name


@PLAIN
@given(
    st.lists(st.sampled_from(METHODS), min_size=1, max_size=4),
    st.none() | st.integers(1, 30),
    st.integers(0, 3),
    st.none() | st.integers(1, 30),
)
def test_common_settings_reach_each_method_that_takes_them_and_no_other(methods, anchors, corrections, snapshots):
    """Of a spacing and a number of states, checkpoint takes the number."""
    expected = [
        Adjoint(
            method,
            anchors if "anchors" in taken(method) and not (method == "checkpoint" and snapshots) else None,
            corrections if "corrections" in taken(method) else 0,
            snapshots if "snapshots" in taken(method) else None,
        )
        for method in methods
    ]
    text, words = ",".join(methods), None if anchors is None else str(anchors)
    used = {name for adjoint in expected for name, value in asdict(adjoint).items() if value}
    wanted = {"anchors": anchors, "corrections": corrections, "snapshots": snapshots}
    if any(value and name not in used for name, value in wanted.items()):
        with pytest.raises(UsageError, match=f"none of {text} takes"):
            parse_adjoints(text, anchors=words, corrections=corrections, snapshots=snapshots)
    else:
        found = parse_adjoints(text, anchors=words, corrections=corrections, snapshots=snapshots)
        assert [choice.fixed for choice in found] == expected


def test_more_snapshots_than_steps_are_as_good_as_one_for_each():
    plan = parse_adjoints(f"checkpoint:snapshots={10**20}")[0].fixed.plan(5, "euler")
    assert plan.anchors == (0, 1, 2, 3, 4)
