"""The command that segments one photo."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

import pocketsam
from pocketsam.commands.console import Json, Threads, out, print_json, table
from pocketsam.errors import OutputError, PromptError, UsageError


def segment(
    image: Annotated[Path, typer.Argument(help="Photo.")],
    bundle: Annotated[str, typer.Option(help="Bundle folder; default: the built-in model on PyTorch.")] = "lite0",
    point: Annotated[list[str] | None, typer.Option(help="x,y or x,y,1 (object) or x,y,0 (background).")] = None,
    box: Annotated[list[str] | None, typer.Option(help="x0,y0,x1,y1; repeat for several objects.")] = None,
    runtime: Annotated[str, typer.Option(help="Runtime name, or auto.")] = "auto",
    precision: Annotated[str, typer.Option(help="Precision of the artifacts, or auto.")] = "fp32",
    multimask: Annotated[bool | None, typer.Option(help="Three ambiguous masks, or one; default: three for a single "
                                                        "point, of which the best is drawn.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Overlay image.")] = None,
    masks: Annotated[Path | None, typer.Option(help="Folder for the masks as PNG.")] = None,
    threads: Threads = None,
    json_: Json = False,
) -> None:
    """Segment one photo with points or boxes."""
    from pocketsam.images import load_rgb
    from pocketsam.overlay import check_picture

    if output is not None:
        check_picture(output)
    points, labels = _parse_points(point or [])
    boxes = [_floats(b, (4,), "box", "x0,y0,x1,y1") for b in box or []]
    if len(boxes) > 1 and points:
        raise UsageError("several boxes cannot be combined with points; segment one object at a time.")
    if len(boxes) > 1 and multimask:
        raise UsageError("--multimask gives the three masks of one object; pass a single --box, or leave it out.")
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
        print_json({"image": {"width": rgb.shape[1], "height": rgb.shape[0]}, "masks": data, **sam.info()})
        return
    shown = table("mask", "predicted IoU", "area", "box", "file")
    for row in data:
        shown.add_row(str(row["mask"]), f"{row['score']:.3f}", str(row["area"]), str(row["bbox"]), row["file"] or "")
    out.print(shown)
    info = sam.info()
    out.print(f"{info['model']} on {info['runtime']} {info['version']} {info['precision']}: encoder with resize "
              f"{(encoded - started) * 1e3:.0f} ms, prompt with upsampling {(decoded - encoded) * 1e3:.0f} ms"
              + (f", overlay {output}" if output else ""), highlight=False)


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
    from pocketsam.files import output_errors
    from pocketsam.overlay import draw, save_image, save_mask

    if output is not None:
        with output_errors(output):
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
