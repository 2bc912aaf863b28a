"""Pack golden outputs of the official implementations into the compact form that the tests read.

    python tools/pack_goldens.py SOURCE_FOLDER tests/reference MODEL [MODEL ...]

SOURCE_FOLDER holds ``<model>.json`` and ``<model>.npz``. Kept: the state_dict manifest, sampled tensors, predicted
IoU and the binary masks. Dropped: float16 copies that are only for looking at, outputs of inner modules, and what
follows from kept tensors: the mask prompt is token 0 of prompt a, SAM 2's dynamic mask is one of the three. Logits are
kept at every fourth sample of each axis, features and dense encodings on a grid of 8 x 8 points and at every second
channel.
"""

from __future__ import annotations

import json
import lzma
import sys
from pathlib import Path

import numpy as np

DROPPED = ("_f16", "/stability", "stage/", "bilinear", "logit_sub", "_mean_std", "input_sub", "input_large_sub",
           "mask_input", "feature_0_sub", "single_dynamic/mask_bits", "dense_sub")
KEPT = ("image_embedding_mean_std",)
FIELDS = ("name", "repo", "commit", "var_scale", "weights_sha256", "keys", "image_sha256", "input", "input_large",
          "image_size", "mask_shape", "prompts", "prompt_points", "observed_fp32_noise", "params", "notes")


def thinning(key: str, shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Which samples of a tensor to keep; ``tests/reference/goldens.py`` takes the same from ours."""
    if key.endswith("low_sub"):
        return (slice(None), slice(None, None, 4), slice(None, None, 4))
    if key.endswith(("embedding_sub", "s0_sub", "s1_sub")):
        step = max(1, shape[1] // 8)
        return (slice(None, None, 2), slice(None, None, step), slice(None, None, step))
    if key.endswith(("dense_pe_sub", "dense_sub")):
        return (slice(None, None, 2),)
    return ()


def pack(source: Path, target: Path, name: str) -> int:
    """Write ``<name>.json.xz`` and, where there are outputs, ``<name>.npz``; returns their bytes."""
    manifest = json.loads((source / f"{name}.json").read_text("utf-8"))
    small = {k: manifest[k] for k in FIELDS if k in manifest}
    target.mkdir(parents=True, exist_ok=True)
    text = lzma.compress(json.dumps(small, separators=(",", ":")).encode(), preset=9)
    (target / f"{name}.json.xz").write_bytes(text)
    if not (source / f"{name}.npz").exists():
        return len(text)
    arrays = {}
    with np.load(source / f"{name}.npz") as data:
        for key in data.files:
            if key not in KEPT and any(part in key for part in DROPPED):
                continue
            arrays[key] = data[key][thinning(key, data[key].shape)]
    np.savez_compressed(target / f"{name}.npz", **arrays)
    return len(text) + (target / f"{name}.npz").stat().st_size


if __name__ == "__main__":
    for model in sys.argv[3:]:
        print(model, pack(Path(sys.argv[1]), Path(sys.argv[2]), model), "bytes")
