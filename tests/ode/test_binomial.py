"""Binomial checkpointing against dynamic programming, brute force and the sweep's own count.

N: depth; S: snapshots; l: steps of a segment; s: states that may be held in it. Recurrences: Griewank and Walther 2000.
"""

from __future__ import annotations

from functools import cache
from itertools import chain, combinations

import pytest
import torch

from resode_cli.ode import Adjoint, Monitor, Plan, Prediction
from resode_cli.ode.binomial import forward_placement, replay_cost, replay_placement

SIZES = [(depth, snapshots) for depth in (1, 2, 3, 5, 8, 13, 21, 40) for snapshots in (1, 2, 3, 4, 7, 40, 50)]


@cache
def replays(l: int, s: int) -> int:  # noqa: E741
    """P(l, s): steps run again to reverse a segment of which only the first state is held."""
    if l <= 1:
        return 0
    if s == 1:
        return l * (l - 1) // 2
    return min(m + replays(l - m, s - 1) + replays(m, s) for m in range(1, l))


@cache
def after_forward(l: int, s: int) -> int:  # noqa: E741
    """R(l, s): the same where the first run over the segment is the forward pass, and free."""
    if l <= 1:
        return 0
    if s == 1:
        return l * (l - 1) // 2
    return min(after_forward(l - m, s - 1) + replays(m, s) for m in range(1, l))


def simulate(plan: Plan) -> tuple[int, int, int]:
    """Steps run again, states held at a time at most, and the same with the state that a replay ends in."""
    held, again = set(plan.anchors), 0
    most = with_current = len(held)
    for n in reversed(range(plan.depth)):
        step = plan.steps[n]
        if step.prediction is Prediction.HELD:
            assert n in held
        else:
            assert step.prediction is Prediction.REPLAY
            below = max(k for k in held if k < n)
            assert all(below < k < n for k in step.hold)
            again += n - below
            held |= set(step.hold)
            with_current = max(with_current, len(held) + 1)
        most = max(most, len(held))
        held -= {n}
    assert not held
    return again, most, max(most, with_current)


def test_the_closed_form_is_the_recurrence():
    for s in range(1, 9):
        for length in range(1, 41):
            assert replay_cost(length, s) == replays(length, s), (length, s)


def test_forward_placement_attains_the_least():
    for snapshots in range(1, 8):
        for depth in range(1, 30):
            anchors = forward_placement(depth, snapshots)
            assert anchors[0] == 0 and len(anchors) == min(depth, snapshots)
            ends = [*anchors[1:], depth]
            assert all(a < b for a, b in zip(anchors, ends, strict=True))
            cost = sum(replays(b - a, snapshots - i) for i, (a, b) in enumerate(zip(anchors, ends, strict=True)))
            assert cost == after_forward(depth, snapshots), (depth, snapshots)


def test_replay_placement_stays_inside_its_segment():
    assert replay_placement(3, 4, 5) == ()
    assert replay_placement(3, 9, 1) == ()
    for slots in range(2, 6):
        for stop in range(5, 20):
            found = replay_placement(3, stop, slots)
            assert len(found) <= slots - 1
            assert list(found) == sorted(set(found))
            assert all(3 < n < stop - 1 for n in found)


@pytest.mark.parametrize(("depth", "snapshots"), SIZES)
def test_the_plan_runs_the_least_again_and_never_holds_more(depth, snapshots):
    plan = Adjoint("checkpoint", snapshots=snapshots).plan(depth, "euler")
    again, most, with_current = simulate(plan)
    assert again == after_forward(depth, snapshots)
    assert most <= snapshots
    assert plan.most_states_held == with_current <= snapshots + 1
    assert plan.states_kept == len(plan.anchors) == min(depth, snapshots)
    assert plan.exact


@pytest.mark.parametrize("every", [1, 2, 3, 5, 20])
def test_largest_states_of_a_spacing(every):
    plan = Adjoint("checkpoint", every).plan(13, "euler")
    assert plan.most_states_held == simulate(plan)[2]
    assert plan.states_kept == len(plan.anchors)


@pytest.mark.parametrize("snapshots", [1, 12])
def test_no_steps_hold_nothing(snapshots):
    plan = Adjoint("checkpoint", snapshots=snapshots).plan(0, "euler")
    assert (plan.anchors, plan.depth, plan.states_kept, plan.most_states_held) == ((), 0, 0, 0)


@pytest.mark.parametrize("scheme", ["euler", "heun"])
@pytest.mark.parametrize("snapshots", [1, 2, 3, 5, 30])
@pytest.mark.parametrize("depth", [1, 2, 5, 9, 17])
def test_the_sweep_evaluates_what_was_planned(depth, snapshots, scheme, make_field, field_gradients, state):
    field, monitor = make_field("rough", depth, horizon=3.0), Monitor()
    found = field_gradients(field, Adjoint("checkpoint", snapshots=snapshots), state, scheme=scheme, monitor=monitor)
    slots = 2 if scheme == "heun" else 1
    count = sum(residual.module.calls for residual in field.residuals)
    assert count == monitor.evaluations == slots * (depth + after_forward(depth, snapshots))

    dense = field_gradients(field, Adjoint("checkpoint"), state, scheme=scheme)
    assert all(torch.equal(a, b) for a, b in zip(found, dense, strict=True))
    backprop = field_gradients(field, Adjoint("backprop"), state, scheme=scheme)
    torch.testing.assert_close(found, backprop, rtol=1e-12, atol=1e-13)


def test_a_hundred_steps_with_twelve_snapshots_cost_about_two_evaluations_each(make_field, field_gradients, state):
    monitor = Monitor()
    field_gradients(make_field("tied", 100), Adjoint("checkpoint", snapshots=12), state, monitor=monitor)
    assert monitor.evaluations <= 2.1 * 100


# --- optimality --------------------------------------------------------------------------------------------


def subsets(numbers):
    numbers = list(numbers)
    return (frozenset(c) for c in chain.from_iterable(combinations(numbers, k) for k in range(len(numbers) + 1)))


def cheapest(depth: int, snapshots: int) -> float:
    """The fewest steps run again by any strategy at all: whatever is held, dropped or run from anywhere."""

    @cache
    def reverse(n: int, held: frozenset[int]) -> float:
        if n < 0:
            return 0
        if n in held:
            return reverse(n - 1, held - {n})
        best = float("inf")
        for start in held:
            for kept in subsets(held):
                room = snapshots - len(kept)
                for new in subsets(range(start + 1, n)):
                    if len(new - kept) <= room and new | kept:
                        best = min(best, n - start + reverse(n - 1, frozenset(k for k in new | kept if k < n)))
        return best if n or 0 in held else float("inf")

    return min(reverse(depth - 1, held) for held in subsets(range(depth)) if 0 in held and len(held) <= snapshots)


@pytest.mark.parametrize("snapshots", [1, 2, 3])
def test_no_strategy_runs_fewer_steps_again(snapshots):
    for depth in range(1, 7):
        plan = Adjoint("checkpoint", snapshots=snapshots).plan(depth, "euler")
        assert simulate(plan)[0] == cheapest(depth, snapshots), depth
