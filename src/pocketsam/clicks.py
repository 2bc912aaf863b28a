"""Many single clicks on one image: through a runtime's click graphs where it has them, else through its decoder.

The click graphs give the same masks up to float rounding for a fraction of the arithmetic, and masks only for clicks
whose predicted IoU passes; ``pocketsam.models.click_decoder`` derives them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pocketsam.click_specs import BATCH, FACTORS
from pocketsam.embedding import Embedding
from pocketsam.prompts import Prompt, decoder_inputs
from pocketsam.resampling import Floats
from pocketsam.runtime import Tensors
from pocketsam.specs import GraphSpec

if TYPE_CHECKING:
    from pocketsam.predictor import Predictor


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

    def answers(self, points: NDArray[np.float64], batch: int = BATCH, least_score: float = 0) -> Iterator[Answers]:
        """Decode one click each, a batch at a time; clicks none of whose masks passes may be left out.

        Args:
            points: (K, 2) XY pixels of the embedded image.
            batch: clicks decoded at once without click graphs, whose batches are fixed.
            least_score: masks whose predicted IoU is not above this are of no use; 0 keeps all.
        """
        if self.graphs:
            yield from self._with_graphs(points, least_score)
        else:
            yield from self._with_decoder(points, batch)

    def logits(self, points: NDArray[np.float64], tokens: Sequence[int]) -> list[Floats]:
        """(4h, 4w) logits of several clicks, of each one's token 1 to 3.

        Args:
            points: (K, 2) XY pixels of the embedded image.
        """
        rows = (row for answers in self.answers(points) for row in answers.low_res)
        return [row[token - 1] for row, token in zip(rows, tokens, strict=True)]

    def _with_decoder(self, points: NDArray[np.float64], batch: int) -> Iterator[Answers]:
        sam, frame = self.sam, self.embedding.frame
        for start in range(0, len(points), batch):
            prompts = [Prompt.of(frame, sam.spec, points=[p], labels=[1]) for p in points[start:start + batch]]
            inputs = decoder_inputs(prompts, frame, sam.spec, sam.runtime.slots)
            out = sam.runtime.decode(self.embedding.features, inputs)
            yield Answers(np.arange(start, start + len(prompts)), out["low_res_masks"][:, 1:],
                          out["iou_predictions"][:, 1:])

    def _with_graphs(self, points: NDArray[np.float64], least_score: float) -> Iterator[Answers]:
        coords = self.embedding.frame.to_model(points)[:, None].astype(np.float32)
        waiting = _Waiting(self._specs["click_masks"])
        workers = self.sam.runtime.click_workers
        with ThreadPoolExecutor(workers) as pool:
            # What runs or is about to: bounded, because each batch holds megabytes of factors.
            scored: deque[tuple[int, Future[Tensors]]] = deque()
            masked: deque[tuple[Future[Tensors], NDArray[np.int64], Floats]] = deque()
            starts = iter(range(0, len(coords), BATCH))
            while True:
                while len(scored) <= workers and (start := next(starts, None)) is not None:
                    scored.append((start, pool.submit(self._scores, coords[start:start + BATCH])))
                if scored:
                    start, future = scored.popleft()
                    for row, passed in self._passing(future.result(), len(coords) - start, least_score):
                        if waiting.add(start + row, passed, future.result(), row):
                            masked.append(self._submit(pool, waiting))
                elif waiting.count:
                    masked.append(self._submit(pool, waiting))
                while masked and (len(masked) > workers or not scored):
                    done, found, scores = masked.popleft()
                    yield Answers(found, done.result()["low_res_masks"][:len(found)], scores)
                if not scored and not masked and not waiting.count:
                    return

    def _scores(self, coords: Floats) -> Tensors:
        padded = np.concatenate([coords, np.repeat(coords[-1:], BATCH - len(coords), 0)])
        return self.sam.runtime.click("click_scores", self._take("click_scores", {"point_coords": padded}))

    @staticmethod
    def _passing(out: Tensors, count: int, least_score: float) -> Iterator[tuple[int, Floats]]:
        for row, scores in enumerate(out["iou_predictions"][:count, 1:]):
            if least_score <= 0 or (scores > least_score).any():
                yield row, scores

    def _submit(self, pool: ThreadPoolExecutor,
                waiting: _Waiting) -> tuple[Future[Tensors], NDArray[np.int64], Floats]:
        inputs = self._take("click_masks", waiting.factors)
        return pool.submit(self.sam.runtime.click, "click_masks", inputs), *waiting.clear()

    def _take(self, graph: str, own: Tensors) -> Tensors:
        return {n: own[n] if n in own else self._shared[n] for n in self._specs[graph].input_names}


class _Waiting:
    """Clicks that passed, gathered until they fill a batch of the mask graph; rows beyond them hold zeros."""

    def __init__(self, graph: GraphSpec) -> None:
        self._tensors = [t for t in graph.inputs if t.name in FACTORS]
        self.factors: Tensors = {}
        self._points: list[int] = []
        self._scores: list[Floats] = []

    @property
    def count(self) -> int:
        return len(self._points)

    def add(self, point: int, scores: Floats, out: Tensors, row: int) -> bool:
        """Take one row of the score graph's outputs; True when the batch is full."""
        if not self.count:
            # New arrays, because the last batch may still be running.
            self.factors = {t.name: np.zeros(t.concrete(BATCH), np.float32) for t in self._tensors}
        for name, values in self.factors.items():
            values[self.count] = out[name][row]
        self._points.append(point)
        self._scores.append(scores)
        return self.count == BATCH

    def clear(self) -> tuple[NDArray[np.int64], Floats]:
        """Begin a new batch; indices and scores of the one that was gathered."""
        points, scores = np.array(self._points, np.int64), np.array(self._scores, np.float32)
        self._points, self._scores = [], []
        return points, scores
