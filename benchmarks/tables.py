"""Rows as text, the same for the terminal, the page and the documents."""

from __future__ import annotations

from typing import Any

from pocketsam.benchmarks.results import mean_agreement, megabytes, precision_of

HEADS = ("runtime", "precision", "threads", "MB", "agreement", "encoder ms", "x PyTorch", "x floor", "prompt ms",
         "x PyTorch", "load ms", "peak MB", "note")
QUALITY = ("box", "point", "oracle")


def cells(row: dict[str, Any]) -> list[str]:
    """One line of the main table."""
    agreement = mean_agreement(row)
    encoder, decoder = row.get("encoder") or {}, row.get("decoder") or {}
    return [row["runtime"], precision_of(row), str(row["threads"]), _one(megabytes(row)),
            "" if agreement is None or row.get("reference") else f"{agreement:.4f}",
            _time(encoder), _ratio(encoder), _floor(encoder), _time(decoder), _ratio(decoder),
            _one(row.get("load_ms"), 0), _one(row.get("peak_mb") or None, 0), note(row)]


def note(row: dict[str, Any]) -> str:
    """What a reader must know of this row."""
    found = [] if row["status"] == "ok" else [row["status"]]
    if layers := (row.get("float_layers") or {}).get("encoder"):
        found.append(f"{layers} layer{'s' if layers > 1 else ''} of the encoder in float")
    found += [f"{graph} {r['value']:.2f} x {r['to']}" for graph in ("encoder", "decoder")
              if (r := (row.get(graph) or {}).get("times_against")) and "to" in r]
    if row.get("slower_than"):
        found.append(f"slower than {row['slower_than']}, which is more accurate")
    if fallbacks := row.get("fallbacks"):
        found.append(f"{fallbacks} operators off the fast path")
    if row.get("resident") is False:
        found.append("opened anew for each turn")
    return "; ".join(found)


def accuracy_rows(result: dict[str, Any]) -> list[list[str]]:
    """Agreement and quality by prompt kind, with a header; columns that nothing was measured for are left out."""
    rows = []
    for row in result["rows"]:
        measured, quality = row.get("agreement") or {}, row.get("quality") or []
        if not measured and not quality:
            continue
        name = [row["runtime"], precision_of(row)]
        for prompt in ("box", "point"):
            m = measured.get(prompt)
            numbers = [str(m["prompts"]), *(f"{m[k]:.4f}" for k in ("mean", "p5", "worst"))] if m else [""] * 4
            told = m and prompt == "point" and "flip_rate" in measured
            flips = f"{100 * measured['flip_rate']:.1f} %" if told else ""
            rows.append([*name, prompt, *numbers, flips, *(_of_all(row, k, prompt) for k in ("quality", "retention"))])
    heads = ["runtime", "precision", "prompt", "prompts", "mean IoU with PyTorch", "5th percentile", "worst", "flips",
             "mIoU with ground truth", "retention"]
    used = [i for i in range(len(heads)) if any(r[i] for r in rows)]
    return [[r[i] for i in used] for r in (heads, *rows)] if rows else []


def source_rows(result: dict[str, Any]) -> list[list[str]]:
    """Quality against the labels, a line for each runtime, precision and source, with a header."""
    rows = [[row["runtime"], precision_of(row), q["source"], str(q["regions"]), *(f"{q[k]:.4f}" for k in QUALITY)]
            for row in result["rows"] for q in row.get("quality") or []]
    heads = ["runtime", "precision", "source", "regions", "box mIoU", "point mIoU", "best of three mIoU"]
    return [heads, *rows] if rows else []


def _of_all(row: dict[str, Any], table: str, kind: str) -> str:
    whole: dict[str, Any] = next((q for q in row.get(table) or [] if q["source"] == "all"), {})
    return "" if whole.get(kind) is None else f"{whole[kind]:.4f}"


def facts(result: dict[str, Any]) -> str:
    """Machine, versions and commit in one sentence."""
    m = result["machine"]
    versions = sorted({f"{r['runtime']} {r['version'].split('-')[0]}" for r in result["rows"] if r.get("version")})
    ceilings = "; ".join(
        f"{c['threads']} thread{'s' if c['threads'] > 1 else ''}: {c['gemm_fp32'] / 1e9:.0f} GFLOP/s fp32"
        + (f", {c['gemm_bf16'] / 1e9:.0f} GFLOP/s bf16" if c.get("gemm_bf16") else "")
        + (f", {c['gemm_int8'] / 1e9:.0f} GOP/s int8" if c.get("gemm_int8") else "")
        + f", {c['bandwidth'] / 1e9:.1f} GB/s" for c in result.get("ceilings", []))
    return (f"{m['cpu']}, {m['cores']} cores, {' '.join(m['features'])}; {m['system']}, Python {m['python']}; "
            f"{', '.join(versions)}; PocketSAM {result['pocketsam']} {result.get('commit', '')}; {result['created']}. "
            + (f"Measured ceilings: {ceilings}." if ceilings else ""))


def _one(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _time(graph: dict[str, Any]) -> str:
    if not graph:
        return ""
    return f"{graph['p50_ms']:.1f} ± {100 * graph['spread']:.0f} %"


def _ratio(graph: dict[str, Any]) -> str:
    r = graph.get("times_pytorch")
    return "" if not r else f"{r['value']:.2f} ({r['low']:.2f}-{r['high']:.2f})"


def _floor(graph: dict[str, Any]) -> str:
    floor = graph.get("floor")
    return "" if not floor else f"{floor['times_floor']:.1f}"
