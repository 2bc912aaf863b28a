"""Looking into a module while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

# Module, "before" or "after", and a torch hook: (module, inputs) or (module, inputs, output).
Hook = tuple[nn.Module, str, Callable[..., Any]]


@contextmanager
def hooked(hooks: Iterable[Hook]) -> Iterator[None]:
    """Register hooks, and remove them at the end."""
    handles = [part.register_forward_pre_hook(call) if when == "before" else part.register_forward_hook(call)
               for part, when, call in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
