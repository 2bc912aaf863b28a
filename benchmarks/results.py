"""The JSON of a benchmark: assembled here, read back and checked, merged over devices (docs/bench-schema.md)."""

from __future__ import annotations

import csv
import io
import json
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pocketsam
from pocketsam.benchmarks.shapes import RESULT, misfit
from pocketsam.benchmarks.targets import described
from pocketsam.bundle import Artifact, Bundle
from pocketsam.doctor import machine
from pocketsam.errors import BenchmarkError
from pocketsam.files import staged_file

KIND = "pocketsam-bench"
SCHEMA = 1
MAX_BYTES = 64 * 2**20
GRAPHS = ("encoder", "decoder")
# Times closer than this are equal on a busy machine.
EQUAL = 1.05
ROW_KEYS = ("runtime", "format", "precision", "threads", "status")


def header(bundle: Bundle, settings: dict[str, Any], device: str) -> dict[str, Any]:
    """Everything but the rows."""
    return {
        "kind": KIND, "schema": SCHEMA, "complete": False,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device or str(machine()["cpu"]), "machine": machine(), "pocketsam": pocketsam.__version__,
        "commit": commit(),
        "model": {"name": bundle.spec.name, "image_size": bundle.spec.image_size,
                  "weights_sha256": bundle.weights_sha256},
        "settings": settings, "ceilings": [], "rows": [],
    }


def commit() -> str:
    """Git commit of the source that runs, with ``-dirty`` if it was changed; empty outside a checkout."""
    root = Path(__file__).resolve().parents[1]
    try:
        # An installed copy may lie inside somebody else's repository.
        for command in (["ls-files", "--error-unmatch", Path(__file__).resolve()],
                        ["describe", "--always", "--dirty", "--abbrev=12"]):
            got = subprocess.run(["git", *command], cwd=root, capture_output=True, encoding="utf-8", timeout=10,
                                 check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return got.stdout.strip()


def write(data: dict[str, Any], path: Path) -> None:
    """Write the JSON in one step: a reader sees the old file or the new one."""
    with staged_file(path) as staged:
        staged.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    """Read a result.

    Raises:
        BenchmarkError: missing, damaged, of a newer schema, or something else.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise BenchmarkError(f"{path} is larger than {MAX_BYTES // 2**20} MB and was not read.")
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise BenchmarkError(f"{path} cannot be read ({e}); expected the JSON that `pocketsam bench` wrote.") from e
    if not isinstance(data, dict) or data.get("kind") != KIND:
        raise BenchmarkError(f"{path} is not a benchmark result; expected the JSON that `pocketsam bench` wrote.")
    if not isinstance(data.get("schema"), int) or data["schema"] > SCHEMA:
        raise BenchmarkError(f"{path} has schema {data.get('schema')!r} and this version reads up to {SCHEMA}; "
                             "upgrade pocketsam.")
    if lacking := misfit(data, RESULT):
        raise BenchmarkError(f"{path} lacks parts of a benchmark result ({lacking} is missing or of another type); run "
                             "the benchmark again.")
    return data


def merge(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Read results of several devices, for one report.

    Raises:
        BenchmarkError: one cannot be read, or they are of different models or input sides.
    """
    found = [read(f) for f in files]
    if not found:
        raise BenchmarkError("nothing to merge; name at least one result.")
    models = {f"{f['model']['name']} at {f['model']['image_size']} x {f['model']['image_size']}" for f in found}
    if len(models) > 1:
        raise BenchmarkError(f"the results are of different models ({', '.join(sorted(models))}); merge one model's, "
                             "of one input side.")
    return found


def precision_of(row: dict[str, Any]) -> str:
    """Precision of the files, and what they were computed in where that had to be asked for."""
    return described(row["precision"], row.get("compute", ""))


def key(row: dict[str, Any]) -> tuple[str, str, int]:
    """What identifies a row within a result."""
    return row["runtime"], precision_of(row), row["threads"]


def held(parts: dict[str, Artifact]) -> dict[str, Any]:
    """What a row says of its artifacts, by graph; sizes of graphs that are missing are 0."""
    encoder = parts.get("encoder")
    kept = {g: a.quantization.get("float_layers") for g, a in parts.items() if g in GRAPHS}
    return {"bytes": {g: parts[g].bytes if g in parts else 0 for g in GRAPHS},
            "agreement": (encoder.measured or None) if encoder else None,
            "float_layers": {g: len(names) for g, names in kept.items() if isinstance(names, list)} or None}


def one_image(row: dict[str, Any], clicks: int = 1) -> float | None:
    """Milliseconds (p50) until the masks of the first ``clicks`` prompts of a new image."""
    if not row.get("encoder") or not row.get("decoder"):
        return None
    return float(row["encoder"]["p50_ms"] + clicks * row["decoder"]["p50_ms"])


def mean_agreement(row: dict[str, Any]) -> float | None:
    """Mean mask agreement over boxes and points; 1 for the reference itself."""
    if row.get("reference"):
        return 1.0
    measured = row.get("agreement") or {}
    if "all" in measured:
        return float(measured["all"]["mean"])
    parts = [measured[k] for k in ("box", "point") if k in measured]
    total = sum(p["prompts"] for p in parts)
    return sum(p["mean"] * p["prompts"] for p in parts) / total if total else None


def mark_slower(rows: list[dict[str, Any]]) -> None:
    """Name, in each row, a row of the same threads that is more accurate (or less compressed) and yet faster."""
    for row in rows:
        row["slower_than"] = ""
        time, accuracy = one_image(row), mean_agreement(row)
        for other in rows:
            better, reached = one_image(other), mean_agreement(other)
            if None in (time, accuracy, better, reached) or other["threads"] != row["threads"]:
                continue
            assert time is not None
            assert accuracy is not None
            assert better is not None
            assert reached is not None
            if other["format"] == row["format"] and reached > accuracy and better * EQUAL < time:
                row["slower_than"] = f"{other['runtime']} {precision_of(other)}"


def to_csv(results: Sequence[dict[str, Any]]) -> str:
    """One line a row and device."""
    out = io.StringIO()
    graphs = [f"{g}_{n}" for g in GRAPHS for n in ("min_ms", "p50_ms", "p90_ms", "p99_ms", "spread", "first_ms")]
    names = ["device", "model", *ROW_KEYS, "compute", "version", "mb", "load_ms", "peak_mb", *graphs,
             "encoder_times_pytorch", "encoder_times_against", "encoder_times_floor", "agreement_mean", "slower_than"]
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    for result in results:
        for row in result["rows"]:
            writer.writerow({"device": result["device"], "model": result["model"]["name"], **_flat(row)})
    return out.getvalue()


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    flat = {k: row.get(k) for k in (*ROW_KEYS, "compute", "version", "load_ms", "peak_mb", "slower_than")}
    flat["mb"] = megabytes(row)
    for graph in GRAPHS:
        numbers = row.get(graph) or {}
        flat |= {f"{graph}_{n}": numbers.get(n) for n in ("min_ms", "p50_ms", "p90_ms", "p99_ms", "spread", "first_ms")}
    encoder = row.get("encoder") or {}
    for name in ("times_pytorch", "times_against"):
        flat[f"encoder_{name}"] = (encoder.get(name) or {}).get("value")
    flat["encoder_times_floor"] = (encoder.get("floor") or {}).get("times_floor")
    flat["agreement_mean"] = mean_agreement(row)
    return flat


def megabytes(row: dict[str, Any]) -> float | None:
    """Both files, in MB (10^6 bytes)."""
    sizes = row.get("bytes")
    return round(sum(sizes.values()) / 1e6, 2) if sizes else None
