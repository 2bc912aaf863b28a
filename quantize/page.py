"""The int8 report as one HTML file: the table, and the worst masks as pictures."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from pocketsam.bundle import Bundle
from pocketsam.doctor import machine
from pocketsam.files import staged_file
from pocketsam.geometry import Bools
from pocketsam.overlay import draw
from pocketsam.quantize.report import HEADS, Case, Row

SIDE = 320
STYLE = """
:root { color-scheme: light dark; --line: #d0d0d0; }
@media (prefers-color-scheme: dark) { :root { --line: #444; } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 90rem; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; } td, th { border: 1px solid var(--line); padding: .3rem .6rem; }
"""


def write(path: Path, bundle: Bundle, rows: Sequence[Row], cases: Sequence[Case]) -> None:
    """Write the page atomically.

    Args:
        cases: the prompts whose masks agree least.

    Raises:
        OutputError: it cannot be written.
    """
    facts = machine()
    body = [f"<h1>int8: {html.escape(bundle.spec.name)}</h1>",
            f"<p>{html.escape(facts['cpu'])}, {facts['cores']} cores, {' '.join(facts['features'])}. "
            f"{html.escape(', '.join(f'{k} {v}' for k, v in bundle.tools.items()))}</p>",
            table(HEADS, [r.cells() for r in rows]), "<h2>The worst masks</h2><table>",
            "<tr><th>prompt</th><th>fp32</th><th>int8</th><th>difference</th></tr>"]
    for case in cases:
        cells = [f"<td><img alt='{name}' src='data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}'></td>"
                 for name, jpeg in zip(("fp32", "int8", "difference"), pictures(case), strict=True)]
        body.append(f"<tr><th>{html.escape(case.title)}<br>IoU {case.iou:.3f}</th>{''.join(cells)}</tr>")
    body.append("</table>")
    with staged_file(path) as staged:
        staged.write_text(f"<!doctype html><html lang=en><meta charset=utf-8><title>int8</title><style>{STYLE}</style>"
                          f"{''.join(body)}</html>\n", encoding="utf-8")


def pictures(case: Case) -> list[bytes]:
    """JPEGs of the fp32 mask, the int8 mask, and the pixels in which they differ."""
    return [_jpeg(case, m) for m in (case.fp32, case.int8, np.logical_xor(case.fp32, case.int8))]


def _jpeg(case: Case, mask: Bools) -> bytes:
    picture: Image.Image = draw(case.image, mask[None])
    picture.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table of texts."""
    lines = ["<tr>" + "".join(f"<th>{html.escape(h)}</th>" for h in heads) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows]
    return f"<table>{''.join(lines)}</table>"
