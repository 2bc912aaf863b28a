"""From a checkpoint to a bundle: convert, measure against PyTorch, refuse what fails its gate, write atomically."""

from __future__ import annotations

import gc
import hashlib
import json
import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pocketsam
from pocketsam import registry
from pocketsam.api import open_bundle
from pocketsam.bundle import MANIFEST, Artifact, Bundle, to_json
from pocketsam.errors import OutputError, ParityError, UsageError
from pocketsam.export import rewrites
from pocketsam.export.conversions import Conversion, Source, convert_all, module
from pocketsam.export.existing import bring, carry_over, check_same, existing, standing
from pocketsam.export.graphs import Graph
from pocketsam.export.request import check_request, check_sizes, floats_of
from pocketsam.files import sha256_file, sha256_path, size_of, staged_folder
from pocketsam.images import ImageLike, Rgb, load_rgb
from pocketsam.models.catalog import spec as spec_of
from pocketsam.models.checkpoints import licence_of
from pocketsam.models.loading import load_model, weights_sha256
from pocketsam.parity import GATES, compare, compare_clicks, photos_id
from pocketsam.photos import CALIBRATION_IMAGES, photo_paths
from pocketsam.predictor import Predictor
from pocketsam.specs import CLICK_GRAPHS, DEFAULT_SLOTS, GraphSpec, ModelSpec, TensorSpec

Report = Callable[[str], None]
PARITY_IMAGES = 3


def export_bundle(model: str, *, checkpoint: Path, formats: Sequence[str], precisions: Sequence[str], out: Path,
                  slots: int = DEFAULT_SLOTS, gate: float | None = None, images: Sequence[ImageLike] | None = None,
                  image_size: int | None = None, clicks: bool = True, report: Report = lambda text: None,
                  calibration: Path | None = None, calibration_images: int = CALIBRATION_IMAGES,
                  search_seconds: float = 0, jobs: int = 1) -> Bundle:
    """Export a model and prove every artifact against the PyTorch reference.

    Args:
        model: registry name.
        checkpoint: official checkpoint file.
        formats, precisions: what to make, e.g. ``["onnx"]`` and ``["fp32"]``.
        out: the bundle folder; an existing bundle is extended, unchanged artifacts are kept as they are.
        slots: fixed prompt slots of the decoder.
        gate: least mean mask agreement; by default 0.999 for fp32. Where an int8 recipe is asked for it is for that
            alone, and the float artifacts are held to their defaults.
        image_size: input side instead of the model's own; positional tables are resized once, and the agreement of
            PyTorch at this side with PyTorch at the native one is stored in ``weights["native_agreement"]``.
        images: images to measure on; by default photos that ship with the package.
        clicks: make the click graphs too, for models that have them.
        report: called with one line per step.
        calibration: for int8 only: folder or pack of images; by default the photos that ship with the package.
        calibration_images: for int8: how many images to calibrate on.
        search_seconds: for int8 only: how long to look for layers to keep in float when a gate is missed.
        jobs: processes that convert the float graphs, each of which holds the model.

    Raises:
        CheckpointError, UnknownName, UsageError: bad input.
        UnsupportedModel: the weights are too large for a format.
        ParityError: an artifact misses its gate. Nothing is written if it is a float one; else everything but the int8
            pairs that miss theirs or that a format's tool refuses.
        OutputError: the folder cannot be written, or holds a bundle of another model, input side, number of slots or
            other weights.
    """
    precisions = list(dict.fromkeys(precisions))
    exporters = check_request(spec_of(model), formats, precisions, slots, gate, jobs)
    recipes = [p for p in precisions if p in registry.RECIPES]
    if not recipes and (calibration is not None or search_seconds):
        raise UsageError(f"a calibration source and a search are for {', '.join(registry.RECIPES)}, and none of these "
                         "precisions was asked for; name one, or leave them out.")
    asked, precisions = precisions, floats_of(precisions)
    before, old = standing(out), existing(out)
    rgbs = [load_rgb(i) for i in images] if images else [load_rgb(p) for p in photo_paths()[:PARITY_IMAGES]]
    report(f"loading {checkpoint}")
    image_size = None if image_size == spec_of(model).image_size else image_size
    loaded = load_model(model, checkpoint, image_size)
    sha256 = weights_sha256(loaded)
    images_to_calibrate = None if not recipes else registry.entry("pocketsam.quantize.calibration:collect")(
        calibration, loaded.spec, calibration_images)
    weights: dict[str, Any] = {"sha256": sha256, "file": checkpoint.name, "file_sha256": sha256_file(checkpoint),
                               "licence": licence_of(model)}
    report(f"weights licence of {model}: {weights['licence']}")
    if image_size is not None:
        report(f"comparing PyTorch at {image_size} with PyTorch at the native side")
        weights["native_agreement"] = native_agreement(model, checkpoint, loaded, rgbs)
    spec = loaded.spec
    check_sizes(loaded, exporters)
    check_same(old, spec, sha256, slots)
    rewrites.prepare(loaded)
    misses: list[str] = []
    if old is not None and old.spec != spec:
        held = {(a.format, a.precision) for a in old.artifacts}
        if lost := held - {(e.name, p) for e in exporters for p in precisions}:
            raise OutputError(f"{out} was made by another version of pocketsam, which described {model} otherwise, and "
                              f"cannot be extended; ask for all that it holds ({_pairs(lost)} too), or export to "
                              "another folder.")
        report(f"{out} was made by another version of pocketsam and is made anew")
        old = None
    kept = [] if old is None else list(old.artifacts)
    tools = {**({} if old is None else old.tools), "pocketsam": pocketsam.__version__,
             "python": platform.python_version()}
    with staged_folder(out) as staging:
        for exporter in exporters:
            tools |= exporter.tools()
        source = Source(model, checkpoint, image_size, slots)
        rows = _make(source, loaded, exporters, precisions, clicks, sha256, kept, old, staging, jobs, report)
        rows += carry_over(kept, rows, old, staging, recipes)
        floats = loaded if recipes else None
        del loaded
        gc.collect()
        bundle = Bundle(staging, spec, slots, weights, tools, tuple(rows))
        # The gate of an int8 export is not for the float artifacts that it starts from.
        bundle = _prove(bundle, checkpoint, image_size, exporters, precisions, None if recipes else gate, rgbs,
                        not recipes, report)
        if recipes:
            reference = registry.load("runtime", "pytorch").from_checkpoint(model, checkpoint, image_size=image_size)
            def converted(graph: str, format_: str) -> Graph:
                """What an exporter converts."""
                assert floats is not None
                return module(registry.load("format", format_), floats, graph, slots)

            # On few photos a single ranking that flips would decide.
            judges = rgbs if images else [load_rgb(p) for p in photo_paths()]
            bundle, misses = _quantize(bundle, reference, exporters, recipes, converted, gate, judges,
                                       images_to_calibrate, search_seconds, kept, old, report)
            bundle = _without_unasked(bundle, asked, kept)
            if not bundle.artifacts:
                raise ParityError(f"{' '.join(misses)} Nothing was written.")
        if standing(out) != before:
            raise OutputError(f"{out} was changed while this export ran, perhaps by another one; nothing was written: "
                              "run it again, which keeps what is there now.")
        (staging / MANIFEST).write_text(to_json(bundle), encoding="utf-8")
    report(f"wrote {out}")
    if misses:
        raise ParityError(f"{' '.join(misses)} {out} holds the rest.")
    return replace(bundle, root=out)


