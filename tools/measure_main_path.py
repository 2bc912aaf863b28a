"""Time the main path: every runtime of a bundle against PyTorch eager, and the predictor's own overhead.

    python tools/measure_main_path.py BUNDLE MODEL [--checkpoint FILE] [--threads 2] [--rounds 10]

Calls are interleaved round by round, so that a drift of the machine cancels in the ratios. Load time (second opening,
caches warm) and peak memory come from a process of their own for each runtime. Prints JSON.
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

import pocketsam
from pocketsam.bundle import read_bundle
from pocketsam.doctor import machine
from pocketsam.geometry import Frame, masks_from_logits, to_model_image
from pocketsam.prompts import Prompt, decoder_inputs
from pocketsam.registry import RUNTIME_FORMATS

ALONE = """
import json, resource, sys, time
import numpy, pocketsam
bundle, runtime, precision, threads = sys.argv[1:5]
start = time.perf_counter()
sam = pocketsam.load(bundle, runtime=runtime, precision=precision, threads=int(threads))
load = time.perf_counter() - start
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
sam.set_image(numpy.zeros((768, 1024, 3), numpy.uint8))
sam.predict(points=[(5, 5)])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"load_s": round(load, 2), "peak_mb": peak // 1024, "peak_before_image_mb": before // 1024}))
"""

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
        ratios = np.array(times[reference]) / np.array(values)
        out[name] = {"min_ms": round(min(values), 1), "p50_ms": round(float(np.median(values)), 1),
                     "p90_ms": round(float(np.percentile(values, 90)), 1),
                     "times_faster": round(float(np.median(ratios)), 2)}
    return out


def alone(bundle: Path, runtime: str, precision: str, threads: int) -> dict[str, Any]:
    """Load time with warm caches and peak memory, in a fresh process; the first opening only warms."""
    out = ""
    for _ in range(2):
        out = subprocess.run([sys.executable, "-c", ALONE, str(bundle), runtime, precision, str(threads)], check=True,
                             capture_output=True, encoding="utf-8").stdout
    measured: dict[str, Any] = json.loads(out.splitlines()[-1])
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("model")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()

    bundle = read_bundle(args.bundle)
    predictors = {"pytorch fp32": pocketsam.load(args.model, checkpoint=args.checkpoint, runtime="pytorch",
                                                 threads=args.threads)}
    pairs = [(r, p) for r, f in RUNTIME_FORMATS.items() if r != "coreml"
             for g, p in sorted({(a.format, a.precision) for a in bundle.artifacts}) if g == f]
    for runtime, precision in pairs:
        predictors[f"{runtime} {precision}"] = pocketsam.load(args.bundle, runtime=runtime, precision=precision,
                                                              threads=args.threads)
    spec = bundle.spec
    photo = np.random.default_rng(0).integers(0, 256, (3000, 4000, 3), dtype=np.uint8)
    frame = Frame.of(3000, 4000, spec)
    image = to_model_image(photo, frame, spec)
    prompt = Prompt.of(frame, spec, points=[(2000, 1500)], labels=[1])
    features = predictors["pytorch fp32"].runtime.encode(image, frame)
    inputs = {p.runtime.slots: decoder_inputs([prompt], frame, spec, p.runtime.slots) for p in predictors.values()}
    low_res = predictors["pytorch fp32"].runtime.decode(features, inputs[max(inputs)])["low_res_masks"]

    encoder = interleaved({n: lambda p=p: p.runtime.encode(image, frame) for n, p in predictors.items()}, args.rounds)
    decoder = interleaved({n: lambda p=p: p.runtime.decode(features, inputs[p.runtime.slots])
                           for n, p in predictors.items()}, args.rounds * 5)
    host = interleaved({
        "resize_and_pad": lambda: to_model_image(photo, frame, spec),
        "prompt_slots": lambda: decoder_inputs([prompt], frame, spec, bundle.slots),
        "mask_upsampling": lambda: masks_from_logits(low_res[:, 0], frame),
    }, args.rounds * 2)
    versions = {n: p.info()["version"] for n, p in predictors.items()}
    del predictors
    print(json.dumps({
        "machine": machine(), "threads": args.threads, "model": spec.name, "image": "12 megapixels, 4000 x 3000",
        "versions": versions,
        "encoder": summary(encoder, "pytorch fp32"), "decoder_one_prompt": summary(decoder, "pytorch fp32"),
        "alone": {f"{r} {p}": alone(args.bundle, r, p, args.threads) for r, p in pairs},
        "host_ms_p50": {n: round(float(np.median(v)), 1) for n, v in host.items()},
        "host_ms_p50_total": round(sum(float(np.median(v)) for v in host.values()), 1),
    }, indent=2))


if __name__ == "__main__":
    main()
