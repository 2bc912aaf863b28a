"""The command that finds all masks of a photo or a folder."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pocketsam.commands.console import Json, Threads, err, escape, out, print_json, progress, table
from pocketsam.errors import UsageError

if TYPE_CHECKING:
    from pocketsam.folders import Done, Job

Bundle = Annotated[str, typer.Option(help="Bundle folder; default: the built-in model on PyTorch.")]
Runtime = Annotated[str, typer.Option(help="Runtime name, or auto.")]
Precision = Annotated[str, typer.Option(help="Precision of the artifacts, or auto.")]


def everything(
    photos: Annotated[Path, typer.Argument(metavar="IMAGE_OR_FOLDER", help="A photo or a folder of photos.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for overlays and labels; a folder of an "
                                                                "interrupted run is completed.")],
    bundle: Bundle = "lite0",
    runtime: Runtime = "auto",
    precision: Precision = "fp32",
    grid: Annotated[int | None, typer.Option(help="Points per side; default 32.")] = None,
    pred_iou: Annotated[float | None, typer.Option(help="Least predicted IoU, 0 to 1.")] = None,
    stability: Annotated[float | None, typer.Option(help="Least stability score, 0 to 1.")] = None,
    nms: Annotated[float | None, typer.Option(help="Box IoU of duplicates, 0 to 1; default 0.7.")] = None,
    crop_layers: Annotated[int | None, typer.Option(help="Layers of overlapping crops; default 0.")] = None,
    crop_points_divide: Annotated[int | None, typer.Option(help="Divide the grid's side by this per layer.")] = None,
    min_region: Annotated[int | None, typer.Option(help="Fill holes and remove islands below this many "
                                                        "pixels.")] = None,
    max_area: Annotated[float | None, typer.Option(help="Drop masks above this fraction of the photo.")] = None,
    workers: Annotated[int, typer.Option(help="Processes; each takes --threads threads.")] = 1,
    engine: Annotated[str, typer.Option(help="local, or ray for Ray Data (the extra `ray`).")] = "local",
    address: Annotated[str | None, typer.Option(help="Ray cluster to join; default: a local one.")] = None,
    shard: Annotated[int | None, typer.Option(help="Photos per COCO file; default: all in one.")] = None,
    embeddings: Annotated[Path | None, typer.Option(help="Folder that keeps embeddings between runs.")] = None,
    overlays: Annotated[bool, typer.Option(help="Draw overlay pictures.")] = True,
    threads: Threads = None,
    json_: Json = False,
) -> None:
    """Find all masks of a photo or of a folder: overlays, COCO JSON and SA-1B style JSON."""
    from pocketsam.clicks import has_click_graphs
    from pocketsam.doctor import cores
    from pocketsam.everything import default_settings, settings_for
    from pocketsam.folders import Job, check_output, finish, prepare
    from pocketsam.images import photos_in

    given = {"points_per_side": grid, "pred_iou": pred_iou, "stability": stability, "nms": nms,
             "crop_layers": crop_layers, "crop_points_divide": crop_points_divide, "min_region": min_region,
             "max_area": max_area}
    changes: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
    # Checked on the defaults first, so that a typo is named before a model is opened.
    settings_for("lite0", **changes)
    if workers < 1 or (shard is not None and shard < 1):
        raise UsageError(f"workers is {workers} and shard {shard}; expected at least 1.")
    if engine not in ("local", "ray"):
        raise UsageError(f"engine is {engine!r}; expected local or ray.")
    found = photos_in(photos)
    check_output(output)
    if threads is None:
        threads = max(1, cores() // workers)
    job = Job(output, default_settings("lite0"), bundle, runtime, precision, threads, overlays, embeddings)
    sam = job.open()
    job = replace(job, settings=settings_for(sam.spec.name, **changes), runtime=sam.info()["runtime"],
                  precision=sam.info()["precision"])
    todo = prepare(job, sam, found)
    outcomes = _run(job, todo, engine, workers, address, sam, json_)
    files = finish(job, shard)
    info = {**sam.info(), "click_graphs": has_click_graphs(sam.runtime)}
    _show(job, outcomes, len(found) - len(todo), [str(f) for f in files], info, json_)
    if any(d.problem for d in outcomes):
        raise typer.Exit(1)


def _run(job: Job, todo: list[Path], engine: str, workers: int, address: str | None, sam: Any,
         quiet: bool) -> list[Done]:
    started = time.perf_counter()

    def report(done: Done, n: int, total: int) -> None:
        left = (time.perf_counter() - started) / n * (total - n)
        what = done.problem or f"{done.masks} masks, {done.seconds:.1f} s"
        progress(f"[{n}/{total}] {done.photo}: {what}, ETA {int(left) // 60}:{int(left) % 60:02d}", quiet)

    if not todo:
        return []
    if engine == "ray":
        from pocketsam.clusters import run_ray

        return run_ray(job, todo, workers, report, address)
    from pocketsam.folders import run

    return run(job, todo, workers, report, sam)


def _show(job: Job, outcomes: list[Done], earlier: int, files: list[str], info: dict[str, Any], json_: bool) -> None:
    bad = [d for d in outcomes if d.problem]
    good = [d for d in outcomes if not d.problem]
    if json_:
        print_json({"photos": [d.__dict__ for d in outcomes], "done_earlier": earlier, "failed": len(bad),
                    "coco": files, "settings": job.settings.to_json(), **info})
        return
    shown = table("photo", "masks", "seconds", "problem")
    for d in outcomes:
        shown.add_row(escape(d.photo), "" if d.problem else str(d.masks), "" if d.problem else f"{d.seconds:.2f}",
                      escape(d.problem))
    out.print(shown)
    way = "click graphs" if info["click_graphs"] else "prompt decoder, no click graphs"
    out.print(f"{len(good)} photos segmented, {earlier} done earlier, {len(bad)} unreadable; "
              f"{info['model']} on {info['runtime']} {info['version']}, {way}, {job.threads} threads; labels"
              f"{' and overlays' if job.overlays else ''} in {job.out}", highlight=False)
    for d in bad:
        err.print(f"[bold red]unreadable:[/] {escape(d.problem)}", soft_wrap=True, highlight=False)
