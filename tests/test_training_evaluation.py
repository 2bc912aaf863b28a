"""The quality table, and distillation, on drawn images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from drawn import PLAIN, SIZE, generator, toy
from torch import Tensor

from pocketsam.models.sam import Features, SegmentAnything
from pocketsam.training.batches import image_weights, make_batch
from pocketsam.training.distill import ModelTeacher
from pocketsam.training.evaluate import evaluate, pearson, table
from pocketsam.training.packs import Cache
from pocketsam.training.rounds import episode

pytestmark = pytest.mark.usefixtures("gradients")


class Oracle(SegmentAnything):
    """Answers every prompt with the bright disc or square under it, by colour."""

    def encode(self, x: Tensor) -> Features:
        return {"image_embeddings": x}

    def decode(self, features: Features, point_coords: Tensor, point_labels: Tensor, mask_input: Tensor | None,
               has_mask_input: Tensor | None, fixed_slots: bool = False) -> tuple[Tensor, Tensor]:
        x = features["image_embeddings"]
        is_box = point_labels[:, :1] == 2
        centre = torch.where(is_box, point_coords[:, :2].mean(1), point_coords[:, 0])
        cells = centre.long()
        rows = torch.arange(len(cells))
        colour = x[rows, :, cells[:, 1], cells[:, 0]][..., None, None]
        near = 1.0 - (x - colour).abs().amax(1, keepdim=True)
        logits = torch.nn.functional.avg_pool2d(near, 4).repeat(1, 4, 1, 1)
        logits[:, 1] = -1
        scores = torch.tensor([0.9, 0.1, 0.8, 0.9]).repeat(len(rows), 1)
        return logits, scores


def test_evaluation_scores_a_perfect_segmenter_high(drawn_pack: Path) -> None:
    model = toy(size=128)
    model.__class__ = Oracle
    results = evaluate(model, drawn_pack)
    assert len(results) == 12
    rows = {r.name: r for r in table(results)}
    assert rows["all"].regions == rows["drawn0"].regions + rows["drawn1"].regions
    assert rows["all"].box > 0.85
    assert rows["all"].ranked > 0.85
    assert rows["all"].oracle >= rows["all"].ranked
    assert rows["all"].gain == pytest.approx(0, abs=0.02)


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
    with pytest.raises(ValueError, match="expected one above zero"):
        ModelTeacher(toy(), 0.0, 0.0)
