"""The quality table, and distillation, on drawn images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn import PLAIN, SIZE, generator, png, toy
from tars import write_tar
from torch import Tensor

from pocketsam.errors import UsageError
from pocketsam.geometry import Frame
from pocketsam.labelled import read_pack
from pocketsam.models.sam import Features, SegmentAnything
from pocketsam.prompts import Prompt, decoder_inputs
from pocketsam.training.batches import image_weights, make_batch
from pocketsam.training.distill import ModelTeacher
from pocketsam.training.evaluate import click_prompts, corrected, evaluate, pearson, small_target, table
from pocketsam.training.packs import Cache
from pocketsam.training.ranking import photo_answers
from pocketsam.training.rounds import episode

pytestmark = pytest.mark.usefixtures("gradients")


class Oracle(SegmentAnything):
    """Answers a box or a lone click with the object under it, told by its colour; a later click of label 1 adds the
    object under it to the previous mask, one of label 0 takes it away."""

    def encode(self, x: Tensor) -> Features:
        return {"image_embeddings": x}

    def first(self, image: Tensor, found: Tensor, is_box: Tensor) -> Tensor:
        """bool (M, 32, 32): the answer to a first prompt on (1, 3, 128, 128), which found an object."""
        return found

    def decode(self, features: Features, point_coords: Tensor, point_labels: Tensor, mask_input: Tensor | None,
               has_mask_input: Tensor | None, fixed_slots: bool = False) -> tuple[Tensor, Tensor]:
        x, rows = features["image_embeddings"], torch.arange(len(point_labels))
        slots = torch.arange(point_labels.shape[1])
        last = torch.where((point_labels == 0) | (point_labels == 1), slots, -1).amax(1)
        is_box = (point_labels == 2).any(1)
        cells = torch.where(is_box[:, None], point_coords[:, :2].mean(1), point_coords[rows, last]).long()
        colour = x[rows, :, cells[:, 1], cells[:, 0]][..., None, None]
        found = ((x - colour).abs().amax(1) < 0.1)[:, 2::4, 2::4]
        if mask_input is None:
            mask = self.first(x, found, is_box)
        else:
            before = mask_input[:, 0] > 0
            mask = torch.where((point_labels[rows, last] == 1)[:, None, None], before | found, before & ~found)
        logits = torch.where(mask, 10.0, -10.0)[:, None].repeat(1, 4, 1, 1)
        logits[:, 1] = -1
        return logits, torch.tensor([0.9, 0.1, 0.8, 0.9]).repeat(len(rows), 1)


class Mistaken(Oracle):
    """Answers a lone click with everything but the object under it: both have to be corrected."""

    def first(self, image: Tensor, found: Tensor, is_box: Tensor) -> Tensor:
        bright = (image.amax(1) > 1)[:, 2::4, 2::4]
        return torch.where(is_box[:, None, None], found, bright & ~found)


class Recorder(Mistaken):
    """Keeps the coordinates and labels that it was asked."""

    asked: list[tuple[Any, Any]]

    def decode(self, features: Features, point_coords: Tensor, point_labels: Tensor, mask_input: Tensor | None,
               has_mask_input: Tensor | None, fixed_slots: bool = False) -> tuple[Tensor, Tensor]:
        self.asked.append((point_coords.numpy(), point_labels.numpy()))
        # Ranking reads what this head sees.
        self.mask_decoder.iou_prediction_head(torch.zeros(1, 64))
        return super().decode(features, point_coords, point_labels, mask_input, has_mask_input, fixed_slots)


def acting(kind: type[Oracle]) -> Oracle:
    model = toy(size=128)
    model.__class__ = kind
    assert isinstance(model, Oracle)
    return model


@pytest.fixture
def squares(tmp_path: Path) -> Path:
    """Two photos, wide and high, with two objects each on the cells of the decoder's masks."""
    members: dict[str, bytes] = {}
    index = []
    for i, (h, w) in enumerate([(64, 128), (128, 96)]):
        image, ids = np.zeros((h, w, 3), np.uint8), np.zeros((h, w), np.uint8)
        image[8:40, 8:48], image[20:56, 60:88] = (220, 60, 40), (30, 200, 90)
        ids[8:40, 8:48], ids[20:56, 60:88] = 1, 2
        members |= {f"im{i}.jpg": png(image), f"im{i}.0.png": png(ids)}
        index.append({"id": f"im{i}", "source": f"drawn{i}", "layers": [{"file": f"im{i}.0.png"}]})
    return write_tar(tmp_path / "squares.tar", {**members, "index.json": json.dumps(index).encode()})


def test_evaluation_scores_a_perfect_segmenter_high(squares: Path) -> None:
    results = evaluate(acting(Oracle), squares)
    assert len(results) == 4
    rows = {r.name: r for r in table(results)}
    assert rows["all"].regions == rows["drawn0"].regions + rows["drawn1"].regions
    assert (rows["all"].box, rows["all"].ranked, rows["all"].oracle, rows["all"].gain) == pytest.approx(
        (1, 1, 1, 0), abs=0.01)


