"""Folder jobs that go on: what is done stays, what changed is made again, what does not belong together is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from folder_jobs import Run, everything, job_of

from pocketsam.bundle import read_bundle
from pocketsam.errors import LabelError, UsageError
from pocketsam.everything import segment_everything
from pocketsam.files import sha256_file
from pocketsam.folders import embed, finish, prepare, segment_photo
from pocketsam.images import load_rgb
from pocketsam.predictor import Predictor


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
    sam = Predictor(sam.runtime)
    with pytest.raises(UsageError, match=rf"another model or runtime \({words}"):
        prepare(job, sam, [])


def test_masks_of_another_input_side_are_not_mixed(toy_bundle: Path, tmp_path: Path) -> None:
    job = job_of(toy_bundle, tmp_path / "out")
    sam = job.open()
    prepare(job, sam, [])
    sam.runtime.spec = replace(sam.spec, image_size=256)
    with pytest.raises(UsageError, match=r"\(image_size 128 and now 256\)"):
        prepare(job, sam, [])


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


def test_a_photo_that_is_replaced_meanwhile_is_done_again(photos: Path, toy_bundle: Path, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    job, photo = job_of(toy_bundle, tmp_path / "out"), photos / "p1.png"
    sam = job.open()
    real = segment_everything

    def slow(*args: object, **options: object) -> object:
        shutil.copy(photos / "p0.png", photo)
        return real(*args, **options)  # type: ignore[arg-type]

    assert prepare(job, sam, [photo]) == [photo]
    monkeypatch.setattr("pocketsam.folders.segment_everything", slow)
    assert not segment_photo(sam, photo, job).problem
    monkeypatch.undo()
    assert prepare(job, sam, [photo]) == [photo], "the masks are those of the old photo"
    segment_photo(sam, photo, job)
    assert prepare(job, sam, [photo]) == []
    photo.unlink()
    assert "does not exist" in segment_photo(sam, photo, job).problem
    assert not job.label(photo).exists()
    assert not job.overlay(photo).exists()


def test_the_overlay_of_an_earlier_photo_does_not_stay(photos: Path, toy_bundle: Path, tmp_path: Path) -> None:
    job, photo = job_of(toy_bundle, tmp_path / "out"), photos / "p1.png"
    sam = job.open()
    prepare(job, sam, [photo])
    segment_photo(sam, photo, job)
    shutil.copy(photos / "p0.png", photo)
    plain = replace(job, overlays=False)
    assert prepare(plain, sam, [photo]) == [photo]
    segment_photo(sam, photo, plain)
    assert prepare(plain, sam, [photo]) == []
    assert prepare(job, sam, [photo]) == [photo], "there is no picture of this photo yet"
