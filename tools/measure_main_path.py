"""Time the main path: every runtime of a bundle against PyTorch eager, and the predictor's own overhead.

    python tools/measure_main_path.py BUNDLE MODEL [--checkpoint FILE] [--threads 2] [--rounds 10]

Each runtime lives in a process of its own and they take turns round by round, so that a drift of the machine cancels
in the ratios. Load times are those of a warm cache. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pocketsam.bundle import Bundle, read_bundle
from pocketsam.doctor import machine
from pocketsam.geometry import Frame, masks_from_logits, to_model_image
from pocketsam.prompts import Prompt, decoder_inputs
from pocketsam.registry import RUNTIME_FORMATS
from pocketsam.specs import ModelSpec

# A worker owns one runtime, so that the spinning threads and caches of one never slow down another.
WORKER = """
import json, sys, time
start = time.perf_counter()
import numpy as np, pocketsam
from pocketsam.geometry import Frame
from pocketsam.prompts import Prompt, decoder_inputs
source, checkpoint, runtime, precision, threads = sys.argv[1:6]
imported = time.perf_counter()
sam = pocketsam.load(source, checkpoint=checkpoint or None, runtime=runtime, precision=precision, threads=int(threads))
loaded = time.perf_counter()
engine, spec = sam.runtime, sam.spec
frame = Frame.of(3 * spec.image_size // 4, spec.image_size, spec)
image = np.random.default_rng(0).integers(0, 256, (1, spec.image_size, spec.image_size, 3), dtype=np.uint8)
prompt = Prompt.of(frame, spec, points=[(20, 30)], labels=[1])
inputs = decoder_inputs([prompt], frame, spec, engine.slots)
features = engine.encode(image, frame)
engine.decode(features, inputs)
calls = {"encoder": lambda: engine.encode(image, frame), "decoder": lambda: engine.decode(features, inputs)}
print(json.dumps({"load_s": round(loaded - imported, 2), "version": sam.info()["version"]}), flush=True)
for line in sys.stdin:
    graph, count = line.split()
    times = []
    for _ in range(int(count)):
        start = time.perf_counter()
        calls[graph]()
        times.append((time.perf_counter() - start) * 1e3)
    status = dict(r.split(":", 1) for r in open("/proc/self/status") if ":" in r)
    print(json.dumps({"times": times, "peak_mb": int(status["VmHWM"].split()[0]) // 1024}), flush=True)
"""


class Worker:
    """One runtime in a process of its own, asked for a few calls at a time."""

    def __init__(self, source: str, checkpoint: Path | None, runtime: str, precision: str, threads: int) -> None:
        args = [source, str(checkpoint or ""), runtime, precision, str(threads)]
        self.process = subprocess.Popen([sys.executable, "-c", WORKER, *args], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, encoding="utf-8")
        self.facts: dict[str, Any] = self._read()
        self.peak_mb = 0

    def time(self, graph: str, count: int) -> list[float]:
        """Milliseconds of ``count`` calls, readback included."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{graph} {count}\n")
        self.process.stdin.flush()
        answer = self._read()
        self.peak_mb = answer["peak_mb"]
        return list(answer["times"])

    def _read(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate()


def rounds_of(workers: dict[str, Worker], graph: str, rounds: int, calls: int) -> dict[str, list[float]]:
    """The workers take turns; the first call of each turn only wakes the threads."""
    times: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            times[name] += worker.time(graph, calls + 1)[1:]
    return times


def interleaved(calls: dict[str, Callable[[], Any]], rounds: int, warmup: int = 3) -> dict[str, list[float]]:
    """Milliseconds of each call, one after the other in every round."""
    for _ in range(warmup):
        for call in calls.values():
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


def summary(times: dict[str, list[float]], reference: str) -> dict[str, Any]:
    """Percentiles, and the median over rounds of the ratio to the reference."""
    out = {}
    for name, values in times.items():
        count = min(len(values), len(times[reference]))
        ratios = np.array(times[reference][:count]) / np.array(values[:count])
        out[name] = {"min_ms": round(min(values), 1), "p50_ms": round(float(np.median(values)), 1),
                     "p90_ms": round(float(np.percentile(values, 90)), 1),
                     "times_faster": round(float(np.median(ratios)), 2)}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("model")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()

    bundle = read_bundle(args.bundle)
    pairs = [(r, p) for r, f in RUNTIME_FORMATS.items() if r != "coreml"
             for g, p in sorted({(a.format, a.precision) for a in bundle.artifacts}) if g == f]
    # Opened once before, so that load times are those of a warm cache.
    for runtime, precision in pairs:
        Worker(str(args.bundle), None, runtime, precision, args.threads).close()
    workers = {"pytorch fp32": Worker(args.model, args.checkpoint, "pytorch", "fp32", args.threads)}
    for runtime, precision in pairs:
        workers[f"{runtime} {precision}"] = Worker(str(args.bundle), None, runtime, precision, args.threads)
    encoder = rounds_of(workers, "encoder", args.rounds, 2)
    decoder = rounds_of(workers, "decoder", args.rounds, 20)
    for worker in workers.values():
        worker.close()
    host = host_times(bundle.spec, bundle.slots, args.rounds * 2)
    print(json.dumps({
        "machine": machine(), "threads": args.threads, "model": bundle.spec.name,
        "versions": {n: w.facts["version"] for n, w in workers.items()}, "files": files_of(bundle),
        "encoder": summary(encoder, "pytorch fp32"), "decoder_one_prompt": summary(decoder, "pytorch fp32"),
        "load_s": {n: w.facts["load_s"] for n, w in workers.items()},
        "peak_mb": {n: w.peak_mb for n, w in workers.items()},
        "host_12_megapixels_ms_p50": {n: round(float(np.median(v)), 1) for n, v in host.items()},
        "host_12_megapixels_ms_p50_total": round(sum(float(np.median(v)) for v in host.values()), 1),
    }, indent=2))


def files_of(bundle: Bundle) -> dict[str, dict[str, float]]:
    """Size of both graphs in MB and the mask agreement measured at export, by format and precision."""
    out: dict[str, dict[str, float]] = {}
    for a in bundle.artifacts:
        row = out.setdefault(f"{a.format} {a.precision}", {"mb": 0.0, "mask_agreement": a.measured["all"]["mean"]})
        row["mb"] = round(row["mb"] + a.bytes / 1e6, 1)
    return out


def host_times(spec: ModelSpec, slots: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of what the predictor does outside the graphs for a photo of 4000 x 3000."""
    photo = np.random.default_rng(0).integers(0, 256, (3000, 4000, 3), dtype=np.uint8)
    frame = Frame.of(3000, 4000, spec)
    prompt = Prompt.of(frame, spec, points=[(2000, 1500)], labels=[1])
    low_res = np.random.default_rng(1).normal(size=(1, spec.mask_size, spec.mask_size)).astype(np.float32)
    return interleaved({
        "resize_and_pad": lambda: to_model_image(photo, frame, spec),
        "prompt_slots": lambda: decoder_inputs([prompt], frame, spec, slots),
        "mask_upsampling": lambda: masks_from_logits(low_res, frame),
    }, rounds)


if __name__ == "__main__":
    main()
