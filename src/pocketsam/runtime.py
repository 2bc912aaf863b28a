"""The contract of a runtime: a few members, the same for every engine."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pocketsam.errors import BundleError, UsageError
from pocketsam.geometry import Frame
from pocketsam.images import Rgb
from pocketsam.resampling import Floats
from pocketsam.specs import GraphSpec, ModelSpec

Features = dict[str, Floats]
Tensors = dict[str, NDArray[np.float32]]


class Runtime(Protocol):
    """Executes the graphs of one model.

    Attributes:
        clicks: whether it has the click graphs (``pocketsam.click_specs``).
        click_workers: how many calls of :meth:`click` run side by side, each on one thread: batches are independent,
            and so nothing waits at the end of every operator.
    """

    spec: ModelSpec
    slots: int
    clicks: bool
    click_workers: int

    def encode(self, image: Rgb, frame: Frame) -> Features:
        """uint8 (1, S, S, 3) RGB -> features by contract name; ``frame`` says where the content ends."""
        ...

    def decode(self, features: Features, prompts: Tensors) -> Tensors:
        """Features and ``decoder_inputs`` for B prompts -> low_res_masks (B, 4, 4h, 4w), iou_predictions (B, 4)."""
        ...

    def click(self, graph: str, inputs: Tensors) -> Tensors:
        """Run ``click_image``, ``click_scores`` or ``click_masks``; prompts come ``click_specs.BATCH`` at a time."""
        ...

    def info(self) -> dict[str, Any]:
        """Name, engine version, threads, precision, weights sha256: what a report must say beside a number."""
        ...


def check_tensors(place: object, graph: GraphSpec, found: Mapping[str, tuple[str, Sequence[Any]]]) -> None:
    """Hold an opened graph to the contract, so that what does not fit is named here and not by the engine later.

    Args:
        place: the file, to be named.
        found: numpy's name of the dtype, and sizes, by tensor; a size that is no positive number is free.

    Raises:
        BundleError: a tensor has another dtype or shape.
    """
    for tensor in (*graph.inputs, *graph.outputs):
        dtype, shape = found[tensor.name]
        fits = len(shape) == len(tensor.shape) and all(
            want == got for want, got in zip(tensor.shape, shape, strict=True)
            if isinstance(want, int) and isinstance(got, int | np.integer) and got > 0)
        if not fits or dtype != tensor.dtype:
            raise BundleError(f"{place} has {tensor.name} as {dtype} {tuple(shape)}, and bundle.json says "
                              f"{tensor.dtype} {tensor.shape}; export the bundle again.")


def check_threads(threads: Any) -> int | None:
    """A number of threads as an int, numpy's included; None stays.

    Raises:
        UsageError: it is no whole number, or below 1.
    """
    if threads is None:
        return None
    try:
        count = operator.index(threads)
    except TypeError:
        count = 0
    if count < 1:
        raise UsageError(f"threads is {threads}; expected a whole number of at least 1.")
    return count


@contextmanager
def sparing(runtime: Runtime) -> Iterator[None]:
    """Let ``encode`` give back what it needed to compute, for callers that go on for long without encoding.

    Only engines with a member ``sparing`` can; costs a tenth of an encoder call.
    """
    if not hasattr(runtime, "sparing"):
        yield
        return
    runtime.sparing = True
    try:
        yield
    finally:
        runtime.sparing = False
