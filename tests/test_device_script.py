"""The stand-alone script for devices: runs without PocketSAM and writes what the report merges."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks/device/bench_device.py"
# Runs the script as it would run from the command line, then looks at what it imported.
WRAPPER = """
import runpy, sys
try:
    sys.argv.pop(0)
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    found = {m.split(".")[0] for m in sys.modules} & {"pocketsam", "torch", "PIL", "typer", "rich"}
    assert not found, found
"""
TIMES = {"calls", "min_ms", "p50_ms", "p90_ms", "p99_ms", "spread", "first_ms"}


def run(bundle: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-I", "-c", WRAPPER, str(SCRIPT), str(bundle), "-o", str(out), "--threads",
                           "1", *options], capture_output=True, encoding="utf-8", check=False, cwd=out.parent)


def check(out: Path, bundle: Path, runtime: str) -> None:
    manifest = json.loads((bundle / "bundle.json").read_text())
    result = json.loads(out.read_text("utf-8"))
    assert list(result) == ["kind", "schema", "complete", "created", "device", "machine", "pocketsam", "commit",
                            "model", "settings", "ceilings", "rows"]
    assert (result["kind"], result["schema"], result["complete"]) == ("pocketsam-bench", 1, True)
    assert result["device"] == "test board"
    assert list(result["machine"]) == ["python", "system", "cpu", "cores", "features"]
    assert result["model"] == {"name": "toy_sam", "image_size": 128, "weights_sha256": manifest["weights"]["sha256"]}
    assert result["settings"] == {"script": "bench_device", "threads": [1]}
    row, = result["rows"]
    assert (row["runtime"], row["precision"], row["threads"], row["status"]) == (runtime, "fp32", 1, "ok")
    held = {a["graph"]: a for a in manifest["artifacts"] if (a["format"], a["precision"]) == (row["format"], "fp32")}
    assert row["bytes"] == {g: held[g]["bytes"] for g in ("encoder", "decoder")}
    assert row["agreement"] == held["encoder"]["measured"]
    assert row["version"]
    assert row["load_ms"] > 0
    assert row["peak_mb"] is None or 10 < row["peak_mb"] < 4000
    for graph, least in (("encoder", 20), ("decoder", 100)):
        times = row[graph]
        assert set(times) == TIMES
        assert times["calls"] >= least
        assert 0 < times["min_ms"] <= times["p50_ms"] <= times["p90_ms"] <= times["p99_ms"]
        assert times["spread"] == pytest.approx((times["p90_ms"] - times["p50_ms"]) / times["p50_ms"])
        assert times["first_ms"] > 0


def test_onnx(toy_bundle: Path, tmp_path: Path) -> None:
    done = run(toy_bundle, tmp_path / "r.json", "--runtime", "onnxruntime", "--device", "test board")
    assert done.returncode == 0, done.stderr
    check(tmp_path / "r.json", toy_bundle, "onnxruntime")


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["litert", "openvino"])
def test_other_engines(toy_everywhere: Path, tmp_path: Path, runtime: str) -> None:
    done = run(toy_everywhere, tmp_path / "r.json", "--runtime", runtime, "--device", "test board")
    assert done.returncode == 0, done.stderr
    check(tmp_path / "r.json", toy_everywhere, runtime)


def test_refusals(toy_bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.bundle"
    shutil.copytree(toy_bundle, copy)
    done = run(copy, tmp_path / "r.json", "--runtime", "litert")
    assert done.returncode == 1
    assert "holds no fp32 graphs for litert" in done.stderr
    with (copy / "onnx/decoder.fp32.onnx").open("r+b") as f:
        f.write(b"\1")
    done = run(copy, tmp_path / "r.json", "--runtime", "onnxruntime")
    assert done.returncode == 1
    assert "does not match its recorded sha256" in done.stderr
    manifest = (copy / "bundle.json").read_text()
    (copy / "bundle.json").write_text(manifest.replace("onnx/encoder.fp32.onnx", "../encoder.fp32.onnx"))
    done = run(copy, tmp_path / "r.json", "--runtime", "onnxruntime")
    assert "is missing or outside" in done.stderr
    assert not (tmp_path / "r.json").exists()
