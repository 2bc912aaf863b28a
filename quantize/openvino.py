"""OpenVINO IR through NNCF."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as opset

from pocketsam.bundle import IR_FILE
from pocketsam.export.openvino import save
from pocketsam.quantize.openvino_attention import global_attention, make_signed, spell_out
from pocketsam.quantize.openvino_ranges import leave_to_layers, set_range
from pocketsam.quantize.recipes import Job, narrow_grid
from pocketsam.quantize.tables import in_8_bits, is_table
from pocketsam.quiet import quiet

if TYPE_CHECKING:
    from pocketsam.quantize.channels import Form
    from pocketsam.quantize.correction import Layer
    from pocketsam.quantize.ranges import Range

PASSED = ("Convert", "Reshape", "Transpose")
# Operators that add a table, and which of their inputs it can be.
ADDED = {"Add": (0, 1), "ScaledDotProductAttention": (3,)}
WEIGHTED = ("Convolution", "GroupConvolution", "ConvolutionBackpropData", "MatMul")
# They compute in float whatever they read, so rounding it (a residual stream, queries and keys) gains nothing.
FLOAT = ("MVN", "Multiply", "Pad", "ReduceMean", "ReduceSum", "ScaledDotProductAttention")


class OpenVinoQuantizer:
    """``int8``: NNCF post-training quantization, unsigned activations; ``int8-weights``: NNCF weight compression.

    Dynamic int8 is refused: OpenVINO has it for the large matrix products of language models only.
    """

    name = "openvino"
    recipes: tuple[str, ...] = ("int8", "int8-weights")
    scales: Form = "reshape"
    rounds_outputs = False

    grid = staticmethod(narrow_grid)

    def __init__(self, job: Job) -> None:
        self.job = job
        self._samples: list[Any] = []

    @staticmethod
    def tools() -> dict[str, str]:
        """Versions that an artifact depends on."""
        return {"nncf": metadata.version("nncf")}

    @staticmethod
    def check_source(path: Path) -> None:
        """Takes every artifact."""

    def layers(self) -> dict[str, NDArray[Any]]:
        """The operators with constant weights."""
        return {o.get_friendly_name(): weights for o in self._read().get_ordered_ops()
                if (weights := _weights(o)) is not None}

    def attention(self) -> list[str]:
        """Global attention, whose logits may be rounded."""
        return self._attention(self._read())

    def write(self, path: Path, keep: frozenset[str] = frozenset()) -> None:
        """Write the quantized IR, with the operators of ``keep`` in float."""
        with quiet():
            import nncf

            model = self._read()
            logits = spell_out(model, set(self._attention(model)) - keep)
            computed = {*self._computed(model), *self._tables(model)}.difference(logits)
            ignored = nncf.IgnoredScope(names=sorted(computed | keep), validate=False)
            layers = self._rounded(model)
            if self.job.recipe == "int8-weights":
                done = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM, ignored_scope=ignored)
                for operator in done.get_ordered_ops():
                    if (name := operator.get_friendly_name()) in layers:
                        _recompress(operator, *layers[name])
            else:
                done = self._quantized(model, layers, ignored)
                make_signed(done, logits)
                if self.job.prepared is not None:
                    leave_to_layers(done, {*layers, *logits} - keep)
            _store_tables(done)
            save(done, path)

    def _attention(self, model: ov.Model) -> list[str]:
        """Of the encoder only: in the decoder each token's attention to the image decides on the mask."""
        return global_attention(model) if self.job.recipe == "int8" and self.job.prepared is not None else []

    def _quantized(self, model: ov.Model, rounded: dict[str, tuple[NDArray[np.float32], Layer]],
                   ignored: Any) -> ov.Model:
        import nncf
        from nncf.quantization.range_estimator import RangeEstimatorParametersSet

        self._samples = self._samples or list(self.job.inputs(1))
        # Biases are corrected before; saturation is avoided by the grid, which costs less than a whole bit.
        advanced = nncf.AdvancedQuantizationParameters(
            overflow_fix=nncf.OverflowFix.DISABLE, disable_bias_correction=self.job.prepared is not None,
            activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX)
        done = nncf.quantize(model, nncf.Dataset(self._samples), subset_size=len(self._samples),
                             preset=nncf.QuantizationPreset.MIXED, ignored_scope=ignored,
                             advanced_parameters=advanced)
        for operator in done.get_ordered_ops():
            if (name := operator.get_friendly_name()) in rounded:
                weights, layer = rounded[name]
                _requantize(operator, weights, layer)
                _narrow(_behind(operator.input_value(0).get_node()), layer.reads)
                for reader in [] if layer.activated else _readers(operator):
                    _narrow(reader, layer.writes)
        for operator in done.get_ordered_ops():
            _flatten(operator)
        return done

    def _rounded(self, model: ov.Model) -> dict[str, tuple[NDArray[np.float32], Layer]]:
        """Names of the layers that are prepared for 8 bits, with their weights and what is known of them."""
        return {o.get_friendly_name(): (weights, layer) for o in model.get_ordered_ops()
                if (weights := _weights(o)) is not None and (layer := self.job.layer_of(weights)) is not None}

    def _tables(self, model: ov.Model) -> list[str]:
        """Products with constants that are no layer, such as SAM's tables of relative positions: what reads them is a
        bias of the attention logits, and queries would be rounded for them alone.
        """
        if self.job.prepared is None or self.job.recipe != "int8":
            return []
        return [o.get_friendly_name() for o in model.get_ordered_ops()
                if (weights := _weights(o)) is not None and self.job.layer_of(weights) is None]

    def _read(self) -> ov.Model:
        return ov.Core().read_model(self.job.source / IR_FILE)

    @staticmethod
    def _computed(model: ov.Model) -> list[str]:
        """Products of two computed tensors (values of attention, mask head) collapse in 8 bits, sums would round a
        residual stream once more, what a scale for each channel mends must not be rounded before it, and what others
        read is rounded for nothing: all stay in float.
        """
        return [o.get_friendly_name() for o in model.get_ordered_ops()
                if (o.get_type_name() == "MatMul" and not _weighted(o))
                or (o.get_type_name() == "Add" and not _adds_constant(o))
                or o.get_type_name() in FLOAT]


