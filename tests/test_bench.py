"""Benchmarks: statistics, results, comparison and page."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocketsam.benchmarks import latency
from pocketsam.benchmarks.compare import compare, remarks
from pocketsam.benchmarks.latency import Measured, Plan, results
from pocketsam.benchmarks.page import page
from pocketsam.benchmarks.plots import pareto
from pocketsam.benchmarks.results import held, mark_slower, mean_agreement, merge, read, to_csv, write
from pocketsam.benchmarks.statistics import disturbed, ratio, summary
from pocketsam.benchmarks.tables import cells, note
from pocketsam.benchmarks.targets import Target
from pocketsam.bundle import Artifact
from pocketsam.errors import BenchmarkError

Run = Callable[..., Any]
PAIRS = (("pytorch", "fp32", 400.0), ("onnxruntime", "fp32", 150.0), ("litert", "fp32", 110.0),
         ("litert", "int8", 80.0))
AGREEMENT = {"fp32": 0.99999, "int8": 0.975}


def synthetic(seed: int, slowed: float = 1.0, noise: float = 0.06, rounds: int = 10) -> dict[str, Any]:
    """A result of a machine that drifts from round to round; ``slowed`` multiplies the times of LiteRT fp32."""
    rng = np.random.default_rng(seed)
    drift = rng.uniform(1.0, 1.5, rounds)
    rows = []
    for runtime, precision, base in PAIRS:
        factor = slowed if (runtime, precision) == ("litert", "fp32") else 1.0
        m = Measured(Target(runtime, precision, 2, "" if runtime == "pytorch" else "f", reference=runtime == "pytorch"),
                     facts={"load_ms": 100.0, "version": "1.2.3", "first_ms": {"encoder": 300.0, "decoder": 30.0}},
                     peak_mb=300.0)
        for graph, scale, calls in (("encoder", 1.0, 2), ("decoder", 0.1, 20)):
            m.times[graph] = [list(base * scale * factor * d * rng.lognormal(0, noise, calls)) for d in drift]
        rows.append(m)
    out = [{"runtime": m.target.runtime, "format": m.target.format, "precision": m.target.precision, "threads": 2,
            "reference": m.target.reference,
            "bytes": None if m.target.reference else {"encoder": 10**7, "decoder": 10**6},
            "agreement": None if m.target.reference else agreement(AGREEMENT[m.target.precision]), "quality": None,
            **own} for m, own in zip(rows, results(rows), strict=True)]
    mark_slower(out)
    machine = {"python": "3.11", "system": "Linux", "cpu": "a cpu", "cores": 2, "features": ["avx2"]}
    return {"kind": "pocketsam-bench", "schema": 1, "complete": True, "created": "2026-01-01T00:00:00+00:00",
            "device": "a cpu", "machine": machine, "pocketsam": "0.1.0", "commit": "abc",
            "settings": {"rounds": rounds},
            "calm": {"rounds": rounds, "repeated": 0, "disturbed": 0, "probe_spread": 0.0},
            "model": {"name": "lite0", "image_size": 512, "weights_sha256": "0"}, "ceilings": [], "rows": out}


def test_rows_tell_which_layers_stay_in_float() -> None:
    def artifact(graph: str, **quantization: Any) -> Artifact:
        return Artifact("", graph, "onnx", "int8", "", 5, [], [], "", agreement(0.9), quantization)

    row = held({"encoder": artifact("encoder", float_layers=["a", "b"]), "click_masks": artifact("click_masks")})
    assert row == {"bytes": {"encoder": 5, "decoder": 0}, "agreement": agreement(0.9), "float_layers": {"encoder": 2}}
    assert note({**row, "status": "ok"}) == "2 layers of the encoder in float"
    assert held({"decoder": artifact("decoder")}) == {
        "bytes": {"encoder": 0, "decoder": 5}, "agreement": None, "float_layers": None}


def agreement(mean: float) -> dict[str, Any]:
    part = {"prompts": 10, "mean": mean, "p5": mean - 0.01, "worst": mean - 0.02}
    return {"box": part, "point": part, "flip_rate": 0.1}


def test_summary_and_ratio() -> None:
    s = summary([10.0] * 9 + [20.0])
    assert (s["calls"], s["min_ms"], s["p50_ms"]) == (10, 10.0, 10.0)
    assert s["spread"] == pytest.approx((s["p90_ms"] - 10) / 10)
    drift = np.random.default_rng(0).uniform(1, 3, 12)
    r = ratio([[30 * d] for d in drift], [[10 * d * (1 + 0.01 * (i % 3 - 1))] for i, d in enumerate(drift)])
    # The drift of the machine, up to three times, cancels within rounds.
    assert r["value"] == pytest.approx(3, rel=0.02)
    assert r["low"] <= r["value"] <= r["high"]
    assert r["high"] - r["low"] < 0.1


def test_ratios_are_taken_to_the_same_thread_count() -> None:
    """Two threads halve the times of both runtimes, so that every ratio is that of one thread."""
    rows = [Measured(Target(runtime, precision, threads, "f"), facts={"first_ms": {"encoder": 1.0, "decoder": 1.0}},
                     times={g: [[ms / threads] * 2] * 3 for g in ("encoder", "decoder")})
            for threads in (1, 2) for runtime, precision, ms in PAIRS]
    ratios = [[row[g]["times_against"]["value"] for g in ("encoder", "decoder")]
              for row in results(rows, "onnxruntime")]
    assert ratios == [[round(150 / ms, 3)] * 2 for _, _, ms in PAIRS] * 2
    assert "times_against" not in results(rows)[0]["encoder"]


def test_disturbed_rounds_are_found() -> None:
    assert disturbed([[10, 10], [10, 11], [19, 20], [10, 30]], 0.2) == [False, False, True, True]
    assert disturbed([], 0.2) == []


def test_disturbed_rounds_are_measured_again_and_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1.0] * 3 + [1.0, 5.0, 1.0, 1.0, 1.0])
    monkeypatch.setattr(latency, "_probe", lambda: next(clock))

    class Fake:
        calls = 0

        def time(self, graph: str, count: int) -> dict[str, Any]:
            Fake.calls += graph == "encoder"
            return {"times": [float(Fake.calls)] * count, "peak_mb": 1.0}

        def rest(self) -> None: ...

        def close(self) -> None: ...

    row = Measured(Target("x", "fp32", 1))
    calm = latency._rounds([row], {0: Fake()}, Plan(rounds=3, calls=(1, 1), warmup=0, extra=5),  # type: ignore[dict-item]
                           lambda t: None, lambda r, q: None)
    assert calm == {"rounds": 3, "repeated": 1, "disturbed": 0, "probe_spread": 0.0}
    assert row.times["encoder"] == [[1.0], [3.0], [4.0]]


@pytest.mark.parametrize("seed", range(5))
def test_compare_is_silent_on_equal_runs(seed: int) -> None:
    assert compare(synthetic(seed), synthetic(seed + 100)) == []


@pytest.mark.parametrize("seed", range(5))
def test_compare_catches_a_slowed_artifact(seed: int) -> None:
    found = compare(synthetic(seed), synthetic(seed + 100, slowed=1.3))
    assert {c.what for c in found if c.worse} == {f"{g} of litert fp32, 2 threads" for g in ("encoder", "decoder")}
    back = compare(synthetic(seed + 100, slowed=1.3), synthetic(seed))
    assert back
    assert not any(c.worse for c in back)


def test_compare_allows_for_disturbed_rounds() -> None:
    """A run that something else disturbed throughout accuses nothing that its own probe moved as much as."""
    fast, slow = synthetic(0), synthetic(100, slowed=1.3)
    restless = {"rounds": 8, "repeated": 2, "disturbed": 8, "probe_spread": 0.3}
    assert any(c.worse for c in compare(fast, slow))
    assert not [c for c in compare({**fast, "calm": restless}, slow) if c.measure == "latency"]
    assert any(c.worse for c in compare({**fast, "calm": {**restless, "disturbed": 2}}, slow))


@pytest.mark.parametrize("rounds", [1, 3])
def test_few_rounds_accuse_only_what_changed_by_half(rounds: int) -> None:
    runs = [synthetic(seed, rounds=rounds) for seed in range(80)]
    assert not [found for i in range(40) if (found := compare(runs[i], runs[i + 40]))]
    assert any(c.worse for c in compare(runs[0], synthetic(100, slowed=2.0, rounds=rounds)))
    assert any("by more than 50%" in line for line in remarks(runs[0], synthetic(0)))


def test_compare_names_what_else_became_worse() -> None:
    old, new = synthetic(0), synthetic(0)
    new["rows"][1]["bytes"]["encoder"] *= 2
    new["rows"][2]["agreement"] = agreement(0.9)
    new["rows"][3]["status"] = "BundleError: damaged"
    assert {(c.what.split(",")[0], c.measure) for c in compare(old, new) if c.worse} == {
        ("onnxruntime fp32", "size"), ("litert fp32", "agreement"), ("litert int8", "status")}


@pytest.mark.parametrize(("part", "name", "value", "message"), [
    ("model", "name", "mobile_sam", "models lite0 and mobile_sam; compare results of one model"),
    ("model", "image_size", 1024, "input sides 512 and 1024; compare results of one input side"),
    ("machine", "cpu", "another", "processors a cpu and another; compare results of one machine"),
])
def test_compare_refuses_what_is_not_alike(part: str, name: str, value: object, message: str) -> None:
    other = synthetic(0)
    other[part][name] = value
    with pytest.raises(BenchmarkError, match=message):
        compare(synthetic(0), other)


def test_a_row_that_vanished_is_worse() -> None:
    old, new = synthetic(0), synthetic(0)
    del new["rows"][2]
    assert [(c.what, c.measure, c.before, c.after, c.worse) for c in compare(old, new)] == [
        ("litert fp32, 2 threads", "status", "ok", "missing", True)]
    assert compare(new, old) == []


def test_compare_remarks_on_unfinished_results_and_other_weights() -> None:
    old, new = synthetic(0), synthetic(0)
    assert remarks(old, new) == []
    new["complete"] = False
    new["model"]["weights_sha256"] = "1"
    assert remarks(old, new) == ["the new result is partial: its run did not end",
                                 "the results are of different weights of lite0"]


@pytest.mark.parametrize("other", [{"images": 60}, {"seed": 0}, {"prompts_per_image": 6},
                                   {"box": {"prompts": 20, "mean": 0.9}}])
def test_agreement_is_compared_on_the_same_prompts_only(other: dict[str, Any]) -> None:
    old, new = synthetic(0), synthetic(0)
    new["rows"][2]["agreement"] = {**agreement(0.9), **other}
    assert compare(old, new) == []
    line, = remarks(old, new)
    assert line.endswith("not compared, of litert fp32, 2 threads")


def test_other_photos_are_no_regression() -> None:
    """As many photos and prompts are not the same photos; results of earlier versions do not name theirs."""
    old, new = synthetic(0), synthetic(0)
    old["rows"][2]["agreement"] = {**agreement(0.99), "photos": "a"}
    new["rows"][2]["agreement"] = {**agreement(0.9), "photos": "b"}
    assert compare(old, new) == []
    assert remarks(old, new)
    del old["rows"][2]["agreement"]["photos"]
    assert [c.measure for c in compare(old, new)] == ["agreement"]
    assert remarks(old, new) == []


def test_slower_but_less_accurate_is_marked() -> None:
    rows = synthetic(0)["rows"]
    assert all(not r["slower_than"] for r in rows)
    slow = copy.deepcopy(rows)
    slow[3]["encoder"]["p50_ms"] = 1e4
    mark_slower(slow)
    assert slow[3]["slower_than"] == "litert fp32"


def test_results_survive_the_disk(tmp_path: Path) -> None:
    result = synthetic(1)
    write(result, tmp_path / "a.json")
    assert read(tmp_path / "a.json") == json.loads(json.dumps(result))
    assert mean_agreement(result["rows"][0]) == 1.0
    table = to_csv([result]).splitlines()
    assert len(table) == 1 + len(PAIRS)
    assert table[0].startswith("device,model,runtime,format,precision,threads,status")


@pytest.mark.parametrize(("text", "message"), [
    ("", "cannot be read"), ("[1]", "not a benchmark result"), ('{"kind": "pocketsam-bench", "schema": 99}', "upgrade"),
    ('{"kind": "pocketsam-bench", "schema": 1, "rows": []}', "lacks parts"),
])
def test_bad_results_get_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(BenchmarkError, match=message):
        read(tmp_path / "bad.json")
    with pytest.raises(BenchmarkError, match="cannot be read"):
        read(tmp_path / "missing.json")


@pytest.mark.parametrize(("part", "value", "lacking"), [
    ("model", {}, "model.name"), ("model", [], "model"), ("machine", {"python": "3.11"}, "machine.system"),
    ("settings", None, "settings"), ("created", 1, "created"), ("rows", [{}], "rows"),
])
def test_a_result_that_lacks_a_part_names_it(tmp_path: Path, part: str, value: object, lacking: str) -> None:
    write({**synthetic(0), part: value}, tmp_path / "bad.json")
    with pytest.raises(BenchmarkError, match=rf"lacks parts of a benchmark result \(.*{lacking}"):
        read(tmp_path / "bad.json")


@pytest.mark.parametrize(("change", "lacking"), [
    ({"encoder": {"p50_ms": 3}}, r"rows\[1\].encoder.spread"), ({"encoder": "x"}, r"rows\[1\].encoder"),
    ({"encoder": {"p50_ms": 0, "spread": 0}}, r"rows\[1\].encoder.p50_ms"), ({"bytes": 5}, r"rows\[1\].bytes"),
    ({"runtime": ["a"]}, r"rows\[1\].runtime"), ({"threads": True}, r"rows\[1\].threads"),
    ({"agreement": {"all": {}}}, r"rows\[1\].agreement.all.mean"), ({"bytes": {"encoder": None}}, "bytes.encoder"),
])
def test_a_row_of_another_shape_is_named(tmp_path: Path, change: dict[str, Any], lacking: str) -> None:
    result = synthetic(0)
    result["rows"][1] |= change
    write(result, tmp_path / "bad.json")
    with pytest.raises(BenchmarkError, match=rf"lacks parts of a benchmark result \(.*{lacking}"):
        read(tmp_path / "bad.json")


def test_a_faster_pytorch_accuses_nobody() -> None:
    """Ratios to it fall, and nothing became slower."""
    old, new = synthetic(0), synthetic(0)
    for row in new["rows"]:
        for graph in ("encoder", "decoder"):
            row[graph]["times_pytorch"] = {k: v * 0.8 for k, v in row[graph]["times_pytorch"].items()}
    assert any(c.worse for c in compare(old, new))
    new["rows"][0]["version"] = "2.0.0"
    assert compare(old, new) == []
    assert remarks(old, new) == ["PyTorch was 1.2.3 and is 2.0.0: milliseconds are compared, not ratios to it"]


def test_what_a_foreign_result_says_is_text_on_the_page() -> None:
    result = synthetic(0)
    result["settings"]["rounds"] = "<script>alert(1)</script>"
    assert "<script" not in page([result])


class Balance(HTMLParser):
    """Counts open tags; void ones and the optional ends of this page's own p, html are not checked."""

    FREE = ("meta", "img", "br", "html", "line", "circle", "path", "rect")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.FREE:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.FREE:
            assert self.open.pop() == tag


