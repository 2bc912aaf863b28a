"""The whole benchmark of a bundle: latency, the floor, accuracy, and a result that is on disk after every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pocketsam.benchmarks import accuracy, latency, roofline
from pocketsam.benchmarks.latency import GRAPHS, Measured
from pocketsam.benchmarks.options import Options, check_against, check_computes, check_counts, check_threads
from pocketsam.benchmarks.page import page
from pocketsam.benchmarks.results import header, held, mark_slower, precision_of, to_csv, write
from pocketsam.benchmarks.targets import EVALUATOR_NOTE, open_target, target_of, targets_of
from pocketsam.bundle import Bundle, read_bundle
from pocketsam.errors import PocketSamError
from pocketsam.files import check_writable, staged_file
from pocketsam.images import load_rgb
from pocketsam.parity import compare
from pocketsam.photos import photo_paths
from pocketsam.predictor import Predictor
from pocketsam.remembered import Remembered

RESULT, CSV, PAGE = "bench.json", "bench.csv", "bench.html"
# So many of a runtime's operators are named, and kinds shown apart.
SLOWEST = 10
KINDS = 8
EVERY = 100_000
# int8 recipe -> what its products are computed in; the others compute in floats.
RATES = {"int8": "int8", "int8-dynamic": "int8"}
Report = Callable[[str], None]


def run(bundle: Path, options: Options, out: Path, report: Report) -> dict[str, Any]:
    """Measure a bundle and write ``bench.json``, ``bench.csv`` and ``bench.html`` into ``out``.

    After every round, the floor and every row of accuracy all three are written with ``complete`` false, so that an
    interrupted run leaves its numbers; before the first round what the folder held stays. What cannot be counted,
    profiled or compared here is left out of its row, and ``report`` is told why.

    Raises:
        BundleError: no bundle.
        BenchmarkError: unusable thread counts, a runtime or precision that is not there, or nothing could be timed.
        CheckpointError: ``data`` needs a reference, and this one has other weights than the bundle.
        OutputError: ``out`` cannot be written.
        UsageError: a count below its least.
        LabelError: unusable data.
        PocketSamError: the PyTorch reference, which ``data`` needs, cannot be opened.
    """
    opened = read_bundle(bundle)
    threads = check_threads(options.threads)
    check_counts(options)
    computes = check_computes(options.computes, opened)
    targets = [*targets_of(opened, list(threads), options.checkpoint, options.compiled, computes), *options.rivals]
    if options.against:
        check_against(options.against, targets, opened)
    check_writable(out / RESULT)
    samples = accuracy.open_data(options.data) if options.data else None
    if samples is not None:
        # Dropped at once: an error now is worth more than one after all rounds, and the memory is for what is timed.
        _reference(opened, max(threads), options)
    settings = {"script": "pocketsam bench", "threads": list(threads), **asdict(options.plan)}
    if options.data:
        settings |= {"images": options.images, "prompts_per_image": options.prompts, "regions": options.regions}
    result = header(opened, settings, options.device)

    def keep(rows: list[Measured], calm: dict[str, Any]) -> None:
        result["rows"], result["calm"] = _rows(opened, rows, options.against), calm
        _save(result, out)

    result["calm"] = latency.measure(targets, options.plan, report, keep)
    _add_floor(opened, result, threads, options, report)
    _save(result, out)
    if samples is not None:
        _add_accuracy(opened, result, samples, options, report, lambda: _save(result, out))
    else:
        _add_agreement(opened, result, options, report)
    mark_slower(result["rows"])
    result["complete"] = True
    _save(result, out)
    return result


def write_reports(results: list[dict[str, Any]], out: Path) -> None:
    """The CSV and the page of one or several results."""
    for name, text in ((CSV, to_csv(results)), (PAGE, page(results))):
        with staged_file(out / name) as staged:
            staged.write_text(text, encoding="utf-8")


def _save(result: dict[str, Any], out: Path) -> None:
    """All three files, so that a folder never holds those of two runs."""
    write(result, out / RESULT)
    write_reports([result], out)


@contextmanager
def _optional(what: str, report: Report) -> Iterator[None]:
    """What cannot be had here is left out: the times, minutes or hours of work, are kept."""
    try:
        yield
    except PocketSamError as e:
        report(f"{what} left out: {e}")


def _rows(bundle: Bundle, measured: list[Measured], against: str) -> list[dict[str, Any]]:
    """JSON rows in the order of the targets, with what the bundle itself knows."""
    rows = []
    for m, own in zip(measured, latency.results(measured, against), strict=True):
        t = m.target
        row: dict[str, Any] = {"runtime": t.runtime, "format": t.format, "precision": t.precision, "compute": t.compute,
                               "threads": t.threads, "reference": t.reference, "bytes": None, "float_layers": None,
                               "agreement": None, "quality": None}
        if t.format:
            parts = {a.graph: a for a in bundle.artifacts if (a.format, a.precision) == (t.format, t.precision)}
            row |= held(parts)
            if t.compute:
                # The export measured what f32 gives.
                row["agreement"] = None
        rows.append({**row, **own})
    return rows


def _add_floor(bundle: Bundle, result: dict[str, Any], threads: tuple[int, ...], options: Options,
               report: Report) -> None:
    """FLOPs, bytes, distance to the floor, operators."""
    ceilings: dict[int, roofline.Ceiling] = {}
    for count in threads:
        report(f"measuring the ceilings of this machine, {count} threads")
        with _optional("ceilings", report):
            ceilings[count] = roofline.ceiling(count)
    result["ceilings"] = [asdict(c) for c in ceilings.values()]
    for row in result["rows"]:
        if row["status"] != "ok" or not (row["format"] or row["reference"]):
            continue
        name = f"{row['runtime']} {precision_of(row)}"
        if row["format"]:
            with _optional(f"floor of {name}", report):
                _add_work(bundle, row, ceilings.get(row["threads"]))
        if options.operators and row["threads"] == max(threads):
            with _optional(f"operators of {name}", report):
                _add_operators(bundle, row, options, report)


def _add_work(bundle: Bundle, row: dict[str, Any], ceiling: roofline.Ceiling | None) -> None:
    """FLOPs and bytes of both graphs, and their floor where the machine's rate is known."""
    rate = RATES.get(row["precision"]) or row["compute"] or "fp32"
    for graph in GRAPHS:
        work = roofline.count(bundle, row["format"], row["precision"], graph)
        row[graph] |= {"flops": work.flops, "bytes": work.bytes}
        if ceiling is not None and ceiling.rate(rate) is not None:
            floor = roofline.floor_ms(work, ceiling, rate)
            row[graph]["floor"] = {"ms": round(floor, 3), "times_floor": round(row[graph]["p50_ms"] / floor, 2)}


