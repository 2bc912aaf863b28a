"""Curves of a run as one PNG, drawn with Pillow from the run's log."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

PANELS = ("loss", "iou", "iou_first", "dice", "focal", "iou_error", "lr", "gradient")
WIDTH, HEIGHT, MARGIN = 480, 200, 34
COLUMNS = 2
SMOOTHING = 0.9


def read_log(path: Path) -> list[dict[str, float]]:
    """Rows of training steps in a ``log.jsonl``."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [row for row in rows if "step" in row]


def draw_curves(log: Path, out: Path) -> None:
    """One panel per quantity over steps: each value in grey, its moving average in blue."""
    rows = read_log(log)
    lines = -(-len(PANELS) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * WIDTH, lines * HEIGHT), "white")
    for i, name in enumerate(PANELS):
        points = [(row["step"], row[name]) for row in rows if name in row]
        sheet.paste(_panel(name, points), (i % COLUMNS * WIDTH, i // COLUMNS * HEIGHT))
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out)


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average without a bias towards the start."""
    total, weight, result = 0.0, 0.0, []
    for value in values:
        total = SMOOTHING * total + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + 1 - SMOOTHING
        result.append(total / weight)
    return result


def _panel(name: str, points: Sequence[tuple[float, float]]) -> Image.Image:
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((MARGIN, MARGIN, WIDTH - 10, HEIGHT - MARGIN), outline="#999999")
    if len(points) < 2:
        draw.text((MARGIN, 10), f"{name}: too few rows", fill="black")
        return image
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    low, high = min(ys), max(ys)
    draw.text((MARGIN, 10), f"{name}: last {ys[-1]:.4g}, from {low:.4g} to {high:.4g}; steps {xs[0]:g} to {xs[-1]:g}",
              fill="black")

    def place(values: Sequence[float]) -> list[tuple[float, float]]:
        across = (WIDTH - 10 - MARGIN) / (xs[-1] - xs[0])
        up = (HEIGHT - 2 * MARGIN) / (high - low or 1)
        return [(MARGIN + (x - xs[0]) * across, HEIGHT - MARGIN - (y - low) * up)
                for x, y in zip(xs, values, strict=True)]

    draw.line(place(ys), fill="#cccccc")
    draw.line(place(smooth(ys)), fill="#1f5fbf", width=2)
    return image
