"""The commands on top of automatic masks: proposals, edges, and instances from a detector's boxes."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

import pocketsam
from pocketsam.commands.console import Json, Threads, err, escape, out, print_json, progress
from pocketsam.commands.everything import Bundle, Precision, Runtime


def proposals(
    photo: Annotated[Path, typer.Argument(help="Photo.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="JSON file.")],
    bundle: Bundle = "lite0",
    runtime: Runtime = "auto",
    precision: Precision = "fp32",
    grid: Annotated[int, typer.Option(help="Points per side; the paper's is 64.")] = 32,
    most: Annotated[int, typer.Option(help="At most this many.")] = 1000,
    threads: Threads = None,
) -> None:
    """Rank class-agnostic object proposals, best first, as SA-1B style JSON."""
    from pocketsam.files import check_writable
    from pocketsam.images import load_rgb
    from pocketsam.labels import sa1b, write_json
    from pocketsam.proposals import PROPOSALS, propose

    settings = replace(PROPOSALS, points_per_side=grid)
    check_writable(output)
    rgb = load_rgb(photo)
    sam = pocketsam.load(bundle, runtime=runtime, precision=precision, threads=threads)
    records = propose(sam, rgb, settings, most)
    write_json(sa1b(records, photo.name, rgb.shape[0], rgb.shape[1], 1), output)
    out.print(f"{len(records)} proposals: {output}", highlight=False)


def edges(
    photo: Annotated[Path, typer.Argument(help="Photo.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Grey PNG, white is a sure edge.")],
    bundle: Bundle = "lite0",
    runtime: Runtime = "auto",
    precision: Precision = "fp32",
    grid: Annotated[int, typer.Option(help="Points per side, 1 to 512; the paper's is 16.")] = 16,
    threads: Threads = None,
) -> None:
    """Draw the edges that automatic masks agree on."""
    import numpy as np
    from PIL import Image

    from pocketsam.edges import find_edges
    from pocketsam.everything import Settings
    from pocketsam.files import check_writable
    from pocketsam.images import load_rgb
    from pocketsam.overlay import check_picture, save_image

    Settings(points_per_side=grid)
    check_writable(output)
    check_picture(output)
    rgb = load_rgb(photo)
    sam = pocketsam.load(bundle, runtime=runtime, precision=precision, threads=threads)
    strength = find_edges(sam, rgb, grid)
    save_image(Image.fromarray(np.rint(strength * 255).astype(np.uint8)), output)
    out.print(f"{np.count_nonzero(strength)} edge pixels: {output}", highlight=False)


def instances(
    photos: Annotated[Path, typer.Argument(metavar="IMAGE_OR_FOLDER", help="The photos that were detected on.")],
    boxes: Annotated[Path, typer.Option(help="COCO JSON, or CSV with image, x0, y0, x1, y1 [, category, score].")],
    output: Annotated[Path, typer.Option("-o", "--output", help="COCO results JSON.")],
    bundle: Bundle = "lite0",
    runtime: Runtime = "auto",
    precision: Precision = "fp32",
    embeddings: Annotated[Path | None, typer.Option(help="Folder that keeps embeddings between runs.")] = None,
    threads: Threads = None,
    json_: Json = False,
) -> None:
    """Turn the boxes of any detector into masks."""
    from pocketsam.errors import ImageError
    from pocketsam.files import check_writable
    from pocketsam.folders import embed
    from pocketsam.images import load_rgb, photos_in
    from pocketsam.instances import Detection, Photos, read_detections, segment_boxes
    from pocketsam.labels import write_json

    groups: dict[Path, list[Detection]] = {}
    check_writable(output)
    known = Photos(photos_in(photos))
    for d in read_detections(boxes):
        groups.setdefault(known.find(d.image), []).append(d)
    sam = pocketsam.load(bundle, runtime=runtime, precision=precision, threads=threads)
    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    started = time.perf_counter()
    for i, (photo, detections) in enumerate(groups.items()):
        try:
            rows += segment_boxes(sam, load_rgb(photo), detections, lambda rgb: embed(sam, rgb, embeddings))
        except ImageError as e:
            problems.append(str(e))
        progress(f"[{i + 1}/{len(groups)}] {photo.name}: {len(detections)} boxes", json_)
    seconds = time.perf_counter() - started
    write_json(rows, output)
    rate = len(rows) / seconds
    if json_:
        print_json({"masks": len(rows), "photos": len(groups), "failed": len(problems), "seconds": seconds,
                    "masks_per_second": rate, "file": str(output), **sam.info()})
    else:
        out.print(f"{len(rows)} masks on {len(groups)} photos, {rate:.1f} masks/s with encoding, {len(problems)} "
                  f"unreadable: {output}", highlight=False)
    for problem in problems:
        err.print(f"[bold red]unreadable:[/] {escape(problem)}", soft_wrap=True, highlight=False)
    if problems:
        raise typer.Exit(1)
