"""Commands that make and prove bundles: export, verify, tune."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import pocketsam
from pocketsam.commands.console import (
    Json,
    Threads,
    escape,
    formats,
    names,
    out,
    print_json,
    progress,
    table,
)
from pocketsam.photos import CALIBRATION_IMAGES


def export(
    model: Annotated[str | None, typer.Argument(help="Model name, see `pocketsam models`; left out, what the "
                                                     "checkpoint holds, or lite0.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Official checkpoint file; lite0 needs none.")] = None,
    to: Annotated[str, typer.Option(help="Formats, separated by commas, or all.")] = "onnx",
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Bundle folder; default MODEL.bundle.")] = None,
    precision: Annotated[str, typer.Option(help="Precisions, separated by commas.")] = "fp32",
    slots: Annotated[int | None, typer.Option(help="Prompt slots of the decoder; default 8.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Input side instead of the model's own: a multiple of "
                                                         "64.")] = None,
    gate: Annotated[float | None, typer.Option(help="Least mean mask agreement with PyTorch, 0 to 1.")] = None,
    parity_images: Annotated[Path | None, typer.Option(help="Photo or folder of photos to measure agreement on; "
                                                            "default: those that ship with the package.")] = None,
    clicks: Annotated[bool, typer.Option(help="Make the graphs that segment everything runs on, for models that "
                                              "have them.")] = True,
    calibration: Annotated[Path | None, typer.Option(help="For int8: folder or pack of images; default: the shipped "
                                                          "photos and crops of them.")] = None,
    calibration_images: Annotated[int, typer.Option(help="For int8: images to calibrate on; fewer are quicker and "
                                                         "less certain.")] = CALIBRATION_IMAGES,
    search: Annotated[float, typer.Option(help="For int8: seconds to look for layers to keep in float when the gate "
                                               "is missed, for each format.")] = 0,
    jobs: Annotated[int, typer.Option(help="Processes that convert graphs at once; each holds the model.")] = 1,
    json_: Json = False,
) -> None:
    """Export a checkpoint to a bundle, proven against PyTorch."""
    from pocketsam.api import recognised
    from pocketsam.errors import MissingDependency
    from pocketsam.images import photos_in

    images = None if parity_images is None else photos_in(parity_images)
    if model is None and checkpoint is not None:
        try:
            model = recognised(checkpoint)
        except ModuleNotFoundError as e:
            raise MissingDependency(str(e.name), "torch", "reading a checkpoint") from e
        progress(f"{checkpoint} is {model}", json_)
    model = model or "lite0"
    bundle = pocketsam.export(model, checkpoint=checkpoint, formats=formats(to), precisions=names(precision),
                              out=output or Path(f"{model}.bundle"), slots=slots, gate=gate, images=images,
                              image_size=image_size, clicks=clicks, calibration=calibration,
                              calibration_images=calibration_images, search_seconds=search, jobs=jobs,
                              report=lambda t: progress(t, json_))
    if json_:
        from pocketsam.bundle import to_json

        print(to_json(bundle), end="")
        return
    shown = table("artifact", "MB", "mask agreement", "5th percentile", "worst", "max tensor error")
    for a in bundle.artifacts:
        m = a.measured
        worst = max((v for k, v in m["max_tensor_error"].items() if k in {o["name"] for o in a.outputs}), default=0.0)
        shown.add_row(a.path, f"{a.bytes / 1e6:.1f}", f"{m['all']['mean']:.5f}", f"{m['all']['p5']:.5f}",
                      f"{m['all']['worst']:.5f}", f"{worst:.1e}")
    out.print(shown)
    if native := bundle.weights.get("native_agreement"):
        out.print(f"at {bundle.spec.image_size} instead of {native['image_size']} pixels: mean mask IoU "
                  f"{native['all']['mean']:.4f} with PyTorch at the native size", highlight=False)
    out.print(f"{bundle.root}: {bundle.spec.name}, weights licence {bundle.weights['licence']}", highlight=False)


def verify(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    checkpoint: Annotated[Path | None, typer.Option(help="The checkpoint it was exported from; lite0 needs "
                                                         "none.")] = None,
    images: Annotated[Path | None, typer.Option(help="Photo or folder of photos; default: the shipped ones.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the prompts.")] = 0,
    json_: Json = False,
) -> None:
    """Measure every artifact against PyTorch again; exit code 1 if one falls below its gate."""
    from pocketsam.bundle import read_bundle
    from pocketsam.images import load_rgb, photos_in
    from pocketsam.photos import photo_paths
    from pocketsam.verify import verify as run

    opened = read_bundle(bundle)
    files = photo_paths() if images is None else photos_in(images)
    reference = pocketsam.load(opened.spec.name, checkpoint=checkpoint, runtime="pytorch",
                               image_size=opened.spec.image_size)
    rows = run(opened, reference, [load_rgb(f) for f in files], seed, lambda t: progress(t, json_))
    if json_:
        print_json([r.to_json() for r in rows])
    else:
        shown = table("format", "precision", "kind", "prompts", "mean", "5th percentile", "worst", "gate", "result")
        for row in rows:
            clicks = {"clicks": row.measured["clicks"]["all"]} if "clicks" in row.measured else {}
            for kind in ("box", "point", *clicks):
                m = {**row.measured, **clicks}.get(kind)
                numbers = [str(m["prompts"]), *(f"{m[k]:.5f}" for k in ("mean", "p5", "worst"))] if m else [""] * 4
                verdict = escape(row.problem) or ("passed" if row.passed else "BELOW GATE")
                shown.add_row(row.format, row.precision, kind, *numbers, str(row.gate), verdict)
        out.print(shown)
    if not all(r.passed for r in rows):
        raise typer.Exit(1)


def tune(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    threads: Threads = None,
    fresh: Annotated[bool, typer.Option(help="Measure again even if this machine was measured before.")] = False,
    json_: Json = False,
) -> None:
    """Time the runtimes of a bundle on this machine and show what `auto` takes, in fp32 and with `--precision auto`."""
    from dataclasses import asdict

    from pocketsam.bundle import read_bundle
    from pocketsam.tune import choose
    from pocketsam.tune import tune as run

    candidates = run(read_bundle(bundle), threads, fresh, lambda t: progress(t, json_))
    best = choose(candidates)
    exact = choose(candidates, "fp32") if any(c.precision == "fp32" and not c.problem for c in candidates) else None
    if json_:
        print_json({"chosen": asdict(exact) if exact else None, "chosen_any_precision": asdict(best),
                    "candidates": [asdict(c) for c in candidates]})
        return
    shown = table("runtime", "precision", "encoder ms", "prompt ms", "mask agreement", "")
    for c in candidates:
        chosen = "chosen by auto" if c == exact else "chosen by --precision auto" if c == best else ""
        note = escape(c.problem) or chosen
        times = ("", "") if c.problem else (f"{c.encoder_ms:.1f}", f"{c.decoder_ms:.1f}")
        shown.add_row(c.runtime, c.precision, *times, f"{c.agreement:.5f}", note)
    out.print(shown)
