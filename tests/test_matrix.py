"""One scenario on every backend: model x format x runtime x precision x prompt, held to the same expectations."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from goldens import FILES, Golden, image

import pocketsam
from pocketsam import registry
from pocketsam.errors import PocketSamError
from pocketsam.images import load_rgb
from pocketsam.parity import mask_iou
from pocketsam.photos import photo_paths
from pocketsam.predictor import Predictor

# Every pair that an exporter makes and a runtime executes; on Linux Core ML goes through the evaluator.
PRECISIONS = {"onnx": ("fp32", "int8"), **dict.fromkeys(("openvino", "litert", "coreml"), ("fp32", "fp16", "int8"))}
BACKENDS = [(r, f, p) for r, f in registry.RUNTIME_FORMATS.items() for p in PRECISIONS[f]]
PROMPTS = {
    "point": {"points": [[0.38, 0.4]], "labels": [1]},
    "points": {"points": [[0.17, 0.2], [0.55, 0.62], [0.85, 0.87]], "labels": [1, 0, 1]},
    "box": {"box": [0.12, 0.12, 0.7, 0.84]},
    "box_and_point": {"points": [[0.42, 0.46]], "labels": [0], "box": [0.12, 0.12, 0.7, 0.84]},
    "mask": {"points": [[0.38, 0.4]], "labels": [1], "mask": True},
}
GOLDEN_NAMES = dict(zip("abcde", PROMPTS, strict=True))
# ViT-B's fp16 twins are held to the export's gate, on photos; the matrix would take minutes more for them.
# int8 is judged in masks, so only by a model with trained weights.
MODELS = {**dict.fromkeys(("toy_sam", "toy_sam2", "mobile_sam"), ("fp32", "fp16")), "lite0": ("fp32", "fp16", "int8"),
          **dict.fromkeys(("sam_vit_b", "toy_hq", "toy_efficient_sam"), ("fp32",))}
# One of each architecture, in the two formats whose converters have least in common, against PyTorch, which the goldens
# hold to the official code; `tools/bench_docs.py` makes every format of every model.
FAMILY = ("edge_sam", "efficientvit_sam_l0")
# Minutes each: by `make test-family`.
REST_OF_FAMILY = ("repvit_sam", "sam_hq_vit_tiny", "efficient_sam_ti", "sam2.1_tiny", "edgetam", "efficienttam_ti")
FAMILY_FORMATS = ("onnx", "litert")
# Recipes that change weights only, or what the engine does by itself; tests/test_quantize.py runs them.
UNTRIED = {"int8-weights", "int8-dynamic"}
FORMATS = {**dict.fromkeys(MODELS, tuple(registry.FORMATS)), **dict.fromkeys(FAMILY + REST_OF_FAMILY, FAMILY_FORMATS)}
MODELS |= dict.fromkeys(FAMILY + REST_OF_FAMILY, ("fp32",))
MARKS = {"toy_sam": (), **dict.fromkeys(REST_OF_FAMILY, (pytest.mark.slow, pytest.mark.family))}
MATRIX = [
    pytest.param(m, r, p, id=f"{m}-{r}-{p}", marks=MARKS.get(m, (pytest.mark.slow,)))
    for m, precisions in MODELS.items() for r, f, p in BACKENDS if p in precisions and f in FORMATS[m]
]
# fp32 may differ in pixels whose logit is within rounding of zero; fp16 is held to the project's gate.
WORST_PIXELS = 10
# Of predicted IoU, and (mean, 5th percentile, worst) of masks, by precision. Looser than the gate, which export holds
# artifacts to: here all three masks of a click count, also those that nobody would choose.
SCORES = {"fp16": 0.05, "int8": 0.1}
LIMITS = {"fp16": (0.995, 0.97, 0.9), "int8": (0.95, 0.87, 0.7)}


@dataclass(frozen=True)
class Answers:
    """A photo, its prompts, and the expected masks and scores."""

    rgb: np.ndarray[Any, Any]
    prompts: dict[str, dict[str, Any]]
    masks: dict[tuple[str, bool], np.ndarray[Any, Any]]
    scores: dict[tuple[str, bool], np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Case:
    """A model's bundle with all formats, and what is expected of it on each photo."""

    bundle: Path
    answers: tuple[Answers, ...]


