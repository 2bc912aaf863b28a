"""Many single clicks on one image: through a runtime's click graphs where it has them, else through its decoder.

The click graphs give the same masks up to float rounding for a fraction of the arithmetic, and masks only for clicks
whose predicted IoU passes; ``pocketsam.models.click_decoder`` derives them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pocketsam.batching import ENTRY_BATCHES
from pocketsam.embedding import Embedding
from pocketsam.prompts import Prompt, decoder_inputs
from pocketsam.resampling import Floats
from pocketsam.runtime import Tensors
from pocketsam.specs import GraphSpec

if TYPE_CHECKING:
    from pocketsam.predictor import Predictor

ONE, MANY = ENTRY_BATCHES


class Answers(NamedTuple):
    """Masks of some of the clicks of a batch.

    Attributes:
        points: int64 (K,), which clicks, ascending.
        low_res: float32 (K, 3, 4h, 4w) logits of tokens 1 to 3; one click is an ambiguous prompt.
        scores: float32 (K, 3) predicted IoU.
    """

    points: NDArray[np.int64]
    low_res: Floats
    scores: Floats


def has_click_graphs(runtime: Any) -> bool:
    """Whether a runtime has graphs for many clicks; bundles of older versions and some families have none."""
    return bool(getattr(runtime, "clicks", False))


class PointDecoder:
    """Answers clicks on one embedded image.

    Args:
        graphs: use the click graphs; by default where the runtime has them.
    """

    def __init__(self, sam: Predictor, embedding: Embedding, graphs: bool | None = None) -> None:
        self.sam, self.embedding = sam, embedding
        self.graphs = has_click_graphs(sam.runtime) if graphs is None else graphs
        self._specs = sam.spec.graphs()
        self._shared: Tensors = {}
        if self.graphs:
            features = {t.name: embedding.features[t.name] for t in sam.spec.feature_specs()}
            self._shared = sam.runtime.click("click_image", features)

    def answers(self, points: NDArray[np.float64], batch: int = MANY, least_score: float = 0) -> Iterator[Answers]:
        """Decode one click each, a batch at a time; clicks none of whose masks passes may be left out.

        Args:
            points: (K, 2) XY pixels of the embedded image.
            batch: clicks decoded at once without click graphs, whose batches are fixed.
            least_score: masks whose predicted IoU is not above this are of no use; 0 keeps all.
        """
        if self.graphs:
            yield from self._with_graphs(points, least_score)
            return
        sam, frame = self.sam, self.embedding.frame
        for start in range(0, len(points), batch):
            prompts = [Prompt.of(frame, sam.spec, points=[p], labels=[1]) for p in points[start:start + batch]]
            inputs = decoder_inputs(prompts, frame, sam.spec, sam.runtime.slots)
            out = sam.runtime.decode(self.embedding.features, inputs)
            yield Answers(np.arange(start, start + len(prompts)), out["low_res_masks"][:, 1:],
                          out["iou_predictions"][:, 1:])

    def logits(self, point: NDArray[np.float64], token: int) -> Floats:
        """(4h, 4w) logits of one click and token 1 to 3."""
        (answer,) = self.answers(point[None], 1)
        logits: Floats = answer.low_res[0, token - 1]
        return logits

    def _with_graphs(self, points: NDArray[np.float64], least_score: float) -> Iterator[Answers]:
        run = self.sam.runtime.click
        size = ONE if len(points) == ONE else MANY
        coords = self.embedding.frame.to_model(points)[:, None].astype(np.float32)
        waiting = _Waiting(self._specs["click_masks"], size)
        for start in range(0, len(coords), size):
            part = coords[start:start + size]
            count = len(part)
            padded = np.concatenate([part, np.repeat(part[-1:], size - count, 0)])
            out = run("click_scores", self._take("click_scores", {"point_coords": padded}))
            scores = out["iou_predictions"][:count, 1:]
            passing = np.flatnonzero((scores > least_score).any(1)) if least_score > 0 else np.arange(count)
            for i in passing.tolist():
                if waiting.add(start + i, scores[i], out, i):
                    yield self._masks(waiting)
        if waiting.count:
            yield self._masks(waiting)

    def _masks(self, waiting: _Waiting) -> Answers:
        out = self.sam.runtime.click("click_masks", self._take("click_masks", waiting.factors))
        points, scores = waiting.clear()
        return Answers(points, out["low_res_masks"][:len(points)], scores)

    def _take(self, graph: str, own: Tensors) -> Tensors:
        return {n: own[n] if n in own else self._shared[n] for n in self._specs[graph].input_names}


class _Waiting:
    """Clicks that passed, gathered until they fill a batch of the mask graph; unused rows hold what was there."""

    def __init__(self, graph: GraphSpec, size: int) -> None:
        self.factors = {t.name: np.zeros(t.concrete(size), np.float32) for t in graph.inputs
                        if isinstance(t.shape[0], str)}
        self.size = size
        self._points: list[int] = []
        self._scores: list[Floats] = []

    @property
    def count(self) -> int:
        return len(self._points)

    def add(self, point: int, scores: Floats, out: Tensors, row: int) -> bool:
        """Take one row of the score graph's outputs; True when the batch is full."""
        for name, values in self.factors.items():
            values[self.count] = out[name][row]
        self._points.append(point)
        self._scores.append(scores)
        return self.count == self.size

    def clear(self) -> tuple[NDArray[np.int64], Floats]:
        points, scores = np.array(self._points, np.int64), np.stack(self._scores)
        self._points, self._scores = [], []
        return points, scores