def test_page_is_self_contained_and_well_formed() -> None:
    result = synthetic(2)
    result["rows"][1]["cold"] = {"load_ms": 10.0, "first_encoder_ms": 20.0, "first_decoder_ms": 3.0}
    operators = {"kinds": {"Conv": 80.0, "Gemm": 20.0},
                 "slowest": [{"name": "<a>", "kind": "Conv", "ms": 8.0, "share": 0.1}]}
    result["rows"][1]["encoder"]["operators"] = operators
    text = page([result, {**synthetic(3), "device": "another <device>", "complete": False}])
    parser = Balance()
    parser.feed(text)
    assert parser.open == []
    assert "<script" not in text
    assert not re.search(r"(src|href)=", text)
    assert "another &lt;device&gt;" in text
    assert "prefers-color-scheme: dark" in text
    assert "Partial" in text


def test_merge_takes_several_devices_of_one_model(tmp_path: Path) -> None:
    files = []
    for i in range(2):
        files.append(tmp_path / f"{i}.json")
        write({**synthetic(i), "device": f"device {i}"}, files[-1])
    assert [r["device"] for r in merge(files)] == ["device 0", "device 1"]
    write({**synthetic(1), "model": {"name": "other", "image_size": 1, "weights_sha256": ""}}, files[1])
    with pytest.raises(BenchmarkError, match="different models"):
        merge(files)
    write({**synthetic(1), "model": {"name": "lite0", "image_size": 1024, "weights_sha256": "0"}}, files[1])
    with pytest.raises(BenchmarkError, match="lite0 at 1024 x 1024, lite0 at 512 x 512"):
        merge(files)


