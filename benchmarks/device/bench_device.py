"""Time one bundle on a device that has numpy and one engine, and nothing of PocketSAM; see README.md here.

    python bench_device.py BUNDLE_DIR --runtime litert --threads 2 -o result.json [--precision fp32] [--device NAME]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import time
from pathlib import Path
from typing import Any

import numpy as np

FORMATS = {"onnxruntime": "onnx", "litert": "litert", "openvino": "openvino"}
FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16", "asimd",
         "asimddp", "i8mm", "bf16", "fphp")


def intact(root: Path, row: dict[str, Any]) -> Path:
    """The file or folder of an artifact, inside the bundle and with the recorded sha256; else the script ends."""
    path: Path = root / row["path"]
    files = {p.relative_to(path).as_posix(): p for p in [path, *path.rglob("*")] if p.is_file()}
    if not files or any(root.resolve() not in p.resolve().parents for p in files.values()):
        raise SystemExit(f"{row['path']} is missing or outside {root}; copy the whole bundle again.")
    sums = {name: hashlib.sha256(p.read_bytes()).hexdigest() for name, p in files.items()}
    listing = "".join(f"{name}\0{digest}\n" for name, digest in sorted(sums.items()))
    if row["sha256"] != (hashlib.sha256(listing.encode()).hexdigest() if path.is_dir() else sums["."]):
        raise SystemExit(f"{path} does not match its recorded sha256; copy the bundle again.")
    return path


def opened(runtime: str, path: Path, row: dict[str, Any], threads: int) -> tuple[str, Any]:
    """Version of the engine, and a function from named arrays to named arrays."""
    names = [t["name"] for t in row["outputs"]]
    # zip's strict needs Python 3.10, which a board may lack.
    if runtime == "onnxruntime":
        import onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.add_session_config_entry("session.force_spinning_stop", "1")
        file = path / "model.onnx" if path.is_dir() else path
        session = onnxruntime.InferenceSession(str(file), options, ["CPUExecutionProvider"])
        return onnxruntime.__version__, lambda feed: dict(zip(names, session.run(names, feed)))  # noqa: B905
    if runtime == "openvino":
        import openvino
        model = openvino.Core().read_model(path / "model.xml")
        model.reshape({t["name"]: openvino.PartialShape(shape(t)) for t in row["inputs"]})
        config = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        run = openvino.Core().compile_model(model, "CPU", config)
        return openvino.get_version(), lambda feed: {n: np.array(v) for n, v in zip(names, run(feed).to_tuple())}  # noqa: B905
    try:
        import ai_edge_litert as package
        from ai_edge_litert.interpreter import Interpreter
    except ModuleNotFoundError:
        import tflite_runtime as package
        from tflite_runtime.interpreter import Interpreter
    runner = Interpreter(model_path=str(path), num_threads=threads).get_signature_runner(
        "encode" if row["graph"] == "encoder" else "decode_1")
    return package.__version__, lambda feed: runner(**feed)


def shape(tensor: dict[str, Any]) -> list[int]:
    """One prompt in place of the symbolic batch."""
    return [1 if isinstance(d, str) else d for d in tensor["shape"]]


def timed(call: Any, runs: int) -> dict[str, Any]:
    """The first call apart, then five warm-ups, then the runs: milliseconds, readback included."""
    times = []
    for _ in range(6 + runs):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    p50, p90, p99 = (float(v) for v in np.percentile(times[6:], (50, 90, 99)))
    return {"calls": runs, "min_ms": min(times[6:]), "p50_ms": p50, "p90_ms": p90, "p99_ms": p99,
            "spread": (p90 - p50) / p50, "first_ms": times[0]}


def kernel(path: str, name: str) -> str:
    """What follows ``name:`` in a file of the kernel, or nothing."""
    text = Path(path).read_text("utf-8", errors="replace") if Path(path).exists() else ""
    found = re.search(rf"^(?:{name})\s*: *(.*)$", text, re.MULTILINE)
    return found[1] if found else ""


def bench(root: Path, runtime: str, precision: str, threads: int, device: str) -> dict[str, Any]:
    """The result that ``pocketsam bench merge`` reads."""
    data = json.loads((root / "bundle.json").read_text(encoding="utf-8"))
    spec, rows = data["model"], {a["graph"]: a for a in data["artifacts"]
                                 if (a["format"], a["precision"]) == (FORMATS[runtime], precision)}
    if not {"encoder", "decoder"} <= set(rows):
        raise SystemExit(f"{root} holds no {precision} graphs for {runtime}; export them first.")
    paths = {g: intact(root, rows[g]) for g in ("encoder", "decoder")}
    start = time.perf_counter()
    (version, encode), (_, decode) = (opened(runtime, paths[g], rows[g], threads) for g in paths)
    load_ms = (time.perf_counter() - start) * 1e3
    image = {"image": np.random.default_rng(0).integers(0, 256, shape(rows["encoder"]["inputs"][0]), dtype=np.uint8)}
    times, features = {"encoder": timed(lambda: encode(image), 20)}, encode(image)
    # One object point in the middle, its padding point and empty slots; no mask.
    prompt = {t["name"]: features.get(t["name"], np.zeros(shape(t), t["dtype"])) for t in rows["decoder"]["inputs"]}
    prompt["point_coords"][:, 0] = (spec.get("prompt_size") or spec["image_size"]) / 2
    prompt["point_labels"][:] = [1, -1] + [-2] * (prompt["point_labels"].shape[1] - 2)
    times["decoder"] = timed(lambda: decode(prompt), 100)
    # Not getrusage: its peak begins with that of the parent process.
    peak = kernel("/proc/self/status", "VmHWM").split()
    row = {"runtime": runtime, "format": FORMATS[runtime], "precision": precision, "threads": threads,
           "version": version, "reference": False, "status": "ok", "bytes": {g: rows[g]["bytes"] for g in paths},
           "load_ms": load_ms, "peak_mb": int(peak[0]) * 1024 / 1e6 if peak else None,
           "agreement": rows["encoder"].get("measured") or None, "quality": None, **times}
    flags = kernel("/proc/cpuinfo", "flags|Features").split()
    machine = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}",
               "cpu": kernel("/proc/cpuinfo", "model name|Model|Hardware") or platform.processor(),
               "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
               "features": [f for f in FLAGS if f in flags]}
    return {"kind": "pocketsam-bench", "schema": 1, "complete": True,
            "created": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()), "device": device, "machine": machine,
            "pocketsam": data["tools"].get("pocketsam", ""), "commit": "",
            "model": {"name": spec["name"], "image_size": spec["image_size"],
                      "weights_sha256": data["weights"]["sha256"]},
            "settings": {"script": "bench_device", "threads": [threads]}, "ceilings": [], "rows": [row]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--runtime", choices=sorted(FORMATS), required=True)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default=platform.machine(), help="what the report calls this device")
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()
    result = bench(args.bundle, args.runtime, args.precision, args.threads, args.device)
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    encoder, decoder = (result["rows"][0][g]["p50_ms"] for g in ("encoder", "decoder"))
    print(f"{args.out}: encoder {encoder:.1f} ms, decoder {decoder:.1f} ms (p50)")
