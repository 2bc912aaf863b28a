"""Time one bundle on a device that has numpy and one engine, and nothing of PocketSAM; see README.md here.

    python bench_device.py BUNDLE_DIR --runtime litert --threads 2 -o result.json [--precision fp32] [--device NAME]
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np

FORMATS = {"onnxruntime": "onnx", "litert": "litert", "openvino": "openvino"}
WARMUPS, ENCODER_RUNS, DECODER_RUNS = 5, 20, 100
FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16", "asimd",
         "asimddp", "i8mm", "bf16", "fphp")


def intact(root: Path, row: dict[str, Any]) -> Path:
    """The file or folder of an artifact, inside the bundle and with the recorded sha256; ends the script otherwise."""
    path: Path = root / row["path"]
    files = [p for p in sorted(path.rglob("*"), key=lambda p: p.relative_to(path).as_posix()) if not p.is_dir()]
    if any(root.resolve() not in p.resolve().parents for p in [path, *files]) or not path.exists():
        raise SystemExit(f"{row['path']} is missing or outside {root}; copy the whole bundle again.")
    sums = [(p.relative_to(path).as_posix(), hashlib.sha256(p.read_bytes()).hexdigest()) for p in files]
    text = "".join(f"{name}\0{digest}\n" for name, digest in sums).encode()
    if hashlib.sha256(text if path.is_dir() else path.read_bytes()).hexdigest() != row["sha256"]:
        raise SystemExit(f"{path} does not match its recorded sha256; copy the bundle again.")
    return path


def engine(name: str, threads: int) -> tuple[str, Any]:
    """The engine's version, and a function (path, artifact) -> function from named arrays to named arrays."""
    if name == "onnxruntime":
        import onnxruntime as ort
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1

        def session_of(path: Path, row: dict[str, Any]) -> Any:
            session, names = ort.InferenceSession(str(path), options, ["CPUExecutionProvider"]), outputs(row)
            return lambda feed: dict(zip(names, session.run(names, feed)))  # noqa: B905 - strict needs Python 3.10
        return ort.__version__, session_of
    if name == "openvino":
        import openvino as ov

        def load(path: Path, row: dict[str, Any]) -> Any:
            model = ov.Core().read_model(path / "model.xml")
            model.reshape({t["name"]: ov.PartialShape(shape(t)) for t in row["inputs"]})
            config = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY",
                      "INFERENCE_NUM_THREADS": threads}
            request, names = ov.Core().compile_model(model, "CPU", config).create_infer_request(), outputs(row)

            def call(feed: dict[str, Any]) -> dict[str, Any]:
                out = request.infer(feed)
                return {n: np.array(out[n]) for n in names}
            return call
        return ov.get_version(), load
    return litert(threads)


def litert(threads: int) -> tuple[str, Any]:
    try:
        from ai_edge_litert.interpreter import Interpreter
        package = "ai-edge-litert"
    except ModuleNotFoundError:
        from tflite_runtime.interpreter import Interpreter
        package = "tflite-runtime"

    def load(path: Path, row: dict[str, Any]) -> Any:
        interpreter = Interpreter(model_path=str(path), num_threads=threads)
        interpreter.allocate_tensors()
        runner = interpreter.get_signature_runner("encode" if row["graph"] == "encoder" else "decode_1")
        return lambda feed: runner(**feed)
    return importlib.metadata.version(package), load


def outputs(row: dict[str, Any]) -> list[str]:
    return [t["name"] for t in row["outputs"]]


def shape(tensor: dict[str, Any]) -> list[int]:
    """One prompt in place of the symbolic batch."""
    return [1 if isinstance(d, str) else d for d in tensor["shape"]]


