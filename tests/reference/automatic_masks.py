"""Automatic masks, written plainly: every mask at full size, every step in the order of the official generator.

Slow on purpose and independent of ``pocketsam.everything``: torch, full bitmaps, no bounds, no windows.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F


def crop_boxes(h: int, w: int, layers: int, ratio: float) -> list[tuple[int, int, int, int, int]]:
    boxes = [(0, 0, w, h, 0)]
    for layer in range(layers):
        n = 2 ** (layer + 1)
        overlap = int(ratio * min(h, w) * (2 / n))
        cw, ch = (math.ceil((overlap * (n - 1) + side) / n) for side in (w, h))
        for i in range(n):
            for j in range(n):
                x, y = (cw - overlap) * i, (ch - overlap) * j
                boxes.append((x, y, min(x + cw, w), min(y + ch, h), layer + 1))
    return boxes


def box_iou(a: np.ndarray, b: np.ndarray) -> float:
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    inter = max(w, 0) * max(h, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    return inter / union if union > 0 else 0.0


def nms(boxes: list[np.ndarray], scores: list[float], threshold: float) -> list[int]:
    kept: list[int] = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if all(box_iou(boxes[i], boxes[k]) <= threshold for k in kept):
            kept.append(i)
    return kept


def full_size(low_res: torch.Tensor, frame: Any) -> torch.Tensor:
    x = F.interpolate(low_res[None, None], (frame.size, frame.size), mode="bilinear", align_corners=False)
    x = x[..., :frame.content_height, :frame.content_width]
    return F.interpolate(x, (frame.height, frame.width), mode="bilinear", align_corners=False)[0, 0]


def near_inner_edge(box: np.ndarray, crop: tuple[int, ...], w: int, h: int) -> bool:
    placed = box + np.array([crop[0], crop[1], crop[0], crop[1]])
    crop_edge = np.isclose(placed, crop[:4], atol=20, rtol=0)
    photo_edge = np.isclose(placed, (0, 0, w, h), atol=20, rtol=0)
    return bool((crop_edge & ~photo_edge).any())


def one_crop(sam: Any, rgb: np.ndarray, crop: tuple[int, ...], s: dict[str, Any]) -> list[dict[str, Any]]:
    from pocketsam.prompts import Prompt

    h, w = rgb.shape[:2]
    x0, y0, x1, y1, layer = crop
    frame = sam.set_image(rgb[y0:y1, x0:x1].copy()).frame
    side = int(s["points_per_side"] / s["crop_points_divide"] ** layer)
    line = np.linspace(1 / (2 * side), 1 - 1 / (2 * side), side)
    rows = []
    for py in line * (y1 - y0):
        points = [(px, py) for px in line * (x1 - x0)]
        low_res, scores = sam.decode_prompts([Prompt.of(frame, sam.spec, points=[p], labels=[1]) for p in points])
        for point, masks, ious in zip(points, low_res, scores, strict=True):
            for token in (1, 2, 3):
                if s["pred_iou"] > 0 and not ious[token] > s["pred_iou"]:
                    continue
                logits = full_size(torch.from_numpy(masks[token].copy()), frame)
                inner = int((logits > s["stability_offset"]).sum())
                outer = int((logits > -s["stability_offset"]).sum())
                if s["stability"] > 0 and (outer == 0 or inner / outer < s["stability"]):
                    continue
                mask = (logits > 0).numpy()
                if not mask.any():
                    continue
                ys, xs = np.nonzero(mask)
                box = np.array([xs.min(), ys.min(), xs.max(), ys.max()])
                if near_inner_edge(box, crop, w, h):
                    continue
                whole = np.zeros((h, w), bool)
                whole[y0:y1, x0:x1] = mask
                rows.append({"mask": whole, "box": box + np.array([x0, y0, x0, y0]), "score": float(ious[token]),
                             "stability": inner / max(1, outer), "point": (point[0] + x0, point[1] + y0),
                             "crop": (x0, y0, x1 - x0, y1 - y0)})
    return [rows[i] for i in nms([r["box"] for r in rows], [r["score"] for r in rows], s["nms"])]


def generate(sam: Any, rgb: np.ndarray, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Dictionaries with mask, box (inclusive corners), score, stability, point, crop."""
    h, w = rgb.shape[:2]
    boxes = crop_boxes(h, w, settings["crop_layers"], settings["crop_overlap"])
    rows = [r for crop in boxes for r in one_crop(sam, rgb, crop, settings)]
    if len(boxes) > 1:
        areas = [r["crop"][2] * r["crop"][3] for r in rows]
        rows = [rows[i] for i in nms([r["box"] for r in rows], [1 / a for a in areas], settings["crop_nms"])]
    return rows
