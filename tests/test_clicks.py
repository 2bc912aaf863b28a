"""Click graphs: the same answers as the prompt decoder, on every runtime, and without them as before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import pocketsam
from pocketsam import registry
from pocketsam.builtin import builtin_weights
from pocketsam.bundle import MANIFEST
from pocketsam.click_specs import BATCH
from pocketsam.clicks import PointDecoder, has_click_graphs
from pocketsam.everything import Settings, default_settings, segment_everything
from pocketsam.export.graphs import ClickGraph
from pocketsam.geometry import Bools
from pocketsam.images import load_rgb
from pocketsam.models.catalog import SPECS
from pocketsam.models.loading import load_model
from pocketsam.parity import compare_clicks, mask_iou
from pocketsam.photos import photo_paths
from pocketsam.predictor import Predictor
from pocketsam.specs import CLICK_GRAPHS

# Random networks: thresholds under which several of their meaningless masks remain.
NETWORK = Settings(points_per_side=5, pred_iou=0, stability=0.3, stability_offset=0.002, nms=1.0)
BACKENDS = [(r, p) for r, f in registry.RUNTIME_FORMATS.items() for p in registry.load("format", f).precisions]


@pytest.mark.parametrize("model", ["toy_sam", "toy_sam2", "lite0"])
def test_equals_the_mask_decoder(model: str, family_checkpoint: Callable[[str], Path]) -> None:
    """PyTorch against PyTorch, so that the algebra alone is tested: errors are float rounding."""
    checkpoint = None if model == "lite0" else family_checkpoint(model)
    sam = pocketsam.load(model, checkpoint=checkpoint, runtime="pytorch")
    measured = compare_clicks(sam, sam, [load_rgb(photo_paths()[0])])
    assert measured.mean >= 0.99999
    assert measured.flips == 0
    assert measured.tensor_errors["iou_predictions"] < 2e-6
    assert measured.tensor_errors["low_res_masks"] < (5e-4 if model == "lite0" else 1e-4)


def test_shapes_follow_the_contract(family_checkpoint: Callable[[str], Path]) -> None:
    for model in ("toy_sam", "toy_sam2"):
        sam = pocketsam.load(model, checkpoint=family_checkpoint(model), runtime="pytorch")
        known = dict(sam.embed(photo_paths()[1]).features)
        known["point_coords"] = np.linspace(0, 127, 2 * BATCH, dtype=np.float32).reshape(BATCH, 1, 2)
        for name in CLICK_GRAPHS:
            graph = sam.spec.graphs()[name]
            known |= sam.runtime.click(name, {n: known[n] for n in graph.input_names})
            for tensor in graph.outputs:
                assert known[tensor.name].shape == tensor.shape


def test_factors_hold_no_denormal_numbers() -> None:
    """With attention as sharp as lite0 once had, one weight in thirty was denormal, and processors of Intel crawled."""
    sam = pocketsam.load(runtime="pytorch")
    model = load_model("lite0", builtin_weights("lite0"))
    for layer in model.mask_decoder.transformer.layers:
        layer.cross_attn_image_to_token.q_proj.weight.data *= 8
    known = {n: torch.from_numpy(x) for n, x in sam.embed(photo_paths()[0]).features.items()}
    known["point_coords"] = torch.linspace(40, 340, 2 * BATCH).reshape(BATCH, 1, 2)
    for name in ("click_image", "click_scores"):
        spec = sam.spec.graphs()[name]
        out = ClickGraph(model, name)(*(known[n] for n in spec.input_names))
        known |= dict(zip(spec.output_names, out, strict=True))
    weights = known["weights"].detach().abs().numpy()
    assert weights.min() < 1e-15, "sharp enough to test something"
    assert not ((weights > 0) & (weights < np.finfo(np.float32).tiny)).any()


def test_only_plain_decoders_have_them() -> None:
    without = {n for n, s in SPECS.items() if not s.clickable}
    assert without >= {"sam_hq_vit_b", "sam_hq_vit_tiny", "efficient_sam_ti", "efficient_sam_s"}
    assert SPECS["lite0"].clickable
    assert SPECS["sam2.1_tiny"].clickable
    assert set(SPECS["sam_hq_vit_b"].graphs()) == {"encoder", "decoder"}
    assert set(SPECS["edgetam"].graphs()) == {"encoder", "decoder", *CLICK_GRAPHS}


@pytest.mark.parametrize(("runtime", "precision"), BACKENDS)
def test_every_runtime(toy_everywhere: Path, toy_checkpoint: Path, runtime: str, precision: str) -> None:
    reference = pocketsam.load("toy_sam", checkpoint=toy_checkpoint, runtime="pytorch")
    sam = pocketsam.load(toy_everywhere, runtime=runtime, precision=precision, threads=2)
    assert has_click_graphs(sam.runtime)
    measured = compare_clicks(reference, sam, [load_rgb(photo_paths()[1])])
    assert measured.mean >= (0.999 if precision == "fp32" else 0.99)
    if precision == "fp32":
        assert measured.tensor_errors["low_res_masks"] < 1e-4


@pytest.mark.parametrize("count", [1, 2, 16, 17, 40])
@pytest.mark.parametrize("runtime", ["onnxruntime", "litert"])
def test_batches_and_order(toy_everywhere: Path, runtime: str, count: int) -> None:
    """Any number of clicks, in their order, whichever pass the score filter."""
    sam = pocketsam.load(toy_everywhere, runtime=runtime, threads=2)
    embedding = sam.embed(photo_paths()[1])
    points = np.random.default_rng(0).uniform(0, 1, (count, 2)) * (embedding.frame.width, embedding.frame.height)
    answers = list(PointDecoder(sam, embedding, False).answers(points))
    scores, masks = (np.concatenate([a[i] for a in answers]) for i in (2, 1))
    for least in (0.0, float(np.median(scores)), 2.0):
        expected = np.flatnonzero((scores > least).any(1)) if least else np.arange(count)
        found = list(PointDecoder(sam, embedding, True).answers(points, least_score=least))
        assert [i for a in found for i in a.points.tolist()] == expected.tolist()
        for a in found:
            assert np.abs(a.low_res - masks[a.points]).max() < 1e-4
            assert np.abs(a.scores - scores[a.points]).max() < 1e-5
    some = PointDecoder(sam, embedding).logits(points, [1 + i % 3 for i in range(count)])
    assert all(np.abs(x - masks[i, i % 3]).max() < 1e-4 for i, x in enumerate(some))


def without_click_graphs(bundle: Path, copy: Path) -> Path:
    """The bundle as an older version would have written it."""
    shutil.copytree(bundle, copy)
    data = json.loads((copy / MANIFEST).read_text())
    data["artifacts"] = [a for a in data["artifacts"] if a["graph"] not in CLICK_GRAPHS]
    (copy / MANIFEST).write_text(json.dumps(data))
    return copy


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "litert"])
def test_old_bundles_give_the_same_masks(toy_everywhere: Path, tmp_path: Path, runtime: str) -> None:
    old = pocketsam.load(without_click_graphs(toy_everywhere, tmp_path / "old"), runtime=runtime, threads=1)
    new = pocketsam.load(toy_everywhere, runtime=runtime, threads=1)
    assert not has_click_graphs(old.runtime)
    rgb = load_rgb(photo_paths()[1])
    expected, found = (sorted(r.area for r in segment_everything(s, rgb, NETWORK)) for s in (old, new))
    assert len(expected) >= 2
    assert len(found) == len(expected)
    assert found == pytest.approx(expected, rel=0.01)


def test_click_graphs_of_another_form_are_left_alone(toy_everywhere: Path, tmp_path: Path) -> None:
    """Those of an older version had other batches: their bundles work as if they had none."""
    copy = tmp_path / "old"
    shutil.copytree(toy_everywhere, copy)
    data = json.loads((copy / MANIFEST).read_text())
    for tensor in (t for a in data["artifacts"] if a["graph"] == "click_scores" for t in a["inputs"]):
        if tensor["name"] == "point_coords":
            tensor["shape"][0] += 1
    (copy / MANIFEST).write_text(json.dumps(data))
    assert has_click_graphs(pocketsam.load(toy_everywhere, runtime="onnxruntime").runtime)
    assert not has_click_graphs(pocketsam.load(copy, runtime="onnxruntime").runtime)


@pytest.mark.slow
@pytest.mark.parametrize("index", range(2))
def test_lite0_finds_the_masks_of_its_decoder(index: int) -> None:
    """A 16 x 16 grid, no mask lost or gained."""
    sam = pocketsam.load(threads=2)
    rgb = load_rgb(photo_paths()[index])
    settings = replace(default_settings("lite0"), points_per_side=16)
    found = [r.mask for r in segment_everything(sam, rgb, settings)]
    plain = Predictor(sam.runtime)
    plain.runtime.clicks = False
    expected: list[Bools] = [r.mask for r in segment_everything(plain, rgb, settings)]
    assert len(found) == len(expected) >= 1
    assert all(mask_iou(a, b) >= 0.99 for a, b in zip(found, expected, strict=True))
