"""Pack golden outputs of the official implementations into the compact form that the tests read.

    python tools/pack_goldens.py SOURCE_FOLDER tests/reference MODEL [MODEL ...]

SOURCE_FOLDER holds ``<model>.json`` and ``<model>.npz``. Kept: the state_dict manifest, sampled tensors, predicted
IoU and the binary masks. Dropped: float16 copies that are only for looking at. Logits and embeddings are kept at
every second sample of each axis, dense encodings at every second channel.
"""

from __future__ import annotations

import json
import lzma
import sys
from pathlib import Path

import numpy as np

DROPPED = ("_f16", "/stability")
FIELDS = ("name", "repo", "commit", "var_scale", "weights_sha256", "keys", "image_sha256", "input", "input_large",
          "image_size", "mask_shape", "prompts", "observed_fp32_noise")


def thinning(key: str) -> tuple[slice, ...]:
    """Which samples of a tensor to keep."""
    if key.endswith(("low_sub", "embedding_sub")):
        return (slice(None), slice(None, None, 2), slice(None, None, 2))
    if key.endswith(("dense_pe_sub", "dense_sub")):
        return (slice(None, None, 2),)
    return ()


def pack(source: Path, target: Path, name: str) -> int:
    """Write ``<name>.json.xz`` and, where there are outputs, ``<name>.npz``; returns their bytes."""
    manifest = json.loads((source / f"{name}.json").read_text())
    small = {k: manifest[k] for k in FIELDS if k in manifest}
    target.mkdir(parents=True, exist_ok=True)
    text = lzma.compress(json.dumps(small, separators=(",", ":")).encode(), preset=9)
    (target / f"{name}.json.xz").write_bytes(text)
    if not (source / f"{name}.npz").exists():
        return len(text)
    arrays = {}
    with np.load(source / f"{name}.npz") as data:
        for key in data.files:
            if any(part in key for part in DROPPED):
                continue
            arrays[key] = data[key][thinning(key)]
    np.savez_compressed(target / f"{name}.npz", **arrays)
    return len(text) + (target / f"{name}.npz").stat().st_size


if __name__ == "__main__":
    for model in sys.argv[3:]:
        print(model, pack(Path(sys.argv[1]), Path(sys.argv[2]), model), "bytes")
