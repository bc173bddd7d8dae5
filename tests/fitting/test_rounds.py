"""How long a fit goes on where nobody says how many steps it takes."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from resode_cli.fitting.results import PhaseCost
from resode_cli.fitting.rounds import FEWEST, FIRST, LATE, NEARLY, PARTS, Rounds, largest


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("resode_cli.fitting.rounds.time.perf_counter", made)
    return made


def rounds(seconds: float, clock: Clock, *phases: str, per_step: float = 1.0) -> Rounds:
    costs = [PhaseCost(phase, {}, None, per_step, 0, "backprop") for phase in phases or ("logits",)]
    return Rounds(costs, seconds, began=clock.now)


def play(found: Rounds, clock: Clock, gains: list[Any], per_step: float = 1.0) -> list[int]:
    """The steps of each round, if each gains so much of what is left; None: it is undone."""
    taken, score = [], 1.0
    found.begin("logits")
    for gain in gains:
        steps = found.steps()
        if not steps:
            break
        taken.append(steps)
        clock.now += steps * per_step
        after = score if gain is None else score * (1 - gain)
        ended = "reverted" if gain is None else "done"
        found.ended(SimpleNamespace(ended=ended, steps=steps, training_seconds=steps * per_step), score, after)  # type: ignore[arg-type]
        score = after
    return taken


def test_rounds_double_and_the_last_takes_the_time_that_is_left(clock: Clock):
    first = FIRST["logits"]
    assert play(rounds(8 * first, clock), clock, [0.5] * 9) == [first, 2 * first, 5 * first]


def test_a_first_round_takes_a_quarter_of_the_time_at_most(clock: Clock):
    """So that a rate that is too high costs no more; what it gains says little, and does not end the phase."""
    quarter = FIRST["logits"] // 2
    assert play(rounds(4 * quarter, clock), clock, [0.01, 0.5]) == [quarter, 3 * quarter]
    assert play(rounds(4 * quarter, clock), clock, [None, 0.5, 0.5]) == [quarter, quarter, 2 * quarter]


def test_a_round_that_hardly_gains_is_the_last(clock: Clock):
    assert len(play(rounds(1e6, clock), clock, [0.5, 0.5, 0.01, 0.5])) == 3


def test_rounds_that_made_things_worse_are_taken_again_and_two_end_the_phase(clock: Clock):
    first = FIRST["logits"]
    assert play(rounds(1e6, clock), clock, [0.5, None, 0.5, None, None, 0.5]) == [
        first,
        *[2 * first] * 2,
        *[4 * first] * 2,
    ]


def test_the_rate_is_lower_after_a_round_that_made_things_worse(clock: Clock):
    found = rounds(1e6, clock)
    play(found, clock, [None])
    assert found.slower == pytest.approx(1 / 3)
    clock.now += 1
    found.ended(SimpleNamespace(ended="done", steps=4, training_seconds=4.0), 1.0, 0.5)  # type: ignore[arg-type]
    assert found.slower == 1


def test_every_phase_is_tried_however_little_time_there_is(clock: Clock):
    assert play(rounds(0.5, clock), clock, [0.5, 0.5]) == [FEWEST]


def test_what_steps_take_is_measured(clock: Clock):
    """Predicted at a second each, they take four; those of the next phase, predicted at two, are to take eight."""
    found = rounds(8000, clock, "logits", "refine")
    found.per_step["refine"] = 2.0
    found.begin("logits")
    found.measured("logits", 4.0)
    share = 8000 * PARTS["logits"] / (PARTS["logits"] + PARTS["refine"])
    assert found.steps() == int(share / 4) // 4
    clock.now += share
    found.begin("refine")
    assert found.steps() == int((8000 - share) / 8) // 4


def test_a_round_that_takes_much_longer_than_predicted_is_overdue(clock: Clock):
    found = rounds(1000, clock)
    found.begin("logits")
    clock.now += 1000 * (1 + LATE / 2)
    assert not found.overdue()
    clock.now += 1000 * LATE
    assert found.overdue()


def test_a_phase_leaves_time_to_those_after_it(clock: Clock):
    found = rounds(800, clock, "blocks", "logits", "refine")
    share = PARTS["blocks"] / sum(PARTS[phase] for phase in ("blocks", "logits", "refine"))
    found.begin("blocks")
    assert found.phase_until - clock.now == pytest.approx(800 * share)
    clock.now += 50  # less than it might have
    found.begin("logits")
    assert found.phase_until - clock.now == pytest.approx(750 * PARTS["logits"] / (PARTS["logits"] + PARTS["refine"]))


def test_it_is_known_whether_time_ended_a_phase(clock: Clock):
    found = rounds(4 * FIRST["logits"], clock)
    play(found, clock, [0.5] * 9)
    assert found.out_of_time
    found = rounds(1e6, clock)
    play(found, clock, [0.5, 0.01])
    assert not found.out_of_time


def test_the_largest_rate_that_is_nearly_as_good_as_the_best_is_taken():
    assert largest({3e-4: 1.0, 1e-3: 0.99 * NEARLY, 3e-3: 1.01 * NEARLY}) == 1e-3
    assert largest({3e-4: 2.0, 1e-3: 1.0, 3e-3: 3.0}) == 1e-3
    assert largest({1e-3: 1.0, 1e-2: math.nan}) == 1e-3
    assert largest({1e-2: math.inf, 1e-3: math.nan}) == 1e-3
