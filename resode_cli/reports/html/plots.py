"""Curves as inline SVG, in colours of the page's own sheet, so that a light and a dark page have the same file."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .markup import Markup, element, joined

WIDTH, HEIGHT = 460, 250  # in the plot's own units; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 66, 12, 10, 34
COLOURS = 8  # of the sheet, c0 to c7
MOST = 400  # points of a curve that are drawn; of more, each part's extremes
MARKED = 60  # so many points at most have a mark each
Point = tuple[float, float]


def plain(value: float) -> str:
    """Four digits of a figure."""
    return f"{value:.4g}"


@dataclass(frozen=True)
class Curve:
    """points: (step, value). colour: a number. dashed: for what is beside the main thing."""

    name: str
    points: Sequence[Point]
    colour: int
    dashed: bool = False


@dataclass(frozen=True)
class Axis:
    """A value's way to a place: linear, or by its logarithm. ticks: the values that are written at it."""

    low: float
    high: float
    logarithmic: bool
    ticks: tuple[float, ...]

    def share(self, value: float) -> float:
        """Of the way from low to high."""
        low, high, at = (math.log(v) if self.logarithmic else v for v in (self.low, self.high, value))
        return (at - low) / (high - low)


def plot(
    title: str,
    curves: Sequence[Curve],
    *,
    show: Callable[[float], str] = plain,
    logarithmic: bool = False,
    from_zero: bool = False,
) -> Markup | None:
    """A figure with a title, the curves and a legend that has each one's last value; None without any point.

    show: writes a value. logarithmic: the axis of values; what is not above 0 has no place there. from_zero: the axis
    begins there, so that heights compare as values do.
    """
    drawn = [(curve, [p for p in curve.points if p[1] > 0 or not logarithmic]) for curve in curves]
    drawn = [(curve, points) for curve, points in drawn if points]
    if not drawn:
        return None
    values = [value for _, points in drawn for _, value in points]
    steps = [step for _, points in drawn for step, _ in points]
    up = log_axis(min(values), max(values)) if logarithmic else axis(0.0 if from_zero else min(values), max(values))
    across = axis(min(0.0, *steps), max(steps), whole=True)
    parts = _grid(across, up, show)
    for curve, points in drawn:
        parts += _curve(curve, points, across, up, show)
    said = "; ".join(
        f"{curve.name} from {show(points[0][1])} at step {points[0][0]:g} to {show(points[-1][1])} at step"
        f" {points[-1][0]:g}"
        for curve, points in drawn
    )
    picture = element("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=f"{title}: {said}")
    legend = [element("li", _swatch(c), f"{c.name}: {show(points[-1][1])}") for c, points in drawn]
    scale = " (logarithmic)" if logarithmic else ""
    return element(
        "figure",
        element("figcaption", title + scale),
        picture,
        element("ul", *legend, class_="legend"),
    )


def axis(low: float, high: float, *, whole: bool = False) -> Axis:
    """A linear axis around these values, which begins and ends with a tick. whole: ticks are whole numbers."""
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        low, high = (low - abs(low) / 10, high + abs(high) / 10) if low else (0.0, 1.0)
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    step = max(step, 1.0) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(step * count for count in range(first, last + 1))
    return Axis(ticks[0], ticks[-1], False, ticks)


def log_axis(low: float, high: float) -> Axis:
    """A logarithmic axis around these values, from a power of ten to one; some of its ticks where there are many."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    last = max(last, first + 1)
    every = -(-(last - first) // 6)
    ticks = [10.0**power for power in range(first, last + 1, every)]
    if last - first == 1:
        ticks = [factor * 10.0**first for factor in (1, 2, 5, 10)]
    return Axis(10.0**first, 10.0**last, True, tuple(ticks))


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most about MOST points: of a long curve the least and the largest value of each part, in their order."""
    if len(points) <= MOST:
        return list(points)
    size = -(-2 * len(points) // MOST)
    found: list[Point] = [points[0]]
    for start in range(0, len(points), size):
        part = points[start : start + size]
        found += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return [*found, points[-1]]


def _x(across: Axis, step: float) -> float:
    return round(LEFT + across.share(step) * (WIDTH - LEFT - RIGHT), 1)


def _y(up: Axis, value: float) -> float:
    return round(HEIGHT - BOTTOM - up.share(value) * (HEIGHT - TOP - BOTTOM), 1)


def _grid(across: Axis, up: Axis, show: Callable[[float], str]) -> list[Markup]:
    found = []
    for tick in up.ticks:
        y = _y(up, tick)
        found.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
        found.append(element("text", show(tick), x=LEFT - 6, y=y + 4, text_anchor="end"))
    for tick in across.ticks:
        x = _x(across, tick)
        found.append(element("line", x1=x, x2=x, y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM + 4, class_="grid"))
        if tick != across.ticks[-1]:
            found.append(element("text", f"{tick:,.0f}", x=x, y=HEIGHT - BOTTOM + 17, text_anchor="middle"))
    last = f"step {across.ticks[-1]:,.0f}"
    return [*found, element("text", last, x=WIDTH - RIGHT, y=HEIGHT - BOTTOM + 17, text_anchor="end")]


def _curve(curve: Curve, points: Sequence[Point], across: Axis, up: Axis, show: Callable[[float], str]) -> list[Markup]:
    colour = f"c{curve.colour % COLOURS}"
    places = [(_x(across, step), _y(up, value)) for step, value in thinned(points)]
    line = "M" + "L".join(f"{x:g} {y:g}" for x, y in places)
    found = [element("path", d=line, class_=f"curve {colour}{' dashed' if curve.dashed else ''}")]
    if len(points) <= MARKED and not curve.dashed:
        for step, value in points:
            told = element("title", f"{curve.name}, step {step:g}: {show(value)}")
            x, y = _x(across, step), _y(up, value)
            found.append(element("circle", told, cx=x, cy=y, r=2.6, class_=colour))
    return found


def _swatch(curve: Curve) -> Markup:
    line = element(
        "line", x1=0, x2=22, y1=5, y2=5, class_=f"curve c{curve.colour % COLOURS}{' dashed' if curve.dashed else ''}"
    )
    return element("svg", line, viewBox="0 0 22 10", class_="swatch", aria_hidden="true")


def figures(found: Sequence[Markup | None]) -> Markup:
    """Plots side by side, as many as the page is wide."""
    return element("div", joined(figure for figure in found if figure is not None), class_="plots")