def _make(source: Source, model: Any, exporters: Sequence[Any], precisions: Sequence[str], clicks: bool, sha256: str,
          kept: list[Artifact], old: Bundle | None, staging: Path, jobs: int, report: Report) -> list[Artifact]:
    """Every artifact of the float precisions: kept where nothing changed, else converted."""
    spec: ModelSpec = model.spec
    graphs = {name: g for name, g in spec.graphs(source.slots).items() if clicks or name not in CLICK_GRAPHS}
    rows: list[Artifact] = []
    tasks: list[Conversion] = []
    for exporter in exporters:
        for precision in precisions:
            if precision not in exporter.precisions:
                report(f"skipping {exporter.name} {precision}: this format has {', '.join(exporter.precisions)}")
                continue
            for name, graph in graphs.items():
                relative = f"{exporter.name}/{name}.{precision}.{exporter.extension}"
                key = _key(spec, graph, exporter, precision, sha256)
                same = next((a for a in kept if a.path == relative and a.key == key), None)
                if same is not None and old is not None and (row := bring(old, same, staging)):
                    report(f"kept {relative}")
                    rows.append(row)
                    continue
                (staging / relative).parent.mkdir(exist_ok=True)
                tasks.append(Conversion(exporter.name, name, precision, staging / relative))
                rows.append(Artifact(relative, name, exporter.name, precision, "", 0, _rows(graph.inputs),
                                     _rows(graph.outputs), key))
    convert_all(tasks, model, source, jobs, report)
    return [r if r.sha256 else replace(r, sha256=sha256_path(staging / r.path), bytes=size_of(staging / r.path))
            for r in rows]


