"""Plots as inline SVG: no script, colours from the page's variables, so that they follow light and dark."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 16, 48
BAR, GAP = 22, 10


@dataclass(frozen=True)
class Point:
    """One mark of a scatter plot; ``color`` is the name of a CSS variable; ``front`` puts it on the drawn front."""

    x: float
    y: float
    label: str
    color: str
    front: bool = False


@dataclass(frozen=True)
class Bar:
    """One stacked bar: (name of the part, length, CSS variable)."""

    label: str
    parts: tuple[tuple[str, float, str], ...]


def scatter(points: Sequence[Point], x_label: str, y_label: str, title: str,
            y_text: Callable[[float], str] | None = None) -> str:
    """Marks with their labels over a logarithmic x, and a step line through the points of the front.

    Args:
        y_text: what a tick of the y axis says; the number itself when left out.
    """
    if not points:
        return "<p class=dim>Nothing was measured.</p>"
    ticks_x = _log_ticks([p.x for p in points])
    ticks_y = _ticks([p.y for p in points])
    to_x = _Scale(ticks_x[0], ticks_x[-1], LEFT, WIDTH - RIGHT, True)
    to_y = _Scale(ticks_y[0], ticks_y[-1], HEIGHT - BOTTOM, TOP, False)
    body = [*(f'<line class=grid x1="{to_x(t):.1f}" x2="{to_x(t):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
              f'<text class=tick text-anchor=middle x="{to_x(t):.1f}" y="{HEIGHT - BOTTOM + 16}">{_number(t)}</text>'
              for t in ticks_x),
            *(f'<line class=grid x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{to_y(t):.1f}" y2="{to_y(t):.1f}"/>'
              f'<text class=tick text-anchor=end x="{LEFT - 6}" y="{to_y(t) + 4:.1f}">{(y_text or _number)(t)}</text>'
              for t in ticks_y)]
    body.append(_front([p for p in points if p.front], to_x, to_y))
    taken: list[tuple[float, float, float]] = []
    for p in sorted(points, key=lambda p: (p.y, p.x)):
        body.append(_mark(p, to_x(p.x), to_y(p.y), taken))
    body.append(f'<text class=axis text-anchor=middle x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}">'
                f'{html.escape(x_label)}</text>'
                f'<text class=axis text-anchor=middle transform="translate(14 {(TOP + HEIGHT - BOTTOM) / 2}) '
                f'rotate(-90)">{html.escape(y_label)}</text>')
    return _svg(WIDTH, HEIGHT, title, "".join(body))


def bars(rows: Sequence[Bar], unit: str, title: str) -> str:
    """Horizontal stacked bars with their totals; parts are named on hovering and in the legend."""
    if not rows:
        return "<p class=dim>Nothing was measured.</p>"
    left = 12 + 6.6 * max(len(r.label) for r in rows)
    most = max(sum(v for _, v, _ in r.parts) for r in rows) or 1.0
    width = WIDTH + 120
    scale = (width - left - 90) / most
    height = len(rows) * (BAR + GAP) + GAP
    body = []
    for i, row in enumerate(rows):
        y = GAP + i * (BAR + GAP)
        body.append(f'<text class=label text-anchor=end x="{left - 8:.0f}" y="{y + 15}">{html.escape(row.label)}'
                    "</text>")
        x = left
        for name, value, color in row.parts:
            wide = value * scale
            body.append(f'<rect x="{x:.1f}" y="{y}" width="{max(0.0, wide - 1):.1f}" height="{BAR}" rx="2" '
                        f'fill="var({color})"><title>{html.escape(name)}: {value:.1f} {unit}</title></rect>')
            x += wide
        total = sum(v for _, v, _ in row.parts)
        body.append(f'<text class=tick x="{x + 6:.1f}" y="{y + 15}">{_number(total)} {unit}</text>')
    names: dict[str, str] = {}
    for row in rows:
        for name, _, color in row.parts:
            names.setdefault(name, color)
    legend = "".join(f'<span><i style="background:var({c})"></i>{html.escape(n)}</span>' for n, c in names.items())
    return f"{_svg(width, height, title, ''.join(body))}<p class=legend>{legend}</p>"


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points nobody beats: no other is as good in both and better in one (less x, more y)."""
    return [not any((a <= x and b >= y) and (a < x or b > y) for a, b in points) for x, y in points]


class _Scale:
    def __init__(self, low: float, high: float, start: float, stop: float, log: bool) -> None:
        self.log = log
        self.low, self.high = (math.log(low), math.log(high)) if log else (low, high)
        self.start, self.stop = start, stop

    def __call__(self, value: float) -> float:
        v = math.log(value) if self.log else value
        share = (v - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return self.start + share * (self.stop - self.start)


def _front(points: list[Point], to_x: _Scale, to_y: _Scale) -> str:
    if len(points) < 2:
        return ""
    ordered = sorted(points, key=lambda p: p.x)
    path = f"M{to_x(ordered[0].x):.1f} {to_y(ordered[0].y):.1f}"
    for p in ordered[1:]:
        path += f"H{to_x(p.x):.1f}V{to_y(p.y):.1f}"
    return f'<path class=front d="{path}"/>'


def _mark(p: Point, x: float, y: float, taken: list[tuple[float, float, float]]) -> str:
    """The mark and its label, moved up or down until it meets no other; where none fits, hovering still names it."""
    wide = 6.4 * len(p.label)
    right = x + 10 + wide < WIDTH
    start = x + 10 if right else x - 10 - wide
    mark = (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="var({p.color})"><title>{html.escape(p.label)}</title>'
            "</circle>")
    rows = [y + 4 + step for step in (0, -14, 14, -28, 28, -42, 42, 56, 70)]
    free = [r for r in rows if TOP < r < HEIGHT - BOTTOM
            and all(abs(r - t) >= 12 or start + wide < a or start > b for t, a, b in taken)]
    if not free:
        return mark
    row = free[0]
    taken.append((row, start, start + wide))
    anchor = "start" if right else "end"
    return (f'{mark}<text class=label text-anchor={anchor} x="{x + (10 if right else -10):.1f}" y="{row:.1f}">'
            f'{html.escape(p.label)}</text>')


def _ticks(values: Sequence[float]) -> list[float]:
    low, high = min(values), max(values)
    span = high - low or abs(high) * 0.1 or 1.0
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next(m for m in (1, 2, 5, 10) if span / (step * m) <= 6)
    first = math.floor(low / step) if low != high else math.floor(low / step) - 1
    last = math.ceil(high / step) if low != high else math.ceil(high / step) + 1
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def _log_ticks(values: Sequence[float]) -> list[float]:
    low, high = min(values), max(values)
    steps = [m * 10.0**e for e in range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
             for m in (1, 2, 5)]
    first = max(i for i, s in enumerate(steps) if s <= low)
    last = next((i for i, s in enumerate(steps) if s >= high and i > first), len(steps) - 1)
    return steps[first:last + 1]


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _svg(width: float, height: float, title: str, body: str) -> str:
    return (f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role=img aria-label="{html.escape(title, quote=True)}">'
            f"{body}</svg>")
