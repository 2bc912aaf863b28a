"""Folder jobs: outputs, bad photos, workers, full disks, and Ray with a killed worker."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folder_jobs import OPTIONS, Run, everything, job_of
from PIL import Image

from pocketsam import rle
from pocketsam.errors import WorkerError
from pocketsam.folders import prepare, run


def test_a_folder(cli: Run, photos: Path, toy_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    outcome = everything(cli, photos, out, toy_bundle, "--json", "--embeddings", tmp_path / "cache")
    assert outcome.code == 0, outcome
    data = json.loads(outcome.out)
    assert [p["photo"] for p in data["photos"]] == [f"p{i}.png" for i in range(4)]
    coco = json.loads((out / "coco.json").read_text())
    assert [i["file_name"] for i in coco["images"]] == [f"p{i}.png" for i in range(4)]
    assert len(coco["annotations"]) == sum(p["masks"] for p in data["photos"]) > 0
    assert [a["id"] for a in coco["annotations"]] == list(range(1, len(coco["annotations"]) + 1))
    for a in coco["annotations"]:
        mask = rle.decode(a["segmentation"])
        ys, xs = np.nonzero(mask)
        assert a["area"] == mask.sum()
        assert a["bbox"] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
    label = json.loads((out / "labels/p2.png.json").read_text())
    assert (label["image"]["height"], label["image"]["width"]) == (42, 60)
    assert set(label["annotations"][0]) == {"id", "segmentation", "bbox", "area", "predicted_iou", "stability_score",
                                            "point_coords", "crop_box"}
    picture = np.asarray(Image.open(out / "overlays/p2.png.png"))
    assert picture.shape == (42, 60, 3)
    assert (picture != np.asarray(Image.open(photos / "p2.png"))).any()
    assert len(list((tmp_path / "cache").iterdir())) == 4
    files = {p.relative_to(out).parts[0] for p in out.rglob("*")}
    assert files == {"labels", "overlays", "coco.json", "job.json"}, "no temporary files stay behind"


def test_pycocotools_reads_the_labels(cli: Run, photos: Path, toy_bundle: Path, tmp_path: Path) -> None:
    from pycocotools.coco import COCO

    everything(cli, photos, tmp_path / "out", toy_bundle)
    coco = COCO(str(tmp_path / "out" / "coco.json"))
    rows = coco.loadAnns(coco.getAnnIds())
    assert rows
    assert all(coco.annToMask(r).sum() == r["area"] for r in rows)


def test_a_name_as_long_as_they_get(cli: Run, photos: Path, toy_bundle: Path, tmp_path: Path) -> None:
    names = [f"{'x' * 250}{i}.png" for i in range(2)] + ["\u753b" * 83 + ".png"]
    for name in names:
        shutil.copyfile(photos / "p0.png", photos / name)
    assert everything(cli, photos, tmp_path / "out", toy_bundle).code == 0
    images = json.loads((tmp_path / "out/coco.json").read_text())["images"]
    assert {i["file_name"] for i in images} == {p.name for p in photos.iterdir()}
    again = everything(cli, photos, tmp_path / "out", toy_bundle, "--json")
    assert json.loads(again.out)["photos"] == []


def test_a_name_that_is_not_utf8(photos: Path, toy_bundle: Path, tmp_path: Path) -> None:
    """Neither numbering, JSON nor a terminal that takes UTF-8 only may stop the job at such a photo."""
    name = os.fsdecode(b"caf\xe9.png")
    shutil.copyfile(photos / "p0.png", photos / name)
    command = [sys.executable, "-m", "pocketsam.cli", "everything", str(photos), "-o", str(tmp_path / "out"),
               "--bundle", str(toy_bundle), "--runtime", "onnxruntime", *OPTIONS]
    strict = {**os.environ, "PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(command, capture_output=True, check=False, env=strict)
    assert done.returncode == 0, done.stderr
    assert b"caf" in done.stdout
    coco = json.loads((tmp_path / "out/coco.json").read_text())
    assert name in [i["file_name"] for i in coco["images"]]


def test_unreadable_photos_are_named_and_counted(cli: Run, photos: Path, toy_bundle: Path, tmp_path: Path) -> None:
    (photos / "p1.png").write_text("not an image")
    outcome = everything(cli, photos, tmp_path / "out", toy_bundle)
    assert outcome.code == 1
    assert "1 unreadable" in outcome.out
    assert "p1.png is not an image" in " ".join(outcome.err.split())
    assert len(list((tmp_path / "out/labels").iterdir())) == 3


@pytest.mark.parametrize(("arguments", "words"), [
    (("--grid", "0"), "points_per_side is 0"), (("--pred-iou", "1.5"), "from 0 to 1"),
    (("--stability", "-0.1"), "from 0 to 1"), (("--workers", "0"), "at least 1"),
    (("--engine", "spark"), "local or ray"),
])
def test_bad_options(cli: Run, photos: Path, toy_bundle: Path, tmp_path: Path, arguments: tuple[str, ...],
                     words: str) -> None:
    outcome = cli("everything", photos, "-o", tmp_path / "out", "--bundle", toy_bundle, *arguments)
    assert outcome.code == 2
    assert words in " ".join(outcome.err.split())
    assert not (tmp_path / "out").exists()


def test_a_ray_cluster_that_is_none_is_one_sentence(cli: Run, photos: Path, toy_bundle: Path, tmp_path: Path) -> None:
    outcome = everything(cli, photos, tmp_path / "out", toy_bundle, "--engine", "ray", "--address", "nonsense")
    assert outcome.code == 2
    assert "Ray stopped the job" in " ".join(outcome.err.split())


def test_bad_places(cli: Run, photos: Path, toy_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for source, out, words in ((tmp_path / "empty", tmp_path / "o", "holds no JPEG"),
                               (tmp_path / "none", tmp_path / "o", "does not exist"),
                               (photos, tmp_path / "file", "is a file"),
                               (photos, tmp_path / "file" / "o", "cannot write")):
        outcome = everything(cli, source, out, toy_bundle)
        assert outcome.code == 2
        assert words in " ".join(outcome.err.split())


def test_a_full_disk_stops_the_job_and_keeps_what_is_done(photos: Path, toy_bundle: Path, tmp_path: Path) -> None:
    """A limit on file sizes stands for a full disk: the large photo's overlay does not fit."""
    rgb = np.random.default_rng(9).integers(0, 256, (600, 600, 3), dtype=np.uint8)
    Image.fromarray(rgb).save(photos / "p2.png")
    code = ("import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (300000, 300000))\n"
            f"sys.argv = ['pocketsam', 'everything', {str(photos)!r}, '-o', {str(tmp_path / 'out')!r}, '--bundle', "
            f"{str(toy_bundle)!r}, '--runtime', 'onnxruntime', *{OPTIONS!r}]\n"
            "from pocketsam.cli import main; main()")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 2, done.stderr
    assert "cannot write" in " ".join(done.stderr.split())
    assert sorted(p.name for p in (tmp_path / "out/labels").iterdir()) == ["p0.png.json", "p1.png.json"]
    assert sorted(p.name for p in (tmp_path / "out/overlays").iterdir()) == ["p0.png.png", "p1.png.png"]