def _quantize(bundle: Bundle, reference: Any, exporters: Sequence[Any], recipes: Sequence[str], module: Any,
              gate: float | None, images: list[Rgb], calibration: Any, seconds: float, kept: list[Artifact],
              old: Bundle | None, report: Report) -> tuple[Bundle, list[str]]:
    """The int8 stage and what missed its gate there; ``pocketsam.quantize`` builds on this package, so it is looked up
    by name.
    """
    def brought(row: Artifact) -> Artifact | None:
        return None if old is None else bring(old, row, bundle.root)

    stage = registry.entry("pocketsam.quantize.stage:Stage")(
        module, reference, images, calibration, gate, seconds, kept, brought, report)
    done, misses = registry.entry("pocketsam.quantize.build:quantize")(
        bundle, [(e.name, e.runtime) for e in exporters], recipes, stage)
    tools = dict(bundle.tools)
    for exporter in exporters:
        tools |= registry.load("quantizer", exporter.name).tools()
    return replace(done, tools=tools), misses


def _without_unasked(bundle: Bundle, asked: Sequence[str], kept: list[Artifact]) -> Bundle:
    """Drop fp32 rows that only served as a source; a file that an int8 row shares stays."""
    if "fp32" in asked:
        return bundle
    before = {(a.path, a.precision) for a in kept}
    rows = tuple(a for a in bundle.artifacts if a.precision != "fp32" or (a.path, a.precision) in before)
    for path in {a.path for a in bundle.artifacts} - {a.path for a in rows}:
        target = bundle.root / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    return replace(bundle, artifacts=rows)


def _pairs(held: set[tuple[str, str]]) -> str:
    return ", ".join(f"{f} {p}" for f, p in sorted(held))


def native_agreement(model: str, checkpoint: Path, loaded: Any, images: list[Rgb]) -> dict[str, Any]:
    """Masks of PyTorch at another input side against PyTorch at the native one, for the same prompts.

    Args:
        loaded: the model at the other side.
    """
    runtime = registry.load("runtime", "pytorch")
    native = Predictor(runtime.from_checkpoint(model, checkpoint))
    other = Predictor(runtime(loaded, ""))
    return {"image_size": native.spec.image_size, **compare(native, other, images, tensors=False).summary()}


def _prove(bundle: Bundle, checkpoint: Path, image_size: int | None, exporters: Sequence[Any],
           precisions: Sequence[str], gate: float | None, images: list[Rgb], gates: bool, report: Report) -> Bundle:
    """Measure each pair of graphs against a fresh, unmodified PyTorch model; kept ones that were measured below this
    gate or on other photos too, where ``gates`` says so.
    """
    open_reference = registry.load("runtime", "pytorch").from_checkpoint
    reference = Predictor(open_reference(bundle.spec.name, checkpoint, image_size=image_size))
    photos = photos_id(images)
    rows = list(bundle.artifacts)
    for exporter in exporters:
        for precision in precisions:
            made = [i for i, a in enumerate(rows) if (a.format, a.precision) == (exporter.name, precision)]
            limit = GATES[precision] if gate is None else gate
            least = (limit, photos) if gates else None
            if all(_proven(rows[i], least) for i in made):
                continue
            report(f"measuring {exporter.name} {precision} on {len(images)} images")
            compute = registry.EXACT_COMPUTE.get(exporter.runtime)
            candidate = Predictor(open_bundle(bundle, exporter.runtime, precision, compute=compute))
            clicks = [i for i in made if rows[i].graph in CLICK_GRAPHS]
            for part, measure in (([i for i in made if i not in clicks], compare), (clicks, compare_clicks)):
                if not part:
                    continue
                measured = measure(reference, candidate, images).summary()
                if not measured["all"]["mean"] >= limit:
                    what = "the click graphs of " if part is clicks else ""
                    raise ParityError(
                        f"{what}{exporter.name} {precision} agrees with PyTorch by a mean mask IoU of "
                        f"{measured['all']['mean']:.4f} (worst {measured['all']['worst']:.4f}), below the gate of "
                        f"{limit}; nothing was written.")
                for i in part:
                    rows[i] = replace(rows[i], measured={"runtime": exporter.runtime, "gate": limit,
                                                         "photos": photos, **measured})
    return replace(bundle, artifacts=tuple(rows))


def _proven(row: Artifact, least: tuple[float, str] | None) -> bool:
    """Whether an artifact was measured; if asked, at this gate or above it and on these photos."""
    if least is None or not row.measured:
        return bool(row.measured)
    gate, photos = least
    return row.measured.get("photos") == photos and float(row.measured.get("gate", 0)) >= gate


def _key(spec: ModelSpec, graph: GraphSpec, exporter: Any, precision: str, sha256: str) -> str:
    """Everything an artifact depends on; a change of any of it rebuilds the artifact."""
    data = {"spec": spec.to_json(), "graph": asdict(graph), "format": exporter.name, "precision": precision,
            "weights": sha256, "tools": exporter.tools(), "pocketsam": pocketsam.__version__}
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _rows(tensors: Sequence[TensorSpec]) -> list[dict[str, Any]]:
    return [{"name": t.name, "dtype": t.dtype, "shape": list(t.shape)} for t in tensors]
