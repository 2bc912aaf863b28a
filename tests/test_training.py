"""The recipe: packs, augmentation, prompts, losses, resumption, evaluation and distillation, on drawn images."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tars import write_tar
from torch import Tensor, nn

from pocketsam.labelled import read_pack
from pocketsam.models.lite0 import lite0
from pocketsam.models.mask_decoder import MaskDecoder
from pocketsam.models.prompt_encoder import EMPTY_SLOT, PADDING_POINT, PromptEncoder
from pocketsam.models.sam import Features, SegmentAnything
from pocketsam.specs import ModelSpec
from pocketsam.training import losses
from pocketsam.training.__main__ import main
from pocketsam.training.augment import Augment, cut_image, cut_labels, sample_window
from pocketsam.training.batches import boxes_of, image_weights, make_batch
from pocketsam.training.curves import draw_curves
from pocketsam.training.distance import centre_point, inner_distance
from pocketsam.training.distill import ModelTeacher
from pocketsam.training.evaluate import evaluate, pearson, table
from pocketsam.training.loop import CHECKPOINT, LOG, Phase, Recipe, Trainer, schedule
from pocketsam.training.packs import Cache, build_cache, nearest_index
from pocketsam.training.prompts import correction_clicks, depth, first_prompts, jitter_boxes, sample_points
from pocketsam.training.rounds import chosen_logits, episode
from pocketsam.training.ship import load_weights, ship

SIZE = 64
PLAIN = Augment(whole=1, flip=0, colour=0, grey=0)
RECIPE = Recipe((Phase(1, SIZE, 2, 2, 2, frozen=2),), steps=4, augment=Augment())


@pytest.fixture(autouse=True)
def gradients() -> Iterator[None]:
    """Other modules of tests may have switched them off."""
    with torch.enable_grad():
        yield


def png(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "png")
    return stream.getvalue()


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six drawn images of two sources: a rectangle and a disc on noise, the last with ids above 255."""
    path = tmp_path_factory.mktemp("pack") / "pack.tar"
    rng = np.random.default_rng(0)
    members: dict[str, bytes] = {}
    index = []
    for i in range(6):
        h, w = (60, 90) if i % 2 else (90, 60)
        image = rng.integers(0, 60, (h, w, 3), dtype=np.uint8)
        ids = np.zeros((h, w), np.uint16 if i == 5 else np.uint8)
        ys, xs = np.mgrid[:h, :w]
        disc, square = (ys - 25) ** 2 + (xs - 25) ** 2 < 15 ** 2, (ys > 32) & (xs > 36) & (xs < 55) & (ys < 58)
        image[disc], image[square] = (220, 60, 40), (30, 200, 90)
        ids[disc], ids[square] = 1, 300 if i == 5 else 2
        members[f"im{i}.jpg"] = png(image)
        members[f"im{i}.0.png"] = png(ids)
        index.append({"id": f"im{i}", "source": f"drawn{i % 2}", "width": w, "height": h, "split": "test",
                      "layers": [{"file": f"im{i}.0.png", "regions": int(ids.max()), "kind": "regions"}]})
    members["index.json"] = json.dumps(index).encode()
    return write_tar(path, members)


@pytest.fixture(scope="module")
def cache(pack: Path) -> Cache:
    return build_cache([pack], SIZE, workers=1)


