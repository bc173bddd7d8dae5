"""The fastest plan within a budget, held against every plan there is."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resode_cli.gradients.planner import Option, fastest, lean, least, peak_of, seconds_of
from resode_cli.ode import Adjoint
from resode_cli.simulation.step import PieceUse


def menu(seed: int, pieces: int = 4, choices: int = 4) -> dict[str, list[Option]]:
    """What holds less takes longer, as it is with real pieces, and in no other order."""
    draw = random.Random(seed)
    options = {}
    for piece in range(pieces):
        whole, time = draw.randint(20, 200), draw.uniform(1, 3)
        options[f"piece {piece}"] = [
            Option(
                Adjoint("checkpoint", anchors=k + 1),
                PieceUse(
                    kept=(kept := whole // (k + 1)),
                    left=-kept + draw.randint(0, 5),
                    forward=kept + draw.randint(0, 30),
                    backward=draw.randint(5, 80) + (whole - kept) // 2,
                    seconds=time * (1 + 0.3 * k + 0.1 * draw.random()),
                    once=time / 3,
                ),
                exact=True,
            )
            for k in range(choices)
        ]
    return options


def every(options: dict[str, list[Option]]) -> list[tuple[Option, ...]]:
    return list(itertools.product(*options.values()))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(0, 10**6), st.integers(0, 100))
def test_a_plan_is_within_the_budget_and_nearly_the_fastest(seed, percent):
    options = menu(seed)
    plans = every(options)
    low, high = (pick(peak_of(plan) for plan in plans) for pick in (min, max))
    budget = low + percent / 100 * (high - low)
    plan = fastest(options, budget)
    assert plan is not None and list(plan) == list(options)
    assert peak_of(plan.values()) <= budget
    best = min(seconds_of(other) for other in plans if peak_of(other) <= budget)
    assert seconds_of(plan.values()) <= 1.05 * best


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(0, 10**6))
def test_the_least_is_nearly_the_least_and_below_it_there_is_no_plan(seed):
    options = menu(seed)
    low = min(peak_of(plan) for plan in every(options))
    assert peak_of(least(options).values()) <= 1.05 * low
    assert fastest(options, low - 1) is None


def test_a_piece_without_an_option_has_no_plan():
    assert fastest({**menu(0), "empty": []}, 10**9) is None


def test_without_a_budget_a_fifth_of_a_forward_pass_is_given_for_memory():
    def option(seconds: float, kept: int, exact: bool = True) -> Option:
        return Option(Adjoint(), PieceUse(kept=kept, seconds=seconds, once=1.0), exact)

    cheap, near, far = option(3.0, 100), option(3.15, 10), option(3.3, 1)
    assert lean({"piece": [cheap, near, far]}, 0.2) == {"piece": near}
    assert lean({"piece": [option(3.0, 10, exact=False), option(3.1, 10)]}, 0.2)["piece"].exact


def test_the_peak_is_that_of_the_forward_or_the_backward_pass():
    a = Option(Adjoint(), PieceUse(kept=10, left=-10, forward=50, backward=5), True)
    b = Option(Adjoint(), PieceUse(kept=20, left=-18, forward=20, backward=7), True)
    assert peak_of([a, b]) == 50 and peak_of([b, a]) == 70 and peak_of([b, b]) == 47
    assert peak_of([]) == 0


@pytest.mark.parametrize("count", [2, 9])
def test_a_budget_for_everything_gives_the_fastest_of_each(count):
    options = menu(3, pieces=count)
    plan = fastest(options, 10**9)
    assert plan is not None
    assert all(plan[name] is min(found, key=lambda o: o.use.seconds) for name, found in options.items())
