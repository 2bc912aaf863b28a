"""What int8 can mean here, by name, and what every format's file offers for it.

``int8``: static; weights per channel and activations in 8 bits, ranges from calibration. Smallest and fastest, and the
    only recipe that can break masks.
``int8-dynamic``: weights in 8 bits, activations quantized on the fly. Needs no calibration; engines do it for matrix
    products only, so convolutions stay in float arithmetic and nothing is won on convolutional encoders.
``int8-weights``: weights stored in 8 bits per channel, arithmetic in float. A quarter of the size, masks almost
    unchanged, speed of float.

A format that lacks a recipe refuses it by name (:func:`check`); none is replaced by another silently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pocketsam import registry
from pocketsam.doctor import machine
from pocketsam.errors import UnknownName, UnsupportedModel
from pocketsam.specs import GraphSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pocketsam.quantize.channels import Form
    from pocketsam.quantize.correction import Layer, Prepared
    from pocketsam.quantize.grid import Grid

RECIPES = {
    "int8": "weights per channel and activations in 8 bits, ranges from calibration",
    "int8-dynamic": "weights in 8 bits, activations quantized at run time",
    "int8-weights": "weights in 8 bits, arithmetic in float",
}


# With these the processor sums u8 x s8 products in 32 bits. AVX2 sums pairs in 16 bits, which saturate.
WIDE_SUMS = frozenset({"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"})


def wide_sums() -> bool:
    """Whether this processor multiplies u8 with 8-bit s8 weights without saturation."""
    return bool(WIDE_SUMS & set(machine()["features"]))


def narrow_grid() -> Grid:
    """The grid for engines that multiply u8 with s8 as this processor does."""
    return "full" if wide_sums() else "pairs"


@dataclass(frozen=True)
class Job:
    """One graph to quantize.

    Attributes:
        spec: its contract.
        source: an fp32 artifact of the same format, a file or folder: the encoder with rounded weights and corrected
            biases (see :mod:`pocketsam.quantize.correction`), the decoder as it is.
        module: the torch module that ``source`` was made from, float, in eval mode.
        recipe: a name of ``RECIPES``.
        inputs: called with a prompt batch, gives calibration inputs by contract name, one at a time.
        threads: CPU threads of calibration.
        prepared: of the encoder: the grid of its weights, and what was seen of its layers.
    """

    spec: GraphSpec
    source: Path
    module: Any
    recipe: str
    inputs: Callable[[int], Iterable[dict[str, Any]]]
    threads: int = 2
    prepared: Prepared | None = None

    def layer_of(self, weights: NDArray[Any]) -> Layer | None:
        """What PyTorch found for the layer with these weights; None for the decoder, and for layers left in float."""
        return None if self.prepared is None else self.prepared.layer_of(weights)


class Quantizer(Protocol):
    """One file of this package: calibrates once, then writes as often as the search asks.

    Attributes:
        name: of the format.
        recipes: what the format has.
        grid: of weights in recipe ``int8``, a function because it may depend on the processor.
        scales: how scales of channels must be written so that the format's converter leaves them where they are.
        rounds_outputs: whether what a layer writes is rounded even where it goes on in float.
    """

    name: str
    recipes: tuple[str, ...]
    scales: Form
    rounds_outputs: bool

    @staticmethod
    def grid() -> Grid: ...

    def __init__(self, job: Job) -> None: ...

    @staticmethod
    def tools() -> dict[str, str]:
        """Versions that an artifact depends on."""
        ...

    @staticmethod
    def check_source(path: Path) -> None:
        """Raises UnsupportedModel if the tool cannot read an artifact."""
        ...

    def layers(self) -> dict[str, NDArray[Any]]:
        """Names of the weighted layers in execution order, with their weights in the format's layout."""
        ...

    def attention(self) -> list[str]:
        """Names of the global attention that has an 8-bit form."""
        ...

    def write(self, path: Path, keep: frozenset[str] = frozenset()) -> None:
        """Write the quantized graph, with the operators of ``keep`` in float."""
        ...


def check(format_: str, recipe: str) -> type[Quantizer]:
    """The quantizer of a format.

    Raises:
        UnknownName: no such recipe.
        UnsupportedModel: this format does not have it; the message names those it has.
        MissingDependency: its packages are not installed.
    """
    if recipe not in RECIPES:
        raise UnknownName("recipe", recipe, RECIPES)
    found: type[Quantizer] = registry.load("quantizer", format_)
    if recipe not in found.recipes:
        raise UnsupportedModel(f"{format_} has no recipe {recipe} ({RECIPES[recipe]}); it has "
                               f"{', '.join(found.recipes)}.")
    return found