def scaled(prompt: dict[str, Any], width: int, height: int, mask: Any) -> dict[str, Any]:
    size = np.array([width, height])
    out: dict[str, Any] = {"labels": prompt.get("labels")}
    out["points"] = np.array(prompt["points"]) * size if "points" in prompt else None
    out["box"] = np.array(prompt["box"]) * np.tile(size, 2) if "box" in prompt else None
    out["mask"] = mask if prompt.get("mask") else None
    return out


def from_goldens(model: str) -> Answers:
    """Expectations of the official code."""
    golden = Golden.of(model)
    prompts, masks, scores = {}, {}, {}
    for letter, p in golden.manifest["prompts"].items():
        name = GOLDEN_NAMES[letter]
        prompts[name] = {**p, "mask": golden.arrays["mask_input"] if p["mask"] else None}
        for multi, mode in ((False, "single"), (True, "multi")):
            masks[name, multi] = golden.masks(letter, mode)
            scores[name, multi] = golden.arrays[f"{letter}/{mode}/iou"]
    return Answers(image(), prompts, masks, scores)


def from_pytorch(reference: Predictor, rgb: np.ndarray[Any, Any]) -> Answers:
    """Expectations of our PyTorch reference on the same uint8 pixels, for models without official outputs."""
    reference = Predictor(reference.runtime, exact=False)
    reference.set_image(rgb)
    mask = reference.predict(points=[(rgb.shape[1] * 0.38, rgb.shape[0] * 0.4)], multimask=False).logits
    prompts = {n: scaled(p, rgb.shape[1], rgb.shape[0], mask) for n, p in PROMPTS.items()
               if reference.spec.mask_prompt or not p.get("mask")}
    results = {(n, m): reference.predict(**p, multimask=m) for n, p in prompts.items() for m in (False, True)}
    return Answers(rgb, prompts, {k: r.masks for k, r in results.items()}, {k: r.scores for k, r in results.items()})


