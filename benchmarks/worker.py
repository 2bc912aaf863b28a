"""One runtime in a process of its own: opens it, then times calls as it is told on standard input.

    python -m pocketsam.benchmarks.worker TARGET_JSON

Lines on standard input: ``encoder 2`` or ``decoder 20``; each is answered by one line of JSON on standard output.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from pocketsam.benchmarks.targets import Target, open_target
from pocketsam.errors import first_line

# PR_SET_PDEATHSIG of prctl(2).
SET_DEATH_SIGNAL = 1


def main() -> None:
    """Serve until standard input ends; what an engine or a target fails with is told as ``{"problem": ...}``."""
    answers = _own_stdout()
    die_with_parent()
    target = Target(**json.loads(sys.argv[1]))
    pin(target.threads)
    # Engines have classes of their own, ONNX Runtime's no common one.
    try:
        calls, facts = prepare(target)
        _say(answers, facts)
        for line in sys.stdin:
            graph, count = line.split()
            times = [_milliseconds(calls[graph]) for _ in range(int(count))]
            _say(answers, {"times": times, "peak_mb": peak_mb()})
    except Exception as e:
        _say(answers, {"problem": f"{type(e).__name__}: {first_line(e)}"})


def prepare(target: Target) -> tuple[dict[str, Callable[[], Any]], dict[str, Any]]:
    """Open the runtime and run each graph once, timing all three."""
    import numpy as np

    from pocketsam.geometry import Frame
    from pocketsam.prompts import Prompt, decoder_inputs

    start = time.perf_counter()
    engine = open_target(target)
    load_ms = (time.perf_counter() - start) * 1e3
    spec = engine.spec
    side = spec.image_size
    frame = Frame.of(3 * side // 4, side, spec)
    image = np.random.default_rng(0).integers(0, 256, (1, side, side, 3), dtype=np.uint8)
    prompt = Prompt.of(frame, spec, points=[(side / 2, side / 3)], labels=[1])
    inputs = decoder_inputs([prompt], frame, spec, engine.slots)
    start = time.perf_counter()
    features = engine.encode(image, frame)
    first_encoder = (time.perf_counter() - start) * 1e3
    calls: dict[str, Callable[[], Any]] = {"encoder": lambda: engine.encode(image, frame),
                                           "decoder": lambda: engine.decode(features, inputs)}
    first_decoder = _milliseconds(calls["decoder"])
    info = engine.info()
    facts = {"load_ms": round(load_ms, 2), "first_ms": {"encoder": round(first_encoder, 2),
                                                        "decoder": round(first_decoder, 2)},
             "version": str(info["version"]), "note": str(info.get("note", "")), "peak_mb": peak_mb()}
    return calls, facts


def pin(threads: int) -> None:
    """Keep this process on as many cores as it has threads, where the system can."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, set(cores[:threads]))


def die_with_parent() -> None:
    """On Linux, be killed when the process that started this one ends: between turns it is paused and sees no end."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


def peak_mb() -> float:
    """Peak resident memory of this process in MB (10^6 bytes)."""
    status = Path("/proc/self/status")
    if status.exists():
        # ru_maxrss starts at the parent's size on Linux; VmHWM is this program's own.
        fields = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines() if ":" in line)
        return round(int(fields["VmHWM"].split()[0]) * 1024 / 1e6, 1)
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(rss / 1e6 if sys.platform == "darwin" else rss * 1024 / 1e6, 1)


def _milliseconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def _own_stdout() -> TextIO:
    """Keep standard output for the answers: engines that print go to standard error."""
    mine = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return mine


def _say(stream: TextIO, data: dict[str, Any]) -> None:
    stream.write(json.dumps(data) + "\n")
    stream.flush()


if __name__ == "__main__":
    main()
