"""Randomness by step number: a step can be made again, in any order, by any process."""

from __future__ import annotations

import hashlib

import torch


def seeded(device: torch.device | str, *parts: int | str) -> torch.Generator:
    """A generator that depends on nothing but ``parts``."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=7).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big"))