def _weighted(operator: Any) -> bool:
    if operator.get_type_name() not in WEIGHTED:
        return False
    return any(_constant(operator.input_value(i).get_node()) for i in range(operator.get_input_size()))


def _weights(operator: Any) -> NDArray[np.float32] | None:
    """The constant weights of a float operator, or None."""
    if not _weighted(operator):
        return None
    for i in range(operator.get_input_size()):
        node = _behind(operator.input_value(i).get_node())
        if node.get_type_name() == "Constant":
            return np.array(node.data, np.float32)
    return None


def _requantize(operator: Any, weights: NDArray[np.float32], layer: Layer) -> None:
    """Replace the tool's int8 weights, Multiply(Convert(Constant), scale), by those on the scales of a layer."""
    product = operator.input_value(1).get_node()
    if product.get_type_name() != "Multiply" or layer.scales is None:
        return
    codes, column = _on_grid(operator, weights, layer, list(product.get_output_shape(0)))
    product.input(0).replace_source_output(opset.convert(opset.constant(codes), "f32").output(0))
    product.input(1).replace_source_output(opset.constant(column).output(0))


def _recompress(operator: Any, weights: NDArray[np.float32], layer: Layer) -> None:
    """Replace the tool's compressed weights, Convert(Multiply(Convert(Constant), scale)), which it rounds to a grid of
    its own, by those on the scales of a layer.
    """
    for i in range(operator.get_input_size()):
        node = operator.input_value(i).get_node()
        product = node.input_value(0).get_node() if node.get_type_name() == "Convert" else node
        if product.get_type_name() == "Multiply" and _constant(product.input_value(0).get_node()):
            codes, column = _on_grid(operator, weights, layer, list(product.get_output_shape(0)))
            restored = opset.multiply(opset.convert(opset.constant(codes), "f32"), opset.constant(column))
            operator.input(i).replace_source_output(restored.output(0))


def _on_grid(operator: Any, weights: NDArray[np.float32], layer: Layer,
             shape: list[int]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """The codes of weights, and the scales of a layer in the shape that multiplies them."""
    assert layer.scales is not None
    # Transposed convolutions have their output channels second, grouped ones theirs by group.
    axes = {"ConvolutionBackpropData": (1,), "GroupConvolution": (0, 1)}.get(operator.get_type_name(), (0,))
    column = layer.scales.numpy().reshape([side if i in axes else 1 for i, side in enumerate(shape)])
    return np.rint(weights.reshape(shape) / column).astype(np.int8), column.astype(np.float32)


def _readers(operator: Any) -> list[Any]:
    """What reads a weighted operator's output, its bias added."""
    nodes = [t.get_node() for t in operator.output(0).get_target_inputs()]
    biased = [n for n in nodes if n.get_type_name() == "Add" and _adds_constant(n)]
    return nodes + [t.get_node() for n in biased for t in n.output(0).get_target_inputs()]


def _adds_constant(node: Any) -> bool:
    return any(_constant(node.input_value(i).get_node()) for i in range(2))


def _store_tables(model: ov.Model) -> None:
    """Tables that are added go to 8 bits."""
    for operator in model.get_ordered_ops():
        for i in ADDED.get(operator.get_type_name(), ()):
            if i >= operator.get_input_size():
                continue
            node = operator.input_value(i).get_node()
            if node.get_type_name() == "Constant" and is_table(tuple(node.get_output_shape(0))):
                table = in_8_bits(np.array(node.data, np.float32))
                codes = opset.convert(opset.constant(table.codes), "f32")
                operator.input(i).replace_source_output(
                    opset.multiply(codes, opset.constant(table.column())).output(0))


def _narrow(quantizer: Any, span: Range) -> None:
    """Give a FakeQuantize of activations another range, zero exact; other operators are left alone."""
    if quantizer.get_type_name() != "FakeQuantize":
        return
    from pocketsam.quantize.ranges import UINT8, affine

    scale, zero = affine(*span)
    set_range(quantizer, -zero * scale, (UINT8 - zero) * scale)


def _flatten(operator: Any) -> None:
    """One range for a whole activation: before a depthwise convolution the tool takes one for each index of axis 1,
    which are the tokens of a transformer, each as the calibration photos had them.
    """
    if operator.get_type_name() == "FakeQuantize":
        low, high = (np.array(operator.input_value(i).get_node().data) for i in (1, 2))
        if low.size > 1:
            _narrow(operator, (min(0.0, float(low.min())), max(0.0, float(high.max()))))


def _behind(node: Any) -> Any:
    """What a tensor is before it passes conversions and reshapes."""
    while node.get_type_name() in PASSED and node.get_input_size():
        node = node.input_value(0).get_node()
    return node


def _constant(node: Any) -> bool:
    return bool(_behind(node).get_type_name() == "Constant")
