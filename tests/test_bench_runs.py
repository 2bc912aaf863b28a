"""Benchmarks that run: workers, interruption, precisions, commands."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pocketsam.benchmarks import accuracy, latency, processes
from pocketsam.benchmarks.accuracy import agreement
from pocketsam.benchmarks.latency import Measured, Plan
from pocketsam.benchmarks.results import read, write
from pocketsam.benchmarks.run import Options, run
from pocketsam.benchmarks.targets import Target
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
    assert row["encoder"]["times_against"]["value"] == 1.0
    assert row["peak_mb"] > 20
    assert {p.name for p in bench_run.iterdir()} == {"bench.json", "bench.csv", "bench.html"}


def test_what_finds_no_room_comes_for_its_turns(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for one process: the first stays, the second is opened anew for each turn, and both are timed."""
    # A process of the toy model takes some 100 MB.
    monkeypatch.setattr(latency, "available_mb", lambda: 150 / latency.ROOM)
    opened: list[Path] = []
    open_ = processes.Worker.open
    monkeypatch.setattr(processes.Worker, "open", lambda self: (opened.append(self.cache), open_(self)))
    kept: list[Measured] = []
    plan = Plan(rounds=2, calls=(1, 2), warmup=1, extra=0, cold=False)
    latency.measure([Target("onnxruntime", "fp32", 1, "onnx", str(toy_bundle))] * 2, plan, lambda t: None,
                    lambda rows, quality: kept.__setitem__(slice(None), rows))
    assert [r.resident for r in kept] == [True, False]
    assert all(r.status == "ok" and [len(t) for t in r.times["decoder"]] == [2, 2] for r in kept)
    # Twice at the start, then the guest for the warm-up and for each round.
    assert len(opened) == 2 + 3


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
    assert cli("bench", "compare", path, path).code == 0
    slow = read(path)
    slow["rows"][1]["encoder"]["p50_ms"] *= 5
    slow["rows"][1]["encoder"]["spread"] = 0.1
    write(slow, tmp_path / "slow.json")
    got = cli("bench", "compare", path, tmp_path / "slow.json")
    assert got.code == (1 if read(path)["rows"][1]["encoder"]["spread"] < 3.5 else 0)
    assert cli("bench", "merge", path, path, "-o", tmp_path / "both").code == 0
    assert (tmp_path / "both" / "bench.html").exists()


def test_a_run_in_bf16(toy_everywhere: Path, toy_checkpoint: Path, tmp_path: Path) -> None:
    """OpenVINO's smallest float files are measured in both; without bf16 in the processor the row says so."""
    import openvino as ov

    options = Options(plan=QUICK, threads=(1,),
                      checkpoint=str(toy_checkpoint), operators=False, computes=("bf16",), photos=1)
    result = run(toy_everywhere, options, tmp_path, lambda t: None)
    rows = {(r["runtime"], r["precision"], r["compute"]): r for r in result["rows"]}
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


@pytest.mark.parametrize(("args", "message"), [
    (("--compute", "fp4"), "unknown inference precision 'fp4'"),
    (("--threads", "0"), "expected 1 to"), (("--threads", "4096"), "expected 1 to"),
    (("--threads", "two"), "whole numbers"), (("--against", "tensorrt"), "no tensorrt"),
    (("--rounds", "0"), "at least 1"),
])
def test_bad_options(cli: Run, toy_bundle: Path, tmp_path: Path, args: tuple[str, ...], message: str) -> None:
    got = cli("bench", toy_bundle, "-o", tmp_path / "out", *args)
    assert got.code == 2
    assert message in got.err
    assert not (tmp_path / "out").exists()
