"""Batches by step number, made ahead of time by threads."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import torch

Item = TypeVar("Item")


def seeded(device: torch.device | str, *parts: int | str) -> torch.Generator:
    """A generator that depends on nothing but ``parts``: a step can be made again, in any order, in any thread."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=7).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big"))


class Feed(Generic[Item]):
    """What ``make(step)`` returns, for growing steps.

    Args:
        make: pure in ``step``; torch releases the interpreter lock in most of it.
        workers: threads, each making one item; 0 makes them when asked.
    """

    def __init__(self, make: Callable[[int], Item], workers: int) -> None:
        self.make, self.workers = make, workers
        self.pool = ThreadPoolExecutor(workers) if workers else None
        self.ahead: dict[int, Future[Item]] = {}

    def get(self, step: int) -> Item:
        """The item of a step; the next ones are started."""
        if self.pool is None:
            return self.make(step)
        for i in range(step, step + self.workers + 1):
            if i not in self.ahead:
                self.ahead[i] = self.pool.submit(self.make, i)
        return self.ahead.pop(step).result()

    def close(self) -> None:
        """Forget what was made ahead."""
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)
        self.ahead.clear()
