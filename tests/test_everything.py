"""Segment everything: the official algorithm, exactly, on every runtime, and without torch."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from automatic_masks import generate
from blobs import BlobRuntime

import pocketsam
from pocketsam import rle
from pocketsam.candidates import Store, _closer, find, iou, restore, suppress, tight_box
from pocketsam.clicks import Answers
from pocketsam.errors import UsageError
from pocketsam.everything import MaskRecord, Settings, default_settings, segment_everything, settings_for
from pocketsam.geometry import Frame, masks_from_logits, upscale_logits
from pocketsam.grids import crops, point_grid
from pocketsam.images import Rgb, load_rgb
from pocketsam.models.catalog import spec as spec_of
from pocketsam.photos import photo_paths
from pocketsam.predictor import Predictor
from pocketsam.regions import clean, label_regions
from pocketsam.remembered import Remembered
from pocketsam.windows import Window, shape_of, to_image, upscale_bands

TOY = Settings(points_per_side=8, pred_iou=0.3, stability=0.5)
# The toy network's masks mean nothing and cover half the photo: only with these settings several remain.
NETWORK = Settings(points_per_side=4, pred_iou=0, stability=0.3, stability_offset=0.002, nms=1.0)


@pytest.fixture(scope="module")
def toy() -> Predictor:
    return Predictor(BlobRuntime())


def same_masks(sam: Predictor, rgb: Rgb, settings: Settings) -> int:
    """Every reference mask is found with IoU >= 0.99, counts within 2 %; returns the count."""
    ours = segment_everything(sam, rgb, settings)
    reference = generate(sam, rgb, settings.to_json())
    allowed = max(0, len(reference) // 50)
    assert abs(len(ours) - len(reference)) <= allowed
    masks = [r.mask for r in ours]
    missed = 0
    for row in reference:
        best = max(((row["mask"] & m).sum() / (row["mask"] | m).sum() for m in masks), default=0)
        missed += best < 0.99
    assert missed <= allowed
    return len(reference)


@pytest.mark.parametrize("settings", [
    TOY, replace(TOY, stability=0.8), replace(TOY, pred_iou=0, stability=0, nms=0.95),
    replace(TOY, crop_layers=1, crop_points_divide=2),
    replace(TOY, crop_layers=2, points_per_side=6, crop_points_divide=1, crop_nms=0.4),
], ids=["filters", "stable", "unfiltered", "crops", "two crop layers"])
def test_equals_the_plain_implementation(toy: Predictor, settings: Settings) -> None:
    photo = load_rgb(photo_paths()[0])
    assert same_masks(toy, photo[::2, ::2].copy(), settings) >= 3


@pytest.mark.parametrize("shape", [(30, 47), (1, 90), (300, 40)])
def test_odd_photos(toy: Predictor, shape: tuple[int, int]) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    assert same_masks(toy, rgb, replace(TOY, stability=0.3)) >= 1


def test_bounds_hold_for_a_lone_cell() -> None:
    """A cell barely above zero among strong negatives gives no pixel: it must not stretch the inner bound."""
    frame = Frame.of(427, 640, spec_of("lite0"))
    low_res = np.full((1, 3, 128, 128), -3, np.float32)
    low_res[..., 4:20, 10:60] = 3
    low_res[..., 60, 30] = 1e-3
    found = list(find(Answers(np.arange(1), low_res, np.ones((1, 3), np.float32)), frame, 0.2, 0.1, 1.0))
    assert len(found) == 3
    for c in found:
        shape = shape_of(restore(c, 128), frame, to_image(c.cells, frame, 128), 1.0)
        box = tight_box(shape)
        assert box is not None
        assert box[3] < 150, "the lone cell left no pixel"
        assert all(c.outer[i] <= box[i] <= c.inner[i] for i in (0, 1))
        assert all(c.inner[i] <= box[i] <= c.outer[i] for i in (2, 3))


@pytest.mark.parametrize("size", [(1500, 2250), (2000, 1200), (1024, 1024)])
def test_closer_bounds_hold(size: tuple[int, int]) -> None:
    """On large photos: bounds from the model's frame are tighter than those from cells, and still bounds."""
    frame = Frame.of(*size, spec_of("lite0"))
    rng = np.random.default_rng(0)
    coarse = rng.standard_normal((6, 3, 16, 16)).astype(np.float32)
    low_res = np.repeat(np.repeat(coarse, 8, 2), 8, 3) + 0.5 * rng.standard_normal((6, 3, 128, 128)).astype(np.float32)
    low_res[:, :, :40] = low_res[:, :, :, 90:] = -3
    for c in find(Answers(np.arange(6), low_res, np.ones((6, 3), np.float32)), frame, 0.2, 0, 1.0):
        logits = restore(c, 128)
        closer = _closer(c, logits, frame)
        box = tight_box(shape_of(logits, frame, to_image(c.cells, frame, 128), 1.0))
        assert box is not None
        assert all(closer.outer[i] <= box[i] <= closer.inner[i] for i in (0, 1))
        assert all(closer.inner[i] <= box[i] <= closer.outer[i] for i in (2, 3))
        assert closer.outer[1] > c.outer[1]


