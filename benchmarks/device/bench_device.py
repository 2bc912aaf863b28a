"""Time the graphs of this folder, made by `pocketsam bench kit`, with numpy and one engine; no PocketSAM needed."""

import argparse
import hashlib
import json
import os
import platform
import re
import time
import timeit
from pathlib import Path
from typing import Any

import engine
import numpy as np

HERE = Path(__file__).parent


def timed(call: Any, runs: int) -> dict[str, Any]:
    """The first call apart, then five warm-ups, then the runs: milliseconds, readback included."""
    times = [timeit.timeit(call, number=1) * 1e3 for _ in range(6 + runs)]
    p50, p90, p99 = (float(v) for v in np.percentile(times[6:], (50, 90, 99)))
    return {"calls": runs, "min_ms": min(times[6:]), "p50_ms": p50, "p90_ms": p90, "p99_ms": p99,
            "spread": (p90 - p50) / p50, "first_ms": times[0]}


def kernel(path: str, name: str) -> str:
    """What follows ``name:`` in a file of the kernel, or nothing."""
    text = Path(path).read_text("utf-8", "replace") if Path(path).exists() else ""
    return str((re.findall(rf"^(?:{name})\s*: *(.*)$", text, re.MULTILINE) or [""])[0])


kit = json.loads((HERE / "kit.json").read_text("utf-8"))
parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--device", default=platform.machine(), help="what the report calls this device")
parser.add_argument("-o", "--out", type=Path, default="bench-{runtime}-{precision}.json".format(**kit["row"]))
args = parser.parse_args()
if args.threads < 1 or not args.out.parent.is_dir():
    parser.error(f"expected at least 1 thread, not {args.threads}, and --out in a folder that exists, not {args.out}.")
for name, digest in kit["files"].items():
    if not (HERE / name).is_file() or hashlib.sha256((HERE / name).read_bytes()).hexdigest() != digest:
        raise SystemExit(f"{HERE / name} is missing or does not match its recorded sha256; copy the folder again.")
result, row, (encoder, decoder) = kit["result"], kit["row"], kit["graphs"]
start = time.perf_counter()
encode, decode = (engine.opened(HERE / g["path"], g, args.threads) for g in kit["graphs"])
row.update(version=engine.VERSION, threads=args.threads, load_ms=(time.perf_counter() - start) * 1e3)
image = {n: np.random.default_rng(0).integers(0, 256, t["shape"], t["dtype"]) for n, t in encoder["inputs"].items()}
row["encoder"], features = timed(lambda: encode(image), 20), encode(image)
prompt = {n: features.get(n, np.full(t["shape"], t["value"], t["dtype"])) for n, t in decoder["inputs"].items()}
row["decoder"] = timed(lambda: decode(prompt), 100)
row["peak_mb"] = int((kernel("/proc/self/status", "VmHWM") or "0 kB").split()[0]) * 1024 / 1e6 or None
result["machine"] = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}",
                     "cpu": kernel("/proc/cpuinfo", "model name|Model|Hardware") or platform.processor(),
                     "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
                     "features": [f for f in kernel("/proc/cpuinfo", "flags|Features").split() if f in kit["features"]]}
result.update(device=args.device, created=time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()), rows=[row])
args.out.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
print(f"{args.out}: encoder {row['encoder']['p50_ms']:.1f} ms, decoder {row['decoder']['p50_ms']:.1f} ms (p50)")