def test_workers_do_every_photo_once(photos: Path, toy_bundle: Path, tmp_path: Path) -> None:
    job = job_of(toy_bundle, tmp_path / "out")
    todo = prepare(job, job.open(), sorted(photos.iterdir()))
    outcomes = run(job, todo, workers=2)
    assert sorted(d.photo for d in outcomes) == [f"p{i}.png" for i in range(4)]
    assert prepare(job, job.open(), sorted(photos.iterdir())) == []


def test_a_dead_worker_is_named_and_the_job_resumes(photos: Path, toy_bundle: Path, tmp_path: Path) -> None:
    job = job_of(toy_bundle, tmp_path / "out")
    todo = prepare(job, job.open(), sorted(photos.iterdir()))

    def kill(done: Any, n: int, total: int) -> None:
        for pid in children(os.getpid(), "spawn_main"):
            os.kill(pid, signal.SIGKILL)

    with pytest.raises(WorkerError, match="go on"):
        run(job, [*todo, *todo * 10], workers=2, report=kill)
    left = prepare(job, job.open(), todo)
    run(job, left, workers=1)
    assert prepare(job, job.open(), todo) == []


def children(parent: int, word: str) -> list[int]:
    """Processes below one of ours whose command line holds a word."""
    parents, names = {}, {}
    for path in Path("/proc").iterdir():
        if path.name.isdecimal():
            try:
                stat = (path / "stat").read_text().rsplit(")", 1)[1].split()
                names[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            parents[int(path.name)] = int(stat[1])
    found, todo = [], [parent]
    while todo:
        current = todo.pop()
        below = [p for p, up in parents.items() if up == current]
        todo += below
        found += [p for p in below if word in names[p]]
    return found


@pytest.mark.slow
def test_ray_with_a_killed_worker(photos: Path, toy_bundle: Path, tmp_path: Path) -> None:
    """One of two actors is killed in the middle: every photo is there exactly once, and a second run does nothing."""
    for i in range(4, 12):
        shutil.copy(photos / f"p{i % 4}.png", photos / f"p{i}.png")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "pocketsam.cli", "everything", str(photos), "-o", str(out), "--bundle",
               str(toy_bundle), "--runtime", "onnxruntime", *OPTIONS, "--grid", "16", "--engine", "ray", "--workers",
               "2", "--shard", "5", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8") as process:
        killed = False
        while process.poll() is None and not killed:
            time.sleep(0.1)
            if len(list((out / "labels").glob("p*.json"))) >= 2:
                actors = children(process.pid, "MapWorker")
                if actors:
                    os.kill(actors[0], signal.SIGKILL)
                    killed = True
        stdout, stderr = process.communicate()
    assert killed, stderr
    assert process.returncode == 0, stderr
    data = json.loads(stdout)
    names = sorted(f"p{i}.png" for i in range(12))
    assert sorted(p["photo"] for p in data["photos"]) == names
    joined = [i["file_name"] for s in sorted(out.glob("coco-*.json")) for i in json.loads(s.read_text())["images"]]
    assert sorted(joined) == names
    stamps = {p.name: p.stat().st_mtime_ns for p in (out / "labels").iterdir()}
    again = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
    assert json.loads(again.stdout)["photos"] == []
    assert {p.name: p.stat().st_mtime_ns for p in (out / "labels").iterdir()} == stamps