def test_the_ratio_that_was_asked_for_is_shown(tmp_path: Path) -> None:
    result = synthetic(0)
    result["rows"][2]["encoder"]["times_against"] = {"value": 1.5, "low": 1.4, "high": 1.6, "to": "onnxruntime fp32"}
    assert cells(result["rows"][2])[-1] == "encoder 1.50 x onnxruntime fp32"
    assert ",1.5," in to_csv([result])


def test_front() -> None:
    assert pareto([(1, 1), (2, 2), (3, 1), (1, 0.5)]) == [True, True, False, False]


def test_what_is_asked_of_openvino_is_a_row_of_its_own(tmp_path: Path) -> None:
    """The same files in f32 and in bf16: told apart in the table, the CSV, comparisons and what is marked as slower."""
    result = synthetic(0)
    asked = copy.deepcopy(result["rows"][2])
    asked |= {"compute": "bf16", "agreement": agreement(0.98)}
    asked["encoder"]["p50_ms"] = 1e4
    result["rows"].append(asked)
    mark_slower(result["rows"])
    assert asked["slower_than"] == "litert fp32"
    assert cells(asked)[1] == "fp32 in bf16"
    assert to_csv([result]).splitlines()[-1].split(",")[2:8] == ["litert", "f", "fp32", "2", "ok", "bf16"]
    worse = copy.deepcopy(result)
    worse["rows"][-1]["agreement"] = agreement(0.9)
    assert [c.what for c in compare(result, worse)] == ["litert fp32 in bf16, 2 threads"]
