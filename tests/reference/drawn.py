"""Drawn images with labels, and a segmenter small enough to train on them within a test."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tars import write_tar
from torch import Tensor, nn

from pocketsam.models.mask_decoder import MaskDecoder
from pocketsam.models.prompt_encoder import PromptEncoder
from pocketsam.models.sam import Features, SegmentAnything
from pocketsam.specs import ModelSpec
from pocketsam.training.augment import Augment

SIZE = 64
PLAIN = Augment(whole=1, flip=0, colour=0, grey=0)


def png(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "png")
    return stream.getvalue()


def write_pack(path: Path, seed: int = 0) -> Path:
    """Six drawn images of two sources: a rectangle and a disc on noise, the last with ids above 255."""
    rng = np.random.default_rng(seed)
    members: dict[str, bytes] = {}
    index = []
    for i in range(6):
        h, w = (60, 90) if i % 2 else (90, 60)
        image = rng.integers(0, 60, (h, w, 3), dtype=np.uint8)
        ids = np.zeros((h, w), np.uint16 if i == 5 else np.uint8)
        ys, xs = np.mgrid[:h, :w]
        disc, square = (ys - 25) ** 2 + (xs - 25) ** 2 < 15 ** 2, (ys > 32) & (xs > 36) & (xs < 55) & (ys < 58)
        image[disc], image[square] = (220, 60, 40), (30, 200, 90)
        ids[disc], ids[square] = 1, 300 if i == 5 else 2
        members[f"im{i}.jpg"] = png(image)
        members[f"im{i}.0.png"] = png(ids)
        index.append({"id": f"im{i}", "source": f"drawn{i % 2}", "width": w, "height": h, "split": "test",
                      "layers": [{"file": f"im{i}.0.png", "regions": int(ids.max()), "kind": "regions"}]})
    members["index.json"] = json.dumps(index).encode()
    return write_tar(path, members)


class ToyEncoder(nn.Module):
    """One strided convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 64, 16, 16)

    def forward(self, x: Tensor) -> Features:
        return {"image_embeddings": self.conv(x)}


def toy(size: int = SIZE, seed: int = 0) -> SegmentAnything:
    torch.manual_seed(seed)
    spec = ModelSpec("toy", "toy", size, embed_dim=64, embed_size=size // 16)
    return SegmentAnything(spec, ToyEncoder(), PromptEncoder(64, size // 16, size), MaskDecoder(64, 64))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