def test_corrective_clicks_mend_a_mistaken_answer(squares: Path) -> None:
    """One click has to add the object that was meant, another to take away the one that was not."""
    row = table(evaluate(acting(Mistaken), squares))[0]
    assert (row.box, row.ranked, row.gain) == pytest.approx((1, 0, 1), abs=0.01)


def test_clicks_stay_inside_the_photo() -> None:
    """What the model paints below a wide photo is no error, and half a mask pixel at its end no place to click."""
    spec = toy(size=128).spec
    frame = Frame.of(54, 128, spec)
    truth = torch.zeros(2, 54, 128, dtype=torch.bool)
    truth[0, 8:40, 8:48], truth[1, 50:] = True, True
    spilled = torch.full((2, 32, 32), -10.0)
    spilled[:, 14:] = 10
    prompts = corrected(click_prompts(torch.tensor([[60.0, 20], [60, 52]]), frame, spec), spilled,
                        small_target(truth, frame, 32), frame, spec)
    assert [p.labels.tolist() for p in prompts] == [[1, 1], [1, 1]]
    for region, prompt in zip(truth, prompts, strict=True):
        x, y = prompt.points[1].astype(int)
        assert region[y, x]


def _rank(model: Oracle, pack: Path) -> None:
    photo_answers(model, next(iter(read_pack(pack))), generator())


@pytest.mark.parametrize(("ask", "clicks"), [(evaluate, [0, 1, 2, 3, 4]), (_rank, [1, 2, 1, 0])])
def test_prompts_are_those_of_the_predictor(squares: Path, ask: Callable[[Oracle, Path], Any],
                                            clicks: list[int]) -> None:
    """Boxes and growing rows of clicks lie in the decoder's inputs as the same prompts of a user would."""
    model = acting(Recorder)
    assert isinstance(model, Recorder)
    model.asked = []
    ask(model, squares)
    calls = model.asked[:len(clicks)]
    assert [int(((labels[0] == 0) | (labels[0] == 1)).sum()) for _, labels in calls] == clicks
    spec, frame = model.spec, Frame.of(64, 128, model.spec)
    for coords, labels in calls:
        is_click = (labels[0] == 0) | (labels[0] == 1)
        prompts = [Prompt.of(frame, spec, points=xy[is_click], labels=lab[is_click]) if is_click.any()
                   else Prompt.of(frame, spec, box=xy[:2].ravel()) for xy, lab in zip(coords, labels, strict=True)]
        expected = decoder_inputs(prompts, frame, spec, labels.shape[1])
        np.testing.assert_array_equal(labels, expected["point_labels"])
        np.testing.assert_allclose(coords, expected["point_coords"], rtol=1e-6)


def test_evaluation_of_a_real_graph_is_repeatable(drawn_pack: Path) -> None:
    results = evaluate(toy(), drawn_pack, most=1, seed=3)
    assert len(results) == 6
    assert results == evaluate(toy(), drawn_pack, most=1, seed=3)
    assert all(0 <= r.ranked <= r.oracle <= 1 for r in results)


def test_pearson() -> None:
    assert pearson([1, 2, 3, 4], [2, 4, 6, 8]) == pytest.approx(1)
    assert pearson([1, 2, 3], [5, 5, 5]) is None


@pytest.mark.parametrize(("embeddings", "logits"), [(1.0, 0.0), (0.0, 1.0)])
def test_a_student_approaches_its_teacher(drawn_cache: Cache, embeddings: float, logits: float) -> None:
    teacher = ModelTeacher(toy(size=128, seed=1), embeddings, logits)
    student = toy(seed=2)
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    cut = make_batch(drawn_cache, image_weights(drawn_cache), 3, 2, SIZE, PLAIN, generator())
    batch = cut.batch(torch.device("cpu"))
    history = []
    for _ in range(12):
        parts = episode(student, batch, 2, generator(), teacher)
        optimizer.zero_grad()
        parts["distill"].backward()
        optimizer.step()
        history.append(parts["distill"].item())
    assert history[-1] < 0.9 * history[0]
    assert all(p.grad is None for p in teacher.model.parameters())


def test_a_student_equal_to_its_teacher_has_no_embedding_loss(drawn_cache: Cache) -> None:
    cut = make_batch(drawn_cache, image_weights(drawn_cache), 1, 2, SIZE, PLAIN, generator())
    batch = cut.batch(torch.device("cpu"))
    assert float(episode(toy(), batch, 1, generator(), ModelTeacher(toy(), 1.0, 0.0))["distill"]) < 1e-9


def test_a_teacher_needs_a_weight() -> None:
    with pytest.raises(UsageError, match="expected one above zero"):
        ModelTeacher(toy(), 0.0, 0.0)
