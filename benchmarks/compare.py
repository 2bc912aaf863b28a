"""Two results of one machine and model: what became slower, larger or worse beyond the noise of both."""

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
# The interval of fewer rounds says little (that of one has no width): then only a change by half counts.
FEW_ROUNDS = 5
MUCH_SLOWER = 0.5


@dataclass(frozen=True)
class Change:
    """One thing that differs.

    Attributes:
        what: e.g. ``encoder of onnxruntime fp32, 2 threads``.
        measure: latency, agreement, size, peak memory or status.
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
    spread of both runs is allowed for; so too where the two runs had different versions of PyTorch, whose own speed the
    ratios hold. Rounds that something else disturbed are allowed the spread of the probe. Where
    either run kept fewer than five rounds, only a change by half counts. A row that the new result lacks is worse.

    Raises:
        BenchmarkError: different models, input sides or machines, or no row in common.
    """
    _check_comparable(old, new)
    before, after = ({key(r): r for r in result["rows"]} for result in (old, new))
    if not before.keys() & after.keys():
        raise BenchmarkError("the two results have no runtime, precision and thread count in common.")
    allowed = (MUCH_SLOWER if _few_rounds(old, new) else SLOWER) + _unrest(old) + _unrest(new)
    ratios = _reference(old) == _reference(new)
    found = [change for k, row in after.items() if k in before for change in _row(before[k], row, allowed, ratios)]
    found += [Change(_name(row), "status", row["status"], "missing", True)
              for k, row in before.items() if k not in after]
    return sorted(found, key=lambda c: not c.worse)


def remarks(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What the reader of a comparison must know besides the changes, one line each."""
    found = [f"the {name} result is partial: its run did not end" for name, result in (("old", old), ("new", new))
             if not result["complete"]]
    if old["model"]["weights_sha256"] != new["model"]["weights_sha256"]:
        found.append(f"the results are of different weights of {new['model']['name']}")
    versions = _reference(old), _reference(new)
    if versions[0] != versions[1]:
        found.append(f"PyTorch was {versions[0] or 'not timed'} and is {versions[1] or 'not timed'}: milliseconds are "
                     "compared, not ratios to it")
    if _few_rounds(old, new):
        found.append(f"fewer than {FEW_ROUNDS} rounds were kept: only times that changed by more than "
                     f"{MUCH_SLOWER:.0%} are told")
    before = {key(r): r for r in old["rows"]}
    apart = [_name(r) for r in new["rows"] if r.get("agreement") and before.get(key(r), {}).get("agreement")
             and not _same_prompts(r, before[key(r)])]
    if apart:
        found.append(f"agreement was measured on other photos or prompts, and is not compared, of {'; '.join(apart)}")
    return found


def _reference(result: dict[str, Any]) -> str:
    """Version of the PyTorch that ratios are to; empty where there is none."""
    return next((r.get("version") or "" for r in result["rows"] if r.get("reference") and r["status"] == "ok"), "")


def _check_comparable(old: dict[str, Any], new: dict[str, Any]) -> None:
    for part, name, what, one in (("model", "name", "the models", "model"),
                                  ("model", "image_size", "the input sides", "input side"),
                                  ("machine", "cpu", "the processors", "machine")):
        first, second = old[part][name], new[part][name]
        if first != second:
            raise BenchmarkError(f"the results are of {what} {first} and {second}; compare results of one {one}.")


def _few_rounds(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether either run kept too few rounds to tell noise from a change; device scripts know no rounds."""
    kept = [result["calm"]["rounds"] for result in (old, new) if result.get("calm")]
    return bool(kept) and min(kept) < FEW_ROUNDS


def _unrest(result: dict[str, Any]) -> float:
    """Relative error of a run's times because of disturbed rounds: the spread of its probe, by their share."""
    calm = result.get("calm") or {}
    return float(calm["probe_spread"] * calm["disturbed"] / calm["rounds"]) if calm.get("rounds") else 0.0


def _name(row: dict[str, Any]) -> str:
    return f"{row['runtime']} {precision_of(row)}, {row['threads']} threads"


def _same_prompts(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether the agreement of two rows was measured on the same, as far as the summaries tell."""
    first, second = a["agreement"], b["agreement"]
    # The export's names no seed, and earlier versions named no photos.
    named = "photos" in first and "photos" in second
    names = ["images", "seed", "prompts_per_image", *(["photos"] if named else [])]
    facts = [[*map(m.get, names), *(m.get(kind, {}).get("prompts") for kind in ("box", "point"))]
             for m in (first, second)]
    return facts[0] == facts[1]


def _row(a: dict[str, Any], b: dict[str, Any], allowed: float, ratios: bool) -> list[Change]:
    name = _name(b)
    found = []
    if (a["status"] == "ok") != (b["status"] == "ok"):
        return [Change(name, "status", a["status"], b["status"], b["status"] != "ok")]
    if not b.get("reference"):
        found += [c for g in GRAPHS if (c := _latency(f"{g} of {name}", a.get(g), b.get(g), allowed, ratios))]
    if a.get("agreement") and b.get("agreement") and _same_prompts(a, b):
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


def _latency(name: str, a: dict[str, Any] | None, b: dict[str, Any] | None, allowed: float,
             ratios: bool) -> Change | None:
    if not a or not b:
        return None
    first, second = a.get("times_pytorch"), b.get("times_pytorch")
    if ratios and first and second:
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
