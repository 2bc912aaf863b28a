"""What training sees: packs, augmentation, batches, simulated prompts, on drawn images."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn import PLAIN, SIZE, generator

from pocketsam.errors import LabelError
from pocketsam.labelled import read_pack
from pocketsam.models.prompt_encoder import EMPTY_SLOT, PADDING_POINT
from pocketsam.training.augment import Augment, Window, cut_image, cut_labels, sample_window
from pocketsam.training.batches import LEAST_AREA, boxes_of, image_weights, make_batch
from pocketsam.training.distance import centre_point, inner_distance
from pocketsam.training.on_device import DeviceCache, cut_images, cut_label_maps
from pocketsam.training.packs import Cache, _numbered, nearest_index
from pocketsam.training.prompts import correction_clicks, depth, first_prompts, jitter_boxes, sample_points

pytestmark = pytest.mark.usefixtures("gradients")


def test_regions_are_numbered_through(drawn_pack: Path, drawn_cache: Cache) -> None:
    """Ids of a pack may be any numbers, and regions are counted."""
    samples = list(read_pack(drawn_pack))
    assert [s.source for s in samples[:2]] == ["drawn0", "drawn1"]
    assert samples[5].layers[0].max() == 300
    assert set(drawn_cache.labels[5].unique().tolist()) == {0, 1, 2}
    assert drawn_cache.regions[5] == 2
    layer = np.array([[0, 40_000, 7], [7, -3, 2**31 - 1]], np.int32)
    assert _numbered(layer, "x").tolist() == [[0, 2, 1], [1, 0, 3]]
    with pytest.raises(LabelError, match="a layer of x has 32768 regions; expected at most 32767"):
        _numbered(np.arange(1, 32_769, dtype=np.int32)[None], "x")
    assert drawn_cache.content[0] == (SIZE, 43)


def test_nearest_index_is_exact_for_whole_factors() -> None:
    assert nearest_index(6, 3).tolist() == [1, 3, 5]
    assert nearest_index(3, 6).tolist() == [0, 0, 1, 1, 2, 2]


def test_augmented_labels_are_cached_labels() -> None:
    """An image whose colour encodes the label must stay in step with the label map through crop, scale and flip."""
    labels = torch.arange(16).repeat_interleave(16).reshape(16, 16).repeat_interleave(4, 0).repeat(1, 4).short()
    image = labels[..., None].repeat(1, 1, 3).to(torch.uint8)
    for seed in range(20):
        window = sample_window((64, 64), 64, 32, Augment(whole=0, max_zoom=3), generator(seed))
        shown = cut_labels(labels, window, 32)
        pixels, valid = cut_image(image, window, 32)
        assert set(shown.unique().tolist()) <= set(labels.unique().tolist()) | {0}
        inside = valid[0] > 0
        assert int(inside.sum()) == window.out_height * window.out_width
        assert not shown[~inside].any()
        assert float((pixels[0].float() - shown)[inside].abs().max()) <= 1.5


def test_whole_images_are_cut_unchanged(drawn_cache: Cache) -> None:
    window = sample_window(drawn_cache.content[0], SIZE, SIZE, PLAIN, generator())
    pixels, _ = cut_image(drawn_cache.images[0], window, SIZE)
    assert torch.equal(cut_labels(drawn_cache.labels[0], window, SIZE), drawn_cache.labels[0])
    assert torch.equal(pixels, drawn_cache.images[0].permute(2, 0, 1))


def test_batches_hold_regions_with_tight_boxes(drawn_cache: Cache) -> None:
    cut = make_batch(drawn_cache, image_weights(drawn_cache), 3, 4, SIZE, Augment(), generator())
    batch = cut.batch(torch.device("cpu"))
    assert batch.images.shape == (3, 3, SIZE, SIZE)
    assert batch.targets.shape == (12, SIZE // 4, SIZE // 4)
    for target, (x0, y0, x1, y1) in zip(batch.targets, (batch.boxes / 4).tolist(), strict=True):
        ys, xs = (target > 0).nonzero(as_tuple=True)
        assert (int(xs.min()), int(ys.min())) == (int(x0), int(y0))
        assert (int(xs.max()), int(ys.max())) == (math.ceil(x1) - 1, math.ceil(y1) - 1)
    again = make_batch(drawn_cache, image_weights(drawn_cache), 3, 4, SIZE, Augment(), generator())
    assert torch.equal(cut.images, again.images)
    assert torch.equal(cut.colour, again.colour)


def test_points_lie_inside_masks() -> None:
    masks = torch.zeros(40, 16, 16, dtype=torch.bool)
    for i in range(40):
        masks[i, i % 10:i % 10 + 3, i // 10:i // 10 + 6] = True
    points = sample_points(masks, 64, generator())
    cells = (points / 4).long()
    assert masks[torch.arange(40), cells[:, 1], cells[:, 0]].all()


def test_depth_counts_erosions() -> None:
    mask = torch.zeros(1, 9, 9, dtype=torch.bool)
    mask[0, 2:7, 2:7] = True
    assert depth(mask)[0, 4].tolist() == [0, 0, 1, 2, 3, 2, 1, 0, 0]


def test_first_prompts_are_boxes_or_single_points() -> None:
    targets = torch.zeros(200, 16, 16)
    targets[:, 4:12, 4:12] = 1
    boxes = torch.tensor([[16.0, 16, 48, 48]]).repeat(200, 1)
    prompts = first_prompts(targets, boxes, 64, generator())
    kinds = {tuple(row) for row in prompts.labels.tolist()}
    assert kinds == {(2, 3, EMPTY_SLOT), (PADDING_POINT, EMPTY_SLOT, 1)}
    assert torch.equal(prompts.ambiguous, prompts.labels[:, 0] == PADDING_POINT)
    assert 70 < int(prompts.ambiguous.sum()) < 130
    corners = prompts.coords[~prompts.ambiguous, :2].flatten(1)
    tight = (corners == boxes[0]).all(1)
    assert 0.3 < float(tight.float().mean()) < 0.7
    assert float((corners[~tight] - boxes[0]).abs().max()) > 0


def test_box_jitter_has_the_papers_size() -> None:
    boxes = torch.tensor([[256.0, 256, 356, 356]]).repeat(2000, 1)
    noise = jitter_boxes(boxes, 1024, generator()) - boxes
    assert float(noise.abs().max()) <= 20
    assert 8 < float(noise.std()) < 10


def test_clicks_fall_on_errors_with_the_right_sign() -> None:
    target = torch.zeros(60, 16, 16)
    target[:, :, :8] = 1
    logits = torch.where(target > 0, 5.0, -5.0)
    logits[:30, 4:8, 2:6] = -5
    logits[30:, 4:8, 10:14] = 5
    points, labels = correction_clicks(logits, target, 64, generator())
    assert labels.tolist() == [1.0] * 30 + [0.0] * 30
    assert ((points[:30] >= 8) & (points[:30] <= 32)).all()
    assert (points[30:, 0] >= 40).all()


def test_distance_is_euclidean() -> None:
    mask = torch.zeros(1, 12, 14, dtype=torch.bool)
    mask[0, 1:10, 3:14] = True
    mask[0, 5, 8] = False
    got = inner_distance(mask)[0]
    outside = [(y, x) for y in range(-1, 13) for x in range(-1, 15)
               if not (0 <= y < 12 and 0 <= x < 14) or not mask[0, y, x]]
    for y, x in [(1, 3), (3, 5), (8, 12), (5, 9), (2, 8)]:
        assert float(got[y, x]) == pytest.approx(min(math.dist((y, x), o) for o in outside))


def test_the_centre_of_a_square_is_its_middle() -> None:
    mask = torch.zeros(20, 30, dtype=torch.bool)
    mask[4:11, 10:17] = True
    assert centre_point(mask).tolist() == [13.5, 7.5]
    assert boxes_of(mask[None]).tolist() == [[10, 4, 17, 11]]


def test_batches_made_on_the_device_show_what_single_cuts_show(drawn_cache: Cache) -> None:
    """Every image of a batch against the window of the same place cut alone, enlarged and reduced."""
    near = DeviceCache(drawn_cache, torch.device("cpu"))
    augment = Augment(whole=0.2, min_zoom=0.5, max_zoom=2, stretch=1.5)
    index = torch.arange(len(drawn_cache.images)).repeat(20)
    windows = near._windows(index, SIZE, augment, generator())
    pixels, valid = cut_images(near.images[index], windows, SIZE)
    shown = cut_label_maps(near.labels, index, windows, SIZE)
    for i, row in enumerate(torch.stack(list(vars(windows).values()), 1).tolist()):
        alone = Window(*row[:6], flip=bool(row[6]), whole=bool(row[7]))
        image, inside = cut_image(drawn_cache.images[index[i]], alone, SIZE)
        assert torch.equal(valid[i], inside)
        assert float((pixels[i] - image.float()).abs().max()) <= 1
        assert float((pixels[i] != image.float()).float().mean()) < 0.01
        assert torch.equal(shown[i], cut_labels(drawn_cache.labels[index[i]], alone, SIZE))
    whole = windows.whole.nonzero()[:, 0]
    assert 0 < len(whole) < len(index)
    assert torch.equal(pixels[whole], drawn_cache.images[index[whole]].permute(0, 3, 1, 2).float())


def test_device_batches_hold_visible_regions_with_tight_boxes(drawn_cache: Cache) -> None:
    near = DeviceCache(drawn_cache, torch.device("cpu"))
    batch = near.batch(8, 4, SIZE, Augment(min_zoom=0.5, colour=0, grey=0), generator())
    again = near.batch(8, 4, SIZE, Augment(min_zoom=0.5, colour=0, grey=0), generator())
    assert batch.images.shape == (8, 3, SIZE, SIZE)
    assert batch.targets.shape == (32, SIZE // 4, SIZE // 4)
    assert torch.equal(batch.images, again.images)
    assert torch.equal(batch.boxes, again.boxes)
    assert int((batch.targets > 0).flatten(1).sum(1).min()) >= LEAST_AREA
    for target, (x0, y0, x1, y1) in zip(batch.targets, (batch.boxes / 4).tolist(), strict=True):
        ys, xs = (target > 0).nonzero(as_tuple=True)
        assert (int(xs.min()), int(ys.min())) == (int(x0), int(y0))
        assert (int(xs.max()), int(ys.max())) == (math.ceil(x1) - 1, math.ceil(y1) - 1)
    for shown, image in zip(batch.shown.tolist(), batch.images, strict=True):
        if shown >= 0:
            assert torch.equal(image, drawn_cache.images[shown].permute(2, 0, 1).float())
