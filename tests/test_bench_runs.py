"""Benchmarks that run: workers, interruption, precisions, commands."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pocketsam.benchmarks import accuracy, latency, processes, roofline
from pocketsam.benchmarks.accuracy import agreement
from pocketsam.benchmarks.latency import Measured, Plan
from pocketsam.benchmarks.options import Options
from pocketsam.benchmarks.results import commit, read, write
from pocketsam.benchmarks.run import _add_operators, _add_work, run
from pocketsam.benchmarks.targets import Target
from pocketsam.bundle import read_bundle
from pocketsam.errors import BenchmarkError
from pocketsam.predictor import Predictor

Run = Callable[..., Any]
QUICK = Plan(rounds=1, calls=(1, 1), warmup=1, extra=0, cold=False)


@pytest.fixture(scope="module")
def bench_run(toy_bundle: Path, toy_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One quick run on the toy bundle, from another process, as a user would."""
    out = tmp_path_factory.mktemp("bench")
    code = ("import sys; sys.path.insert(0, 'tests/reference'); from pocketsam.cli import main; "
            f"sys.argv = ['pocketsam', 'bench', {str(toy_bundle)!r}, '-o', {str(out)!r}, '--quick', '--threads', '1', "
            f"'--against', 'onnxruntime']; main()")
    got = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True,
                         encoding="utf-8")
    assert got.returncode == 0, got.stderr
    assert "onnxruntime" in got.stdout
    return out


def test_a_real_run(bench_run: Path) -> None:
    result = read(bench_run / "bench.json")
    assert result["complete"]
    rows = {r["runtime"]: r for r in result["rows"]}
    # The toy model is no name that a fresh process knows: the reference becomes a row that says so.
    assert rows["pytorch"]["status"].startswith("UnknownName")
    row = rows["onnxruntime"]
    assert row["status"] == "ok"
    assert row["encoder"]["p50_ms"] > 0
    assert row["encoder"]["flops"] > 0
    assert row["encoder"]["floor"]["times_floor"] > 1
    assert "times_against" in row["encoder"]
    assert row["peak_mb"] > 20
    assert {p.name for p in bench_run.iterdir()} == {"bench.json", "bench.csv", "bench.html"}


