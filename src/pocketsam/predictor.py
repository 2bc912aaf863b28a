"""One promptable-segmentation API over any runtime."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from pocketsam.embedding import Embedding, check_identity, load_embedding
from pocketsam.errors import EmbeddingError, PromptError
from pocketsam.geometry import Bools, Frame, masks_from_logits, to_exact_image, to_model_image
from pocketsam.images import ImageLike, Rgb, image_id, load_rgb
from pocketsam.prompts import Prompt, decoder_inputs, float_array
from pocketsam.resampling import Floats
from pocketsam.runtime import Runtime
from pocketsam.specs import ModelSpec

if TYPE_CHECKING:
    from pocketsam.everything import MaskRecord, Settings

DECODER_BATCH = 16


@dataclass(frozen=True)
class Result:
    """Masks of one prompt (M of them) or of a batch (one each).

    Attributes:
        masks: bool (M, H, W) at the image's size.
        scores: float32 (M,) predicted IoU; a linear head, so values slightly outside [0, 1] occur.
        logits: float32 (M, 4h, 4w) low-resolution logits; a row can be the ``mask`` of a following prompt.
    """

    masks: Bools
    scores: Floats
    logits: Floats

    @property
    def best(self) -> int:
        """Index of the mask with the highest predicted IoU."""
        return int(self.scores.argmax())


class Predictor:
    """Embed an image once, then prompt it as often as needed.

    Args:
        runtime: an open runtime.
        exact: preprocess as the official code does, in floating point where it does so; by default only for a runtime
            that takes such images (PyTorch). Exported graphs take uint8, so comparisons with them pass False.
    """

    def __init__(self, runtime: Runtime, exact: bool | None = None) -> None:
        self.runtime = runtime
        self.exact = bool(getattr(runtime, "takes_floats", False)) if exact is None else exact
        self.weights_sha256 = str(runtime.info()["weights_sha256"])
        self._embedding: Embedding | None = None

    @property
    def spec(self) -> ModelSpec:
        return self.runtime.spec

    def embed(self, image: ImageLike) -> Embedding:
        """Run the encoder.

        Args:
            image: path, PIL image (EXIF orientation honoured) or uint8 (H, W, 3) RGB array.

        Raises:
            ImageError: the image cannot be used.
        """
        return self._embed_rgb(load_rgb(image))

    def set_image(self, image: ImageLike) -> Embedding:
        """Embed an image and make it the one that :meth:`predict` works on."""
        self._embedding = self.embed(image)
        return self._embedding

    def set_embedding(self, embedding: Embedding | str | Path, image: ImageLike | None = None) -> Embedding:
        """Work on a stored embedding, an object or an npz path; with ``image``, check that it is the same image.

        Raises:
            EmbeddingError: made by another model, other weights or from another image.
        """
        if not isinstance(embedding, Embedding):
            embedding = load_embedding(embedding, self.spec, self.weights_sha256)
        check_identity("the embedding", embedding.model, embedding.weights_sha256, embedding.image_size, self.spec,
                       self.weights_sha256)
        if image is not None and image_id(load_rgb(image)) != embedding.image_sha256:
            raise EmbeddingError("the embedding was made from another image than the one given; embed this image.")
        self._embedding = embedding
        return embedding

    def predict(self, points: ArrayLike | None = None, labels: ArrayLike | None = None, box: ArrayLike | None = None,
                mask: ArrayLike | None = None, multimask: bool = True) -> Result:
        """Masks for one prompt on the current image.

        Args:
            points: (K, 2) XY pixels of the image, from the top left.
            labels: (K,) 1 foreground, 0 background; all foreground when left out.
            box: (4,) x0, y0, x1, y1 in pixels.
            mask: float logits (4h, 4w) of an earlier result.
            multimask: True returns the three ambiguous masks (tokens 1 to 3) in the official order, or the best of
                them where the official predictor does so (SAM-HQ); False the single-mask answer, the better choice
                for a box or several points: token 0, or SAM 2's choice by stability.

        Raises:
            PromptError: nothing or something unusable was given, or no image is set.
        """
        current = self.current
        (low_res, scores), = self._decode(current, [Prompt.of(current.frame, self.spec, points, labels, box, mask)])
        if multimask and not self.spec.best_only:
            return self._result(current, low_res[0, 1:], scores[0, 1:])
        token = best_token(scores[0]) if multimask else single_token(low_res[0], scores[0], self.spec)
        return self._result(current, low_res[0, token][None], scores[0, token][None])

    def predict_boxes(self, boxes: ArrayLike) -> Result:
        """The single-mask answer for each of many boxes.

        Args:
            boxes: (K, 4) x0, y0, x1, y1 in pixels.

        Raises:
            PromptError: not numbers of this shape, a box is empty or leaves the image, or no image is set.
        """
        current = self.current
        rows = float_array(boxes, "boxes", (-1, 4))
        if not len(rows):
            raise PromptError("boxes is empty; expected (K, 4) with at least one box.")
        found = []
        # One token of four is kept of every batch.
        for low_res, scores in self._decode(current, [Prompt.of(current.frame, self.spec, box=row) for row in rows]):
            tokens = [single_token(logits, ious, self.spec) for logits, ious in zip(low_res, scores, strict=True)]
            chosen = np.arange(len(tokens)), tokens
            found.append((low_res[chosen], scores[chosen]))
        return self._result(current, np.concatenate([f[0] for f in found]), np.concatenate([f[1] for f in found]))

    def decode_prompts(self, prompts: Sequence[Prompt]) -> tuple[Floats, Floats]:
        """Raw answers of all four tokens: low-res logits (B, 4, 4h, 4w) and predicted IoU (B, 4).

        Raises:
            PromptError: no prompt was given, one is unusable, or no image is set.
        """
        if not prompts:
            raise PromptError("prompts is empty; pass at least one.")
        found = list(self._decode(self.current, prompts))
        return np.concatenate([f[0] for f in found]), np.concatenate([f[1] for f in found])

    def everything(self, image: ImageLike, settings: Settings | None = None, **changes: Any) -> list[MaskRecord]:
        """All masks of a photo, found with a grid of points; see :mod:`pocketsam.everything`.

        The image that :meth:`predict` works on stays as it is.

        Args:
            image: path, PIL image or uint8 (H, W, 3) RGB array.
            settings: a :class:`pocketsam.everything.Settings`; what suits the model when left out.
            changes: single settings to replace in these, such as ``points_per_side=16``.

        Raises:
            ImageError: the image cannot be used.
            UsageError: a setting that does not exist or is out of range.
        """
        from pocketsam.everything import segment_everything, settings_for

        return segment_everything(self, image, settings_for(self.spec.name, settings, **changes))

    def info(self) -> dict[str, Any]:
        """Runtime, versions, threads and model: what to quote beside a number."""
        return {"model": self.spec.name, **self.runtime.info()}

    def _embed_rgb(self, rgb: Rgb) -> Embedding:
        frame = Frame.of(rgb.shape[0], rgb.shape[1], self.spec)
        # Only a runtime that says ``takes_floats`` is given anything but uint8.
        image: Any = to_exact_image(rgb, frame, self.spec) if self.exact else to_model_image(rgb, frame, self.spec)
        features = self.runtime.encode(image, frame)
        return Embedding(features, frame, self.spec.name, self.weights_sha256, image_id(rgb), self.spec.image_size)

    @property
    def current(self) -> Embedding:
        """The embedding that prompts are answered on.

        Raises:
            PromptError: no image is set.
        """
        if self._embedding is None:
            raise PromptError("no image is set; call set_image or set_embedding first.")
        return self._embedding

    def _result(self, current: Embedding, logits: Floats, scores: Floats) -> Result:
        masks = masks_from_logits(logits, current.frame)
        limit = self.spec.logit_limit
        return Result(masks, scores, np.clip(logits, -limit, limit) if limit else logits)

    def _decode(self, current: Embedding, prompts: Sequence[Prompt]) -> Iterator[tuple[Floats, Floats]]:
        """Logits and predicted IoU of a batch of prompts after the other, all on one embedding: another thread may set
        the next image meanwhile.
        """
        for i in range(0, len(prompts), DECODER_BATCH):
            inputs = decoder_inputs(prompts[i:i + DECODER_BATCH], current.frame, self.spec, self.runtime.slots)
            out = self.runtime.decode(current.features, inputs)
            yield out["low_res_masks"], out["iou_predictions"]


def best_token(scores: Floats) -> int:
    """(4,) predicted IoU -> the best of the ambiguous tokens 1 to 3."""
    return 1 + int(scores[1:].argmax())


def single_token(logits: Floats, scores: Floats, spec: ModelSpec) -> int:
    """The token of the single-mask answer: 0, or the best of 1 to 3 where mask 0 is less stable than the spec asks.

    Stability is the share of the pixels above -delta that are also above +delta; no such pixel counts as stable
    (SAM 2's ``_dynamic_multimask_via_stability``).

    Args:
        logits: (4, 4h, 4w) of one prompt.
        scores: (4,) predicted IoU.
    """
    if not spec.stability:
        return 0
    delta, threshold = spec.stability
    wide = int((logits[0] > -delta).sum())
    stable = wide == 0 or int((logits[0] > delta).sum()) / wide >= threshold
    return 0 if stable else best_token(scores)
