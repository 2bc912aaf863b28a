"""Agreement and quality on drawn packs and COCO folders."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blobs import BlobRuntime
from PIL import Image
from tars import read_tar, write_tar

from pocketsam import rle
from pocketsam.benchmarks.accuracy import agreement, open_data, quality, regions, retention
from pocketsam.benchmarks.coco import CocoFolder, fill
from pocketsam.distance import inner_point
from pocketsam.errors import LabelError, UsageError
from pocketsam.models.catalog import spec
from pocketsam.parity import mask_iou
from pocketsam.predictor import Predictor
from pocketsam.quantize.calibration import collect

H, W = 60, 90
SQUARE = [10.0, 10.0, 40.0, 10.0, 40.0, 30.0, 10.0, 30.0]


def png(values: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(values).save(out, "png")
    return out.getvalue()


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (H, W, 3), dtype=np.uint8)


def make_pack(path: Path, photos: int = 4, layers: int = 2) -> Path:
    """Photos of two sources; each layer has a disc and a rectangle."""
    ys, xs = np.mgrid[:H, :W]
    members, index = {}, []
    for i in range(photos):
        members[f"im{i}.jpg"] = png(noise(i))
        rows = []
        for k in range(layers):
            ids = np.zeros((H, W), np.uint8)
            ids[(ys - 25) ** 2 + (xs - 20 - 4 * k) ** 2 < 12 ** 2], ids[40:55, 50:80 - k] = 1, 2
            members[f"im{i}.{k}.png"] = png(ids)
            rows.append({"file": f"im{i}.{k}.png", "regions": 2, "kind": "regions"})
        index.append({"id": f"im{i}", "source": f"drawn{i % 2}", "layers": rows})
    members["index.json"] = json.dumps(index).encode()
    return write_tar(path, members)


def disc() -> np.ndarray:
    ys, xs = np.mgrid[:H, :W]
    return np.asarray((ys - 20) ** 2 + (xs - 25) ** 2 < 15 ** 2)


def coco() -> dict[str, Any]:
    flat = disc().ravel(order="F").astype(int)
    runs = np.diff(np.concatenate([[0], np.flatnonzero(np.diff(flat)) + 1, [flat.size]])).tolist()
    shapes: list[Any] = [[SQUARE], rle.encode(disc()), {"size": [H, W], "counts": runs},
                         [SQUARE, [60, 40, 80, 40, 70, 55]]]
    rows = [{"id": i, "image_id": 1, "segmentation": s, "iscrowd": 0} for i, s in enumerate(shapes)]
    rows.append({"id": 8, "image_id": 1, "segmentation": rle.encode(disc()), "iscrowd": 1})
    rows.append({"id": 9, "image_id": 2, "segmentation": [], "iscrowd": 0})
    return {"images": [{"id": 1, "file_name": "a.png", "height": H, "width": W}, {"id": 2, "file_name": "b.png"}],
            "annotations": rows}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    (root / "images").mkdir(parents=True)
    (root / "a.png").write_bytes(png(noise(1)))
    (root / "images/b.png").write_bytes(png(noise(2)))
    (root / "instances.json").write_text(json.dumps(coco()))
    return root


def sam() -> Predictor:
    return Predictor(BlobRuntime())


def test_inner_point_is_the_deepest() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        mask = rng.random((int(rng.integers(1, 25)), int(rng.integers(1, 25)))) < 0.9
        mask[0, 0] = True
        outside = np.argwhere(~np.pad(mask, 1)) - 1
        ys, xs = np.nonzero(mask)
        depth = ((np.stack([ys, xs], 1)[:, None] - outside) ** 2).sum(-1).min(1)
        first = int(depth.argmax())
        assert inner_point(mask) == (xs[first] + 0.5, ys[first] + 0.5)
    with pytest.raises(ValueError, match="empty"):
        inner_point(np.zeros((3, 3), bool))


def test_filled_polygons_cover_pixel_centres() -> None:
    expected = np.zeros((H, W), bool)
    expected[10:30, 10:40] = True
    assert np.array_equal(fill(np.array(SQUARE), H, W), expected)
    beyond = fill(np.array([-50.0, -50, 500, -50, 500, 500, -50, 500]), H, W)
    assert beyond.all()
    turns = np.linspace(0, 2 * np.pi, 200, endpoint=False)
    circle = np.stack([25.5 + 15 * np.cos(turns), 20.5 + 15 * np.sin(turns)], 1).ravel()
    assert abs(int(fill(circle, H, W).sum()) - np.pi * 15 ** 2) < 10


def test_coco_masks_overlap_and_crowds_are_counted(folder: Path) -> None:
    data = open_data(folder)
    assert isinstance(data, CocoFolder)
    assert data.photos == 2
    assert dict(data.left_out) == {"crowd": 1, "no mask": 1}
    first, second = data
    square, compressed, plain, two = regions(first)
    assert square.sum() == 600
    assert np.array_equal(compressed, disc())
    assert np.array_equal(plain, disc())
    assert (square & compressed).any()
    assert np.array_equal(two & square, square)
    assert two.sum() > square.sum()
    assert not list(regions(second))
    assert (second.image == noise(2)).all()
    assert quality(sam(), data)[0]["regions"] == 4


def test_json_is_found(folder: Path) -> None:
    (folder / "annotations").mkdir()
    (folder / "instances.json").rename(folder / "annotations/what.json")
    assert open_data(folder).photos == 2
    (folder / "annotations/other.json").write_text("{}")
    with pytest.raises(LabelError, match="2 JSON files"):
        open_data(folder)


def segmentation(shape: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data["annotations"][0].update(segmentation=shape)


def photo(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda data: data["images"][0].update(file_name=name)


@pytest.mark.parametrize(("damage", "message"), [
    (photo("gone.png"), "gone.png"), (photo("../secret.png"), "not a path inside"),
    (photo("/etc/passwd"), "not a path"),
    (photo("link.png"), "leads out"), (photo("instances.json"), "not an image"),
    (lambda d: d["images"][0].update(width=50), "another copy"), (lambda d: d.pop("images"), "cannot be read as COCO"),
    (lambda d: d.update(annotations=[]), "holds no masks"), (lambda d: d.update(annotations=[3]), "cannot be read"),
    (lambda d: d["annotations"][0].update(image_id=77), "cannot be read as COCO"),
    (segmentation([[1, 2, 3]]), "annotation 0"), (segmentation([[1, 2, 3, 4, 5, 1e300]]), "annotation 0"),
    (segmentation("x"), "annotation 0"), (segmentation({"size": [H, W], "counts": [10 ** 15]}), "annotation 0"),
    (segmentation({"size": [2, 2], "counts": [4]}), "annotation 0"),
    (segmentation({"size": [H, W], "counts": "o" * 99}), "annotation 0"),
])
def test_bad_coco(folder: Path, damage: Callable[[dict[str, Any]], Any], message: str) -> None:
    (folder.parent / "secret.png").write_bytes(png(noise(3)))
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    data = coco()
    damage(data)
    (folder / "instances.json").write_text(json.dumps(data))
    with pytest.raises(LabelError, match=message):
        quality(sam(), open_data(folder))


def test_bad_packs(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match="without masks"):
        open_data(make_pack(tmp_path / "bare.tar", layers=0))
    with pytest.raises(LabelError, match="does not exist"):
        open_data(tmp_path / "none.tar")
    (tmp_path / "junk.tar").write_text("junk")
    with pytest.raises(LabelError, match="as a pack"):
        open_data(tmp_path / "junk.tar")
    (tmp_path / "empty").mkdir()
    with pytest.raises(LabelError, match="no JSON"):
        open_data(tmp_path / "empty")


def lost(picture: bytes) -> bytes:
    """A PNG of which the pixels end early, in the middle of nothing that is a chunk."""
    at = picture.index(b"IDAT") - 4
    return picture[:at] + (50).to_bytes(4, "big") + picture[at + 4:]


def unfinished(picture: bytes) -> bytes:
    """A PNG with an empty chunk where a number is expected."""
    at = picture.index(b"IDAT") - 4
    return picture[:at] + b"\0\0\0\0gAMA" + zlib.crc32(b"gAMA").to_bytes(4, "big") + picture[at:]


@pytest.mark.parametrize("name", ["im0.jpg", "im0.1.png"])
@pytest.mark.parametrize("damage", [lost, unfinished, lambda picture: picture[:60]])
def test_damaged_pictures(tmp_path: Path, name: str, damage: Callable[[bytes], bytes]) -> None:
    members = read_tar(make_pack(tmp_path / "p.tar", photos=1))
    pack = write_tar(tmp_path / "damaged.tar", {**members, name: damage(members[name])})
    with pytest.raises(LabelError, match="as a pack"):
        quality(sam(), open_data(pack))


def test_pictures_that_claim_to_be_huge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_data(make_pack(tmp_path / "p.tar"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", H * W // 2 - 1)
    with pytest.raises(LabelError, match="exceeds limit"):
        quality(sam(), data)


@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress, lambda data: gzip.compress(data)[:99],
                                      lambda data: lzma.compress(data)[:99]])
def test_packs_are_not_compressed(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    (tmp_path / "p.tar.x").write_bytes(compress(make_pack(tmp_path / "p.tar").read_bytes()))
    with pytest.raises(LabelError, match="expected an uncompressed tar"):
        open_data(tmp_path / "p.tar.x")
    with pytest.raises(UsageError, match="neither a folder nor a pack"):
        collect(tmp_path / "p.tar.x", spec("lite0"))


def test_calibration_leaves_damaged_pictures_of_a_pack_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = read_tar(make_pack(tmp_path / "p.tar"))
    members |= {"im0.jpg": lost(members["im0.jpg"]), "im1.jpg": unfinished(members["im1.jpg"])}
    members["im2.jpg"] = png(np.zeros((3 * H, W, 3), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", H * W)
    found = collect(write_tar(tmp_path / "damaged.tar", members), spec("lite0"), count=4)
    assert found.distinct == 1
    assert [s.split(" ")[0] for s in found.skipped] == ["im0.jpg", "im1.jpg", "im2.jpg"]


def test_quality_is_reproducible_and_by_source(tmp_path: Path) -> None:
    data = open_data(make_pack(tmp_path / "p.tar"))
    rows = quality(sam(), data)
    assert [(r["source"], r["regions"]) for r in rows] == [("all", 16), ("drawn0", 8), ("drawn1", 8)]
    for row in rows:
        assert 0 <= row["point"] <= row["oracle"] <= 1
        assert 0 <= row["box"] <= 1
    assert rows[0]["box"] == pytest.approx((rows[1]["box"] + rows[2]["box"]) / 2)
    few = quality(sam(), data, regions_per_image=1, seed=3)
    assert few == quality(sam(), data, regions_per_image=1, seed=3)
    assert few[0]["regions"] == 4
    assert few != quality(sam(), data, regions_per_image=1, seed=4)
    assert len(list(data.spread(2))) == 2
    assert "clicked" in quality(sam(), data.spread(1), clicks=2)[0]


def test_numbers_are_those_of_the_predictor(tmp_path: Path) -> None:
    """One region by hand: its box is answered by the single mask, its inner point by three."""
    data = open_data(make_pack(tmp_path / "p.tar", photos=1, layers=1))
    sample = next(iter(data))
    predictor = sam()
    predictor.set_image(sample.image)
    kept = predictor.current
    expected = []
    for truth, box in zip(regions(sample), [(9, 14, 32, 37), (50, 40, 80, 55)], strict=True):
        assert mask_iou(truth, truth & np.pad(np.ones((box[3] - box[1], box[2] - box[0]), bool), (
            (box[1], H - box[3]), (box[0], W - box[2])))) == 1
        three = predictor.predict(points=[inner_point(truth)])
        ious = [mask_iou(m, truth) for m in three.masks]
        expected.append((mask_iou(predictor.predict_boxes([box]).masks[0], truth), ious[three.best], max(ious)))
    row = quality(predictor, data)[0]
    assert [row["box"], row["point"], row["oracle"]] == pytest.approx(np.mean(expected, 0).tolist())
    assert predictor.current is kept


def test_retention(tmp_path: Path) -> None:
    rows = [{"source": "all", "regions": 2, "box": 0.5, "point": 0.0, "oracle": 0.8}]
    ours = [{"source": "all", "regions": 2, "box": 0.4, "point": 0.1, "oracle": 0.8}]
    assert retention(ours, rows) == [{"source": "all", "regions": 2, "box": 0.8, "point": None, "oracle": 1.0}]
    with pytest.raises(UsageError, match="same data"):
        retention([], rows)


def test_agreement(tmp_path: Path) -> None:
    data = open_data(make_pack(tmp_path / "p.tar"))
    same = agreement(sam(), sam(), data, images=2)
    assert same["images"] == 2
    assert same["flip_rate"] == 0
    assert same["box"] == same["point"] == {"prompts": 8, "mean": 1.0, "p5": 1.0, "worst": 1.0}
    other = agreement(sam(), Predictor(BlobRuntime(side=256)), list(data), images=3, prompts_per_image=4)
    assert other["images"] == 3
    assert other["max_tensor_error"] == {}
    assert other["box"]["mean"] < 1
    json.dumps(other, allow_nan=False)
    for wrong in ({"images": 0}, {"prompts_per_image": 1}, {"samples": []}):
        with pytest.raises(UsageError):
            agreement(sam(), sam(), **{"samples": data, **wrong})


def test_light_import() -> None:
    code = "import sys, pocketsam.benchmarks.accuracy; assert not {'torch', 'scipy', 'onnxruntime'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
