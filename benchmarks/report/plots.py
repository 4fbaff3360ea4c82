"""Plots as inline SVG: bars with their spread, and lines. No IO, no scripts, no external resources."""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import NamedTuple

from benchmarks.report.figures import Figure, short

WIDTH = 760
COLOURS = {"bare publisher": "#8a8f98", "gateway": "#2563eb", "fastapi": "#e07b1a", "baseline": "#12946a"}
OTHER_COLOURS = ("#2563eb", "#e07b1a", "#12946a", "#b4367e", "#8a8f98")

_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 12, 40  # room around a line plot, in pixels
_HEIGHT = 260


class Ticks(NamedTuple):
    """Marks of an axis, with their labels."""

    places: Sequence[float]
    labels: Sequence[str]


def colour(name: str, number: int = 0) -> str:
    """Return the colour of a series. A system has the same one in every plot."""
    return COLOURS.get(name, OTHER_COLOURS[number % len(OTHER_COLOURS)])


def bars(groups: Mapping[str, Mapping[str, Figure]], unit: str, *, one_scale: bool = False) -> str:
    """Return horizontal bars. Each group has its own scale, since batch sizes differ by orders of magnitude."""
    overall = max((figure.highest for figures in groups.values() for figure in figures.values()), default=0) or 1
    group_width = 8 * max(map(len, groups), default=0) + 8
    label_width = group_width + 7 * max((len(name) for figures in groups.values() for name in figures), default=0) + 12
    value_width, height, gap = 190, 20, 12
    room = WIDTH - label_width - value_width
    parts: list[str] = []
    y = 4.0
    for group, figures in groups.items():
        largest = overall if one_scale else max((figure.highest for figure in figures.values()), default=0) or 1
        parts.append(_text(0, y + height * len(figures) / 2 + 4, group, bold=True))
        for name, figure in figures.items():
            middle = y + height / 2
            end = label_width + figure.median / largest * room
            low, high = (label_width + value / largest * room for value in (figure.lowest, figure.highest))
            parts.append(_text(label_width - 6, middle + 4, name, anchor="end"))
            parts.append(
                f'<rect x="{label_width}" y="{y + 3:.1f}" width="{max(end - label_width, 1):.1f}" '
                f'height="{height - 6}" rx="2" fill="{colour(name)}"/>'
            )
            if high > low:
                parts.append(_line(low, middle, high, middle, "spread"))
            parts.append(_text(max(end, high) + 8, middle + 4, f"{figure.shown(short)} {unit}"))
            y += height
        y += gap
    return _svg(y, parts)


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x_label: str,
    y_label: str,
    x_ticks: Ticks | None = None,
    scale_x: Callable[[float], float] = lambda x: x,
) -> str:
    """Return lines over one x axis. The y axis begins at 0, so that a small change does not look like a large one."""
    points = {name: [(scale_x(x), y) for x, y in line] for name, line in series.items() if line}
    if not points:
        return "<p>No data.</p>"
    xs = [x for line in points.values() for x, _ in line]
    x_low, x_high = min(xs), max(xs)
    y_ticks = _round_ticks(0, max(y for line in points.values() for _, y in line) * 1.05 or 1)
    y_high = y_ticks.places[-1]
    width, height = WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def at_x(x: float) -> float:
        return _LEFT + (x - x_low) / ((x_high - x_low) or 1) * width

    def at_y(y: float) -> float:
        return _TOP + height - y / y_high * height

    parts: list[str] = []
    for y, label in zip(*y_ticks, strict=True):
        parts.append(_line(_LEFT, at_y(y), WIDTH - _RIGHT, at_y(y), "grid"))
        parts.append(_text(_LEFT - 6, at_y(y) + 4, label, anchor="end"))
    for x, label in zip(*(x_ticks or _round_ticks(x_low, x_high)), strict=True):
        if x_low <= scale_x(x) <= x_high:
            parts.append(_line(at_x(scale_x(x)), _TOP, at_x(scale_x(x)), _TOP + height, "grid"))
            parts.append(_text(at_x(scale_x(x)), _TOP + height + 16, label, anchor="middle"))
    for number, (name, line) in enumerate(points.items()):
        path = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour(name, number)}" stroke-width="2"/>')
    parts.append(_text(_LEFT + width / 2, _HEIGHT - 6, x_label, anchor="middle"))
    parts.append(
        f'<text transform="translate(12 {_TOP + height / 2:.0f}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
    legend = "".join(
        f'<span><i style="background:{colour(name, number)}"></i>{escape(name)}</span>'
        for number, name in enumerate(points)
    )
    return _svg(_HEIGHT, parts) + (f'<p class="legend">{legend}</p>' if len(points) > 1 else "")


PERCENTILE_TICKS = Ticks((50, 90, 99, 99.9, 99.99, 99.999), ("50 %", "90 %", "99 %", "99.9 %", "99.99 %", "99.999 %"))


def percentile_scale(percentile: float) -> float:
    """Map a percentile to its place on the axis: 90, 99, 99.9 are equally far apart."""
    return -math.log10(1 - min(percentile, 99.9999) / 100)


def _round_ticks(low: float, high: float) -> Ticks:
    """Return about five marks at round numbers. The last one is at or above `high`."""
    rough = (high - low) / 5 or 1
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    places = [number * step for number in range(first, last + 1)]
    return Ticks(places, [f"{place:,.{max(0, -math.floor(math.log10(step)))}f}" for place in places])


def standalone(svg: str) -> str:
    """Return an inline plot as an SVG file of its own, readable on a light and on a dark page."""
    style = "<style>text{font:11px sans-serif;fill:#6b7280}line{stroke:#6b7280}</style>"
    return svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(">", f">{style}", 1) + "\n"


def _svg(height: float, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img">{"".join(parts)}</svg>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", bold: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'
