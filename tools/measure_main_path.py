"""Time the main path: encoder and decoder on ONNX Runtime against PyTorch eager, and the predictor's own overhead.

    python tools/measure_main_path.py BUNDLE MODEL CHECKPOINT [--threads 2] [--rounds 10]

Calls are interleaved round by round, so that a drift of the machine cancels in the ratios. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import pocketsam
from pocketsam.doctor import machine
from pocketsam.geometry import Frame, masks_from_logits, to_model_image
from pocketsam.prompts import Prompt, decoder_inputs


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
                     f"times_faster_than_{reference}": round(float(np.median(ratios)), 2)}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("model")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()

    candidate = pocketsam.load(args.bundle, runtime="onnxruntime", threads=args.threads)
    reference = pocketsam.load(args.model, checkpoint=args.checkpoint, runtime="pytorch", threads=args.threads)
    spec = candidate.spec
    photo = np.random.default_rng(0).integers(0, 256, (3000, 4000, 3), dtype=np.uint8)
    frame = Frame.of(3000, 4000, spec)
    image = to_model_image(photo, frame, spec)
    prompt = Prompt.of(frame, spec, points=[(2000, 1500)], labels=[1])
    features = candidate.runtime.encode(image, frame)
    inputs = {s: decoder_inputs([prompt], frame, spec, s) for s in {candidate.runtime.slots, reference.runtime.slots}}
    low_res = candidate.runtime.decode(features, inputs[candidate.runtime.slots])["low_res_masks"]

    both = {"pytorch": reference, "onnxruntime": candidate}
    encoder = interleaved({n: lambda p=p: p.runtime.encode(image, frame) for n, p in both.items()}, args.rounds)
    decoder = interleaved({n: lambda p=p: p.runtime.decode(features, inputs[p.runtime.slots])
                           for n, p in both.items()}, args.rounds * 10)
    host = interleaved({
        "resize_and_pad": lambda: to_model_image(photo, frame, spec),
        "prompt_slots": lambda: decoder_inputs([prompt], frame, spec, candidate.runtime.slots),
        "mask_upsampling": lambda: masks_from_logits(low_res[:, 0], frame),
    }, args.rounds * 2)
    print(json.dumps({
        "machine": machine(), "threads": args.threads, "model": spec.name, "image": "12 megapixels, 4000 x 3000",
        "versions": {n: p.info()["version"] for n, p in both.items()},
        "encoder": summary(encoder, "pytorch"), "decoder_one_prompt": summary(decoder, "pytorch"),
        "host_ms_p50": {n: round(float(np.median(v)), 1) for n, v in host.items()},
        "host_ms_p50_total": round(sum(float(np.median(v)) for v in host.values()), 1),
    }, indent=2))


if __name__ == "__main__":
    main()
