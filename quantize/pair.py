"""Encoder and decoder of one format as 8-bit artifacts: quantize, measure in masks, search if the gate fails, time."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from pocketsam import registry
from pocketsam.api import open_bundle
from pocketsam.bundle import Artifact, Bundle
from pocketsam.doctor import machine
from pocketsam.errors import BundleError, ParityError, PocketSamError, UnsupportedModel, first_line
from pocketsam.files import caches_in, sha256_path, size_of
from pocketsam.images import Rgb
from pocketsam.parity import GATES, compare_clicks, photos_id
from pocketsam.predictor import Predictor
from pocketsam.quantize.agreement import agreement, slower, time_ratio
from pocketsam.quantize.correction import METHOD
from pocketsam.quantize.recipes import Job, Quantizer, check
from pocketsam.quantize.search import Search, try_attention
from pocketsam.quantize.stage import Preparation, Stage
from pocketsam.remembered import Remembered
from pocketsam.runtime import Runtime
from pocketsam.specs import CLICK_GRAPHS
from pocketsam.tune import graph_calls

THREADS = 2
# Decoder tensors of a batch are large; a few images with five kinds of prompt each show their ranges.
DECODER_IMAGES = 8
# Images on which the search compares candidates; always calibration images, never those that judge the result.
SEARCH_IMAGES = 6
# Images that show what int8 does to single clicks.
CLICK_IMAGES = 3
# How much faster an int8 decoder must be: it costs masks, and is the smaller part of the time.
DECODER_GAIN = 1.2
# Mean mask IoU that it may cost beside the int8 encoder alone, even where the gate leaves more.
DECODER_LOSS = 0.005
# Recipes whose weights are rounded to a grid known beforehand.
CORRECTED = ("int8", "int8-weights")


class Pair:
    """Encoder and decoder of one format under one recipe."""

    def __init__(self, bundle: Bundle, format_: str, runtime: str, recipe: str, stage: Stage,
                 reference: Remembered, prepared: Preparation) -> None:
        self.prepared = prepared
        self.folder = tempfile.TemporaryDirectory()
        self.bundle, self.stage, self.reference = bundle, stage, reference
        self.format, self.runtime, self.recipe = format_, runtime, recipe
        self.quantizer = check(format_, recipe)
        self.gate = GATES[recipe] if stage.gate is None else stage.gate
        self.photos = photos_id(stage.images)
        # Core ML's evaluator says nothing of speed.
        self.timed = runtime != "coreml"
        self.old = [a for a in stage.kept if (a.format, a.precision) == (format_, recipe)]

    def earlier(self) -> list[Artifact]:
        """What an earlier export left, brought over; empty if a file is damaged or a half is missing."""
        brought = [a for a in map(self.stage.bring, self.old) if a is not None]
        whole = len(brought) == len(self.old) and {a.graph for a in brought} >= {"encoder", "decoder"}
        return brought if whole else []

    def passed_before(self) -> bool:
        """Whether what an earlier export left reaches the gate of this one, on the photos of this one."""
        return all(a.measured.get("photos") == self.photos and a.measured["all"]["mean"] >= self.gate
                   for a in self.old if a.graph not in CLICK_GRAPHS)

    def discard(self) -> None:
        """Remove what an attempt left."""
        for graph in ("encoder", "decoder"):
            remove(self._path(graph))

    def make(self) -> list[Artifact]:
        """The artifacts of this pair, made or brought over.

        Raises:
            ParityError: the gate is out of reach.
            UnsupportedModel: the format's tool refuses the model.
            BundleError: the engine refuses what the tool made of the encoder.
        """
        key = self._key()
        if self.old and all(a.key == key for a in self.old) and (kept := self.earlier()):
            self.stage.report(f"kept {self.format} {self.recipe}")
            return kept
        # Before the preparation, which takes most of the time.
        self.quantizer.check_source(self.bundle.file(self.bundle.find(self.format, "fp32", "encoder")))
        decoder = replace(self.bundle.find(self.format, "fp32", "decoder"), precision=self.recipe, key=key)
        encoder, found = self._encoder(key, decoder)
        ratios = {"encoder": self._ratio("encoder", encoder, decoder), "decoder": None}
        decoder, reason, tried, measured = self._decoder(encoder, decoder, key, found.measured)
        ratios["decoder"] = None if reason else tried
        common = {"recipe": self.recipe, "calibration": self.stage.calibration.to_json(), "threads": THREADS,
                  "cpu": machine()["cpu"], "features": machine()["features"]}
        rows = []
        for row, extra in ((encoder, found.to_json()), (decoder, {"kept_in_float": reason, "tried": tried})):
            ratio = ratios[row.graph]
            fp32 = self.bundle.find(self.format, "fp32", row.graph)
            details = {**common, **extra, "size_ratio": round(fp32.bytes / row.bytes, 2), "time_ratio": ratio,
                       "slower": slower(ratio)}
            rows.append(replace(row, measured={"runtime": self.runtime, "gate": self.gate, "photos": self.photos,
                                               **measured}, quantization=details))
            if slower(ratio):
                self.stage.report(f"{row.path} is slower than fp32 here ({ratio} x); auto will not choose it")
        return rows + self._clicks(key, rows)

    def _clicks(self, key: str, rows: list[Artifact]) -> list[Artifact]:
        """The click graphs, which are the decoder in another form and like it stay in float; what the encoder's 8 bits
        do to their masks is measured, and judged with the pair itself.
        """
        rows_of_clicks = [replace(a, precision=self.recipe, key=key, measured={},
                                  quantization={"kept_in_float": "click graph"}) for a in self._float_clicks()]
        if not rows_of_clicks:
            return []
        pair = replace(self.bundle, artifacts=(*rows, *rows_of_clicks))
        candidate = Predictor(self._runtime(pair, self.recipe))
        measured = compare_clicks(Predictor(self.reference), candidate, self.stage.images[:CLICK_IMAGES]).summary()
        return [replace(a, measured={"runtime": self.runtime, **measured}) for a in rows_of_clicks]

    def _float_clicks(self) -> list[Artifact]:
        return [a for a in self.bundle.artifacts if (a.format, a.precision) == (self.format, "fp32")
                and a.graph in CLICK_GRAPHS]

    def _encoder(self, key: str, decoder: Artifact) -> tuple[Artifact, Any]:
        self.stage.report(f"quantizing {self.format} encoder, {self.recipe}")
        job = self._job("encoder")
        with self._tool_errors():
            tool = self.quantizer(job)
            layers, global_attention = tool.layers(), frozenset(tool.attention())
        path = self._path("encoder")
        floats = [] if job.prepared is None else job.prepared.in_float(layers)
        if len(floats) > 1:
            self.stage.report(f"{len(floats)} of {len(layers)} layers stay in float")

        fixed = frozenset(floats)

        def measure(keep: frozenset[str], images: Sequence[Rgb]) -> dict[str, Any]:
            remove(path)
            self._write(tool, path, keep | fixed)
            row = self._row("encoder", path, key)
            return self._agreement(row, decoder, images)

        def ratio() -> float | None:
            return self._ratio("encoder", self._row("encoder", path, key), decoder)

        trials = self.stage.calibration.images[:SEARCH_IMAGES]
        in_float, attention = try_attention(global_attention, measure, trials, ratio, self.stage.report)
        fixed |= in_float
        search = Search([n for n in layers if n not in floats], measure, self.stage.images, trials, self.gate,
                        self.stage.seconds, f"{key}-{self.format}-{len(in_float)}", self.stage.report, ratio)
        found = search.run()
        if not found.measured["all"]["mean"] >= self.gate:
            remove(path)
            raise ParityError(
                f"{self.format} {self.recipe} agrees with PyTorch by a mean mask IoU of at most "
                f"{found.measured['all']['mean']:.4f} (worst {found.measured['all']['worst']:.4f}), with "
                f"{len(floats) + len(found.keep)} layers in float, below the gate of {self.gate}.")
        found = replace(found, keep=(*floats, *found.keep), attention=attention)
        return self._row("encoder", path, key), found

    def _decoder(self, encoder: Artifact, fp32: Artifact, key: str,
                 measured: dict[str, Any]) -> tuple[Artifact, str, float | None, dict[str, Any]]:
        """The int8 decoder if it passes the gate and gains enough, else the fp32 file, and why; the int8 form's time
        ratio where it was measured, and the agreement of the pair.
        """
        path = self._path("decoder")
        try:
            with self._tool_errors():
                tool = self.quantizer(self._job("decoder"))
        except UnsupportedModel as e:
            return fp32, str(e), None, measured
        self.stage.report(f"quantizing {self.format} decoder, {self.recipe}")
        try:
            self._write(tool, path, frozenset())
            row = self._row("decoder", path, key)
            both = self._agreement(encoder, row, self.stage.images)
            ratio = self._ratio("decoder", encoder, row)
        except (UnsupportedModel, BundleError) as e:
            remove(path)
            return fp32, f"its int8 form is refused: {e}", None, measured
        mean, alone = both["all"]["mean"], measured["all"]["mean"]
        if not mean >= max(self.gate, alone - DECODER_LOSS):
            remove(path)
            return fp32, f"its int8 form lowers the mean mask IoU from {alone:.4f} to {mean:.4f}", ratio, measured
        if ratio is None or ratio < DECODER_GAIN:
            remove(path)
            return fp32, f"its int8 form is less exact and only {ratio} x as fast as fp32", ratio, measured
        return row, "", ratio, both

    def _write(self, tool: Quantizer, path: Path, keep: frozenset[str]) -> None:
        with self._tool_errors():
            tool.write(path, keep)

    def _tool_errors(self) -> AbstractContextManager[None]:
        names = ", ".join(self.quantizer.tools())
        return foreign_errors(UnsupportedModel, f"{names} cannot make {self.format} {self.recipe} of this model")

    def _job(self, graph: str) -> Job:
        spec = self.bundle.spec
        graph_spec = spec.encoder_graph() if graph == "encoder" else spec.decoder_graph(self.bundle.slots)
        calibration = self.stage.calibration

        def inputs(batch: int) -> Iterable[dict[str, Any]]:
            if graph == "encoder":
                return ({"image": image} for image in calibration.encoder_inputs(spec))
            few = replace(calibration, images=calibration.images[:DECODER_IMAGES])
            return few.decoder_inputs(self.reference, self.bundle.slots, batch)

        static = self.recipe == "int8"
        if graph == "encoder" and self.recipe in CORRECTED:
            prepared = self.prepared.encoder(self.format, self.quantizer.grid() if static else "full", static)
            prepared = prepared.written(self.quantizer.scales, self.quantizer.rounds_outputs)
            exporter = registry.load("format", self.format)
            source = Path(self.folder.name) / f"encoder.{exporter.extension}"
            with foreign_errors(UnsupportedModel, f"{', '.join(exporter.tools())} cannot convert the prepared encoder"):
                exporter.export(prepared.module, graph_spec, "fp32", source)
            return Job(graph_spec, source, prepared.module, self.recipe, inputs, THREADS, prepared)
        source = self.bundle.file(self.bundle.find(self.format, "fp32", graph))
        return Job(graph_spec, source, self.stage.module(graph, self.format), self.recipe, inputs, THREADS)

    def _open(self, encoder: Artifact, decoder: Artifact) -> Runtime:
        return self._runtime(replace(self.bundle, artifacts=(encoder, decoder)), self.recipe)

    def _runtime(self, bundle: Bundle, precision: str) -> Runtime:
        compute = registry.EXACT_COMPUTE.get(self.runtime)
        with caches_in(Path(self.folder.name) / "cache"):
            return open_bundle(bundle, self.runtime, precision, THREADS, compute)

    def _agreement(self, encoder: Artifact, decoder: Artifact, images: Sequence[Rgb]) -> dict[str, Any]:
        with foreign_errors(BundleError, f"{self.runtime} cannot run the {self.recipe} graphs"):
            return agreement(self.reference, self._open(encoder, decoder), images).summary()

    def _ratio(self, graph: str, encoder: Artifact, decoder: Artifact) -> float | None:
        if not self.timed:
            return None
        int8 = graph_calls(self._open(encoder, decoder))[graph]
        fp32 = graph_calls(self._runtime(self.bundle, "fp32"))[graph]
        return time_ratio(int8, fp32)

    def _path(self, graph: str) -> Path:
        fp32 = Path(self.bundle.find(self.format, "fp32", graph).path)
        return self.bundle.root / fp32.parent / f"{graph}.{self.recipe}{fp32.suffix}"

    def _row(self, graph: str, path: Path, key: str) -> Artifact:
        fp32 = self.bundle.find(self.format, "fp32", graph)
        return replace(fp32, path=path.relative_to(self.bundle.root).as_posix(), precision=self.recipe, key=key,
                       sha256=sha256_path(path), bytes=size_of(path), measured={})

    def _key(self) -> str:
        data = {"fp32": [self.bundle.find(self.format, "fp32", g).key for g in ("encoder", "decoder")],
                "clicks": [a.key for a in self._float_clicks()], "photos": self.photos,
                "recipe": self.recipe, "method": METHOD, "tools": self.quantizer.tools(), "gate": self.gate,
                "calibration": self.stage.calibration.to_json(), "features": machine()["features"]}
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


@contextmanager
def foreign_errors(kind: type[PocketSamError], what: str) -> Iterator[None]:
    """Turn what a format's tool or engine raises into one sentence; our errors and those of the machine pass."""
    try:
        yield
    except (PocketSamError, OSError, MemoryError):
        raise
    except Exception as e:  # tools and engines raise classes of their own
        raise kind(f"{what} ({first_line(e)}); choose other formats or precisions.") from e


def remove(path: Path) -> None:
    """Remove a file or folder that may not be there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

