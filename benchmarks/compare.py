"""Two results of the same device and model: what became slower, larger or worse beyond the noise of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pocketsam.benchmarks.results import GRAPHS, key, mean_agreement, precision_of
from pocketsam.errors import BenchmarkError

# Below these a difference is not worth a failed build, however sure it is.
SLOWER = 0.08
LARGER = 0.02
MORE_MEMORY = 0.15
LESS_AGREEMENT = 0.002


@dataclass(frozen=True)
class Change:
    """One thing that differs.

    Attributes:
        what: e.g. ``encoder of onnxruntime fp32, 2 threads``.
        measure: latency, agreement, size, memory or status.
        before, after: as text.
        worse: a regression, not a gain.
    """

    what: str
    measure: str
    before: str
    after: str
    worse: bool


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """Changes beyond noise, regressions first.

    Latency is compared through the ratio to PyTorch eager where both runs have it, because the ratio survives a
    machine that is slower today; the intervals of both must be apart. Without it the medians are compared, and the
    spread of both runs is allowed for. Rounds that something else disturbed are allowed the spread of the probe.

    Raises:
        BenchmarkError: different models, or no row in common.
    """
    if old["model"]["name"] != new["model"]["name"]:
        raise BenchmarkError(f"the results are of {old['model']['name']} and {new['model']['name']}; compare one "
                             "model.")
    before = {key(r): r for r in old["rows"]}
    pairs = [(before[key(r)], r) for r in new["rows"] if key(r) in before]
    if not pairs:
        raise BenchmarkError("the two results have no runtime, precision and thread count in common.")
    allowed = SLOWER + _unrest(old) + _unrest(new)
    found = [change for a, b in pairs for change in _row(a, b, allowed)]
    return sorted(found, key=lambda c: not c.worse)


def _unrest(result: dict[str, Any]) -> float:
    """Relative error of a run's times because of disturbed rounds: the spread of its probe, by their share."""
    calm = result.get("calm") or {}
    return float(calm["probe_spread"] * calm["disturbed"] / calm["rounds"]) if calm.get("rounds") else 0.0


def _row(a: dict[str, Any], b: dict[str, Any], allowed: float) -> list[Change]:
    name = f"{b['runtime']} {precision_of(b)}, {b['threads']} threads"
    found = []
    if (a["status"] == "ok") != (b["status"] == "ok"):
        return [Change(name, "status", a["status"], b["status"], b["status"] != "ok")]
    if not b.get("reference"):
        found += [c for g in GRAPHS if (c := _latency(f"{g} of {name}", a.get(g), b.get(g), allowed))]
    first, second = mean_agreement(a), mean_agreement(b)
    if first is not None and second is not None and abs(first - second) > LESS_AGREEMENT:
        found.append(Change(name, "agreement", f"{first:.4f}", f"{second:.4f}", second < first))
    for measure, old, new, limit in (
        ("size", sum((a.get("bytes") or {}).values()), sum((b.get("bytes") or {}).values()), LARGER),
        ("peak memory", a.get("peak_mb") or 0, b.get("peak_mb") or 0, MORE_MEMORY),
    ):
        if old and new and abs(new / old - 1) > limit:
            unit = 1e6 if measure == "size" else 1
            found.append(Change(name, measure, f"{old / unit:.1f} MB", f"{new / unit:.1f} MB", new > old))
    return found


def _latency(name: str, a: dict[str, Any] | None, b: dict[str, Any] | None, allowed: float) -> Change | None:
    if not a or not b:
        return None
    first, second = a.get("times_pytorch"), b.get("times_pytorch")
    if first and second:
        moved = first["value"] / second["value"] - 1
        apart = second["high"] < first["low"] or second["low"] > first["high"]
        if abs(moved) > allowed and apart:
            before, after = (f"{r['value']:.2f} x PyTorch" for r in (first, second))
            return Change(name, "latency", before, after, moved > 0)
        return None
    moved = b["p50_ms"] / a["p50_ms"] - 1
    if abs(moved) > allowed + a["spread"] + b["spread"]:
        return Change(name, "latency", f"{a['p50_ms']:.1f} ms", f"{b['p50_ms']:.1f} ms", moved > 0)
    return None