@pytest.mark.slow
@pytest.mark.parametrize("index", range(3))
def test_official_settings_on_the_pytorch_runtime(index: int) -> None:
    """lite0 on three photos: official defaults, and lite0's own thresholds, under which masks surely remain."""
    # The plain implementation asks the same under both settings.
    sam = Predictor(Remembered(pocketsam.load(threads=2).runtime))
    rgb = load_rgb(photo_paths()[index])
    same_masks(sam, rgb, Settings())
    assert same_masks(sam, rgb, replace(Settings(), pred_iou=0.2, stability=0.1)) >= 1


def test_results_are_consistent(toy: Predictor) -> None:
    rgb = load_rgb(photo_paths()[1])
    records = toy.everything(rgb, TOY)
    assert len(records) >= 3
    for r in records:
        mask = r.mask
        assert mask.shape == rgb.shape[:2]
        assert mask.sum() == r.area == rle.area(r.rle)
        ys, xs = np.nonzero(mask)
        assert r.box == (xs.min(), ys.min(), xs.max(), ys.max())
        assert r.bbox == (xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1)
        assert r.stability >= TOY.stability
        assert 0 <= r.point[0] < rgb.shape[1]
        assert 0 <= r.point[1] < rgb.shape[0]
    scores = [r.score for r in records]
    assert scores == sorted(scores, reverse=True)
    for a, b in itertools.combinations(records, 2):
        assert iou(a.box, np.array([b.box], float))[0] <= TOY.nms


