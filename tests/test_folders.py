"""Folder jobs: outputs, resuming, bad photos, workers, full disks, and Ray with a killed worker."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pocketsam import rle
from pocketsam.bundle import read_bundle
from pocketsam.errors import LabelError, UsageError, WorkerError
from pocketsam.everything import Settings
from pocketsam.files import sha256_file
from pocketsam.folders import Job, embed, finish, prepare, run
from pocketsam.images import load_rgb

Run = Callable[..., Any]
OPTIONS = ("--grid", "2", "--pred-iou", "0", "--stability", "0", "--nms", "1", "--threads", "1")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(4):
        rgb = np.random.default_rng(i).integers(0, 256, (40 + i, 60, 3), dtype=np.uint8)
        Image.fromarray(rgb).save(folder / f"p{i}.png")
    return folder


def everything(cli: Run, photos: Path, out: Path, bundle: Path, *more: object) -> Any:
    return cli("everything", photos, "-o", out, "--bundle", bundle, *OPTIONS, *more)


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


def test_resuming_and_shards(cli: Run, photos: Path, toy_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert everything(cli, photos / "p1.png", out, toy_bundle).code == 0
    before = (out / "labels/p1.png.json").stat().st_mtime_ns
    data = json.loads(everything(cli, photos, out, toy_bundle, "--json", "--shard", "3").out)
    assert data["done_earlier"] == 1
    assert [p["photo"] for p in data["photos"]] == ["p0.png", "p2.png", "p3.png"]
    assert (out / "labels/p1.png.json").stat().st_mtime_ns == before
    shards = sorted(out.glob("coco-*.json"))
    assert [len(json.loads(s.read_text())["images"]) for s in shards] == [3, 1]
    assert not (out / "coco.json").exists(), "the file of the first run"
    (out / "coco-mine.json").write_text("")
    assert everything(cli, photos, out, toy_bundle, "--shard", "2").code == 0
    assert sorted(p.name for p in out.glob("coco*")) == [
        "coco-00000-of-00002.json", "coco-00001-of-00002.json", "coco-mine.json"]
    assert json.loads(everything(cli, photos, out, toy_bundle, "--json").out)["photos"] == []
    assert sorted(p.name for p in out.glob("coco*")) == ["coco-mine.json", "coco.json"]
    refused = everything(cli, photos, out, toy_bundle, "--max-area", "0.5")
    assert refused.code == 2
    assert "other settings" in " ".join(refused.err.split())


def test_overlays_that_are_asked_for_later_are_drawn_from_the_labels(cli: Run, photos: Path, toy_bundle: Path,
                                                                     tmp_path: Path) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    first = everything(cli, photos, out, toy_bundle, "--no-overlays")
    assert "and overlays in" not in " ".join(first.out.split())
    before = {p: p.stat().st_mtime_ns for p in (out / "labels").iterdir()}
    outcome = everything(cli, photos, out, toy_bundle)
    assert "labels and overlays in" in " ".join(outcome.out.split())
    assert {p: p.stat().st_mtime_ns for p in (out / "labels").iterdir()} == before
    everything(cli, photos, whole, toy_bundle)
    for picture in (whole / "overlays").iterdir():
        assert (out / "overlays" / picture.name).read_bytes() == picture.read_bytes()


@pytest.mark.parametrize("name", ["coco.json", "coco-00000-of-00001.json", "labels/mine.json"])
def test_annotations_of_a_dataset_are_not_replaced(cli: Run, photos: Path, toy_bundle: Path, name: str) -> None:
    mine = photos / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    outcome = everything(cli, photos, photos, toy_bundle, "--shard", "1")
    assert outcome.code == 2
    assert f"holds {name} and no job.json" in " ".join(outcome.err.split())
    assert mine.read_text() == "mine"
    assert not (photos / "job.json").exists()


@pytest.mark.parametrize("text", ["{", "{}", "[]", "null", '{"image": []}', "a row"])
def test_a_damaged_label_is_made_again(photos: Path, toy_bundle: Path, tmp_path: Path, text: str) -> None:
    job, photo = job_of(toy_bundle, tmp_path / "out"), photos / "p0.png"
    job.label(photo).parent.mkdir(parents=True)
    if text == "a row":
        image = {"file_name": "p0.png", "width": 60, "height": 40, "file_sha256": sha256_file(photo)}
        text = json.dumps({"image": image, "annotations": [{"id": 1}]})
    job.label(photo).write_text(text)
    assert not job.holds(photo)
    assert job.labelled(photo) is None
    with pytest.raises(LabelError, match="delete it to make it again"):
        finish(job)


def test_photos_of_earlier_calls_stay_in_the_coco_file(cli: Run, photos: Path, toy_bundle: Path,
                                                       tmp_path: Path) -> None:
    (photos / "p1.png").rename(photos / ".p1.png")
    for name in (".p1.png", "p0.png", "p3.png"):
        assert everything(cli, photos / name, tmp_path / "out", toy_bundle).code == 0
        # What a killed process leaves.
        (tmp_path / "out/labels/.p2.png.k1ll3d.json").write_text('{"image": {"file_name": "p2.png"')
    coco = json.loads((tmp_path / "out/coco.json").read_text())
    assert [i["file_name"] for i in coco["images"]] == [".p1.png", "p0.png", "p3.png"]
    # Parts are numbered through, so that they can be joined.
    assert everything(cli, photos / "p0.png", tmp_path / "out", toy_bundle, "--shard", "1").code == 0
    parts = [json.loads(p.read_text()) for p in sorted((tmp_path / "out").glob("coco-*.json"))]
    for key in ("images", "annotations"):
        assert [r["id"] for p in parts for r in p[key]] == list(range(1, len(coco[key]) + 1))
    assert [a["image_id"] for p in parts for a in p["annotations"]] == [a["image_id"] for a in coco["annotations"]]


def test_a_name_as_long_as_they_get(cli: Run, photos: Path, toy_bundle: Path, tmp_path: Path) -> None:
    names = [f"{'x' * 250}{i}.png" for i in range(2)] + ["\u753b" * 83 + ".png"]
    for name in names:
        shutil.copyfile(photos / "p0.png", photos / name)
    assert everything(cli, photos, tmp_path / "out", toy_bundle).code == 0
    images = json.loads((tmp_path / "out/coco.json").read_text())["images"]
    assert {i["file_name"] for i in images} == {p.name for p in photos.iterdir()}
    again = everything(cli, photos, tmp_path / "out", toy_bundle, "--json")
    assert json.loads(again.out)["photos"] == []


def test_masks_of_another_int8_are_not_mixed(photos: Path, toy_bundle: Path, tmp_path: Path) -> None:
    """Weights stay the same when a bundle is quantized anew; files do not."""
    job, rgb = job_of(toy_bundle, tmp_path / "out"), load_rgb(photos / "p0.png")
    sam = job.open()
    held = read_bundle(toy_bundle)
    assert sam.info()["artifacts_sha256"] == held.identity("onnx", "fp32")
    prepare(job, sam, [])
    embed(sam, rgb, tmp_path / "cache")
    info = sam.info() | {"artifacts_sha256": replace(held, artifacts=held.artifacts[:1]).identity("onnx", "fp32")}
    sam.runtime.info = lambda: info
    with pytest.raises(UsageError, match=r"\(artifacts_sha256\)"):
        prepare(job, sam, [])
    embed(sam, rgb, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_changed_photo_is_done_again(cli: Run, photos: Path, toy_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert everything(cli, photos, out, toy_bundle).code == 0
    before = (out / "labels/p0.png.json").stat().st_mtime_ns
    (out / "labels/p3.png.json").write_text("{")
    other = Path(shutil.copytree(photos, tmp_path / "other"))
    shutil.copyfile(photos / "p2.png", other / "p1.png")
    (other / "p2.png").write_text("not an image")
    outcome = everything(cli, other, out, toy_bundle, "--json")
    assert outcome.code == 1, "one photo is unreadable now"
    assert [p["photo"] for p in json.loads(outcome.out)["photos"]] == ["p1.png", "p2.png", "p3.png"]
    assert (out / "labels/p0.png.json").stat().st_mtime_ns == before
    images = json.loads((out / "coco.json").read_text())["images"]
    assert [(i["file_name"], i["height"]) for i in images] == [("p0.png", 40), ("p1.png", 42), ("p3.png", 43)]


@pytest.mark.parametrize(("name", "value", "words"), [
    ("precision", "int8", "precision fp32 and now int8"), ("runtime", "litert", "runtime openvino and now litert"),
    ("inference_precision", "bf16", "compute f32 and now bf16"), ("weights_sha256", "x", "weights_sha256"),
])
def test_masks_of_another_runtime_or_model_are_not_mixed(toy_bundle: Path, tmp_path: Path, name: str, value: str,
                                                         words: str) -> None:
    job = job_of(toy_bundle, tmp_path / "out")
    sam = job.open()
    info = {**sam.info(), "runtime": "openvino", "inference_precision": "f32"}
    sam.runtime.info = lambda: info
    prepare(job, sam, [])
    prepare(job, sam, [])
    info[name] = value
    with pytest.raises(UsageError, match=rf"another model or runtime \({words}"):
        prepare(job, sam, [])


def test_masks_of_another_input_side_are_not_mixed(toy_bundle: Path, tmp_path: Path) -> None:
    job = job_of(toy_bundle, tmp_path / "out")
    sam = job.open()
    prepare(job, sam, [])
    sam.runtime.spec = replace(sam.spec, image_size=256)
    with pytest.raises(UsageError, match=r"\(image_size 128 and now 256\)"):
        prepare(job, sam, [])


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


def test_a_damaged_embedding_is_made_again(photos: Path, toy_bundle: Path, tmp_path: Path) -> None:
    sam = job_of(toy_bundle, tmp_path).open()
    rgb = load_rgb(photos / "p0.png")
    made = embed(sam, rgb, tmp_path / "cache")
    (path,) = (tmp_path / "cache").iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"(1, 32, 8", b"(1, (2, 8"))
    again = embed(sam, rgb, tmp_path / "cache")
    assert np.array_equal(again.features["image_embeddings"], made.features["image_embeddings"])
    assert path.read_bytes() == whole


@pytest.mark.parametrize(("name", "value"), [("precision", "int8"), ("runtime", "litert")])
def test_embeddings_of_another_encoder_are_not_taken(photos: Path, toy_bundle: Path, tmp_path: Path, name: str,
                                                     value: str) -> None:
    sam, rgb, cache = job_of(toy_bundle, tmp_path).open(), load_rgb(photos / "p0.png"), tmp_path / "cache"
    embed(sam, rgb, cache)
    embed(sam, rgb, cache)
    assert len(list(cache.iterdir())) == 1
    info = {**sam.runtime.info(), name: value}
    sam.runtime.info = lambda: info
    embed(sam, rgb, cache)
    assert len(list(cache.iterdir())) == 2


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


def job_of(toy_bundle: Path, out: Path) -> Job:
    return Job(out, Settings(points_per_side=2, pred_iou=0, stability=0), str(toy_bundle), "onnxruntime", threads=1)


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