def _add_operators(bundle: Bundle, row: dict[str, Any], options: Options, report: Report) -> None:
    report(f"profiling {row['runtime']} {precision_of(row)}")
    runtime = _reference(bundle, row["threads"], options).runtime if row["reference"] else row["runtime"]
    compute = row["compute"] or "f32"
    off = [roofline.fallbacks(bundle, runtime, row["precision"], g, row["threads"], compute) for g in GRAPHS]
    row["fallbacks"] = sum(off) if None not in off else None
    try:
        found = roofline.slowest(bundle, runtime, row["precision"], "encoder", row["threads"], EVERY, compute)
    except roofline.NoProfiler as e:
        row["encoder"]["operators"] = {"problem": str(e), "slowest": [], "kinds": {}}
        return
    kinds: dict[str, float] = {}
    for operator in found:
        kinds[operator.kind] = kinds.get(operator.kind, 0.0) + operator.ms
    ordered = sorted(kinds.items(), key=lambda k: -k[1])
    shown = {k: round(v, 2) for k, v in ordered[:KINDS]}
    if rest := sum(v for _, v in ordered[KINDS:]):
        shown["other"] = round(rest, 2)
    row["encoder"]["operators"] = {"slowest": [asdict(o) for o in found[:SLOWEST]], "kinds": shown}


def _add_agreement(bundle: Bundle, result: dict[str, Any], options: Options, report: Report) -> None:
    """Masks of what the export did not measure, on the shipped photos."""
    rows = [r for r in result["rows"] if r["compute"] and r["status"] == "ok"]
    if not rows:
        return
    with _optional(f"agreement in {' and '.join(sorted({r['compute'] for r in rows}))}", report):
        reference = _reference(bundle, max(result["settings"]["threads"]), options)
        remembered = Predictor(Remembered(reference.runtime))
        images = [load_rgb(p) for p in photo_paths()[:options.photos]]
        for row in rows:
            report(f"agreement of {row['runtime']} {precision_of(row)}")
            row["agreement"] = compare(remembered, Predictor(open_target(target_of(bundle, row))), images).summary()


def _reference(bundle: Bundle, threads: int, options: Options) -> Predictor:
    """PyTorch with the bundle's weights, in the most threads that are measured."""
    found = targets_of(bundle, [threads], options.checkpoint)
    opened = Predictor(open_target(next(t for t in found if t.reference)))
    bundle.check_weights(opened.weights_sha256)
    return opened


def _add_accuracy(bundle: Bundle, result: dict[str, Any], samples: accuracy.Data, options: Options,
                  report: Report, keep: Callable[[], None]) -> None:
    """Agreement with PyTorch and quality against the labels, once for each runtime and precision; ``keep`` is called
    after each, as one takes minutes.
    """
    most = max(result["settings"]["threads"])
    reference = _reference(bundle, most, options)
    if samples.left_out:
        report(f"not used of {options.data}: " + ", ".join(f"{n} x {why}" for why, n in samples.left_out.items()))
    report("quality of pytorch fp32")
    truth = accuracy.quality(reference, samples.spread(options.images), options.regions)
    # Every candidate is compared on the same prompts; the labels are asked once.
    remembered = Predictor(Remembered(reference.runtime))
    done: dict[tuple[str, str], dict[str, Any]] = {}
    for row in result["rows"]:
        pair = row["runtime"], precision_of(row)
        if row.get("reference"):
            row["quality"] = truth
            continue
        if not row["format"] or (row["status"] not in ("ok", EVALUATOR_NOTE)):
            continue
        with _optional(f"accuracy of {' '.join(pair)}", report):
            if pair not in done:
                report(f"accuracy of {' '.join(pair)}")
                candidate = Predictor(open_target(target_of(bundle, row, most)))
                agreed = accuracy.agreement(remembered, candidate, samples, options.images, options.prompts)
                quality = accuracy.quality(candidate, samples.spread(options.images), options.regions)
                done[pair] = {"agreement": agreed, "quality": quality, "retention": accuracy.retention(quality, truth)}
            row |= done[pair]
        keep()