def test_the_current_image_stays(toy: Predictor) -> None:
    first = toy.set_image(photo_paths()[1])
    toy.everything(photo_paths()[0], replace(TOY, points_per_side=2))
    assert toy.current is first


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "litert"])
def test_every_runtime_without_torch(toy_everywhere: Path, runtime: str, tmp_path: Path) -> None:
    """Same masks, in a process where torch cannot be imported."""
    np.save(tmp_path / "rgb.npy", load_rgb(photo_paths()[1]))
    code = f"""
import sys
class Ban:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('torch', 'onnx', 'onnxscript', 'safetensors', 'scipy', 'typer', 'rich', 'cv2', 'ray'):
            raise ImportError(name + ' is banned here')
sys.meta_path.insert(0, Ban())
import numpy, pocketsam
from pocketsam.everything import Settings
from pocketsam.edges import find_edges
sam = pocketsam.load({str(toy_everywhere)!r}, runtime={runtime!r}, threads=2)
rgb = numpy.load({str(tmp_path / 'rgb.npy')!r})
records = sam.everything(rgb, Settings(**{NETWORK.to_json()!r}))
assert find_edges(sam, rgb, 2).shape == rgb.shape[:2]
print(*(f'{{r.area}}' for r in records))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    areas = [int(a) for a in done.stdout.splitlines()[-1].split()]
    sam = pocketsam.load(toy_everywhere, runtime="onnxruntime", threads=1)
    expected = [r.area for r in sam.everything(load_rgb(photo_paths()[1]), NETWORK)]
    assert len(expected) >= 3
    assert len(areas) == len(expected)
    assert sorted(areas) == pytest.approx(sorted(expected), rel=0.01)


def test_forgotten_logits_are_decoded_again(toy: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    """With almost no room for logits the answer stays, and the room is respected."""
    rgb = load_rgb(photo_paths()[1])
    expected = toy.everything(rgb, TOY)
    stores: list[Store] = []

    def small() -> Store:
        stores.append(Store(limit=4000))
        return stores[-1]

    monkeypatch.setattr("pocketsam.everything.Store", small)
    records = toy.everything(rgb, TOY)
    held = sum(c.logits.nbytes for c in stores[0].candidates if c.logits is not None)
    assert held <= 4000
    assert any(c.logits is None for c in stores[0].candidates)
    assert [r.point for r in records] == [r.point for r in expected]
    assert [r.area for r in records] == pytest.approx([r.area for r in expected], rel=0.01)


def test_large_masks_are_dropped(toy: Predictor) -> None:
    rgb = load_rgb(photo_paths()[1])
    areas = [r.area for r in toy.everything(rgb, replace(TOY, nms=1.0))]
    limit = float(np.median(areas)) / (rgb.shape[0] * rgb.shape[1])
    kept = [r.area for r in toy.everything(rgb, replace(TOY, nms=1.0, max_area=limit))]
    assert sorted(kept) == sorted(a for a in areas if a <= limit * rgb.shape[0] * rgb.shape[1])


# One for each way in which logits reach the photo.
ENLARGED = ["lite0", "mobile_sam", "sam2.1_tiny", "efficient_sam_ti", "efficientvit_sam_l0"]


@pytest.mark.parametrize("model", ENLARGED)
@pytest.mark.parametrize("size", [(480, 720), (3000, 400), (40, 60), (1, 500), (700, 1)])
def test_windows_equal_whole_masks(model: str, size: tuple[int, int]) -> None:
    spec = spec_of(model)
    frame = Frame.of(*size, spec)
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((spec.mask_size, spec.mask_size)).astype(np.float32)
    whole = upscale_logits(logits, frame)
    for _ in range(4):
        y0, x0 = (int(rng.integers(0, n)) for n in size)
        y1, x1 = int(rng.integers(y0, size[0])) + 1, int(rng.integers(x0, size[1])) + 1
        part = np.concatenate([b for _, b in upscale_bands(logits, frame, Window(x0, y0, x1, y1))])
        assert np.abs(part - whole[y0:y1, x0:x1]).max() < 3e-4


@pytest.mark.parametrize("model", ENLARGED)
@pytest.mark.parametrize("size", [(480, 720), (700, 90), (40, 60), (2100, 2300)])
def test_candidates_equal_whole_masks(model: str, size: tuple[int, int]) -> None:
    """What is stored of a candidate gives every pixel of its mask, within its bounds; sharp borders let cubic
    interpolation ring.
    """
    spec = spec_of(model)
    frame, m = Frame.of(*size, spec), spec.mask_size
    rng = np.random.default_rng(0)
    coarse = rng.normal(-1, 2, (2, 3, m // 16, m // 16))
    low_res = (np.kron(coarse, np.ones((16, 16))) * rng.uniform(0.2, 3, (2, 3, m, m))).astype(np.float32)
    # Whole float16 numbers, so that storing them changes nothing.
    low_res = low_res.astype(np.float16).astype(np.float32)
    found = list(find(Answers(np.arange(2), low_res, np.ones((2, 3), np.float32)), frame, 0.2, 0, 1.0))
    assert found
    for c in found:
        logits = restore(c, m)
        shape = shape_of(logits, frame, to_image(c.cells, frame, m), 1.0)
        whole = masks_from_logits(low_res[c.point, c.token - 1][None], frame)[0]
        w = shape.window
        rest = whole.copy()
        rest[w.y0:w.y1, w.x0:w.x1] ^= shape.mask
        # A pixel whose logit is 0 up to rounding may differ.
        assert int(rest.sum()) <= 2
        box = tight_box(shape)
        assert box is not None
        assert all(c.outer[i] <= box[i] for i in (0, 1))
        assert all(box[i] <= c.outer[i] for i in (2, 3))
        assert c.inner[2] < c.inner[0] or all(box[i] <= c.inner[i] and c.inner[i + 2] <= box[i + 2] for i in (0, 1))


def test_run_lengths_of_a_window() -> None:
    rng = np.random.default_rng(0)
    for density in (0, 0.3, 0.9, 1):
        for _ in range(20):
            h, w = (int(n) for n in rng.integers(1, 30, 2))
            y0, x0 = int(rng.integers(0, h)), int(rng.integers(0, w))
            y1, x1 = int(rng.integers(y0, h)) + 1, int(rng.integers(x0, w)) + 1
            mask = np.zeros((h, w), bool)
            mask[y0:y1, x0:x1] = rng.random((y1 - y0, x1 - x0)) < density
            assert rle.encode_window(mask[y0:y1, x0:x1], x0, y0, h, w) == rle.encode(mask)


def test_grid_and_crops() -> None:
    assert point_grid(2).tolist() == [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]
    found = crops(600, 900, 2, 512 / 1500)
    assert [c.layer for c in found] == [0] + [1] * 4 + [2] * 16
    assert found[0].xywh == (0, 0, 900, 600)
    assert found[1].box == (0, 0, 552, 402)
    assert found[4].box == (348, 198, 900, 600)


def test_regions_agree_with_scipy() -> None:
    from scipy import ndimage

    rng = np.random.default_rng(0)
    for density in (0.0, 0.2, 0.45, 0.6, 1.0):
        for shape in ((40, 50), (1, 30), (30, 1)):
            mask = rng.random(shape) < density
            labels, areas = label_regions(mask)
            expected, count = ndimage.label(mask, np.ones((3, 3)))
            assert len(areas) == count == labels.max()
            assert sorted(areas) == sorted(np.bincount(expected.ravel())[1:])
            assert len(set(zip(labels.ravel().tolist(), expected.ravel().tolist(), strict=True))) == count + (
                not mask.all())


def test_holes_and_islands() -> None:
    mask = np.zeros((30, 30), bool)
    mask[2:20, 2:20] = True
    mask[5:7, 5:7] = False
    mask[25:27, 25:27] = True
    filled, changed = clean(mask, 5, "holes")
    assert changed
    assert filled[5:7, 5:7].all()
    cleaned, changed = clean(filled, 5, "islands")
    assert changed
    assert not cleaned[25:].any()
    assert cleaned.sum() == 18 * 18
    assert not clean(cleaned, 5, "islands")[1]
    small, changed = clean(mask[24:, 24:], 100, "islands")
    assert changed
    assert small.sum() == 4, "the largest region stays even if it is small"


def test_cleaning_prefers_untouched_masks() -> None:
    from pocketsam.regions import clean_records

    whole = np.zeros((40, 40), bool)
    whole[5:30, 5:30] = True
    holed = whole.copy()
    holed[10, 10] = False
    records = [MaskRecord(rle.encode(m), int(m.sum()), (5, 5, 29, 29), s, 1.0, (9.0, 9.0), (0, 0, 40, 40))
               for m, s in ((holed, 0.9), (whole, 0.8))]
    assert [r.score for r in clean_records(records, 10, 0.7)] == [0.8]


def test_suppression_keeps_the_first_of_equals() -> None:
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 10], [50, 50, 60, 60], [3, 3, 3, 9], [3, 3, 3, 9]], float)
    assert suppress(boxes, np.array([0.5, 0.5, 0.9, 0.1, 0.1]), 0.7) == [2, 0, 3, 4]


@pytest.mark.parametrize(("change", "words"), [
    ({"points_per_side": 0}, "points_per_side is 0"), ({"pred_iou": 1.5}, "from 0 to 1"),
    ({"stability": -0.1}, "from 0 to 1"), ({"nms": float("nan")}, "from 0 to 1"), ({"max_area": 2}, "from 0 to 1"),
    ({"crop_layers": 6}, "from 0 to 5"), ({"stability_offset": -1}, "0 or more"), ({"batch": 0}, "from 1"),
    ({"crop_layers": 2, "points_per_side": 4, "crop_points_divide": 8}, "leaves no point"),
])
def test_impossible_settings(change: dict[str, float], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        replace(Settings(), **change)
    assert default_settings("sam_vit_h") == Settings()


def test_single_settings_replace_those_of_the_model() -> None:
    assert settings_for("lite0", points_per_side=16) == replace(default_settings("lite0"), points_per_side=16)
    assert settings_for("lite0", Settings(nms=0.5), batch=4) == Settings(nms=0.5, batch=4)
    with pytest.raises(UsageError, match="grid: no such setting; expected some of points_per_side, pred_iou"):
        settings_for("lite0", grid=16)
    with pytest.raises(UsageError, match="nms is wide; expected a value from 0 to 1"):
        settings_for("lite0", nms="wide")


def test_pixels_beside_the_last_cells_belong_to_the_mask() -> None:
    """The photo ends between the centres of cells 95 and 96, and its last rows are interpolated from both."""
    frame = Frame.of(384, 512, spec_of("lite0"))
    low_res = np.full((1, 3, 128, 128), -9, np.float32)
    low_res[:, :, 95:97, 20:60] = np.array([-1, 9], np.float32)[:, None]
    want = masks_from_logits(low_res[0, :1], frame)[0]
    assert want.sum() > 100
    found = list(find(Answers(np.arange(1), low_res, np.ones((1, 3), np.float32)), frame, 0.2, 0, 1.0))
    assert len(found) == 3
    for c in found:
        shape = shape_of(restore(c, 128), frame, to_image(c.cells, frame, 128), 1.0)
        whole = np.zeros_like(want)
        whole[shape.window.y0:shape.window.y1, shape.window.x0:shape.window.x1] = shape.mask
        assert np.array_equal(whole, want)
