"""A runtime without a network: clicks answer with three nested blobs around the nearest of some seeded centres."""

from __future__ import annotations

from typing import Any

import numpy as np

from pocketsam.geometry import Frame
from pocketsam.specs import ModelSpec


class BlobRuntime:
    """Masks of many sizes, some unstable, some duplicates, each with a score: work for every filter."""

    slots = 8

    def __init__(self, centres: int = 25, side: int = 128) -> None:
        self.spec = ModelSpec(name="blobs", family="test", image_size=side, embed_dim=4, embed_size=side // 16)
        self.centres = centres

    def encode(self, image: Any, frame: Frame) -> dict[str, Any]:
        seed = int(image.astype(np.int64).sum()) % 2 ** 31
        features = np.zeros((1, 4, self.spec.embed_size, self.spec.embed_size), np.float32)
        features[0, 0, 0, :3] = seed % 1009, frame.content_height, frame.content_width
        return {"image_embeddings": features}

    def decode(self, features: dict[str, Any], prompts: dict[str, Any]) -> dict[str, Any]:
        m, scale = self.spec.mask_size, self.spec.image_size / self.spec.mask_size
        seed, height, width = features["image_embeddings"][0, 0, 0, :3]
        rng = np.random.default_rng(int(seed))
        centres = rng.uniform(0, 1, (self.centres, 2)) * (width, height) / scale
        radii = rng.uniform(1, 0.3 * m, (self.centres, 2))
        slope = rng.choice([0.3, 1.0, 6.0, 40.0], (self.centres, 4))
        wave = rng.uniform(0.5, 3, (self.centres, 2))
        ys, xs = np.mgrid[:m, :m] + 0.5
        points = prompts["point_coords"][:, 0] / scale
        masks = np.empty((len(points), 4, m, m), np.float32)
        scores = np.empty((len(points), 4), np.float32)
        for i, point in enumerate(points):
            k = int(((centres - point) ** 2).sum(1).argmin())
            dx, dy = (xs - centres[k, 0]) / radii[k, 0], (ys - centres[k, 1]) / radii[k, 1]
            distance = np.hypot(dx, dy) + 0.1 * np.sin(wave[k, 0] * xs + wave[k, 1] * ys + 0.05 * point.sum())
            for token in range(4):
                masks[i, token] = slope[k, token] * (0.5 + 0.25 * token - distance) * 4
                scores[i, token] = 0.5 + 0.5 * np.sin(k + 7 * token + 0.01 * point.sum())
        return {"low_res_masks": masks, "iou_predictions": scores}

    def info(self) -> dict[str, Any]:
        return {"runtime": "blobs", "version": "1", "precision": "fp32", "threads": 1, "weights_sha256": "0" * 64}
