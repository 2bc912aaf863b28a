"""Our PyTorch predictor against the official implementations: embeddings, logits, predicted IoU and final masks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from goldens import FILES, MANIFESTS, Golden, image, read_manifest, sampled

import pocketsam
from pocketsam import registry
from pocketsam.geometry import Frame, masks_from_logits, to_model_image
from pocketsam.models.catalog import spec as spec_of
from pocketsam.models.keys import ignored, rename
from pocketsam.predictor import Result, single_token
from pocketsam.prompts import Prompt

FAST = ("mobile_sam", "edge_sam", "edgetam", "efficientvit_sam_l0", "efficienttam_ti", "sam_hq_vit_tiny")
MODELS = [pytest.param(m, marks=[] if m in FAST else [pytest.mark.slow]) for m in FILES]
PIXELS = 10
# Golden name of each feature.
FEATURES = {"image_embedding_sub": "image_embeddings", "high_res_s0_sub": "high_res_features_0",
            "high_res_s1_sub": "high_res_features_1"}


class Case:
    """A model's goldens and our predictor, with the image encoded once."""

    def __init__(self, model: str, checkpoint: Path) -> None:
        self.golden = Golden.of(model)
        self.sam = pocketsam.load(model, checkpoint=checkpoint, runtime="pytorch", threads=2)
        self.embedding = self.sam.set_image(image())
        # The official mask prompt is the single mask of prompt a; ours agrees with it to 1e-5 (test_prompt).
        self.mask = self.golden.arrays.get("mask_input")
        if self.mask is None and self.sam.spec.mask_prompt:
            self.mask = self.raw("a")[0][:1]

    def prompt(self, name: str) -> dict[str, Any]:
        p = self.golden.manifest["prompts"][name]
        return {"points": p["points"], "labels": p["labels"], "box": p["box"], "mask": self.mask if p["mask"] else None}

    def raw(self, name: str) -> tuple[Any, Any]:
        """Logits and predicted IoU of all four tokens."""
        prompt = Prompt.of(self.sam.current.frame, self.sam.spec, **self.prompt(name))
        logits, scores = self.sam.decode_prompts([prompt])
        return logits[0], scores[0]

    def answer(self, name: str, mode: str) -> Result:
        """Our answer in one of the official modes.

        ``single``, ``single_dynamic`` and ``single_sum`` (SAM plus HQ) are what ``predict`` gives for one mask;
        ``single_static`` is token 0 of SAM 2, ``n4`` all four masks of EdgeSAM.
        """
        if mode in ("n4", "single_static"):
            logits, scores = self.raw(name)
            count = 4 if mode == "n4" else 1
            return Result(masks_from_logits(logits[:count], self.sam.current.frame), scores[:count], logits[:count])
        return self.sam.predict(**self.prompt(name), multimask=mode.startswith("multi"))


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest, golden_checkpoint: Callable[[str], Path]) -> Case:
    return Case(request.param, golden_checkpoint(request.param))


def close(ours: np.ndarray[Any, Any], golden: np.ndarray[Any, Any], factor: float = 1e-4) -> bool:
    """The tolerance that the goldens were published with: 1e-4 of the tensor's spread."""
    return bool(ours.shape == golden.shape and np.abs(ours - golden).max() <= factor * max(1.0, float(golden.std())))


def test_features(case: Case) -> None:
    for name, feature in FEATURES.items():
        assert (name in case.golden.arrays) == (feature in case.embedding.features)
        if name in case.golden.arrays:
            golden = case.golden.arrays[name]
            assert close(sampled(case.embedding.features[feature][0], golden), golden), name
    mean_std = case.golden.arrays["image_embedding_mean_std"]
    full = case.embedding.features["image_embeddings"][0].reshape(256, -1)
    assert np.allclose(np.stack([full.mean(1), full.std(1)]), mean_std, atol=2e-3)


