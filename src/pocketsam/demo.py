"""The whole toolkit in one go: export the built-in model, run it everywhere, show the masks side by side."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pocketsam.api import export, open_bundle
from pocketsam.builtin import BUILTIN_MODEL
from pocketsam.bundle import Bundle
from pocketsam.doctor import exporters, machine
from pocketsam.errors import MissingDependency, PocketSamError, first_line
from pocketsam.everything import settings_for
from pocketsam.files import staged_file
from pocketsam.images import Rgb, load_rgb
from pocketsam.labels import overlay, sa1b
from pocketsam.overlay import draw
from pocketsam.photos import BOXES, CLICKS, PHOTOS, photo_paths
from pocketsam.predictor import Predictor
from pocketsam.registry import RUNTIME_FORMATS
from pocketsam.runtime import check_threads
from pocketsam.tune import time_runtime

PRECISIONS = ("fp32",)
MOST_JOBS = 4
THUMBNAIL = 300
PROMPTS = ("click", "box", "everything")
EVERYTHING_GRID = 8
Report = Callable[[str], None]

STYLE = """
:root { color-scheme: light dark; --line: #d0d0d0; --dim: #666; }
@media (prefers-color-scheme: dark) { :root { --line: #444; --dim: #aaa; } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 90rem; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; } td, th { border: 1px solid var(--line); padding: .3rem .6rem; }
th { text-align: left; } .grid { overflow-x: auto; } img { display: block; width: 300px; } .dim { color: var(--dim); }
"""


@dataclass(frozen=True)
class Column:
    """One runtime's pictures: (photo, prompt) -> JPEG bytes and caption."""

    title: str
    cells: dict[tuple[str, str], tuple[bytes, str]]


def run(folder: Path, threads: int | None, report: Report) -> tuple[list[list[str]], Path]:
    """Export, segment, write ``demo.html``.

    Returns:
        Rows (format, precision, MB, agreement, encoder ms, prompt ms, note) and the page's path.

    Raises:
        MissingDependency: nothing can be exported here.
    """
    threads = check_threads(threads)
    formats = [row.name for row in exporters() if row.usable]
    if not formats:
        raise MissingDependency("torch", "all", "the demo")
    out = folder / f"{BUILTIN_MODEL}.bundle"
    bundle = export(BUILTIN_MODEL, formats=formats, precisions=PRECISIONS, out=out, report=report,
                    jobs=min(machine()["cores"], MOST_JOBS))
    rows: list[list[str]] = []
    columns: list[Column] = []
    for runtime, format_ in RUNTIME_FORMATS.items():
        for precision in PRECISIONS:
            row, column = _run_one(bundle, runtime, format_, precision, threads, report)
            rows.append(row)
            columns += [column] if column else []
    page = folder / "demo.html"
    with staged_file(page) as staged:
        staged.write_text(_page(rows, columns), encoding="utf-8")
    return rows, page


def _run_one(bundle: Bundle, runtime: str, format_: str, precision: str, threads: int | None,
             report: Report) -> tuple[list[str], Column | None]:
    """A failure becomes a row."""
    try:
        parts = [bundle.find(format_, precision, g) for g in ("encoder", "decoder")]
        report(f"segmenting with {runtime} {precision}")
        engine = open_bundle(bundle, runtime, precision, threads)
        encoder, decoder = time_runtime(engine)
        # The evaluator of Core ML files proves them; hundreds of prompts would keep it busy for a minute.
        prompts = PROMPTS if "note" not in engine.info() else PROMPTS[:2]
        column = Column(f"{runtime} {precision}", _segment_all(Predictor(engine), prompts))
    except PocketSamError as e:
        return [format_, precision, "", "", "", "", str(e)], None
    except Exception as e:  # engines raise classes of their own
        return [format_, precision, "", "", "", "", f"{runtime} failed ({first_line(e)})"], None
    size = sum(p.bytes for p in parts) / 1e6
    note = str(engine.info().get("note", ""))
    return [format_, precision, f"{size:.1f}", f"{parts[0].measured['all']['mean']:.5f}", f"{encoder:.1f}",
            f"{decoder:.1f}", note], column


def _segment_all(sam: Predictor, prompts: Sequence[str]) -> dict[tuple[str, str], tuple[bytes, str]]:
    cells = {}
    for name, path in zip(PHOTOS, photo_paths(), strict=True):
        rgb = load_rgb(path)
        sam.set_image(rgb)
        click, box = CLICKS[name], BOXES[name]
        guesses = sam.predict(points=[click], labels=[1])
        best = guesses.best
        pictures = {
            "click": (draw(rgb, guesses.masks[best:best + 1], [click], [1]), guesses.scores[best]),
        }
        boxed = sam.predict(box=box, multimask=False)
        pictures["box"] = (draw(rgb, boxed.masks, boxes=[box]), boxed.scores[0])
        for prompt, (picture, score) in pictures.items():
            cells[name, prompt] = (_jpeg(picture), f"predicted IoU {score:.2f}")
        if "everything" in prompts:
            cells[name, "everything"] = _everything(sam, rgb)
    return cells


def _everything(sam: Predictor, rgb: Rgb) -> tuple[bytes, str]:
    """All masks from a coarse grid, so that the demo stays a matter of minutes on every runtime."""
    settings = settings_for(sam.spec.name, points_per_side=EVERYTHING_GRID)
    records = sam.everything(rgb, settings)
    rows = sa1b(records, "", rgb.shape[0], rgb.shape[1], 1)["annotations"]
    return _jpeg(overlay(rgb, rows)), f"{len(records)} masks from {EVERYTHING_GRID} x {EVERYTHING_GRID} points"


def _jpeg(picture: Image.Image) -> bytes:
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _page(rows: list[list[str]], columns: list[Column]) -> str:
    heads = ("format", "precision", "MB", "mask agreement", "encoder ms", "prompt ms", "note")
    facts = machine()
    body = [f"<h1>PocketSAM demo: {BUILTIN_MODEL}</h1>",
            f"<p class=dim>{html.escape(facts['cpu'])}, {facts['cores']} cores, Python {facts['python']}. Agreement: "
            "mean mask IoU with PyTorch. Times: best of a few calls.</p>",
            _table([heads, *rows]), "<div class=grid><table><tr><th>photo, prompt</th>"]
    body += [f"<th>{html.escape(c.title)}</th>" for c in columns]
    body.append("</tr>")
    for name in PHOTOS:
        for prompt in PROMPTS:
            body.append(f"<tr><th>{name}, {prompt}</th>")
            for column in columns:
                if (name, prompt) not in column.cells:
                    body.append("<td class=dim>not run on the evaluator</td>")
                    continue
                jpeg, caption = column.cells[name, prompt]
                data = base64.b64encode(jpeg).decode()
                body.append(f'<td><img alt="{name} segmented with a {prompt} by {html.escape(column.title)}" '
                            f'src="data:image/jpeg;base64,{data}"><span class=dim>{caption}</span></td>')
            body.append("</tr>")
    body.append("</table></div>")
    return (f"<!doctype html><html lang=en><meta charset=utf-8><title>PocketSAM demo</title><style>{STYLE}</style>"
            f"{''.join(body)}</html>\n")


def _table(rows: list[tuple[str, ...] | list[str]]) -> str:
    lines = []
    for i, row in enumerate(rows):
        tag = "td" if i else "th"
        lines.append("<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in row) + "</tr>")
    return f"<table>{''.join(lines)}</table>"
