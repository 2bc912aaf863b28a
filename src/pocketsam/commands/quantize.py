"""The command that adds int8 to a bundle and shows what it costs and gains."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import pocketsam
from pocketsam.commands.console import Json, escape, names, out, print_json, progress, table
from pocketsam.photos import CALIBRATION_IMAGES


def quantize(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder with fp32 artifacts.")],
    checkpoint: Annotated[Path | None, typer.Option(help="The checkpoint it was exported from; lite0 needs "
                                                         "none.")] = None,
    recipe: Annotated[str, typer.Option(help="Recipes, separated by commas: int8, int8-dynamic, "
                                             "int8-weights.")] = "int8",
    calibration: Annotated[Path | None, typer.Option(help="Folder or pack of images to calibrate on; default: the "
                                                          "shipped photos and crops of them.")] = None,
    calibration_images: Annotated[int, typer.Option(help="Images to calibrate on; fewer are quicker and "
                                                         "less certain.")] = CALIBRATION_IMAGES,
    gate: Annotated[float | None, typer.Option(help="Least mean mask agreement with PyTorch; default 0.97.")] = None,
    search: Annotated[float, typer.Option(help="Seconds to look for layers to keep in float when the gate is missed, "
                                               "for each format.")] = 300,
    pack: Annotated[Path | None, typer.Option(help="Labelled pack: agreement is measured on its images, and retention "
                                                   "on its regions.")] = None,
    count: Annotated[int, typer.Option("--images", help="Images of the pack to measure on.")] = 60,
    html: Annotated[Path | None, typer.Option(help="Write a page with the table and the five worst masks.")] = None,
    json_: Json = False,
) -> None:
    """Quantize a bundle and show per format what int8 costs in masks and gains in size and time."""
    from pocketsam.bundle import read_bundle
    from pocketsam.errors import MissingDependency, ParityError, UnknownName, UsageError
    from pocketsam.files import check_writable
    from pocketsam.labelled import count_photos
    from pocketsam.registry import RECIPES, entry
    from pocketsam.specs import CLICK_GRAPHS

    opened = read_bundle(bundle)
    name, side = opened.spec.name, opened.spec.image_size
    # Before the hour that follows.
    for asked in names(recipe):
        if asked not in RECIPES:
            raise UnknownName("recipe", asked, RECIPES)
    if pack is not None and (count < 1 or not count_photos(pack)[1]):
        raise UsageError(f"nothing to measure on: {count} images of {pack}; expected at least 1, of a pack with masks.")
    if html is not None:
        check_writable(html)
    missed: ParityError | None = None
    try:
        pocketsam.export(name, checkpoint=checkpoint, formats=opened.formats(), precisions=["fp32", *names(recipe)],
                         out=bundle, slots=opened.slots, image_size=side, gate=gate, calibration=calibration,
                         clicks=any(a.graph in CLICK_GRAPHS for a in opened.artifacts),
                         calibration_images=calibration_images, search_seconds=search,
                         report=lambda t: progress(t, json_))
    except ParityError as e:
        # The other formats are written, and reported.
        missed = e
    done = read_bundle(bundle)
    reference = pocketsam.load(name, checkpoint=checkpoint, runtime="pytorch", image_size=side)
    try:
        measure = entry("pocketsam.quantize.report:measure")
    except ModuleNotFoundError as e:
        raise MissingDependency(str(e.name), "all", "the int8 report") from e
    rows, worst = measure(done, reference, names(recipe), pack, count, lambda t: progress(t, json_))
    if json_:
        print_json([r.to_json() for r in rows])
    else:
        shown = table(*(rows[0].heads() if rows else ("nothing was quantized",)))
        for row in rows:
            shown.add_row(*(escape(c) for c in row.cells()))
        out.print(shown)
    if html is not None:
        entry("pocketsam.quantize.page:write")(html, done, rows, worst)
        progress(f"wrote {html}", json_)
    if missed is not None:
        raise missed