class ToyEncoder(nn.Module):
    """One strided convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 64, 16, 16)

    def forward(self, x: Tensor) -> Features:
        return {"image_embeddings": self.conv(x)}


def toy(size: int = SIZE, seed: int = 0) -> SegmentAnything:
    torch.manual_seed(seed)
    spec = ModelSpec("toy", "toy", size, embed_dim=64, embed_size=size // 16)
    return SegmentAnything(spec, ToyEncoder(), PromptEncoder(64, size // 16, size), MaskDecoder(64, 64))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_packs_keep_ids_above_255(pack: Path, cache: Cache) -> None:
    samples = list(read_pack(pack))
    assert [s.source for s in samples[:2]] == ["drawn0", "drawn1"]
    assert samples[5].layers[0].max() == 300
    assert set(cache.labels[5].unique().tolist()) == {0, 1, 300}
    assert cache.content[0] == (SIZE, 43)


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


def test_whole_images_are_cut_unchanged(cache: Cache) -> None:
    window = sample_window(cache.content[0], SIZE, SIZE, PLAIN, generator())
    pixels, _ = cut_image(cache.images[0], window, SIZE)
    assert torch.equal(cut_labels(cache.labels[0], window, SIZE), cache.labels[0])
    assert torch.equal(pixels, cache.images[0].permute(2, 0, 1))


def test_batches_hold_regions_with_tight_boxes(cache: Cache) -> None:
    cut = make_batch(cache, image_weights(cache), 3, 4, SIZE, Augment(), generator())
    batch = cut.batch(torch.device("cpu"))
    assert batch.images.shape == (3, 3, SIZE, SIZE)
    assert batch.targets.shape == (12, SIZE // 4, SIZE // 4)
    for target, (x0, y0, x1, y1) in zip(batch.targets, (batch.boxes / 4).tolist(), strict=True):
        ys, xs = (target > 0).nonzero(as_tuple=True)
        assert (int(xs.min()), int(ys.min())) == (int(x0), int(y0))
        assert (int(xs.max()), int(ys.max())) == (math.ceil(x1) - 1, math.ceil(y1) - 1)
    again = make_batch(cache, image_weights(cache), 3, 4, SIZE, Augment(), generator())
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


def test_losses_equal_values_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3)], [-math.log(3), math.log(3)]])
    target = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    # Probabilities 1/2, 3/4, 1/4, 3/4.
    focal = (0.25 * math.log(2) + 0.0625 * math.log(4 / 3) * 2 + 0.5625 * math.log(4)) / 4
    assert float(losses.focal_loss(logits, target)) == pytest.approx(focal)
    assert float(losses.dice_loss(logits, target)) == pytest.approx(1 - (2 * 1.25 + 1) / (2.25 + 2 + 1))
    assert float(losses.mask_iou(logits, target)) == pytest.approx(1 / 3)
    assert float(losses.mask_iou(-torch.ones(2, 2), torch.zeros(2, 2))) == 1


def test_only_the_best_of_three_masks_learns_from_a_point() -> None:
    target = torch.zeros(2, 8, 8)
    target[:, :4] = 1
    logits = torch.randn(2, 4, 8, 8, generator=generator())
    logits[0, 2] = target[0] * 8 - 4
    logits.requires_grad_(True)
    scores = torch.zeros(2, 4, requires_grad=True)
    losses.prompt_loss(logits, scores, target, torch.tensor([True, False]))["loss"].backward()
    assert logits.grad is not None
    assert scores.grad is not None
    learning = logits.grad.flatten(2).abs().sum(-1) > 0
    assert learning.tolist() == [[False, False, True, False], [True, False, False, False]]
    assert scores.grad.ne(0).tolist()[1] == [True, False, False, False]
    assert not scores.grad[0, 0]


def test_a_point_is_answered_by_the_best_ranked_mask() -> None:
    logits = torch.arange(8.0).reshape(2, 4, 1, 1)
    scores = torch.tensor([[9.0, 1, 3, 2], [9, 1, 3, 2]])
    assert chosen_logits(logits, scores, torch.tensor([True, False])).flatten().tolist() == [2, 4]


def test_schedule_warms_up_and_decays() -> None:
    values = [schedule(p, 0.1) for p in (0.05, 0.1, 0.55, 1.0)]
    assert values == pytest.approx([0.5, 1.0, 0.505, 0.01])


def test_a_recipe_needs_one_length() -> None:
    with pytest.raises(ValueError, match="either steps or minutes"):
        replace(RECIPE, minutes=1)


def fresh(cache: Cache, out: Path) -> Trainer:
    torch.manual_seed(0)
    return Trainer(lite0(), cache, RECIPE, out)


def test_resuming_continues_bit_for_bit(cache: Cache, tmp_path: Path) -> None:
    whole = fresh(cache, tmp_path / "whole")
    for _ in range(4):
        whole.train_step()
    first = fresh(cache, tmp_path / "parts")
    for _ in range(2):
        first.train_step()
    first.save()
    assert not (tmp_path / "parts" / (CHECKPOINT + ".partial")).exists()
    torch.manual_seed(99)
    second = Trainer(lite0(), cache, RECIPE, tmp_path / "parts")
    assert second.step == 2
    for _ in range(2):
        second.train_step()
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[key]), key
        assert torch.equal(whole.average[key], second.average[key]), key


def test_batches_made_ahead_are_the_same(cache: Cache, tmp_path: Path) -> None:
    ahead = Trainer(toy(), cache, RECIPE, tmp_path, workers=3)
    now = Trainer(toy(), cache, RECIPE, tmp_path)
    for step in range(5):
        assert torch.equal(ahead.feed.get(step)[1].images, now.feed.get(step)[1].images)
    ahead.feed.close()


def test_frozen_stages_keep_their_weights(cache: Cache, tmp_path: Path) -> None:
    trainer = fresh(cache, tmp_path)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.train_step()
    moved = {k for k, v in trainer.model.state_dict().items() if not torch.equal(v, before[k])}
    assert not [k for k in moved if "trunk.stem" in k or "trunk.stages.2." in k or "running_" in k]
    assert "image_encoder.trunk.stages.3.0.expand.c.weight" in moved
    assert "mask_decoder.mask_tokens.weight" in moved


def test_training_lowers_the_loss(cache: Cache, tmp_path: Path) -> None:
    recipe = Recipe((Phase(1, SIZE, 4, 4, 1),), steps=60, lr=2e-3, augment=PLAIN)
    trainer = Trainer(toy(), cache, recipe, tmp_path)
    trainer.run(log_steps=20)
    rows = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()][1:]
    assert [row["step"] for row in rows] == [20, 40, 60]
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert (tmp_path / CHECKPOINT).is_file()
    draw_curves(tmp_path / LOG, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size[0] > 500


def test_shipped_weights_load_and_stay_small(cache: Cache, tmp_path: Path) -> None:
    trainer = fresh(cache, tmp_path)
    trainer.train_step()
    trainer.save()
    assert ship(tmp_path, tmp_path / "lite0.safetensors") <= 15_000_000
    a, b = load_weights(tmp_path), load_weights(tmp_path / "lite0.safetensors")
    for key, value in a.state_dict().items():
        torch.testing.assert_close(b.state_dict()[key], value, rtol=1e-3, atol=1e-3)


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


def test_evaluation_scores_a_perfect_segmenter_high(pack: Path) -> None:
    model = toy(size=128)
    model.__class__ = Oracle
    results = evaluate(model, pack)
    assert len(results) == 12
    rows = {r.name: r for r in table(results)}
    assert rows["all"].regions == rows["drawn0"].regions + rows["drawn1"].regions
    assert rows["all"].box > 0.85
    assert rows["all"].ranked > 0.85
    assert rows["all"].oracle >= rows["all"].ranked
    assert rows["all"].gain == pytest.approx(0, abs=0.02)


def test_evaluation_of_a_real_graph_is_repeatable(pack: Path) -> None:
    results = evaluate(toy(), pack, most=1, seed=3)
    assert len(results) == 6
    assert results == evaluate(toy(), pack, most=1, seed=3)
    assert all(0 <= r.ranked <= r.oracle <= 1 for r in results)


def test_pearson() -> None:
    assert pearson([1, 2, 3, 4], [2, 4, 6, 8]) == pytest.approx(1)
    assert pearson([1, 2, 3], [5, 5, 5]) is None


@pytest.mark.parametrize(("embeddings", "logits"), [(1.0, 0.0), (0.0, 1.0)])
def test_a_student_approaches_its_teacher(cache: Cache, embeddings: float, logits: float) -> None:
    teacher = ModelTeacher(toy(size=128, seed=1), embeddings, logits)
    student = toy(seed=2)
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    batch = make_batch(cache, image_weights(cache), 3, 2, SIZE, PLAIN, generator()).batch(torch.device("cpu"))
    history = []
    for _ in range(12):
        parts = episode(student, batch, 2, generator(), teacher)
        optimizer.zero_grad()
        parts["distill"].backward()
        optimizer.step()
        history.append(parts["distill"].item())
    assert history[-1] < 0.9 * history[0]
    assert all(p.grad is None for p in teacher.model.parameters())


def test_a_student_equal_to_its_teacher_has_no_embedding_loss(cache: Cache) -> None:
    batch = make_batch(cache, image_weights(cache), 1, 2, SIZE, PLAIN, generator()).batch(torch.device("cpu"))
    assert float(episode(toy(), batch, 1, generator(), ModelTeacher(toy(), 1.0, 0.0))["distill"]) < 1e-9


def test_a_teacher_needs_a_weight() -> None:
    with pytest.raises(ValueError, match="expected one above zero"):
        ModelTeacher(toy(), 0.0, 0.0)


def test_command_line_evaluates_and_ships(pack: Path, cache: Cache, tmp_path: Path,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    fresh(cache, tmp_path).save()
    main(["ship", str(tmp_path), str(tmp_path / "w.safetensors")])
    main(["evaluate", str(tmp_path / "w.safetensors"), "--data", str(pack), "--size", "64", "--device", "cpu"])
    out = capsys.readouterr().out
    assert "drawn0" in out
    assert "pearson" in out


PARALLEL = """
import sys
import torch
from pocketsam.training.parallel import average, rank, spawn

def work(out):
    model = torch.nn.Linear(2, 1)
    model.weight.grad, model.bias.grad = torch.full((1, 2), float(rank())), torch.full((1,), 4.0 * rank())
    seconds = average(model, 10.0 * rank())
    torch.save([seconds, model.weight.grad, model.bias.grad], f"{out}/{rank()}.pt")

if __name__ == "__main__":
    spawn(2, work, sys.argv[1])
"""


@pytest.mark.slow
def test_processes_average_gradients_and_clock(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(PARALLEL)
    subprocess.run([sys.executable, str(tmp_path / "script.py"), str(tmp_path)], check=True, timeout=120)
    for i in range(2):
        seconds, weight, bias = torch.load(tmp_path / f"{i}.pt", weights_only=True)
        assert seconds == 5.0
        assert weight.tolist() == [[0.5, 0.5]]
        assert bias.tolist() == [2.0]
