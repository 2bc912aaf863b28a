"""Choosing the fastest runtime of a bundle on this machine: measured once, then remembered."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pocketsam import __version__
from pocketsam.api import open_bundle
from pocketsam.bundle import Bundle
from pocketsam.doctor import machine, runtimes
from pocketsam.errors import BundleError, PocketSamError, UnknownName, UsageError, first_line
from pocketsam.files import cache_root, staged_file
from pocketsam.geometry import Frame
from pocketsam.prompts import middle_click
from pocketsam.registry import RECIPES, RUNTIME_FORMATS, RUNTIME_VARIABLES, missing_runtime
from pocketsam.runtime import Runtime, check_threads

# What a user waits for: one image and a few clicks.
CLICKS = 5
SECONDS_PER_GRAPH = 1.0
# Times closer than this are equal on a busy machine; then the more accurate candidate wins.
EQUAL = 1.05


@dataclass(frozen=True)
class Candidate:
    """One runtime and precision of a bundle on this machine.

    Attributes:
        encoder_ms, decoder_ms: best of a few calls after a warm-up, readback included; decoder for one prompt.
        agreement: mean mask IoU with PyTorch that was measured at export; 0 where the bundle does not say.
        problem: empty, or why it could not be measured.
    """

    runtime: str
    precision: str
    encoder_ms: float
    decoder_ms: float
    agreement: float
    problem: str = ""

    @property
    def cost_ms(self) -> float:
        """Time for one image and five prompts."""
        return self.encoder_ms + CLICKS * self.decoder_ms


def tune(bundle: Bundle, threads: int | None = None, fresh: bool = False,
         report: Callable[[str], None] = lambda text: None) -> list[Candidate]:
    """Measure all candidates, fastest first, or read what was measured here before.

    Args:
        fresh: measure again even if there is a stored result.

    Raises:
        UsageError: threads is no whole number of at least 1.
    """
    threads = check_threads(threads)
    store = cache_root() / "tune" / f"{_key(bundle, threads)}.json"
    if not fresh and (known := _read(store)) and all(_lasting(c) for c in known):
        return known
    found = [_measure(bundle, runtime, precision, threads, report) for runtime, precision in _candidates(bundle)]
    found.sort(key=lambda c: (bool(c.problem), c.cost_ms))
    if not all(_lasting(c) for c in found):
        return found
    try:
        with staged_file(store) as staged:
            staged.write_text(json.dumps([asdict(c) for c in found]), encoding="utf-8")
    except PocketSamError as e:
        report(f"the measurement is not remembered: {e}")
    return found


def choose(candidates: list[Candidate], precision: str | None = None) -> Candidate:
    """The fastest usable candidate; among equally fast ones the most accurate.

    Raises:
        UnknownName: the bundle has no artifact of this precision.
        BundleError: nothing in the bundle runs here.
    """
    held = {c.precision for c in candidates}
    if precision is not None and precision not in held:
        raise UnknownName("precision", precision, held)
    asked = [c for c in candidates if precision in (None, c.precision)]
    usable = [c for c in asked if not c.problem]
    # int8 that is slower than fp32 of its runtime has nothing to offer; it is left when nothing else was asked for.
    usable = [c for c in usable if not _pointless(c, candidates)] or usable
    if not usable:
        problems = "; ".join(c.problem for c in asked) or "it holds no artifacts"
        raise BundleError(f"no runtime can open this bundle here: {problems}")
    fastest = min(c.cost_ms for c in usable)
    return max((c for c in usable if c.cost_ms <= fastest * EQUAL), key=lambda c: (c.agreement, -c.cost_ms))


def _lasting(candidate: Candidate) -> bool:
    """Whether a result may be remembered: a damaged file may be whole again at the next call, or in another copy."""
    return not candidate.problem or candidate.problem == str(missing_runtime(candidate.runtime))


def _pointless(candidate: Candidate, candidates: list[Candidate]) -> bool:
    return candidate.precision in RECIPES and any(
        c.runtime == candidate.runtime and c.precision == "fp32" and not c.problem and c.cost_ms < candidate.cost_ms
        for c in candidates)


def _candidates(bundle: Bundle) -> list[tuple[str, str]]:
    """Runtimes that really are engines here: Core ML only exists on macOS, its evaluator is a verifier."""
    pairs = sorted({(a.format, a.precision) for a in bundle.artifacts})
    return [(r, p) for r, f in RUNTIME_FORMATS.items() for g, p in pairs
            if f == g and (r != "coreml" or sys.platform == "darwin")]


def _measure(bundle: Bundle, runtime: str, precision: str, threads: int | None,
             report: Callable[[str], None]) -> Candidate:
    held = (RUNTIME_FORMATS[runtime], precision, "encoder")
    agreement = next((a.agreement for a in bundle.artifacts if (a.format, a.precision, a.graph) == held), 0.0)
    report(f"timing {runtime} {precision}")
    if not next(row.usable for row in runtimes() if row.name == runtime):
        return Candidate(runtime, precision, 0, 0, agreement, str(missing_runtime(runtime)))
    try:
        encoder, decoder = time_runtime(open_bundle(bundle, runtime, precision, threads))
    except UsageError:
        # Of what the user asked for by an environment variable, not of this bundle.
        raise
    except PocketSamError as e:
        return Candidate(runtime, precision, 0, 0, agreement, str(e))
    except Exception as e:  # engines raise classes of their own for a graph that opens and does not run
        problem = f"{runtime} cannot run the {precision} graphs ({first_line(e)})"
        return Candidate(runtime, precision, 0, 0, agreement, problem)
    return Candidate(runtime, precision, round(encoder, 3), round(decoder, 3), agreement)


def time_runtime(engine: Runtime) -> tuple[float, float]:
    """Milliseconds of the encoder and of the decoder with one prompt, readback included: best of a few calls."""
    calls = graph_calls(engine)
    return _best(calls["encoder"]), _best(calls["decoder"])


def graph_calls(engine: Runtime) -> dict[str, Callable[[], Any]]:
    """One call of encoder and decoder on a seeded image and one click, by graph name; each readback included."""
    spec = engine.spec
    side = spec.image_size
    frame = Frame.of(side, side, spec)
    image = np.random.default_rng(0).integers(0, 256, (1, side, side, 3), dtype=np.uint8)
    features = engine.encode(image, frame)
    inputs = middle_click(spec, engine.slots)
    return {"encoder": lambda: engine.encode(image, frame), "decoder": lambda: engine.decode(features, inputs)}


def _best(call: Callable[[], Any]) -> float:
    """Shortest of the calls that fit in a second (at least two), in milliseconds, after one warm-up."""
    call()
    times: list[float] = []
    while len(times) < 2 or (sum(times) < SECONDS_PER_GRAPH and len(times) < 20):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


def _key(bundle: Bundle, threads: int | None) -> str:
    """Machine, versions, bundle, threads and what steers the runtimes."""
    facts = {"machine": machine(), "pocketsam": __version__, "threads": threads,
             "steered": {v: os.environ.get(v, "") for v in RUNTIME_VARIABLES.values()},
             "versions": {r.name: r.version for r in runtimes()},
             "artifacts": sorted((a.path, a.sha256) for a in bundle.artifacts)}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _read(store: Path) -> list[Candidate] | None:
    try:
        return [Candidate(**row) for row in json.loads(store.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        return None
