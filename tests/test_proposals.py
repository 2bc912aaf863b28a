"""Regions that a teacher proposes where few are annotated, and how often training shows them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from drawn import PLAIN, SIZE, generator
from tars import read_tar, write_tar
from torch import Tensor

import pocketsam.training.propose as training_propose
from pocketsam.builtin import checkpoint_for
from pocketsam.errors import LabelError
from pocketsam.training.__main__ import main
from pocketsam.training.batches import PROPOSED_RATE, image_weights, make_batch
from pocketsam.training.on_device import DeviceCache
from pocketsam.training.packs import Cache, build_cache
from pocketsam.training.propose import NO_PHOTOS, choose, paint, propose
from pocketsam.training.ship import load_weights

SIDE = 128
INSIDE = torch.ones(1, SIDE, SIDE, dtype=torch.bool)


def square(top: int, left: int, side: int, sure: float = 5.0) -> Tensor:
    """Logits of one square, ``sure`` inside and the negative outside."""
    logits = torch.full((SIDE, SIDE), -sure)
    logits[top:top + side, left:left + side] = sure
    return logits


def test_sure_and_distinct_masks_are_chosen_best_first() -> None:
    masks = {
        "whole": (square(16, 16, 64), 0.95), "the same again": (square(16, 16, 62), 0.94),
        "part": (square(20, 20, 20), 0.93), "beside": (square(90, 90, 24), 0.92), "too much": (square(0, 0, 126), 0.99),
        "not sure": (square(90, 10, 24), 0.8), "not stable": (square(90, 50, 24, 0.5), 0.9),
        "empty": (square(0, 0, 0), 0.9),
    }
    names = list(masks)
    logits, scores = torch.stack([m for m, _ in masks.values()]), torch.tensor([s for _, s in masks.values()])
    layers = choose(logits, scores, INSIDE)
    assert [[names[i] for i in layer] for layer in layers] == [["whole", "beside"], ["part"]]
    padded = INSIDE.clone()
    padded[:, :, 80:] = False
    assert "beside" not in [names[i] for layer in choose(logits, scores, padded) for i in layer]


def test_painted_labels_are_the_masks_in_the_cache_frame() -> None:
    labels = paint(torch.stack([square(0, 0, 32), square(64, 64, 64)]), 64, (64, 50))
    assert labels.dtype == torch.int16
    assert labels.shape == (64, 64)
    assert (labels[:16, :16] == 1).all()
    assert (labels[32:, 32:50] == 2).all()
    assert not labels[:, 50:].any()
    assert int((labels > 0).sum()) == 16 * 16 + 32 * 18


@pytest.fixture(scope="module")
def sure() -> Iterator[None]:
    """No model is sure of what it sees in drawings of 64 pixels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_propose, "LEAST_SCORE", 0.3)
        patch.setattr(training_propose, "LEAST_STABILITY", 0.5)
        yield


@pytest.fixture(scope="module")
def proposed(drawn_cache: Cache, sure: None) -> Cache:
    sparse = replace(drawn_cache, labels=drawn_cache.labels.clone(), sources=list(drawn_cache.sources))
    for i in (0, 1):
        for layer in sparse.layers[i]:
            sparse.labels[layer] = 1
    sparse.sources[2] = min(NO_PHOTOS)
    return propose(load_weights(checkpoint_for("lite0", None)), sparse)


def test_only_photos_with_few_labels_get_proposals(drawn_cache: Cache, proposed: Cache) -> None:
    assert len(proposed.proposed) == len(drawn_cache.sources)
    assert not any(proposed.proposed[:3])
    rows = [row for rows in proposed.proposed for row in rows]
    assert rows == list(range(len(drawn_cache.labels), len(proposed.labels)))
    assert rows
    for (height, width), found in zip(proposed.content, proposed.proposed, strict=True):
        for row in found:
            assert proposed.labels[row].max() >= 1
            assert not proposed.labels[row, height:].any()
            assert not proposed.labels[row, :, width:].any()


def test_batches_show_proposals_at_their_rate(proposed: Cache) -> None:
    """Every proposed layer is one region over the whole frame here, no annotated one is."""
    cache = replace(proposed, labels=proposed.labels.clone())
    index = next(i for i, rows in enumerate(cache.proposed) if rows)
    for row in cache.proposed[index]:
        cache.labels[row] = 1
    height, width = cache.content[index]
    weights = torch.zeros(len(cache.sources))
    weights[index] = 1
    host = make_batch(cache, weights, 200, 1, SIZE, PLAIN, generator()).batch(torch.device("cpu"))
    near = DeviceCache(cache, torch.device("cpu"))
    near.weights = weights
    for batch in (host, near.batch(200, 1, SIZE, PLAIN, generator())):
        shown = float((batch.boxes == torch.tensor([0.0, 0, width, height])).all(1).float().mean())
        assert abs(shown - PROPOSED_RATE) < 0.12
    assert float(image_weights(cache).sum()) > 0


def test_photos_without_annotations_show_proposals(drawn_pack: Path, tmp_path: Path, sure: None) -> None:
    """One photo of six, then all, have no layers."""
    members = read_tar(drawn_pack)
    rows = json.loads(members["index.json"])
    teacher = load_weights(checkpoint_for("lite0", None))
    for bare in (rows[3:4], rows):
        for row in bare:
            row["layers"] = []
        pack = write_tar(tmp_path / "bare.tar", {**members, "index.json": json.dumps(rows).encode()})
        cache = propose(teacher, build_cache([pack], SIZE))
        for i, row in enumerate(rows):
            if not row["layers"]:
                assert cache.regions[i] == sum(int(cache.labels[k].max()) for k in cache.proposed[i])
        assert image_weights(cache)[3] > 0
        height, width = cache.content[3]
        for k in cache.proposed[3]:
            cache.labels[k] = 1
        only = torch.where(torch.arange(6) == 3, 1.0, 0.0)
        near = DeviceCache(cache, torch.device("cpu"))
        near.weights = only
        host = make_batch(cache, only, 20, 1, SIZE, PLAIN, generator()).batch(torch.device("cpu"))
        for batch in (host, near.batch(20, 1, SIZE, PLAIN, generator())):
            assert batch.boxes.tolist() == [[0, 0, width, height]] * 20


def test_photos_without_any_region_are_refused(drawn_cache: Cache) -> None:
    bare = replace(drawn_cache, layers=[[] for _ in drawn_cache.layers], regions=[0] * len(drawn_cache.regions))
    with pytest.raises(LabelError, match="no photo of the packs has an annotated region"):
        image_weights(bare)


@pytest.mark.parametrize("option", ["--propose", "--teacher"])
def test_a_model_without_weights_is_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--data", "pack.tar", "--out", "run", option, "mobile_sam"])
    assert stop.value.code == 2
    assert f"{option} mobile_sam needs its weights: add {option}-checkpoint FILE" in capsys.readouterr().err
