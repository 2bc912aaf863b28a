"""Write the deterministic checkpoint of a model, in the official key order, as if it had been downloaded.

    python tests/reference/make_checkpoint.py mobile_sam mobile_sam_deterministic.pt

These are not trained weights: they exist to prove that every runtime computes what the official code computes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from goldens import FILES, Golden, weights


def make(model: str, path: Path) -> None:
    """Save a bare state_dict."""
    torch.save({k: torch.from_numpy(v) for k, v in weights(Golden.of(model).manifest).items()}, path)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in FILES:
        sys.exit(f"usage: make_checkpoint.py MODEL FILE, with MODEL one of {', '.join(FILES)}")
    make(sys.argv[1], Path(sys.argv[2]))
    print(f"wrote {sys.argv[2]}: deterministic, untrained weights of {sys.argv[1]}")
