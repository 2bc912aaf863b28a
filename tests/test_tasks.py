"""Proposals, edges and instances."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blobs import BlobRuntime
from PIL import Image

import pocketsam
from pocketsam import rle
from pocketsam.edge_scores import boundaries, count, match, skeleton, summarize
from pocketsam.edges import find_edges, thin
from pocketsam.errors import LabelError, OutputError
from pocketsam.everything import Settings
from pocketsam.instances import read_detections
from pocketsam.labels import read_json
from pocketsam.overlay import save_image
from pocketsam.photos import photo_paths
from pocketsam.predictor import Predictor
from pocketsam.proposals import average_recall, propose, recalls

Run = Callable[..., Any]


def test_proposals_are_ranked() -> None:
    sam = Predictor(BlobRuntime())
    settings = Settings(points_per_side=8, pred_iou=0, stability=0, nms=0.9)
    found = propose(sam, photo_paths()[1], settings)
    ranks = [r.score + r.stability for r in found]
    assert len(found) > 10
    assert ranks == sorted(ranks, reverse=True)
    assert propose(sam, photo_paths()[1], settings, most=5) == found[:5]


def test_recall() -> None:
    truth = np.array([[0, 0, 9, 9], [20, 20, 39, 39]], float)
    assert average_recall([recalls(truth, truth, 10)], 2) == 1
    half = np.array([[0, 0, 9, 9], [0, 0, 9, 9]], float)
    assert average_recall([recalls(half, truth, 10)], 2) == 0.5
    assert average_recall([recalls(truth[::-1], truth, 1)], 2) == 0.5
    # IoU 0.8 counts at 0.5 to 0.8: seven of ten.
    assert average_recall([recalls(np.array([[0, 0, 9, 7]], float), truth[:1], 1)], 1) == pytest.approx(0.7)
    assert recalls(np.empty((0, 4)), truth, 10).sum() == 0


def test_edges_lie_on_mask_borders() -> None:
    sam = Predictor(BlobRuntime(centres=1))
    rgb = np.full((128, 128, 3), 90, np.uint8)
    strength = find_edges(sam, rgb, 2)
    assert strength.shape == (128, 128)
    assert strength.max() == 1
    sam.set_image(rgb)
    masks = sam.predict(points=[(32, 32)]).masks
    near = np.zeros((128, 128), bool)
    for mask in masks:
        near |= boundaries(mask.astype(np.int32))
    found = np.argwhere(strength > 0.2)
    borders = np.argwhere(near)
    distance = np.sqrt(((found[:, None] - borders[None]) ** 2).sum(-1)).min(1)
    assert len(found) > 10
    assert np.percentile(distance, 95) <= 3


def test_thinning_keeps_the_crest() -> None:
    xs = np.arange(60)[None] - 30.0
    ridge = np.repeat(np.exp(-xs ** 2 / 8), 40, axis=0).astype(np.float32)
    for image in (ridge, ridge.T):
        kept = thin(image) > 0.1
        line = kept if image is ridge else kept.T
        assert (line.sum(1) == 1).all()
        assert line[:, 30].all()


def test_thinning_a_few_rows_at_a_time_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    strength = np.random.default_rng(0).random((97, 60), np.float32)
    whole = thin(strength)
    monkeypatch.setattr("pocketsam.edges.THIN_ROWS", 13)
    assert np.array_equal(thin(strength), whole)


@pytest.mark.parametrize("shape", [(1, 60), (60, 1), (1, 1)])
def test_photos_one_pixel_wide_have_edges(shape: tuple[int, int]) -> None:
    line = np.exp(-(np.arange(60) - 30.0) ** 2 / 8).astype(np.float32)
    kept = thin(line[:shape[0] * shape[1]].reshape(shape))
    assert np.flatnonzero(kept > 0.1).tolist() == ([30] if kept.size > 1 else [])
    assert find_edges(Predictor(BlobRuntime(centres=1)), np.full((*shape, 3), 90, np.uint8), 2).shape == shape


def test_matching_is_one_to_one_within_the_tolerance() -> None:
    truth = np.zeros((300, 400), bool)
    truth[100, 50:350] = True
    for shift, matched in ((0, 300), (3, 300), (4, 0)):
        assert match(np.roll(truth, shift, 0), truth)[1] == matched, "the tolerance is 3.75 pixels here"
    thick = truth | np.roll(truth, 1, 0)
    assert match(thick, truth)[1] == 300
    assert match(truth, np.zeros_like(truth))[1] == 0


def test_edge_scores() -> None:
    truth = np.zeros((100, 100), bool)
    truth[50, 10:90] = True
    perfect = summarize([count(truth.astype(np.float32), [truth])])
    assert perfect.ods == perfect.ois == pytest.approx(1)
    wrong = np.zeros((100, 100), np.float32)
    wrong[50, 10:90] = 0.9
    wrong[20, 10:90] = 0.5
    scores = summarize([count(wrong, [truth])])
    assert scores.ods == pytest.approx(1)
    assert scores.threshold > 0.5
    both = summarize([count(np.where(wrong == 0.5, np.float32(0.95), wrong), [truth])])
    assert both.ods == pytest.approx(2 / 3)
    layer = np.zeros((20, 20), np.int32)
    layer[:, 10:] = 1
    assert np.array_equal(np.flatnonzero(boundaries(layer).any(0)), [9])
    assert skeleton(np.ones((5, 30), bool)).sum() < 40


# Found pixels matched, found pixels, true pixels matched, true pixels: precision 1 at recall 1/4, 1/2 at 3/4.
SURE, UNSURE, NOTHING = (5, 5, 5, 20), (15, 30, 15, 20), (0, 0, 0, 20)


@pytest.mark.parametrize(("rows", "expected"), [
    # 51 steps from recall 0.25 to 0.75 with a mean precision of 3/4.
    ([UNSURE, SURE], 51 * 0.75 * 0.01),
    # A threshold that finds nothing has precision 0 at recall 0, from which the curve rises by 1/25 a step.
    ([UNSURE, SURE, NOTHING], (51 * 0.75 + 12) * 0.01),
    ([SURE, SURE], 0),
])
def test_average_precision_by_hand(rows: list[tuple[int, ...]], expected: float) -> None:
    thresholds = np.linspace(0.3, 0.9, len(rows))
    assert summarize([np.array(rows, float)], thresholds).ap == pytest.approx(expected)


@pytest.fixture
def detections(tmp_path: Path) -> tuple[Path, Path, Path]:
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in (1, 2):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (60, 90, 3), dtype=np.uint8)).save(
            photos / f"{i:012d}.jpg")
    coco = tmp_path / "boxes.json"
    coco.write_text(json.dumps([{"image_id": 1, "bbox": [5, 5, 40, 40], "category_id": 7, "score": 0.5},
                                {"image_id": 2, "bbox": [-5, 10, 200, 20], "category_id": 3, "score": 0.25}] * 10))
    table = tmp_path / "boxes.csv"
    table.write_text("image,x0,y0,x1,y1,category,score\n000000000001.jpg,5,5,45,45,7,0.5\n")
    return photos, coco, table


def test_instances(cli: Run, toy_bundle: Path, detections: tuple[Path, Path, Path], tmp_path: Path) -> None:
    photos, coco, table = detections
    out = tmp_path / "masks.json"
    outcome = cli("instances", photos, "--boxes", coco, "-o", out, "--bundle", toy_bundle, "--json")
    assert outcome.code == 0, outcome
    assert json.loads(outcome.out)["masks_per_second"] > 0
    rows = json.loads(out.read_text())
    assert len(rows) == 20
    assert {(r["image_id"], r["category_id"], r["score"]) for r in rows} == {(1, 7, 0.5), (2, 3, 0.25)}
    sam = pocketsam.load(toy_bundle, threads=1)
    sam.set_image(photos / "000000000001.jpg")
    expected = sam.predict(box=(5, 5, 45, 45), multimask=False).masks[0]
    assert (rle.decode(rows[0]["segmentation"]) != expected).mean() < 1e-3
    assert cli("instances", photos, "--boxes", table, "-o", out, "--bundle", toy_bundle).code == 0
    assert json.loads(out.read_text())[0]["image_id"] == "000000000001.jpg"
    (photos / "000000000002.jpg").write_text("no")
    outcome = cli("instances", photos, "--boxes", coco, "-o", out, "--bundle", toy_bundle)
    assert outcome.code == 1
    assert "is not an image" in " ".join(outcome.err.split())


def test_where_results_go_is_looked_at_first(cli: Run, toy_bundle: Path, detections: tuple[Path, Path, Path],
                                             tmp_path: Path) -> None:
    photos, coco, _ = detections
    (tmp_path / "file").write_text("")
    for out in (tmp_path, tmp_path / "file/masks.json"):
        for call in (("instances", photos, "--boxes", coco), ("proposals", photos / "000000000001.jpg"),
                     ("edges", photos / "000000000001.jpg")):
            outcome = cli(*call, "-o", out, "--bundle", toy_bundle / "missing")
            assert outcome.code == 2
            assert f"cannot write {out}" in " ".join(outcome.err.split()), "the place, before the model is opened"


@pytest.mark.parametrize("text", ["", "[]", "{}", '[{"image_id": 1}]', '[{"image_id": 1, "bbox": [1, 2, 0, 4]}]',
                                  '[{"image_id": 1, "bbox": [1, 2, NaN, 4]}]', '[{"image_id": 1, "bbox": "x"}]',
                                  "[" * 100_000, f'[{{"image_id": 1, "bbox": [1, 2, {"9" * 400}, 4]}}]'])
def test_bad_detections(tmp_path: Path, text: str) -> None:
    (tmp_path / "boxes.json").write_text(text)
    with pytest.raises(LabelError):
        read_detections(tmp_path / "boxes.json")


def test_spaces_behind_the_commas_of_a_table(tmp_path: Path) -> None:
    """As the help and the error write the columns."""
    (tmp_path / "boxes.csv").write_text("image, x0, y0, x1, y1\na.jpg, 1, 2, 3, 4\n")
    (found,) = read_detections(tmp_path / "boxes.csv")
    assert (found.image, found.box) == ("a.jpg", (1.0, 2.0, 3.0, 4.0))


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000])
def test_damaged_labels(tmp_path: Path, text: str) -> None:
    (tmp_path / "photo.json").write_text(text)
    with pytest.raises(LabelError, match="delete it to make it again"):
        read_json(tmp_path / "photo.json")


def test_commands(cli: Run, toy_bundle: Path, tmp_path: Path) -> None:
    photo = photo_paths()[1]
    common = ("--bundle", toy_bundle, "--threads", "1", "--grid", "2")
    assert cli("edges", photo, "-o", tmp_path / "e.png", *common).code == 0
    assert Image.open(tmp_path / "e.png").size == Image.open(photo).size
    assert cli("proposals", photo, "-o", tmp_path / "p.json", *common).code == 0
    assert json.loads((tmp_path / "p.json").read_text())["annotations"]
    assert cli("edges", photo, "-o", tmp_path / "f.png", "--bundle", toy_bundle, "--grid", "0").code == 2
    assert cli("proposals", photo, "-o", tmp_path / "q.json", *common, "--most", "0").code == 2


def test_tables_with_marks_and_short_rows(tmp_path: Path) -> None:
    """A byte order mark, as Windows' editors write it, and a row that ends before its last column."""
    (tmp_path / "boxes.json").write_text('\ufeff[{"image_id": 1, "bbox": [1, 2, 3, 4]}]', encoding="utf-8")
    assert read_detections(tmp_path / "boxes.json")[0].image == "1"
    (tmp_path / "boxes.csv").write_text("x0,y0,x1,y1,image\n1,2,3,4,a.jpg\n1,2,3,4\n")
    with pytest.raises(LabelError, match="a row ends before the column image"):
        read_detections(tmp_path / "boxes.csv")


def test_pictures_that_are_too_large_for_their_kind(tmp_path: Path) -> None:
    wide = Image.new("RGB", (16_384, 1))
    with pytest.raises(OutputError, match=r"WEBP takes at most 16383 a side; choose the ending \.png"):
        save_image(wide, tmp_path / "a.webp")
    save_image(wide, tmp_path / "a.png")
