"""Optimal placement of checkpoints: the fewest re-evaluations for a given number of held states.

A. Griewank, A. Walther, "Algorithm 799: revolve", ACM Trans. Math. Softw. 26 (2000), for a known number
of steps. l: steps of a segment whose first state is held; s: states that may be held in it at a time,
that first one included. Reversing the segment from its first state alone takes, at best,

    P(1, s) = 0,   P(l, 1) = l (l − 1) / 2,   P(l, s) = min_m [m + P(l − m, s − 1) + P(m, s)]

steps forward, one evaluation each. In a stage the forward pass runs anyway and may hold what it likes
on its way, so that the first run over each segment is free:

    R(1, s) = 0,   R(l, 1) = l (l − 1) / 2,   R(l, s) = min_m [R(l − m, s − 1) + P(m, s)]
"""

from __future__ import annotations

import heapq
from functools import lru_cache
from math import comb


def _repetitions(length: int, slots: int) -> int:
    """The least r with l ≤ C(s + r, s): how often the steps of an optimally reversed segment run, at most."""
    r = 0
    while comb(slots + r, slots) < length:
        r += 1
    return r


def replay_cost(length: int, slots: int) -> int:
    """P(l, s) = r l − C(s + r, s + 1), the closed form of Griewank and Walther, equation 3."""
    r = _repetitions(length, slots)
    return r * length - comb(slots + r, slots + 1)


@lru_cache(maxsize=4096)
def _split(length: int, slots: int) -> int:
    """The m that minimises P(l, s): how far to run before holding the next state."""
    return min(range(1, length), key=lambda m: m + replay_cost(length - m, slots - 1) + replay_cost(m, slots))


def forward_placement(depth: int, snapshots: int) -> tuple[int, ...]:
    """The states that the forward pass holds, x_0 first: segments whose lengths attain R(depth, snapshots).

    R is the least sum of P(m_i, s_i) over segments i with m_1 + m_2 + … = depth and s_i = snapshots,
    snapshots − 1, …, 1 from the bottom. Every P is convex in its length, so one more step always goes
    where it costs least.
    """
    slots = list(range(snapshots, max(snapshots - depth, 0), -1))
    lengths = [1] * len(slots)
    queue = [(_marginal(1, s), i) for i, s in enumerate(slots)]
    heapq.heapify(queue)
    for _ in range(depth - len(slots)):
        _, i = heapq.heappop(queue)
        lengths[i] += 1
        heapq.heappush(queue, (_marginal(lengths[i], slots[i]), i))
    return tuple(sum(lengths[:i]) for i in range(len(lengths)))


def _marginal(length: int, slots: int) -> int:
    return replay_cost(length + 1, slots) - replay_cost(length, slots)


def replay_placement(start: int, stop: int, slots: int) -> tuple[int, ...]:
    """The states that one replay from `start` up to stop − 1 holds on its way, by P's optimal splits."""
    found = []
    while slots > 1 and stop - start > 1:
        start += _split(stop - start, slots)
        slots -= 1
        found.append(start)
    return tuple(n for n in found if n < stop - 1)
