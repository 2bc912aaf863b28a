"""Write the deterministic checkpoint of a model, in the official key order, as if it had been downloaded.

    python tests/reference/make_checkpoint.py mobile_sam mobile_sam_deterministic.pt

These are not trained weights: they exist to prove that every runtime computes what the official code computes.
Models without outputs of the official code get the same rule of weights, on the official keys where these are packed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pocketsam import registry

sys.path.insert(0, str(Path(__file__).parent))
from goldens import FILES, MANIFESTS, Golden, read_manifest, tensor, weights

# The larger EfficientViT-SAMs take the scale of their sibling with outputs: larger variances fade the signal.
SCALES = {"efficientvit_sam": read_manifest(FILES["efficientvit_sam_l0"])["var_scale"]}


def keys_of(model: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """Official keys with shape and dtype; of a model without packed ones, those of our module, which has the same."""
    if model in MANIFESTS:
        return {k: (tuple(shape), dtype) for k, (shape, dtype) in read_manifest(MANIFESTS[model])["keys"].items()}
    with torch.device("meta"):
        state = registry.load("model", model)().state_dict()
    return {k: (tuple(v.shape), str(v.dtype)) for k, v in state.items()}


def state_of(model: str) -> dict[str, np.ndarray[Any, Any]]:
    """The deterministic weights of a model."""
    if model in FILES:
        return weights(Golden.of(model).manifest)
    scale = next((s for family, s in SCALES.items() if model.startswith(family)), 1.0)
    return {k: tensor(k, shape, scale) if "float" in dtype else np.zeros(shape, np.int64)
            for k, (shape, dtype) in keys_of(model).items()}


def make(model: str, path: Path) -> None:
    """Save a bare state_dict."""
    torch.save({k: torch.from_numpy(v) for k, v in state_of(model).items()}, path)


if __name__ == "__main__":
    known = [m for m in registry.MODELS if m != "lite0"]
    if len(sys.argv) != 3 or sys.argv[1] not in known:
        sys.exit(f"usage: make_checkpoint.py MODEL FILE, with MODEL one of {', '.join(known)}")
    make(sys.argv[1], Path(sys.argv[2]))
    print(f"wrote {sys.argv[2]}: deterministic, untrained weights of {sys.argv[1]}")