def feed(row: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """Seeded noise as image; one object point in the middle, its padding point and empty slots; no mask."""
    rng = np.random.default_rng(0)
    out: dict[str, Any] = {}
    for t in row["inputs"]:
        zeros = np.zeros(shape(t), t["dtype"])
        out[t["name"]] = rng.integers(0, 256, zeros.shape, dtype=np.uint8) if t["dtype"] == "uint8" else zeros
    if "point_labels" in out:
        out["point_labels"][:] = -2
        out["point_labels"][:, :2] = 1, -1
    return {name: known.get(name, value) for name, value in out.items()}


def timed(call: Any, runs: int) -> dict[str, Any]:
    """The first call apart, then warm-ups, then the runs: milliseconds, readback included."""
    def once() -> float:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    first = once()
    times = [once() for _ in range(WARMUPS + runs)][WARMUPS:]
    p50, p90, p99 = (float(v) for v in np.percentile(times, (50, 90, 99)))
    return {"calls": runs, "min_ms": min(times), "p50_ms": p50, "p90_ms": p90, "p99_ms": p99,
            "spread": (p90 - p50) / p50, "first_ms": first}


def status(path: str) -> dict[str, str]:
    """``name: value`` lines of a file of the kernel; empty where there is none."""
    if not Path(path).exists():
        return {}
    lines = (line.split(":", 1) for line in Path(path).read_text(errors="replace").splitlines() if ":" in line)
    return {k.strip(): v.strip() for k, v in lines}


def machine() -> dict[str, Any]:
    cpu = status("/proc/cpuinfo")
    flags = (cpu.get("flags") or cpu.get("Features") or "").split()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}",
            "cpu": cpu.get("model name") or cpu.get("Model") or cpu.get("Hardware") or platform.processor(),
            "cores": cores, "features": [f for f in FLAGS if f in flags]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--runtime", choices=sorted(FORMATS), required=True)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default=platform.machine(), help="what the report calls this device")
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()
    data = json.loads((args.bundle / "bundle.json").read_text(encoding="utf-8"))
    rows = {a["graph"]: a for a in data["artifacts"]
            if (a["format"], a["precision"]) == (FORMATS[args.runtime], args.precision)
            and a["graph"] in ("encoder", "decoder")}
    if set(rows) != {"encoder", "decoder"}:
        raise SystemExit(f"{args.bundle} holds no {args.precision} graphs for {args.runtime}; export them first.")
    paths = {graph: intact(args.bundle, row) for graph, row in rows.items()}
    version, load = engine(args.runtime, args.threads)
    start = time.perf_counter()
    encode, decode = (load(paths[g], rows[g]) for g in ("encoder", "decoder"))
    load_ms = (time.perf_counter() - start) * 1e3
    image = feed(rows["encoder"], {})
    encoder = timed(lambda: encode(image), ENCODER_RUNS)
    prompt = feed(rows["decoder"], encode(image))
    prompt["point_coords"][:, 0] = data["model"].get("prompt_size") or data["model"]["image_size"]
    prompt["point_coords"][:, 0] /= 2
    decoder = timed(lambda: decode(prompt), DECODER_RUNS)
    # Not getrusage: its peak begins with that of the parent process.
    peak = status("/proc/self/status").get("VmHWM")
    row = {"runtime": args.runtime, "format": FORMATS[args.runtime], "precision": args.precision,
           "threads": args.threads, "version": version, "reference": False, "status": "ok",
           "bytes": {g: rows[g]["bytes"] for g in ("encoder", "decoder")}, "load_ms": load_ms,
           "peak_mb": int(peak.split()[0]) * 1024 / 1e6 if peak else None,
           "agreement": rows["encoder"].get("measured") or None, "quality": None,
           "encoder": encoder, "decoder": decoder}
    result = {"kind": "pocketsam-bench", "schema": 1, "complete": True,
              "created": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()), "device": args.device,
              "machine": machine(), "pocketsam": data["tools"].get("pocketsam", ""), "commit": "",
              "model": {"name": data["model"]["name"], "image_size": data["model"]["image_size"],
                        "weights_sha256": data["weights"]["sha256"]},
              "settings": {"script": "bench_device", "threads": [args.threads]}, "ceilings": [], "rows": [row]}
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"{args.out}: encoder {encoder['p50_ms']:.1f} ms, decoder {decoder['p50_ms']:.1f} ms (p50)")


if __name__ == "__main__":
    main()
