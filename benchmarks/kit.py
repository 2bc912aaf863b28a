"""A folder that measures a bundle where there is no PocketSAM: two graphs, one engine's file and a short script."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from pocketsam.benchmarks.results import GRAPHS, header, held
from pocketsam.bundle import IR_FILE, ONNX_FILE, Artifact, Bundle
from pocketsam.doctor import CPU_FLAGS
from pocketsam.errors import BenchmarkError, BundleError, OutputError
from pocketsam.files import sha256_file, staged_folder
from pocketsam.prompts import middle_click
from pocketsam.registry import RUNTIME_FORMATS

DEVICE = Path(__file__).parent / "device"
SCRIPT, ENGINE, PLAN = "bench_device.py", "engine.py", "kit.json"
ENGINES = tuple(sorted(p.stem for p in (DEVICE / "engines").glob("*.py")))
SIGNATURES = {"encoder": "encode", "decoder": "decode_1"}


def write_kit(bundle: Bundle, runtime: str, precision: str, out: Path) -> int:
    """Write what a device needs to time the encoder and the prompt decoder of a bundle.

    The folder holds copies of the two artifacts, ``kit.json`` (sha256 of every file, tensors of the graphs, one prompt,
    and the result but for what the device adds), ``bench_device.py`` and ``engine.py``.

    Args:
        runtime: one of ``ENGINES``.
        precision: of the artifacts, such as ``fp32``.
        out: a folder that is new, empty or a kit, which is replaced.

    Returns:
        Bytes of the two artifacts.

    Raises:
        BenchmarkError: there is no script for the runtime.
        BundleError: the bundle lacks an artifact, or one is damaged.
        OutputError: something else is there, a result in the kit included, or the place cannot be written.
    """
    if runtime not in ENGINES:
        raise BenchmarkError(f"there is no device script for {runtime!r}; expected one of {', '.join(ENGINES)}.")
    _check_replaceable(out)
    artifacts = [bundle.find(RUNTIME_FORMATS[runtime], precision, graph) for graph in GRAPHS]
    with staged_folder(out) as staging:
        files: dict[str, str] = {}
        # What is zero everywhere stands as 0.
        prompt = {k: v.tolist() if v.any() else 0 for k, v in middle_click(bundle.spec, bundle.slots).items()}
        graphs = [_graph(a, _copy(bundle, a, staging, files), prompt) for a in artifacts]
        row = {"runtime": runtime, "format": RUNTIME_FORMATS[runtime], "precision": precision, "reference": False,
               "status": "ok", **held({a.graph: a for a in artifacts}), "quality": None}
        # The device puts itself, its time and its row in place of this machine's.
        result = {**header(bundle, {"script": "bench_device"}, ""), "complete": True, "commit": ""}
        plan = {"result": result, "row": row, "graphs": graphs, "files": files, "features": CPU_FLAGS}
        (staging / PLAN).write_text(json.dumps(plan, indent=2) + "\n", encoding="utf-8")
        shutil.copyfile(DEVICE / SCRIPT, staging / SCRIPT)
        shutil.copyfile(DEVICE / "engines" / f"{runtime}.py", staging / ENGINE)
    return sum(a.bytes for a in artifacts)


def _check_replaceable(out: Path) -> None:
    """That nothing lies there but a kit: a result that was written into it took somebody's device and time."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        files = set(json.loads((out / PLAN).read_text("utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise OutputError(f"{out} exists and is not a device kit; choose another folder.") from e
    own = {PLAN, SCRIPT, ENGINE, *files}
    for path in sorted(out.rglob("*")):
        if path.is_file() and path.relative_to(out).as_posix() not in own and path.suffix != ".pyc":
            raise OutputError(f"{path} is not part of the kit that would be replaced; move it, or choose another "
                              "folder.")


def _copy(bundle: Bundle, artifact: Artifact, staging: Path, files: dict[str, str]) -> str:
    """Copy an artifact, note the sha256 of its files, and return the path that the engine opens."""
    source, name = bundle.file(artifact), artifact.path
    target = staging / name
    target.parent.mkdir(parents=True, exist_ok=True)
    if not source.is_dir():
        shutil.copyfile(source, target)
        files[name] = artifact.sha256
        return name
    shutil.copytree(source, target)
    held = sorted(p for p in target.rglob("*") if p.is_file())
    files |= {p.relative_to(staging).as_posix(): sha256_file(p) for p in held}
    for main in (IR_FILE, ONNX_FILE):
        if (target / main).is_file():
            return f"{name}/{main}"
    raise BundleError(f"{source} holds neither {IR_FILE} nor {ONNX_FILE}; export the bundle again.")


def _graph(artifact: Artifact, path: str, values: dict[str, Any]) -> dict[str, Any]:
    """One prompt in place of the symbolic batch."""
    inputs = {t["name"]: {"shape": [1 if isinstance(d, str) else d for d in t["shape"]], "dtype": t["dtype"],
                          "value": values.get(t["name"], 0)} for t in artifact.inputs}
    return {"path": path, "signature": SIGNATURES[artifact.graph], "inputs": inputs,
            "outputs": [t["name"] for t in artifact.outputs]}
