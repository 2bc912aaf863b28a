"""Deterministic weights, image and prompts of the golden outputs.

Every weight depends only on its state_dict key and shape, so the exact float32 checkpoint that the official code was
run with can be made again anywhere. ``python tests/reference/make_checkpoint.py`` writes it as a file.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
# Registry name -> name of the golden files.
FILES = {
    "sam_vit_b": "sam_vit_b", "mobile_sam": "mobile_sam_vit_t", "repvit_sam": "repvit_sam", "edge_sam": "edge_sam",
    "sam_hq_vit_b": "sam_hq_vit_b", "sam_hq_vit_tiny": "sam_hq_vit_tiny", "efficient_sam_ti": "efficient_sam_vitt",
    "efficient_sam_s": "efficient_sam_vits", "efficientvit_sam_l0": "efficientvit_sam_l0",
    "sam2.1_tiny": "sam2.1_hiera_tiny", "edgetam": "edgetam", "efficienttam_ti": "efficienttam_ti",
    "efficienttam_s": "efficienttam_s",
}
# Official key names and shapes without outputs.
MANIFESTS = {"sam_vit_l": "sam_vit_l", "sam_vit_h": "sam_vit_h", "sam2.1_small": "sam2.1_hiera_small",
             "sam2.1_base_plus": "sam2.1_hiera_base_plus", "sam2.1_large": "sam2.1_hiera_large"}
EMBEDDINGS = re.compile(r"(token|tokens|embed|embeddings|embeddings\.\d+|invalid_points)\.weight$")


@dataclass(frozen=True)
class Golden:
    """Manifest (``keys``, ``prompts``, checksums) and arrays of one model."""

    manifest: dict[str, Any]
    arrays: dict[str, np.ndarray[Any, Any]]

    @classmethod
    def of(cls, model: str) -> Golden:
        name = FILES[model]
        manifest = read_manifest(name)
        with np.load(HERE / f"{name}.npz") as data:
            return cls(manifest, dict(data))

    def modes(self, prompt: str) -> list[str]:
        """The modes that the official predictor was run in for a prompt."""
        return sorted({k.split("/")[1] for k in self.arrays if k.startswith(f"{prompt}/") and k.endswith("/iou")})

    def masks(self, prompt: str, mode: str) -> np.ndarray[Any, Any]:
        """bool (M, H, W) golden masks of one prompt and mode, e.g. ``single`` or ``multi``."""
        shape = (len(self.arrays[f"{prompt}/{mode}/iou"]), *self.manifest["mask_shape"])
        bits = np.unpackbits(self.arrays[f"{prompt}/{mode}/mask_bits"])
        return bits[: int(np.prod(shape))].reshape(shape).astype(bool)


def read_manifest(name: str) -> dict[str, Any]:
    """The official state_dict's keys and shapes, and the facts of the golden run."""
    manifest: dict[str, Any] = json.loads(lzma.decompress((HERE / f"{name}.json.xz").read_bytes()))
    return manifest


def tensor(key: str, shape: tuple[int, ...], var_scale: float = 1.0) -> np.ndarray[Any, Any]:
    """The float32 value of one state_dict entry."""
    base = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)
    last = key.rsplit(".", 1)[-1]
    if last == "running_var":
        return np.float32(var_scale) * (np.float32(1) + np.abs(base))
    if last in ("running_mean", "bias"):
        return np.float32(0.1) * base
    if last == "positional_encoding_gaussian_matrix":
        return base
    if last != "weight":
        return np.float32(0.2) * base
    if EMBEDDINGS.search(key):
        return np.float32(0.5) * base
    if base.ndim == 1:
        return np.float32(1) + np.float32(0.1) * base
    return base * np.float32(1.0 / np.sqrt(np.prod(shape[1:])))


def weights(manifest: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """All entries in official order (integer counters as zeros), checked against the manifest's sha256."""
    out: dict[str, np.ndarray[Any, Any]] = {}
    digest = hashlib.sha256()
    for key, (shape, dtype) in manifest["keys"].items():
        floating = "float" in dtype
        out[key] = tensor(key, tuple(shape), manifest["var_scale"]) if floating else np.zeros(shape, np.int64)
        digest.update(key.encode())
        digest.update(out[key].tobytes())
    if digest.hexdigest() != manifest["weights_sha256"]:
        raise AssertionError(f"deterministic weights of {manifest['name']} differ from the golden run's")
    return out


def image(height: int = 480, width: int = 720, seed: int = 0) -> np.ndarray[Any, Any]:
    """uint8 (height, width, 3): coarse plus fine noise, each enlarged with Pillow's bicubic filter."""
    rng = np.random.default_rng(seed)
    layers = []
    for h, w in ((16, 24), (120, 180)):
        small = Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8))
        layers.append(np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(np.uint16))
    return ((3 * layers[0] + layers[1]) // 4).astype(np.uint8)


def sampled(full: np.ndarray[Any, Any], like: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The samples of (C, N, N) that the goldens hold in ``like``: every second channel or all, a grid from (1, 2)."""
    step = full.shape[-1] // like.shape[-1]
    return full[::full.shape[0] // like.shape[0], 1::step, 2::step]