def test_what_finds_no_room_comes_for_its_turns(toy_bundle: Path, tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for two processes and a half: of three, one stays, the others are opened anew for each turn."""
    target = Target("onnxruntime", "fp32", 1, "onnx", str(toy_bundle))
    # What one process takes depends on the machine.
    with closing(processes.Worker(target, tmp_path)) as worker:
        one = worker.facts["peak_mb"]
    monkeypatch.setattr(latency, "available_mb", lambda: 2.5 * one / latency.ROOM)
    opened: list[Path] = []
    open_ = processes.Worker.open
    monkeypatch.setattr(processes.Worker, "open", lambda self: (opened.append(self.cache), open_(self)))
    kept: list[Measured] = []
    plan = Plan(rounds=2, calls=(1, 2), warmup=1, extra=0, cold=False)
    latency.measure([target] * 3, plan, lambda t: None,
                    lambda rows, quality: kept.__setitem__(slice(None), rows))
    assert sum(r.resident for r in kept) == 1
    assert all(r.status == "ok" and [len(t) for t in r.times["decoder"]] == [2, 2] for r in kept)
    # Three at the start, then the guests for the warm-up and for each round.
    assert len(opened) == 3 + 2 * 3


def test_a_worker_that_is_killed_between_its_turns_leaves_the_run(toy_bundle: Path, tmp_path: Path) -> None:
    target = Target("onnxruntime", "fp32", 1, "onnx", str(toy_bundle))
    rows = [Measured(target), Measured(target)]
    workers = {i: processes.Worker(target, tmp_path) for i in range(2)}
    try:
        workers[0].process.kill()
        workers[0].process.wait()
        _, times = latency._turns(rows, workers, (1, 1))
        assert rows[0].status == "the process ended with exit status -9"
        assert rows[1].status == "ok"
        assert list(workers) == list(times) == [1]
    finally:
        for worker in workers.values():
            worker.close()


def test_recipes_with_float_products_have_the_floor_of_float(toy_bundle: Path) -> None:
    bundle = read_bundle(toy_bundle)
    ceiling = roofline.Ceiling(gemm_fp32=1e9, gemm_int8=4e9, bandwidth=1e15, threads=1)
    floors = {}
    for recipe in ("int8", "int8-dynamic", "int8-weights"):
        named = replace(bundle, artifacts=tuple(replace(a, precision=recipe) for a in bundle.artifacts))
        row: dict[str, Any] = {"precision": recipe, "compute": "", "format": "onnx", "encoder": {"p50_ms": 1.0},
                               "decoder": {"p50_ms": 1.0}}
        _add_work(named, row, ceiling)
        floors[recipe] = row["encoder"]["floor"]["ms"]
    assert floors["int8"] == floors["int8-dynamic"] < floors["int8-weights"]
    row = {"precision": "int8-weights", "compute": "bf16", "format": "onnx", "encoder": {"p50_ms": 1.0},
           "decoder": {"p50_ms": 1.0}}
    _add_work(named, row, replace(ceiling, gemm_bf16=8e9))
    assert row["encoder"]["floor"]["ms"] == pytest.approx(floors["int8-weights"] / 8, rel=0.01)


def test_a_copy_inside_another_repository_names_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=b"]
    for command in (["init", "-q"], [*who, "commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    copy = tmp_path / ".venv/pocketsam/benchmarks/results.py"
    copy.parent.mkdir(parents=True)
    copy.write_text("")
    monkeypatch.setattr("pocketsam.benchmarks.results.__file__", str(copy))
    assert commit() == ""
    subprocess.run(["git", "add", "-f", copy], cwd=tmp_path, check=True)
    assert len(commit()) >= 12


def test_each_cold_start_meets_empty_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A target that only tells its cache folders and leaves something there; nothing is left to time then."""
    (tmp_path / "teller.py").write_text(
        "import os, pathlib\n"
        "def tell(target):\n"
        "    cache, inductor = (pathlib.Path(os.environ[n]) for n in ('POCKETSAM_CACHE', 'TORCHINDUCTOR_CACHE_DIR'))\n"
        f"    with open({str(tmp_path / 'told')!r}, 'a') as f:\n"
        "        print(cache, cache in inductor.parents, inductor.exists(), file=f)\n"
        "    inductor.mkdir(parents=True, exist_ok=True)\n"
        "    raise ValueError('no runtime.')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    targets = [Target(name, "fp32", 1, factory="teller:tell") for name in ("one", "two")]
    with pytest.raises(BenchmarkError, match="timed: one fp32, 1 thread: ValueError: no runtime; two fp32"):
        latency.measure(targets, Plan(rounds=1), lambda t: None)
    told = [line.split() for line in (tmp_path / "told").read_text().splitlines()]
    assert [line[1:] for line in told] == [["True", "False"]] * 2 + [["True", "True"]] * 2
    caches = [line[0] for line in told]
    assert len(set(caches)) == 2
    # What is told of the warm start was compiled at the same target's cold one.
    assert caches[:2] == caches[2:]


@pytest.mark.skipif(not processes.CAN_PAUSE, reason="workers are paused on Linux only")
def test_between_turns_workers_stand_still_and_die_with_the_benchmark(toy_bundle: Path, tmp_path: Path) -> None:
    code = ("import sys, time; from pathlib import Path; from pocketsam.benchmarks.processes import Worker; "
            "from pocketsam.benchmarks.targets import Target; "
            f"w = Worker(Target('onnxruntime', 'fp32', 1, 'onnx', {str(toy_bundle)!r}), Path({str(tmp_path)!r})); "
            "assert len(w.time('decoder', 2)['times']) == 2; w.rest(); print(w.process.pid, flush=True); "
            "time.sleep(60)")
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, encoding="utf-8")
    assert parent.stdout is not None
    status = Path(f"/proc/{int(parent.stdout.readline())}/status")
    try:
        assert soon(lambda: "State:\tT" in status.read_text("ascii"))
    finally:
        parent.kill()
        parent.communicate()
    assert soon(lambda: not status.exists() or "State:\tZ" in status.read_text("ascii"))


def soon(true: Callable[[], bool]) -> bool:
    """Whether something becomes true within ten seconds."""
    for _ in range(100):
        if true():
            return True
        time.sleep(0.1)
    return False


def test_compare_and_merge_commands(cli: Run, bench_run: Path, tmp_path: Path) -> None:
    path = bench_run / "bench.json"
    got = cli("bench", "compare", path, path)
    assert got.code == 0
    assert "note: fewer than 5 rounds were kept" in got.err
    slow = read(path)
    slow["rows"][1]["encoder"]["p50_ms"] *= 50
    write(slow, tmp_path / "slow.json")
    assert cli("bench", "compare", path, tmp_path / "slow.json").code == 1
    assert cli("bench", "merge", path, path, "-o", tmp_path / "both").code == 0
    assert (tmp_path / "both" / "bench.html").exists()


def test_a_run_in_bf16(toy_everywhere: Path, toy_checkpoint: Path, tmp_path: Path) -> None:
    """OpenVINO's smallest float files are measured in both; without bf16 in the processor the row says so."""
    import openvino as ov

    options = Options(plan=QUICK, threads=(1,), checkpoint=str(toy_checkpoint), against="litert", operators=False,
                      computes=("bf16",), photos=1)
    result = run(toy_everywhere, options, tmp_path, lambda t: None)
    rows = {(r["runtime"], r["precision"], r["compute"]): r for r in result["rows"]}
    own, other = (rows[runtime, "fp32", ""]["encoder"] for runtime in ("onnxruntime", "litert"))
    assert own["times_against"]["to"] == "litert fp32"
    assert own["times_against"]["value"] == pytest.approx(other["p50_ms"] / own["p50_ms"], rel=0.01)
    asked, usual = rows["openvino", "fp16", "bf16"], rows["openvino", "fp16", ""]
    assert ("openvino", "fp32", "bf16") not in rows
    assert usual["status"] == "ok"
    if "BF16" not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        assert "does not compute in bf16" in asked["status"]
        return
    assert asked["status"] == "ok"
    assert asked["encoder"]["floor"]["ms"] > 0
    # Measured here, not taken from the export, and not what f32 gives.
    assert 0.5 < asked["agreement"]["all"]["mean"] < usual["agreement"]["all"]["mean"]


def test_an_interrupted_accuracy_part_keeps_its_rows(toy_everywhere: Path, toy_checkpoint: Path, drawn_pack: Path,
                                                    tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def stops_at_the_second(reference: Predictor, candidate: Predictor, *args: Any) -> dict[str, Any]:
        asked.append(candidate.runtime.info()["runtime"])
        if len(asked) == 2:
            raise KeyboardInterrupt
        return agreement(reference, candidate, *args)

    monkeypatch.setattr(accuracy, "agreement", stops_at_the_second)
    options = Options(plan=QUICK, threads=(1,), checkpoint=str(toy_checkpoint), operators=False, data=drawn_pack,
                      images=1, prompts=2, regions=1)
    with pytest.raises(KeyboardInterrupt):
        run(toy_everywhere, options, tmp_path, lambda t: None)
    kept = read(tmp_path / "bench.json")
    assert not kept["complete"]
    assert [r["runtime"] for r in kept["rows"] if r["quality"] and not r["reference"]] == asked[:1]


@pytest.mark.parametrize("measured", [False, True])
def test_an_interrupted_run_never_passes_off_an_earlier_one(cli: Run, toy_bundle: Path, tmp_path: Path, measured: bool,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    def stops(targets: list[Target], plan: Plan, report: Any, keep: Callable[..., None]) -> None:
        if measured:
            keep([Measured(t, status="stopped") for t in targets],
                 {"rounds": 1, "repeated": 0, "disturbed": 0, "probe_spread": 0.0})
        raise KeyboardInterrupt

    monkeypatch.setattr(latency, "measure", stops)
    files = [tmp_path / f"bench.{suffix}" for suffix in ("json", "csv", "html")]
    for file in files:
        file.write_text("earlier")
    got = cli("bench", toy_bundle, "-o", tmp_path)
    assert got.code == 130
    assert [file.read_text("utf-8") == "earlier" for file in files] == [not measured] * 3
    assert ("nothing was measured yet" in got.err) != measured
    assert ("marked as partial" in got.err) == measured
    assert not measured or not read(files[0])["complete"]


def test_operators_of_the_reference(toy_bundle: Path, toy_checkpoint: Path) -> None:
    row: dict[str, Any] = {"runtime": "pytorch", "precision": "fp32", "compute": "", "reference": True,
                           "threads": torch.get_num_threads(), "encoder": {}}
    _add_operators(read_bundle(toy_bundle), row, Options(checkpoint=str(toy_checkpoint)), lambda t: None)
    assert row["fallbacks"] == 0
    assert all(o["kind"].startswith("aten::") for o in row["encoder"]["operators"]["slowest"])
    assert row["encoder"]["operators"]["kinds"]
