"""What int8 costs and gains: one row for each format and recipe, measured on images that calibration never saw."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pocketsam.api import open_bundle
from pocketsam.bundle import Artifact, Bundle
from pocketsam.distance import inner_point
from pocketsam.geometry import Bools, masks_from_logits, tight_box
from pocketsam.images import Rgb, image_id, load_rgb
from pocketsam.labelled import read_pack
from pocketsam.parity import PROMPTS_PER_IMAGE, Agreement, mask_iou, sample_prompts
from pocketsam.photos import photo_paths
from pocketsam.predictor import Predictor, best_token, single_token
from pocketsam.prompts import Prompt
from pocketsam.registry import RUNTIME_FORMATS
from pocketsam.remembered import Remembered

HEADS = ("format", "recipe", "encoder MB", "size ratio", "box mean / p5 / worst", "point mean / p5 / worst", "flips",
         "retention box / point", "encoder time ratio", "slower", "decoder", "float layers")
WORST = 5
REGIONS = 8
# Share of the image below which a region is left out.
SMALLEST = 0.002


@dataclass(frozen=True)
class Row:
    """One format under one recipe.

    Attributes:
        measured: :meth:`pocketsam.parity.Agreement.summary`.
        retention: mIoU against ground truth divided by that of PyTorch, for boxes and points; None without a pack,
            or of a kind for which there is nothing to divide.
        encoder, decoder: what the bundle records of them.
    """

    format: str
    recipe: str
    measured: dict[str, Any]
    retention: dict[str, float | None] | None
    encoder: dict[str, Any]
    decoder: dict[str, Any]
    encoder_bytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def heads() -> tuple[str, ...]:
        return HEADS

    def cells(self) -> list[str]:
        """Texts in the order of the heads."""
        shares = [(self.retention or {}).get(kind) for kind in ("box", "point")]
        kept = " / ".join("-" if share is None else f"{share:.3f}" for share in shares) if self.retention else "-"
        ratio = self.encoder.get("time_ratio")
        return [self.format, self.recipe, f"{self.encoder_bytes / 1e6:.2f}", f"{self.encoder['size_ratio']:.2f}",
                three(self.measured["box"]), three(self.measured["point"]), f"{self.measured['flip_rate']:.1%}", kept,
                "not measurable here" if ratio is None else f"{ratio:.2f} x",
                "yes" if self.encoder.get("slower") else "no",
                f"float: {self.decoder['kept_in_float']}" if self.decoder.get("kept_in_float") else "int8",
                str(len(self.encoder.get("float_layers", [])))]


@dataclass(frozen=True)
class Case:
    """One prompt whose masks differ most: what the page shows.

    Attributes:
        prompt: number of the image, number of the prompt on it.
    """

    prompt: tuple[int, int]
    title: str
    iou: float
    image: Rgb
    fp32: Bools
    int8: Bools


def three(numbers: dict[str, float]) -> str:
    """Mean, 5th percentile and worst of one kind of prompt."""
    return " / ".join(f"{numbers[n]:.3f}" for n in ("mean", "p5", "worst"))


def measure(bundle: Bundle, reference: Predictor, recipes: Sequence[str], pack: Path | None, count: int,
            report: Callable[[str], None]) -> tuple[list[Row], list[Case]]:
    """Compare every int8 pair of a bundle with PyTorch.

    Args:
        reference: PyTorch in fp32.
        pack: labelled pack; None measures on the photos that ship with the package, without retention.
        count: at most this many images of the pack.

    Raises:
        LabelError: not a labelled pack.

    Returns:
        Rows, and the five prompts whose masks agree least.
    """
    rows: list[Row] = []
    cases: list[Case] = []
    pairs = []
    for runtime, format_ in RUNTIME_FORMATS.items():
        for recipe in recipes:
            held = {a.graph: a for a in bundle.artifacts if (a.format, a.precision) == (format_, recipe)}
            if {"encoder", "decoder"} <= held.keys():
                pairs.append((runtime, format_, recipe, held))
    # Answers are kept for the next pair only: they are 36 MB an image of side 1024.
    asked = Predictor(Remembered(reference.runtime)) if len(pairs) > 1 else reference
    for runtime, format_, recipe, held in pairs:
        report(f"measuring {format_} {recipe} on {pack or 'the shipped photos'}")
        candidate = Predictor(open_bundle(bundle, runtime, recipe))
        row, worst = _row(asked, candidate, _samples(pack, count), format_, recipe, held, pack is not None)
        rows.append(row)
        cases += worst
    # A prompt that is bad in one format is mostly bad in all; it is shown once.
    found = {c.prompt: c for c in sorted(cases, key=lambda c: -c.iou)}
    return rows, sorted(found.values(), key=lambda c: c.iou)[:WORST]


def _samples(pack: Path | None, count: int) -> Iterator[tuple[Rgb, list[Bools]]]:
    """Images, each with at most ``REGIONS`` of its annotated regions, drawn with a seed of its own."""
    if pack is None:
        yield from ((load_rgb(p), []) for p in photo_paths())
        return
    for sample in read_pack(pack, limit=count):
        shapes = [layer == k for layer in sample.layers for k in np.unique(layer[layer > 0])]
        shapes = [s for s in shapes if s.mean() >= SMALLEST]
        order = np.random.default_rng(zlib.crc32(sample.id.encode())).permutation(len(shapes))
        yield sample.image, [shapes[i] for i in order[:REGIONS]]


def _row(reference: Predictor, candidate: Predictor, samples: Iterable[tuple[Rgb, list[Bools]]], format_: str,
         recipe: str, held: dict[str, Artifact], quality: bool) -> tuple[Row, list[Case]]:
    total = Agreement()
    cases: list[Case] = []
    truths: dict[str, list[tuple[float, float]]] = {"box": [], "point": []}
    rng = np.random.default_rng(0)
    for image, regions in samples:
        total.ids.append(image_id(image))
        height, width = image.shape[:2]
        reference.set_image(image)
        candidate.set_image(image)
        asked = sample_prompts(reference, height, width, PROMPTS_PER_IMAGE, rng)
        true = [(kind, prompt, region) for region in regions for kind, prompt in _of(region, reference)]
        prompts = [*asked, *((k, p) for k, p, _ in true)]
        ours, theirs = (_answers(p, prompts) for p in (reference, candidate))
        for (kind, _, region), (a, _), (b, _) in zip(true, ours[len(asked):], theirs[len(asked):], strict=True):
            truths[kind].append((mask_iou(a, region), mask_iou(b, region)))
        for i, ((kind, _), (a, token), (b, other)) in enumerate(zip(asked, ours, theirs, strict=False)):
            iou = mask_iou(a, b)
            total.ious[kind].append(iou)
            total.flips += kind == "point" and token != other
            cases.append(Case((total.images, i), f"{format_} {recipe}, {kind}", iou, image, a, b))
        cases = sorted(cases, key=lambda c: c.iou)[:WORST]
    retention = None
    if quality:
        retention = {k: kept_share(v) for k, v in truths.items()}
    encoder, decoder = held["encoder"], held["decoder"]
    return Row(format_, recipe, total.summary(), retention, encoder.quantization, decoder.quantization,
               encoder.bytes), cases


def kept_share(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Mean IoU with the labels of the candidate over that of the reference; None where there are no labels, or the
    reference finds none of them.
    """
    ours, theirs = (sum(p[i] for p in pairs) for i in (0, 1))
    return theirs / ours if ours else None


def _of(region: Bools, predictor: Predictor) -> list[tuple[str, Prompt]]:
    """The tight box of a region, and its innermost point."""
    frame, spec = predictor.current.frame, predictor.spec
    return [("box", Prompt.of(frame, spec, box=tight_box(region))),
            ("point", Prompt.of(frame, spec, points=[inner_point(region)], labels=[1]))]


def _answers(predictor: Predictor, prompts: Sequence[tuple[str, Prompt]]) -> list[tuple[Bools, int]]:
    """Mask and chosen token of each prompt: the single-mask answer for a box, the best of 1 to 3 for a point."""
    logits, scores = predictor.decode_prompts([p for _, p in prompts])
    tokens = [single_token(logits[i], scores[i], predictor.spec) if kind == "box" else best_token(scores[i])
              for i, (kind, _) in enumerate(prompts)]
    frame = predictor.current.frame
    return [(masks_from_logits(logits[i, t][None], frame)[0], t) for i, t in enumerate(tokens)]

