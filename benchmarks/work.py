"""Floating-point operations and bytes of an exported graph, counted from the file itself.

Operations: two for each multiply-add of a matrix product or convolution (padded places included, as if no algorithm
saved any), one for each added bias and fused activation, one for each output element of an elementwise operator or
normalisation, one for each input element of a reduction, none for moved data. What depends on constants and shapes
alone is computed once and not counted.

Bytes: the weights as stored, and every activation written once and read once. Reshapes and dequantization move nothing,
and an elementwise operator or conversion with a single activation that nobody else reads works in place, as engines
fuse it. An engine that keeps activations in the cache between operators can need fewer.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pocketsam.batching import ENTRY_BATCHES
from pocketsam.benchmarks import kinds
from pocketsam.bundle import Bundle
from pocketsam.errors import MissingDependency, UnknownName, UnsupportedModel, UsageError
from pocketsam.specs import GraphSpec

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Work:
    """What one call of a graph has to do.

    Attributes:
        flops: floating-point (or integer) operations.
        bytes: weights, plus every activation written once and read once.
        by_operator: operations by operator kind as the format names it, most first; kinds without any are left out.
    """

    flops: int
    bytes: int
    by_operator: dict[str, int]


@dataclass(frozen=True)
class Tensor:
    """Shape and bits of an element."""

    shape: tuple[int, ...]
    bits: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return -(-self.elements * self.bits // 8)


@dataclass(frozen=True)
class Step:
    """One operator.

    Attributes:
        kind: as the format names it.
        inputs, outputs: tensor names; the data before the weights.
        flops: operations of products and pooling, where the shapes do not tell; None leaves them to the kind.
        extra: operations that come on top, e.g. a fused activation.
        nearest: a resize that only copies.
    """

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    flops: int | None = None
    extra: int = 0
    nearest: bool = False


@dataclass(frozen=True)
class Graph:
    """Tensors by name, which of them are stored in the file, and steps in execution order."""

    tensors: dict[str, Tensor]
    stored: frozenset[str]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    steps: tuple[Step, ...] = field(repr=False)

    def tensor(self, name: str, step: Step) -> Tensor:
        """A tensor of a step.

        Raises:
            UnsupportedModel: its shape is not known.
        """
        if name not in self.tensors:
            raise UnsupportedModel(f"the shape of {name!r} at an operator {step.kind!r} is not known, so its work "
                                   "cannot be counted; export the bundle again.")
        return self.tensors[name]


class Reader(Protocol):
    """Reads one file of a format."""

    def __call__(self, path: Path, graph: GraphSpec, batch: int) -> Graph: ...


# format -> module with ``read(path, graph, batch)``, its package, and the extra that brings it.
READERS = {
    "onnx": ("pocketsam.benchmarks.graph_onnx", "onnx", "export"),
    "openvino": ("pocketsam.benchmarks.graph_openvino", "openvino", "openvino"),
    "litert": ("pocketsam.benchmarks.graph_litert", "ai-edge-litert", "litert"),
    "coreml": ("pocketsam.benchmarks.graph_coreml", "coremltools", "all"),
}
# These formats hold the prompt decoder once for each batch size.
FIXED_BATCHES = ("litert", "coreml")
BYTE = 8


def count(bundle: Bundle, format: str, precision: str, graph: str, batch: int = 1) -> Work:
    """The work of one call of an exported graph; arguments and errors as :func:`read_graph`.

    Raises:
        UnsupportedModel: the file holds an operator whose work is not known.
    """
    return work_of(read_graph(bundle, format, precision, graph, batch))


def read_graph(bundle: Bundle, format: str, precision: str, graph: str, batch: int = 1) -> Graph:
    """An exported graph as data.

    Args:
        format: ``onnx``, ``openvino``, ``litert`` or ``coreml``.
        graph: ``encoder`` or ``decoder``.
        batch: prompts at once; the encoder takes one image, and LiteRT and Core ML hold decoders for 1 and 16.

    Raises:
        UnknownName: no such format, precision or graph.
        UsageError: a batch that the graph does not take.
        BundleError: the bundle lacks the artifact, or it is damaged.
        MissingDependency: the package that reads the format is not installed.
    """
    spec = graph_spec(bundle, graph)
    if format not in READERS:
        raise UnknownName("format", format, READERS)
    allowed = (1,) if graph == "encoder" else ENTRY_BATCHES if format in FIXED_BATCHES else None
    if batch < 1 or (allowed is not None and batch not in allowed):
        wanted = " or ".join(map(str, allowed)) if allowed else "at least 1"
        raise UsageError(f"batch is {batch}; the {format} {graph} takes {wanted}.")
    path = bundle.file(bundle.find(format, precision, graph))
    return _reader(format)(path, spec, batch)


def share_in_8_bits(bundle: Bundle, format: str, precision: str, graph: str) -> float:
    """The share of a graph's stored numbers that take 8 bits, 0 to 1: how much of it was quantized.

    Arguments and errors as :func:`read_graph`.
    """
    read = read_graph(bundle, format, precision, graph)
    stored = [read.tensors[name] for name in read.stored if name in read.tensors]
    return sum(t.elements for t in stored if t.bits == BYTE) / max(1, sum(t.elements for t in stored))


def graph_spec(bundle: Bundle, graph: str) -> GraphSpec:
    """The contract of one graph of a bundle.

    Raises:
        UnknownName: neither ``encoder`` nor ``decoder``.
    """
    specs = {"encoder": bundle.spec.encoder_graph(), "decoder": bundle.spec.decoder_graph(bundle.slots)}
    if graph not in specs:
        raise UnknownName("graph", graph, specs)
    return specs[graph]


def _reader(format: str) -> Reader:
    module, package, extra = READERS[format]
    try:
        read: Any = importlib.import_module(module).read
    except ModuleNotFoundError as e:
        # The name of what is really missing: Core ML needs torch too.
        raise MissingDependency(e.name or package, extra, f"counting the work of {format} files") from e
    reader: Reader = read
    return reader


def work_of(graph: Graph) -> Work:
    """Add up a graph.

    Raises:
        UnsupportedModel: an operator whose work is not known.
    """
    constant = _constants(graph)
    live = [s for s in graph.steps if any(o not in constant for o in s.outputs)]
    by_operator: dict[str, int] = {}
    for step in live:
        by_operator[step.kind] = by_operator.get(step.kind, 0) + _flops(graph, step, constant)
    ranked = sorted(by_operator.items(), key=lambda item: (-item[1], item[0]))
    moved = _weight_bytes(graph, live, constant) + _activation_bytes(graph, live, constant)
    return Work(sum(by_operator.values()), moved, {k: n for k, n in ranked if n})


def _constants(graph: Graph) -> set[str]:
    """Stored tensors and everything that follows from them and from shapes."""
    constant = set(graph.stored)
    for step in graph.steps:
        if kinds.plain(step.kind) in kinds.SHAPE_ONLY or all(i in constant for i in step.inputs):
            constant.update(step.outputs)
    return constant


def _flops(graph: Graph, step: Step, constant: set[str]) -> int:
    if step.flops is not None:
        return step.flops + step.extra
    cost = "move" if step.nearest else kinds.cost(step.kind)
    if cost is None:
        raise UnsupportedModel(f"the work of the operator {step.kind!r} is not known; add it to "
                               "pocketsam.benchmarks.kinds.")
    if cost in ("view", "move"):
        return step.extra
    names = [i for i in step.inputs if i not in constant][:1] if cost == "reduction" else step.outputs[:1]
    return sum(graph.tensor(n, step).elements for n in names) + step.extra


def _weight_bytes(graph: Graph, live: list[Step], constant: set[str]) -> int:
    """Stored tensors that the live steps read, directly or through steps that were computed once."""
    makers = {o: s for s in graph.steps for o in s.outputs if o in constant}
    todo = [i for s in live for i in s.inputs if i in constant]
    seen: set[str] = set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in makers:
            todo += [i for i in makers[name].inputs if i in constant]
    return sum(graph.tensors[n].bytes for n in seen & graph.stored)


def _activation_bytes(graph: Graph, live: list[Step], constant: set[str]) -> int:
    root = _roots(live, constant)
    readers: dict[str, int] = {}
    working = [s for s in live if not _aliases(s)]
    for step in working:
        for name in {root.get(i, i) for i in step.inputs if i not in constant}:
            readers[name] = readers.get(name, 0) + 1
    kept = {root.get(n, n) for n in (*graph.inputs, *graph.outputs)}
    candidates = {_in_place(graph, step, constant, root) for step in working}
    in_place = {name for name in candidates if name is not None and readers[name] == 1 and name not in kept}
    total = sum(graph.tensors[n].bytes for n in graph.inputs if n in readers)
    for step in working:
        for name in step.outputs:
            if name not in constant and name not in in_place and (name in readers or name in kept):
                total += graph.tensor(name, step).bytes * (1 + (name in readers))
    return total


def _roots(live: list[Step], constant: set[str]) -> dict[str, str]:
    """Each view -> the tensor whose bytes it shows."""
    root: dict[str, str] = {}
    for step in live:
        source = next((i for i in step.inputs if i not in constant), None)
        if _aliases(step) and source is not None:
            root[step.outputs[0]] = root.get(source, source)
    return root


def _aliases(step: Step) -> bool:
    return kinds.cost(step.kind) == "view" or kinds.plain(step.kind) in kinds.DEQUANTIZERS


def _in_place(graph: Graph, step: Step, constant: set[str], root: dict[str, str]) -> str | None:
    """The activation that a step may take over as it is written: its only one, of the size of the result."""
    fusible = kinds.cost(step.kind) == "elementwise" or kinds.plain(step.kind) in kinds.CONVERSIONS
    if step.flops is not None or step.nearest or not fusible:
        return None
    names = {root.get(i, i) for i in step.inputs if i not in constant}
    name = next(iter(names))
    same = graph.tensor(name, step).elements == graph.tensor(step.outputs[0], step).elements
    return name if len(names) == 1 and same else None
