"""The kit for devices: its script runs without PocketSAM and writes what the report merges."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pocketsam.benchmarks.kit import DEVICE, ENGINES, SCRIPT, write_kit
from pocketsam.benchmarks.results import merge
from pocketsam.bundle import read_bundle
from pocketsam.errors import BenchmarkError, OutputError, UnknownName
from pocketsam.files import sha256_path, size_of
from pocketsam.registry import RUNTIME_FORMATS

# Runs the script as it would run from the command line, then looks at what it imported.
WRAPPER = """
import os, runpy, sys
try:
    sys.argv.pop(0)
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    found = {m.split(".")[0] for m in sys.modules} & {"pocketsam", "torch", "PIL", "typer", "rich"}
    assert not found, found
"""
TIMES = {"calls", "min_ms", "p50_ms", "p90_ms", "p99_ms", "spread", "first_ms"}


def run(kit: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-I", "-c", WRAPPER, str(kit / SCRIPT), "-o", str(out), *options],
                          capture_output=True, encoding="utf-8", check=False, cwd=out.parent)


def check(out: Path, bundle: Path, runtime: str) -> None:
    manifest = json.loads((bundle / "bundle.json").read_text())
    result, = merge([out])
    assert set(result) == {"kind", "schema", "complete", "created", "device", "machine", "pocketsam", "commit",
                           "model", "settings", "ceilings", "rows"}
    assert (result["kind"], result["schema"], result["complete"]) == ("pocketsam-bench", 1, True)
    assert result["device"] == "test board"
    assert list(result["machine"]) == ["python", "system", "cpu", "cores", "features"]
    assert result["model"] == {"name": "toy_sam", "image_size": 128, "weights_sha256": manifest["weights"]["sha256"]}
    assert result["settings"] == {"script": "bench_device"}
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


def measured(bundle: Path, folder: Path, runtime: str) -> None:
    kit, out = folder / "kit", folder / "r.json"
    size = write_kit(read_bundle(bundle), runtime, "fp32", kit)
    held = [p.relative_to(kit) for p in kit.rglob("*") if p.is_file()]
    assert size == sum((kit / p).stat().st_size for p in held if len(p.parts) > 1)
    assert {p.parts[0] for p in held} == {RUNTIME_FORMATS[runtime], "kit.json", SCRIPT, "engine.py"}
    done = run(kit, out, "--threads", "1", "--device", "test board")
    assert done.returncode == 0, done.stderr
    check(out, bundle, runtime)


def test_onnx(toy_bundle: Path, tmp_path: Path) -> None:
    measured(toy_bundle, tmp_path, "onnxruntime")


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["litert", "openvino"])
def test_other_engines(toy_everywhere: Path, tmp_path: Path, runtime: str) -> None:
    measured(toy_everywhere, tmp_path, runtime)


def test_the_prompt_is_a_click_in_the_middle(toy_bundle: Path, tmp_path: Path) -> None:
    write_kit(read_bundle(toy_bundle), "onnxruntime", "fp32", tmp_path / "kit")
    _, decoder = json.loads((tmp_path / "kit/kit.json").read_text())["graphs"]
    values = {name: t["value"] for name, t in decoder["inputs"].items()}
    assert values["point_coords"][0][0] == [64.0, 64.0]
    assert values["point_labels"] == [[1.0, -1.0, *[-2.0] * (len(values["point_labels"][0]) - 2)]]
    assert (values["mask_input"], values["has_mask_input"], values["image_embeddings"]) == (0, 0, 0)
    assert all(isinstance(d, int) for t in decoder["inputs"].values() for d in t["shape"])


def test_the_script_is_short_and_every_engine_is_there() -> None:
    assert len((DEVICE / SCRIPT).read_text("utf-8").splitlines()) <= 60
    # Core ML's devices have no Python.
    assert set(ENGINES) == set(RUNTIME_FORMATS) - {"coreml"}


def test_a_damaged_kit_is_refused_on_the_device(toy_bundle: Path, tmp_path: Path) -> None:
    kit, out = tmp_path / "kit", tmp_path / "r.json"
    write_kit(read_bundle(toy_bundle), "onnxruntime", "fp32", kit)
    done = run(kit, out, "--threads", "0")
    assert done.returncode == 2
    assert "expected at least 1 thread, not 0" in done.stderr
    done = run(kit, out, "-o", str(tmp_path / "none/r.json"))
    assert done.returncode == 2
    assert "--out in a folder that exists" in done.stderr
    with (kit / "onnx/decoder.fp32.onnx").open("r+b") as f:
        f.write(b"\1")
    done = run(kit, out)
    assert done.returncode == 1
    assert "does not match its recorded sha256" in done.stderr
    (kit / "onnx/decoder.fp32.onnx").unlink()
    assert "is missing" in run(kit, out).stderr
    assert not out.exists()


def test_refusals(toy_bundle: Path, tmp_path: Path) -> None:
    bundle = read_bundle(toy_bundle)
    with pytest.raises(BenchmarkError, match="no device script for 'coreml'"):
        write_kit(bundle, "coreml", "fp32", tmp_path / "kit")
    with pytest.raises(UnknownName, match="int4"):
        write_kit(bundle, "onnxruntime", "int4", tmp_path / "kit")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/diary.txt").write_text("dear diary")
    with pytest.raises(OutputError, match="is not a device kit"):
        write_kit(bundle, "onnxruntime", "fp32", tmp_path / "mine")
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
    # A kit is replaced.
    write_kit(bundle, "onnxruntime", "fp32", tmp_path / "kit")
    (tmp_path / "kit/engine.py").unlink()
    write_kit(bundle, "onnxruntime", "fp32", tmp_path / "kit")
    assert (tmp_path / "kit/engine.py").is_file()
    # A result that was written into it is not.
    (tmp_path / "kit/result.json").write_text("{}")
    with pytest.raises(OutputError, match=r"result\.json is not part of the kit"):
        write_kit(bundle, "litert", "fp32", tmp_path / "kit")


def test_a_folder_artifact_is_opened_by_its_main_file(toy_bundle: Path, tmp_path: Path) -> None:
    """ONNX files above 2 GiB are folders; every file of one is checked on the device."""
    copy = tmp_path / "copy.bundle"
    shutil.copytree(toy_bundle, copy)
    path = copy / "onnx/encoder.fp32.onnx"
    path.rename(copy / "model.onnx")
    path.mkdir()
    (copy / "model.onnx").rename(path / "model.onnx")
    data = json.loads((copy / "bundle.json").read_text())
    row = next(a for a in data["artifacts"] if a["graph"] == "encoder")
    row["sha256"], row["bytes"] = sha256_path(path), size_of(path)
    (copy / "bundle.json").write_text(json.dumps(data))
    measured(copy, tmp_path, "onnxruntime")
    plan = json.loads((tmp_path / "kit/kit.json").read_text())
    assert plan["graphs"][0]["path"] == "onnx/encoder.fp32.onnx/model.onnx"
    assert set(plan["files"]) == {"onnx/encoder.fp32.onnx/model.onnx", "onnx/decoder.fp32.onnx"}
