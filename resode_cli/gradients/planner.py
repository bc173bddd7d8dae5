"""The fastest plan of a whole network within a memory budget: arithmetic over its pieces.

A plan gives every piece an option. What a step holds follows from what each piece keeps, lets go and works with:

    forward:   peak = max_p (L + forward_p),   L += kept_p          pieces from first to last
    backward:  peak = max_p (L + backward_p),  L += left_p          from last to first

L: bytes alive, beside those that are there in any case. Its time is the sum of theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from ..ode import Adjoint
from ..simulation.step import PieceUse

# A plan that is this much faster is worth an inexact gradient, and a change for less than the second is none.
EXACT_WORTH = 0.05
LEAST_GAIN = 1e-6
MOST_PAIRS = 8000  # so that planning takes a second or so


@dataclass(frozen=True)
class Option:
    """A way to run a piece: its adjoint, what it takes, and whether its gradient is exact."""

    adjoint: Adjoint
    use: PieceUse
    exact: bool


Options = Mapping[str, Sequence[Option]]
Plan = dict[str, Option]


def peak_of(options: Iterable[Option]) -> int:
    """Bytes alive at a time at most, beside those that are there in any case. The pieces are in their order."""
    uses = [option.use for option in options]
    alive = peak = 0
    for use in uses:
        peak = max(peak, alive + use.forward)
        alive += use.kept
    for use in reversed(uses):
        peak = max(peak, alive + use.backward)
        alive += use.left
    return max(peak, alive)


def seconds_of(options: Iterable[Option]) -> float:
    return sum(option.use.seconds for option in options)


def fastest(options: Options, budget: float) -> Plan | None:
    """The fastest plan whose peak is within the budget, or nearly: by local search from both ends. None if none is."""
    useful = {name: _undominated(found) for name, found in options.items()}
    if any(not found for found in useful.values()):
        return None
    quick = {name: min(found, key=lambda o: (o.use.seconds, o.use.kept)) for name, found in useful.items()}
    plans = [_within(quick, useful, budget), _within(least(useful), useful, budget)]
    found = [_quickened(plan, useful, budget) for plan in plans if plan is not None]
    return min(found, key=lambda plan: seconds_of(plan.values()), default=None)


def least(options: Options) -> Plan:
    """The plan of the smallest peak, or nearly."""
    starts = [
        {name: min(found, key=lambda o: o.use.kept) for name, found in options.items()},
        {name: min(found, key=lambda o: o.use.kept + o.use.backward) for name, found in options.items()},
    ]
    ends = []
    for start in starts:
        plan = start
        while (better := _lowered(plan, options)) is not None:
            plan = better
        ends.append(plan)
    return min(ends, key=lambda plan: peak_of(plan.values()))


def lean(options: Options, slack: float) -> Plan:
    """Of every piece what keeps least, among what takes at most `slack` of a forward pass more than the fastest."""
    plan = {}
    for name, found in options.items():
        once = min(option.use.once for option in found)
        limit = min(option.use.seconds for option in found) + slack * once
        near = [option for option in found if option.use.seconds <= limit]
        plan[name] = min(near, key=lambda o: (o.use.kept, not o.exact, o.use.seconds))
    return plan


def _undominated(found: Sequence[Option]) -> list[Option]:
    """Without the options that another is as good as in everything."""

    def figures(option: Option) -> tuple[float, ...]:
        use = option.use
        return (use.kept, use.kept + use.left, use.forward, use.backward, use.seconds, not option.exact)

    kept: list[Option] = []
    for option in sorted(found, key=figures):
        if not any(all(a <= b for a, b in zip(figures(k), figures(option), strict=True)) for k in kept):
            kept.append(option)
    return kept


def _changes(plan: Plan, options: Options, count: int) -> Iterable[Plan]:
    """The plans that differ in `count` pieces."""
    for names in combinations(options, count):
        for changed in _assignments(names, options):
            if all(changed[name] is not plan[name] for name in names):
                yield {**plan, **changed}


def _assignments(names: Sequence[str], options: Options) -> Iterable[Plan]:
    if not names:
        yield {}
        return
    for rest in _assignments(names[1:], options):
        for option in options[names[0]]:
            yield {names[0]: option, **rest}


def _counts(options: Options) -> tuple[int, ...]:
    """How many pieces are changed at once: two, where there are not too many pairs."""
    total = sum(map(len, options.values()))
    return (1, 2) if total * total <= MOST_PAIRS else (1,)


def _lowered(plan: Plan, options: Options) -> Plan | None:
    """A change for the smallest peak; None if there is none."""
    now = peak_of(plan.values())
    for count in _counts(options):
        found = min(_changes(plan, options, count), key=lambda p: peak_of(p.values()), default=None)
        if found is not None and peak_of(found.values()) < now:
            return found
    return None


def _within(plan: Plan, options: Options, budget: float) -> Plan | None:
    """Changes, one by one, that cost least time for the memory they save, until the plan is within the budget."""
    while (now := peak_of(plan.values())) > budget:
        seconds = seconds_of(plan.values())
        best: tuple[float, Plan] | None = None
        for count in _counts(options):
            for changed in _changes(plan, options, count):
                saved = now - max(peak_of(changed.values()), budget)
                if saved <= 0:
                    continue
                price = (seconds_of(changed.values()) - seconds) / saved
                if best is None or price < best[0]:
                    best = price, changed
            if best is not None:
                break
        if best is None:
            return None
        plan = best[1]
    return plan


def _quickened(plan: Plan, options: Options, budget: float) -> Plan:
    """Changes of one or two pieces that save time within the budget, until there are none."""
    while True:
        seconds = seconds_of(plan.values())
        for count in _counts(options):
            fitting = (p for p in _changes(plan, options, count) if seconds_of(p.values()) < seconds * (1 - LEAST_GAIN))
            found = min(
                (p for p in fitting if peak_of(p.values()) <= budget),
                key=lambda p: seconds_of(p.values()),
                default=None,
            )
            if found is not None:
                plan = found
                break
        else:
            return plan
