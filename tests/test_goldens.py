"""Our PyTorch predictor against the official implementations: embeddings, logits, predicted IoU and final masks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from goldens import FILES, Golden, image, read_manifest

import pocketsam
from pocketsam.geometry import Frame, to_model_image
from pocketsam.models.catalog import spec as spec_of

MODELS = [pytest.param("mobile_sam"), pytest.param("sam_vit_b", marks=pytest.mark.slow)]
PIXELS = 10


class Case:
    """A model's goldens and our answers to every prompt, computed once."""

    def __init__(self, model: str, checkpoint: Path) -> None:
        self.golden = Golden.of(model)
        self.sam = pocketsam.load(model, checkpoint=checkpoint, runtime="pytorch", threads=2)
        self.embedding = self.sam.set_image(image())
        self.results = {(p, mode): self.sam.predict(**self.prompt(p), multimask=mode == "multi")
                        for p in self.golden.manifest["prompts"] for mode in ("single", "multi")}

    def prompt(self, name: str) -> dict[str, Any]:
        p = self.golden.manifest["prompts"][name]
        mask = self.golden.arrays["mask_input"] if p["mask"] else None
        return {"points": p["points"], "labels": p["labels"], "box": p["box"], "mask": mask}


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest, golden_checkpoint: Callable[[str], Path]) -> Case:
    return Case(request.param, golden_checkpoint(request.param))


def close(ours: np.ndarray[Any, Any], golden: np.ndarray[Any, Any], factor: float = 1e-4) -> bool:
    """The tolerance that the goldens were published with: 1e-4 of the tensor's spread."""
    return bool(np.abs(ours - golden).max() <= factor * max(1.0, float(golden.std())))


def test_embedding(case: Case) -> None:
    golden = case.golden.arrays["image_embedding_sub"]
    # The goldens hold every fourth sample from (1, 2); packing kept every second of those.
    ours = case.embedding.features["image_embeddings"][0, :, 1::4, 2::4][:, ::2, ::2]
    assert ours.shape == golden.shape
    assert close(ours, golden)
    mean_std = case.golden.arrays["image_embedding_mean_std"]
    full = case.embedding.features["image_embeddings"][0].reshape(256, -1)
    assert np.allclose(np.stack([full.mean(1), full.std(1)]), mean_std, atol=2e-3)


@pytest.mark.parametrize("mode", ["single", "multi"])
@pytest.mark.parametrize("prompt", "abcde")
def test_prompt(case: Case, prompt: str, mode: str) -> None:
    result, arrays = case.results[prompt, mode], case.golden.arrays
    low = result.logits[:, 1::4, 2::4][:, ::2, ::2]
    assert close(low, arrays[f"{prompt}/{mode}/low_sub"])
    assert np.abs(result.scores - arrays[f"{prompt}/{mode}/iou"]).max() <= 2e-5
    golden = case.golden.masks(prompt, mode)
    assert golden.shape == result.masks.shape
    wrong = (golden != result.masks).sum(axis=(1, 2))
    assert wrong.max() <= PIXELS, f"{wrong} of {golden[0].size} pixels differ"


def test_dense_encoding(case: Case) -> None:
    pe = case.sam.runtime.model.prompt_encoder.dense_pe().reshape(64, 64, 256).permute(2, 0, 1)
    assert close(pe[:, 1::8, 2::8].numpy()[::2], case.golden.arrays["dense_pe_sub"])


@pytest.mark.parametrize(("size", "field"), [((480, 720, 0), "input"), ((1400, 1051, 1), "input_large")])
@pytest.mark.parametrize("model", ["mobile_sam", "sam_vit_b"])
def test_preprocessing_is_bit_exact(model: str, size: tuple[int, int, int], field: str) -> None:
    manifest = Golden.of(model).manifest[field]
    spec = spec_of(model)
    rgb = image(*size)
    frame = Frame.of(rgb.shape[0], rgb.shape[1], spec)
    assert [frame.content_height, frame.content_width, 3] == manifest["resized_u8_shape"]
    content = to_model_image(rgb, frame, spec)[0, :frame.content_height, :frame.content_width]
    digest = hashlib.sha256(np.ascontiguousarray(content).tobytes()).hexdigest()
    assert digest == manifest["resized_u8_sha256"]


@pytest.mark.parametrize("model", ["mobile_sam", "sam_vit_b", "sam_vit_l", "sam_vit_h"])
def test_every_official_key_is_used(model: str) -> None:
    import torch

    from pocketsam import registry

    keys = read_manifest(FILES.get(model, model))["keys"]
    with torch.device("meta"):
        ours = {k: list(v.shape) for k, v in registry.load("model", model)().state_dict().items()}
    assert ours == {k: shape for k, (shape, _) in keys.items()}
