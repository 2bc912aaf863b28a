"""The ``pocketsam`` command: thin, with heavy imports inside the handlers."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import pocketsam
from pocketsam.errors import OutputError, PocketSamError, PromptError, UsageError

app = typer.Typer(help="Segment Anything on phones, browsers and boards: export, run and measure, checked against "
                       "PyTorch.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
# A pipe has no width: leave tables whole there instead of cutting them at 80 columns.
out = Console(width=None if sys.stdout.isatty() else 240)
err = Console(stderr=True)
STARTED = time.perf_counter()

Json = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON instead of a table.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; the engine's default when left out.")]


def main() -> None:
    """Entry point: a PocketSamError becomes one sentence and exit code 2."""
    try:
        app()
    except PocketSamError as e:
        err.print(f"[bold red]error:[/] {_escape(str(e))}", soft_wrap=True, highlight=False)
        sys.exit(2)


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


def _version(show: bool) -> None:
    if show:
        out.print(pocketsam.__version__)
        raise typer.Exit


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True,
                                                help="Print the version and exit.")] = False) -> None:
    """Options of every command."""


@app.command()
def models(json_: Json = False) -> None:
    """List supported models and where their official checkpoints are."""
    from pocketsam.models.catalog import SPECS
    from pocketsam.models.checkpoints import CHECKPOINTS

    if json_:
        rows = [{"model": c.model, "file": c.file, "url": c.url, "sha256": c.sha256, "licence": c.licence,
                 "bytes": c.bytes, "image_size": SPECS[c.model].image_size} for c in CHECKPOINTS]
        _print_json(rows)
        return
    table = _table("model", "checkpoint", "MB", "licence", "sha256", "url")
    for c in CHECKPOINTS:
        size = "?" if c.bytes is None else f"{c.bytes / 1e6:.0f}"
        table.add_row(c.model, c.file, size, c.licence, "unknown" if c.sha256 is None else c.sha256[:12], c.url)
    out.print(table)


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="Model name, see `pocketsam models`.")] = "lite0",
    checkpoint: Annotated[Path | None, typer.Option(help="Official checkpoint file; lite0 needs none.")] = None,
    to: Annotated[str, typer.Option(help="Formats, separated by commas, or all.")] = "onnx",
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Bundle folder; default MODEL.bundle.")] = None,
    precision: Annotated[str, typer.Option(help="Precisions, separated by commas.")] = "fp32",
    slots: Annotated[int | None, typer.Option(help="Prompt slots of the decoder; default 8.")] = None,
    gate: Annotated[float | None, typer.Option(help="Least mean mask agreement with PyTorch, 0 to 1.")] = None,
    parity_images: Annotated[Path | None, typer.Option(help="Folder of images to measure agreement on; default: "
                                                            "photos that ship with the package.")] = None,
    json_: Json = False,
) -> None:
    """Export a checkpoint to a bundle, proven against PyTorch."""
    images = None if parity_images is None else _images_in(parity_images)

    bundle = pocketsam.export(model, checkpoint=checkpoint, formats=_formats(to), precisions=_names(precision),
                              out=output or Path(f"{model}.bundle"), slots=slots, gate=gate, images=images,
                              report=lambda t: _progress(t, json_))
    if json_:
        from pocketsam.bundle import to_json

        print(to_json(bundle), end="")
        return
    table = _table("artifact", "MB", "mask agreement", "5th percentile", "worst", "max tensor error")
    for a in bundle.artifacts:
        m = a.measured
        worst = max((v for k, v in m["max_tensor_error"].items() if k in {o["name"] for o in a.outputs}), default=0.0)
        table.add_row(a.path, f"{a.bytes / 1e6:.1f}", f"{m['all']['mean']:.5f}", f"{m['all']['p5']:.5f}",
                      f"{m['all']['worst']:.5f}", f"{worst:.1e}")
    out.print(table)
    out.print(f"{bundle.root}: {bundle.spec.name}, weights licence {bundle.weights['licence']}", highlight=False)


@app.command()
def segment(
    image: Annotated[Path, typer.Argument(help="Photo.")],
    bundle: Annotated[str, typer.Option(help="Bundle folder; default: the built-in model on PyTorch.")] = "lite0",
    point: Annotated[list[str] | None, typer.Option(help="x,y or x,y,1 (object) or x,y,0 (background).")] = None,
    box: Annotated[list[str] | None, typer.Option(help="x0,y0,x1,y1; repeat for several objects.")] = None,
    runtime: Annotated[str, typer.Option(help="Runtime name, or auto.")] = "auto",
    precision: Annotated[str, typer.Option(help="Precision of the artifacts.")] = "fp32",
    multimask: Annotated[bool | None, typer.Option(help="Three ambiguous masks, or one; default: three for a single "
                                                        "point, of which the best is drawn.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Overlay image.")] = None,
    masks: Annotated[Path | None, typer.Option(help="Folder for the masks as PNG.")] = None,
    threads: Threads = None,
    json_: Json = False,
) -> None:
    """Segment one photo with points or boxes."""
    from pocketsam.images import load_rgb

    points, labels = _parse_points(point or [])
    boxes = [_floats(b, (4,), "box", "x0,y0,x1,y1") for b in box or []]
    if len(boxes) > 1 and points:
        raise UsageError("several boxes cannot be combined with points; segment one object at a time.")
    if not boxes and not points:
        raise PromptError("no prompt was given; pass --point x,y or --box x0,y0,x1,y1.")
    rgb = load_rgb(image)
    sam = pocketsam.load(bundle, runtime=runtime, precision=precision, threads=threads)
    # Prompts are checked before the encoder runs, so that a typo does not cost its time.
    from pocketsam.geometry import Frame
    from pocketsam.prompts import Prompt, decoder_inputs

    frame = Frame.of(rgb.shape[0], rgb.shape[1], sam.spec)
    each_box: list[list[float] | None] = [*boxes] or [None]
    checked = [Prompt.of(frame, sam.spec, points or None, labels or None, b) for b in each_box]
    decoder_inputs(checked, frame, sam.spec, sam.runtime.slots)
    started = time.perf_counter()
    sam.set_image(rgb)
    encoded = time.perf_counter()
    several = multimask if multimask is not None else checked[0].single_click
    result = (sam.predict_boxes(boxes) if len(boxes) > 1 else
              sam.predict(points or None, labels or None, boxes[0] if boxes else None, multimask=several))
    decoded = time.perf_counter()
    files = _write_segment(rgb, result, output, masks, points, labels, boxes)
    data = _segment_rows(result, files)
    if json_:
        _print_json({"image": {"width": rgb.shape[1], "height": rgb.shape[0]}, "masks": data, **sam.info()})
        return
    table = _table("mask", "predicted IoU", "area", "box", "file")
    for row in data:
        table.add_row(str(row["mask"]), f"{row['score']:.3f}", str(row["area"]), str(row["bbox"]), row["file"] or "")
    out.print(table)
    info = sam.info()
    out.print(f"{info['model']} on {info['runtime']} {info['version']} {info['precision']}: encoder with resize "
              f"{(encoded - started) * 1e3:.0f} ms, prompt with upsampling {(decoded - encoded) * 1e3:.0f} ms"
              + (f", overlay {output}" if output else ""), highlight=False)


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    checkpoint: Annotated[Path | None, typer.Option(help="The checkpoint it was exported from; lite0 needs "
                                                         "none.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of images; default: the shipped photos.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the prompts.")] = 0,
    json_: Json = False,
) -> None:
    """Measure every artifact against PyTorch again; exit code 1 if one falls below its gate."""
    from pocketsam.bundle import read_bundle
    from pocketsam.images import load_rgb
    from pocketsam.photos import photo_paths
    from pocketsam.verify import verify as run

    opened = read_bundle(bundle)
    files = photo_paths() if images is None else _images_in(images)
    reference = pocketsam.load(opened.spec.name, checkpoint=checkpoint, runtime="pytorch")
    rows = run(opened, reference, [load_rgb(f) for f in files], seed, lambda t: _progress(t, json_))
    if json_:
        _print_json([r.to_json() for r in rows])
    else:
        table = _table("format", "precision", "kind", "prompts", "mean", "5th percentile", "worst", "gate", "result")
        for row in rows:
            for kind in ("box", "point"):
                m = row.measured.get(kind)
                numbers = [str(m["prompts"]), *(f"{m[k]:.5f}" for k in ("mean", "p5", "worst"))] if m else [""] * 4
                verdict = _escape(row.problem) or ("passed" if row.passed else "BELOW GATE")
                table.add_row(row.format, row.precision, kind, *numbers, str(row.gate), verdict)
        out.print(table)
    if not all(r.passed for r in rows):
        raise typer.Exit(1)


@app.command()
def tune(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    threads: Threads = None,
    fresh: Annotated[bool, typer.Option(help="Measure again even if this machine was measured before.")] = False,
    json_: Json = False,
) -> None:
    """Time the runtimes of a bundle on this machine and show which one `auto` takes."""
    from dataclasses import asdict

    from pocketsam.bundle import read_bundle
    from pocketsam.tune import choose
    from pocketsam.tune import tune as run

    candidates = run(read_bundle(bundle), threads, fresh, lambda t: _progress(t, json_))
    best = choose(candidates)
    if json_:
        _print_json({"chosen": asdict(best), "candidates": [asdict(c) for c in candidates]})
        return
    table = _table("runtime", "precision", "encoder ms", "prompt ms", "mask agreement", "")
    for c in candidates:
        note = _escape(c.problem) or ("chosen by auto" if c == best else "")
        times = ("", "") if c.problem else (f"{c.encoder_ms:.1f}", f"{c.decoder_ms:.1f}")
        table.add_row(c.runtime, c.precision, *times, f"{c.agreement:.5f}", note)
    out.print(table)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the page.")] = Path("build"),
    threads: Threads = None,
) -> None:
    """Export the built-in model to every format available here, segment the shipped photos, write one HTML page."""
    from pocketsam.demo import run

    rows, page = run(output, threads, lambda t: _progress(t, False))
    table = _table("format", "precision", "MB", "mask agreement", "encoder ms", "prompt ms", "note")
    for row in rows:
        table.add_row(*(_escape(cell) for cell in row))
    out.print(table)
    out.print(f"page: {page}", highlight=False)


@app.command()
def doctor(json_: Json = False) -> None:
    """Show which runtimes and exporters are usable here, and the command that would add the others."""
    from pocketsam import doctor as checks

    data = checks.report()
    if json_:
        _print_json(data)
        return
    machine = data["machine"]
    out.print(f"Python {machine['python']}, {machine['system']}, {machine['cpu']}, {machine['cores']} cores, "
              f"{' '.join(machine['features'])}", highlight=False)
    table = _table("kind", "name", "usable", "version", "to install")
    for kind, rows in (("runtime", data["runtimes"]), ("export", data["exporters"])):
        for row in rows:
            table.add_row(kind, row["name"], "yes" if row["usable"] else "no", row["version"], _escape(row["remedy"]))
    out.print(table)


def _table(*columns: str) -> Table:
    """A table whose cells wrap instead of being cut off."""
    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _progress(text: str, quiet: bool) -> None:
    """One line for a step of long work, with the seconds since the command began."""
    if not quiet:
        err.print(f"[dim]{time.perf_counter() - STARTED:6.1f} s[/]  {_escape(text)}", highlight=False)


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=2))


def _names(text: str) -> list[str]:
    return [t.strip() for t in text.split(",") if t.strip()]


def _formats(text: str) -> list[str]:
    from pocketsam.registry import FORMATS

    return list(FORMATS) if text == "all" else _names(text)


def _images_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder; expected a folder of images.")
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp", ".bmp"))
    if not found:
        raise UsageError(f"{folder} holds no JPEG, PNG, WebP or BMP image.")
    return found


def _floats(text: str, counts: tuple[int, ...], kind: str, form: str) -> list[float]:
    try:
        values = [float(v) for v in text.split(",")]
    except ValueError:
        values = []
    if len(values) not in counts:
        raise PromptError(f"{kind} {text!r} is not understood; expected {form}.")
    return values


def _parse_points(texts: list[str]) -> tuple[list[list[float]], list[float]]:
    rows = [_floats(t, (2, 3), "point", "x,y or x,y,label") for t in texts]
    return [r[:2] for r in rows], [r[2] if len(r) == 3 else 1.0 for r in rows]


def _write_segment(rgb: Any, result: Any, output: Path | None, folder: Path | None, points: list[list[float]],
                   labels: list[float], boxes: list[list[float]]) -> list[str | None]:
    from pocketsam.overlay import draw, save_image, save_mask

    if output is not None:
        if output.is_dir():
            raise OutputError(f"{output} is a folder; pass an image file name to -o.")
        best = result.masks if len(boxes) > 1 else result.masks[result.best][None]
        save_image(draw(rgb, best, points, labels, boxes), output)
    if folder is None:
        return [None] * len(result.masks)
    files: list[str | None] = []
    for i, mask in enumerate(result.masks):
        path = folder / f"mask_{i}.png"
        save_mask(mask, path)
        files.append(str(path))
    return files


def _segment_rows(result: Any, files: list[str | None]) -> list[dict[str, Any]]:
    import numpy as np

    from pocketsam import rle

    rows = []
    for i, (mask, score) in enumerate(zip(result.masks, result.scores, strict=True)):
        ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = [int(xs[0]), int(ys[0]), int(xs[-1] - xs[0] + 1), int(ys[-1] - ys[0] + 1)] if len(xs) else [0, 0, 0, 0]
        rows.append({"mask": i, "score": float(score), "area": int(mask.sum()), "bbox": box,
                     "segmentation": rle.encode(mask), "file": files[i]})
    return rows


if __name__ == "__main__":
    main()