@pytest.fixture(scope="module")
def cases(toy_checkpoint: Path, family_checkpoint: Callable[[str], Path], golden_checkpoint: Callable[[str], Path],
          tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Callable[[str], Case]:
    """Model name -> its case; exported once, and removed when the next is asked for."""
    checkpoints: dict[str, Callable[[], Path | None]] = {"toy_sam": lambda: toy_checkpoint, "lite0": lambda: None}
    folder = tmp_path_factory.mktemp("matrix")

    @lru_cache(maxsize=1)
    def attempt(model: str) -> Case | PocketSamError:
        try:
            shutil.rmtree(folder)
            folder.mkdir()
            return build(model)
        except PocketSamError as e:
            return e

    def make(model: str) -> Case:
        """A failed export fails each of its tests, without being tried again for each."""
        case = attempt(model)
        if isinstance(case, PocketSamError):
            raise case
        return case

    def build(model: str) -> Case:
        # The built-in model has trained weights of its own.
        source = golden_checkpoint if model in FILES else family_checkpoint
        checkpoint = checkpoints[model]() if model in checkpoints else source(model)
        official = model in ("sam_vit_b", "mobile_sam")
        images = [image()] if model in FILES else [load_rgb(photo_paths()[1])]
        if model == "lite0":  # fp16 and int8 are judged in masks: one photo would be a lottery
            images = [load_rgb(p) for p in photo_paths()]
        out = folder / f"{model}.bundle"
        if model == "toy_sam":
            out = request.getfixturevalue("toy_everywhere")
        else:
            # tests/test_clicks.py holds the click graphs to the decoder.
            pocketsam.export(model, checkpoint=checkpoint, formats=FORMATS[model], precisions=MODELS[model], out=out,
                             images=images[:1], clicks=False)
        if official:
            return Case(out, (from_goldens(model),))
        reference = pocketsam.load(model, checkpoint=checkpoint, runtime="pytorch", threads=2)
        return Case(out, tuple(from_pytorch(reference, rgb) for rgb in images))

    return make


@pytest.mark.parametrize(("model", "runtime", "precision"), MATRIX)
def test_backend(cases: Callable[[str], Case], model: str, runtime: str, precision: str) -> None:
    case = cases(model)
    sam = pocketsam.load(case.bundle, runtime=runtime, precision=precision, threads=2)
    assert sam.info()["runtime"] == runtime
    ious = [iou for answers in case.answers for iou in agreement(sam, answers, precision)]
    if precision != "fp32":
        mean, p5, worst = LIMITS[precision]
        assert np.mean(ious) >= mean, ious
        assert np.quantile(ious, 0.05) >= p5, ious
        assert min(ious) >= worst, ious


def agreement(sam: Predictor, expected: Answers, precision: str) -> list[float]:
    """Mask IoU of every prompt and mask; of fp32 every mask and score is held to the expected one here."""
    sam.set_image(expected.rgb)
    ious = []
    for (name, multi), masks in expected.masks.items():
        result = sam.predict(**expected.prompts[name], multimask=multi)
        assert result.masks.shape == masks.shape
        off = np.abs(result.scores - expected.scores[name, multi]).max()
        if precision == "fp32":
            wrong = (result.masks != masks).sum(axis=(1, 2))
            assert wrong.max() <= WORST_PIXELS, (name, multi, wrong)
            assert off <= 5e-5
        else:
            assert off <= SCORES[precision]
        ious += [mask_iou(a, b) for a, b in zip(result.masks, masks, strict=True)]
    return ious


def test_every_backend_is_in_the_matrix() -> None:
    assert {f for _, f, _ in BACKENDS} == set(registry.FORMATS)
    for name in registry.FORMATS:
        held = {*registry.load("format", name).precisions, *registry.load("quantizer", name).recipes} - UNTRIED
        assert held == set(PRECISIONS[name])


@pytest.mark.parametrize("runtime", list(registry.RUNTIME_FORMATS))
def test_boxes_in_batches(cases: Callable[[str], Case], runtime: str) -> None:
    """Seventeen boxes: one full batch of sixteen and a rest, the same masks as one by one."""
    case = cases("toy_sam")
    rgb = case.answers[0].rgb
    rng = np.random.default_rng(3)
    height, width = rgb.shape[:2]
    corner = rng.uniform(0, 0.4, (17, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(0.2, 0.5, (17, 2))], 1) * np.tile([width, height], 2)
    sam = pocketsam.load(case.bundle, runtime=runtime, threads=2)
    sam.set_image(rgb)
    batch = sam.predict_boxes(boxes)
    for i in (0, 15, 16):
        alone = sam.predict(box=boxes[i], multimask=False)
        assert (batch.masks[i] != alone.masks[0]).sum() <= WORST_PIXELS


@pytest.mark.parametrize("runtime", list(registry.RUNTIME_FORMATS))
def test_threads_do_not_disturb_each_other(cases: Callable[[str], Case], runtime: str) -> None:
    """Two predictors in two threads, and one runtime shared by both: the answers stay those of a single thread."""
    case = cases("toy_sam")
    rgb = case.answers[0].rgb
    images = [rgb, np.ascontiguousarray(rgb[::-1])]
    point = [(rgb.shape[1] * 0.38, rgb.shape[0] * 0.4)]
    shared = pocketsam.load(case.bundle, runtime=runtime, threads=1)
    alone = []
    for rgb in images:
        shared.set_image(rgb)
        alone.append(shared.predict(points=point).logits)

    def work(i: int) -> float:
        sam = Predictor(shared.runtime) if i < 2 else pocketsam.load(case.bundle, runtime=runtime, threads=1)
        worst = 0.0
        for _ in range(4):
            sam.set_image(images[i % 2])
            worst = max(worst, float(np.abs(sam.predict(points=point).logits - alone[i % 2]).max()))
        return worst

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(work, range(4))) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("model", ["lite0"])
def test_the_example_of_the_documents(cases: Callable[[str], Case], model: str) -> None:
    """docs/integrate.md, without PocketSAM, gives the predictor's mask."""
    bundle = cases(model).bundle
    text = (Path(__file__).parents[1] / "docs/integrate.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    photo = next(p for p in photo_paths() if p.name == "coffee.jpg")
    names: dict[str, Any] = {}
    exec(code.replace("src/pocketsam/assets/photos/coffee.jpg", str(photo)).replace("build/lite0.bundle", str(bundle)),
         names)
    sam = pocketsam.load(bundle, runtime="onnxruntime")
    sam.set_image(photo)
    found = sam.predict(points=[(290, 100)])
    assert names["best"] - 1 == found.best
    assert mask_iou(names["mask"], found.masks[found.best]) >= 0.999