@pytest.mark.parametrize("prompt", "abcde")
def test_prompt(case: Case, prompt: str) -> None:
    """Every mode of the official predictor: logits, predicted IoU and masks."""
    arrays = case.golden.arrays
    modes = [m for m in case.golden.modes(prompt) if m not in ("raw", "single_hq")]
    asked = case.golden.manifest["prompts"].get(prompt)
    # EfficientSAM takes no mask prompt, so the official code has no answer to e.
    answered = asked is not None and (case.sam.spec.mask_prompt or not asked["mask"])
    assert len(modes) == (0 if not answered else 3 if case.sam.spec.object_score else 1 if "n4" in modes else 2)
    for mode in modes:
        result = case.answer(prompt, mode)
        assert np.abs(result.scores - arrays[f"{prompt}/{mode}/iou"]).max() <= 2e-5, mode
        if f"{prompt}/{mode}/low_sub" in arrays:
            golden = arrays[f"{prompt}/{mode}/low_sub"]
            assert close(sampled(result.logits, golden), golden), mode
        if f"{prompt}/{mode}/mask_bits" in arrays:
            masks = case.golden.masks(prompt, mode)
            wrong = (masks != result.masks).sum(axis=(1, 2))
            assert wrong.max() <= PIXELS, f"{mode}: {wrong} of {masks[0].size} pixels differ"


@pytest.mark.parametrize("model", ["sam_hq_vit_tiny", pytest.param("sam_hq_vit_b", marks=pytest.mark.slow)])
def test_hq_masks_apart(model: str, golden_checkpoint: Callable[[str], Path]) -> None:
    """SAM's four masks and the HQ mask, which the graph only gives summed, against the official raw outputs."""
    case = Case(model, golden_checkpoint(model))
    parts: list[Any] = []
    decoder = case.sam.runtime.model.mask_decoder
    apart = decoder.raw_masks
    decoder.raw_masks = lambda *args: parts.append(apart(*args)) or parts[-1]
    for prompt in "ad":
        _, scores = case.raw(prompt)
        masks, hq = parts[-1]
        golden = case.golden.arrays[f"{prompt}/raw/low_sub"]
        assert close(sampled(np.concatenate([masks[0], hq[0]]), golden), golden)
        assert np.abs(scores - case.golden.arrays[f"{prompt}/raw/iou"]).max() <= 2e-5


def test_dense_encoding(case: Case) -> None:
    pe = case.sam.runtime.model.prompt_encoder.dense_pe().reshape(64, 64, 256).permute(2, 0, 1).numpy()
    assert close(sampled(pe, case.golden.arrays["dense_pe_sub"]), case.golden.arrays["dense_pe_sub"])


def test_single_masks_follow_stability() -> None:
    """Both branches of SAM 2's choice; the goldens only ever see the fallback."""
    spec = spec_of("sam2.1_tiny")
    scores = np.array([0.9, 0.1, 0.8, 0.3], np.float32)
    firm = np.where(np.arange(64 * 64).reshape(64, 64) < 2000, 5.0, -5.0).astype(np.float32)
    stack = np.stack([firm] * 4)
    assert single_token(stack, scores, spec) == 0
    shaky = stack.copy()
    shaky[0, 0, :60] = 0.01
    assert single_token(shaky, scores, spec) == 2
    assert single_token(shaky, scores, spec_of("sam_vit_b")) == 0
    assert single_token(np.full((4, 64, 64), -5, np.float32), scores, spec) == 0


@pytest.mark.parametrize(("size", "field"), [((480, 720, 0), "input"), ((1400, 1051, 1), "input_large")])
@pytest.mark.parametrize("model", [m for m in FILES if spec_of(m).resampling == "pillow"])
def test_preprocessing_is_bit_exact(model: str, size: tuple[int, int, int], field: str) -> None:
    manifest = Golden.of(model).manifest[field]
    spec = spec_of(model)
    rgb = image(*size)
    frame = Frame.of(rgb.shape[0], rgb.shape[1], spec)
    assert [frame.content_height, frame.content_width, 3] == manifest["resized_u8_shape"]
    content = to_model_image(rgb, frame, spec)[0, :frame.content_height, :frame.content_width]
    digest = hashlib.sha256(np.ascontiguousarray(content).tobytes()).hexdigest()
    assert digest == manifest["resized_u8_sha256"]


@pytest.mark.parametrize("model", [*FILES, *MANIFESTS])
def test_every_official_key_is_used(model: str) -> None:
    """Each key is a tensor of our model, or ignored with a reason; the video memory is all that is ignored."""
    import torch

    keys = read_manifest({**FILES, **MANIFESTS}[model])["keys"]
    family = spec_of(model).family
    with torch.device("meta"):
        ours = {k: list(v.shape) for k, v in registry.load("model", model)().state_dict().items()}
    left_out = ignored(family, keys)
    used = {k: shape for k, (shape, _) in keys.items() if k not in left_out}
    assert ours == {rename(family, k): shape for k, shape in used.items()}
    assert len(ours) == len(used), "two official keys must not share a name"
    assert all(left_out.values())
    assert bool(left_out) == (family in ("sam2", "edgetam", "efficienttam"))
