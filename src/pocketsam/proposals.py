"""Object proposals from automatic masks (SAM paper, appendix D.3), and their average recall."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pocketsam.errors import UsageError
from pocketsam.everything import MaskRecord, Settings, segment_everything
from pocketsam.images import ImageLike

if TYPE_CHECKING:
    from pocketsam.predictor import Predictor

# The paper: no filters, duplicates above 0.9 removed, ranked by the mean of predicted IoU and stability.
PROPOSALS = Settings(points_per_side=64, pred_iou=0, stability=0, nms=0.9)
MOST = 1000
IOUS = np.linspace(0.5, 0.95, 10)


def propose(sam: Predictor, image: ImageLike, settings: Settings = PROPOSALS, most: int = MOST) -> list[MaskRecord]:
    """Class-agnostic proposals, best first.

    Args:
        image: path, PIL image or uint8 (H, W, 3) RGB array.
        settings: the paper's; a coarser grid is faster.
        most: at most this many.

    Raises:
        UsageError: ``most`` is below 1.
    """
    if most < 1:
        raise UsageError(f"most is {most}; expected at least 1.")
    records = segment_everything(sam, image, settings)
    return sorted(records, key=lambda r: -(r.score + r.stability))[:most]


def recalls(proposed: NDArray[np.float64], truth: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """How many true boxes the best ``count`` proposals find at each of the IoUs 0.5, 0.55, ..., 0.95.

    Each proposal finds one box at most: pairs are taken greedily, highest IoU first.

    Args:
        proposed: (N, 4) x0, y0, x1, y1 inclusive, best first.
        truth: (K, 4).

    Returns:
        float64 (10,) numbers of boxes found.
    """
    ious = _ious(proposed[:count], truth)
    matched = []
    while ious.size and ious.max() >= IOUS[0]:
        i, j = np.unravel_index(int(ious.argmax()), ious.shape)
        matched.append(ious[i, j])
        ious[i, :] = ious[:, j] = -1
    found: NDArray[np.float64] = (np.array(matched)[:, None] >= IOUS - 1e-9).sum(0).astype(np.float64)
    return found


def average_recall(found: Sequence[NDArray[np.float64]], total: int) -> float:
    """Mean over the ten IoUs of the fraction of boxes found, summed over photos."""
    return float(np.sum(found, axis=0).mean() / total) if total else 0.0


def _ious(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N, K) IoU of pixel boxes with inclusive corners."""
    size = np.maximum(0, np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2]) + 1)
    inter: NDArray[np.float64] = size[..., 0] * size[..., 1]
    areas = [(x[:, 2] - x[:, 0] + 1) * (x[:, 3] - x[:, 1] + 1) for x in (a, b)]
    out: NDArray[np.float64] = inter / (areas[0][:, None] + areas[1][None] - inter)
    return out
