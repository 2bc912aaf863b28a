"""One self-contained HTML page: tables and inline SVG, light and dark, no script."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

from pocketsam.benchmarks.plots import Bar, Point, bars, pareto, scatter
from pocketsam.benchmarks.results import mean_agreement, megabytes, one_image, precision_of
from pocketsam.benchmarks.tables import HEADS, accuracy_rows, cells, facts, source_rows

COLORS = {"pytorch": "--grey", "torch.compile": "--brown", "onnxruntime": "--blue", "openvino": "--purple",
          "litert": "--orange", "coreml": "--green"}
SERIES = ("--blue", "--orange", "--green", "--purple", "--pink", "--brown", "--teal", "--olive", "--grey", "--red")
STYLE = """
:root { color-scheme: light dark; --bg: #fff; --fg: #1c1e21; --line: #dcdfe3; --dim: #5d646c; --warn: #a33b00;
--blue: #2f6fc4; --orange: #d9730d; --green: #2e8b57; --purple: #7d56b8; --pink: #c2458a; --brown: #8c6239;
--teal: #1c8c94; --olive: #7c8a1e; --grey: #80868d; --red: #c03a36; }
@media (prefers-color-scheme: dark) { :root { --bg: #16181b; --fg: #e8eaec; --line: #33383e; --dim: #a0a7af;
--warn: #ff9e64; --blue: #6ea8ec; --orange: #f29b4b; --green: #61bf8a; --purple: #b195e6; --pink: #e88abf;
--brown: #c39a6f; --teal: #5fc3ca; --olive: #b4c24d; --grey: #9aa1a9; --red: #ea7b76; } }
body { background: var(--bg); color: var(--fg); font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto;
max-width: 84rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; } .dim { color: var(--dim); }
.warn { color: var(--warn); } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
td, th { border-bottom: 1px solid var(--line); padding: .25rem .55rem; text-align: right; white-space: nowrap; }
td:first-child, th:first-child, td:nth-child(2), th:nth-child(2), td.text { text-align: left; }
td.text { white-space: normal; min-width: 12rem; }
th:last-child { text-align: left; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1.5rem; }
svg { width: 100%; max-width: 760px; height: auto; font: 11px system-ui, sans-serif; }
.label { paint-order: stroke; stroke: var(--bg); stroke-width: 3px; } .grid { stroke: var(--line); }
.tick { fill: var(--dim); } .axis, .label { fill: var(--fg); }
.front { fill: none; stroke: var(--dim); stroke-dasharray: 4 3; }
.legend span { margin-right: 1rem; white-space: nowrap; } .legend i { display: inline-block; width: .8em; height: .8em;
border-radius: 2px; margin-right: .35em; }
"""


def page(results: Sequence[dict[str, Any]]) -> str:
    """HTML of one result, or of several devices beside each other."""
    first = results[0]
    title = f"PocketSAM benchmark: {first['model']['name']}"
    body = [f"<h1>{html.escape(title)}</h1>"]
    for result in results:
        body += _device(result, len(results) > 1)
    body += _plots(results)
    body += [_breakdown(r, len(results) > 1) for r in results]
    body.append(_method(first))
    return (f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
            f"<title>{html.escape(title)}</title><style>{STYLE}</style>{''.join(body)}</html>\n")


def _device(result: dict[str, Any], several: bool) -> list[str]:
    body = [f"<h2>{html.escape(result['device'])}</h2>" if several else "",
            f"<p class=dim>{html.escape(facts(result))}</p>"]
    if not result["complete"]:
        body.append("<p class=warn>Partial: the run was interrupted, numbers rest on fewer rounds than planned.</p>")
    calm = result.get("calm") or {}
    if calm.get("disturbed"):
        body.append(f"<p class=warn>The machine was disturbed in {calm['disturbed']:d} of {calm['rounds']:d} rounds; "
                    "trust the ratios more than the milliseconds.</p>")
    rows = [cells(row) for row in result["rows"]]
    body.append(_table(HEADS, rows))
    if accuracy := accuracy_rows(result):
        body += ["<h2>Accuracy</h2>", _table(accuracy[0], accuracy[1:])]
    if sources := source_rows(result):
        body += [f"<details><summary>Quality by source</summary>{_table(sources[0], sources[1:])}</details>"]
    return body


def _plots(results: Sequence[dict[str, Any]]) -> list[str]:
    several = len(results) > 1
    usable = [(r, row) for r in results for row in r["rows"] if one_image(row) is not None]
    times = [float(one_image(row) or 0) for _, row in usable]
    names = [_name(result, row, several) for result, row in usable]
    colors = [COLORS.get(row["runtime"], "--teal") for _, row in usable]
    agreements = [mean_agreement(row) for _, row in usable]
    known = [i for i, a in enumerate(agreements) if a is not None]
    front = pareto([(times[i], float(agreements[i] or 0)) for i in known])
    exact = [Point(times[i], nines(float(agreements[i] or 0)), names[i], colors[i], f)
             for i, f in zip(known, front, strict=True)]
    sizes = [(i, megabytes(row)) for i, (_, row) in enumerate(usable)]
    small = [Point(times[i], mb, names[i], colors[i]) for i, mb in sizes if mb]
    x = "encoder + one prompt, ms (p50)"
    return ["<div class=plots><section><h2>Latency and accuracy</h2>",
            "<p class=dim>Mean mask agreement with PyTorch; the dashed line is the front: nothing is both faster and "
            "closer.</p>", scatter(exact, x, "mask agreement", "latency against accuracy",
                                   lambda v: f"{1 - 10**-v:.5g}"),
            "</section><section><h2>Latency and size</h2><p class=dim>Encoder and decoder files together.</p>",
            scatter(small, x, "MB", "latency against size"), "</section></div>", *_cold(results)]


def nines(agreement: float) -> float:
    """0.9 -> 1, 0.99 -> 2, and so on, at most 5: near 1 every nine counts."""
    return -math.log10(max(1 - agreement, 1e-5))


def _cold(results: Sequence[dict[str, Any]]) -> list[str]:
    rows = []
    for result in results:
        for row in result["rows"]:
            start = row.get("cold")
            if start:
                parts = (("load", start["load_ms"], "--blue"),
                         ("first encoder call", start["first_encoder_ms"], "--orange"),
                         ("first prompt", start["first_decoder_ms"], "--green"))
                rows.append(Bar(_name(result, row, len(results) > 1), parts))
    if not rows:
        return []
    return ["<h2>Cold start</h2><p class=dim>A new process with empty compile caches: open both files, embed one "
            "image, answer one prompt.</p>", bars(rows, "ms", "cold start")]


def _breakdown(result: dict[str, Any], several: bool) -> str:
    rows, tables = [], []
    kinds: dict[str, str] = {}
    for row in result["rows"]:
        operators = (row.get("encoder") or {}).get("operators")
        if not operators or not operators.get("kinds"):
            continue
        parts = []
        for kind, ms in _merged(operators["kinds"]).items():
            color = kinds.setdefault(kind, SERIES[len(kinds) % len(SERIES)])
            parts.append((kind, ms, color))
        rows.append(Bar(_name(result, row, False), tuple(parts)))
        slowest = [[o["name"][:60], o["kind"], f"{o['ms']:.1f}", f"{100 * o['share']:.0f} %"]
                   for o in operators["slowest"]]
        tables.append(f"<details><summary>{html.escape(_name(result, row, False))}: ten slowest operators</summary>"
                      f"{_table(('operator', 'kind', 'ms', 'share'), slowest)}</details>")
    if not rows:
        return ""
    where = f": {html.escape(result['device'])}" if several else ""
    return (f"<h2>Where the encoder's time goes{where}</h2><p class=dim>By each runtime's own profiler, which slows it "
            f"a little; runtimes without one are absent.</p>{bars(rows, 'ms', 'time by operator')}{''.join(tables)}")


def _merged(kinds: dict[str, float]) -> dict[str, float]:
    """Kinds without their kernels, so that runtimes share colours."""
    out: dict[str, float] = {}
    for kind, ms in kinds.items():
        out[kind.split()[0]] = out.get(kind.split()[0], 0.0) + ms
    return out


def _method(result: dict[str, Any]) -> str:
    s = result["settings"]
    return ("<h2>Method</h2><p>One process per row, pinned to as many cores as it has threads; targets take turns "
            f"round by round ({html.escape(str(s.get('rounds', '?')))} rounds, settings {html.escape(str(s))}). A call "
            "includes reading the result back. Ratios are medians over rounds of the ratio to PyTorch eager in the "
            "same round, with a 95 % bootstrap interval. Spread is (p90 - p50) / p50. Peak memory is that of a process "
            "with both graphs. The floor is the larger of FLOPs / measured GEMM rate and bytes / measured "
            "bandwidth.</p>")


def _name(result: dict[str, Any], row: dict[str, Any], several: bool) -> str:
    threads = {r["threads"] for r in result["rows"]}
    name = f"{row['runtime']} {precision_of(row)}" + (f" x{row['threads']}" if len(threads) > 1 else "")
    return f"{name} ({result['device']})" if several else name


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{html.escape(h)}</th>" for h in heads)
    body = "".join("<tr>" + "".join(f"<td{' class=text' if len(c) > 28 else ''}>{html.escape(c)}</td>" for c in row)
                   + "</tr>" for row in rows)
    return f"<div class=scroll><table><tr>{top}</tr>{body}</table></div>"
