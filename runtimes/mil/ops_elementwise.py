"""Operators that act on each element: arithmetic, comparisons, activations and casts."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pocketsam.runtimes.mil.arguments import Arguments, Operator
from pocketsam.runtimes.mil.errors import UnknownOperator

CODES = {"int8": (-128, 127), "uint8": (0, 255)}
GELU = {"EXACT": "none", "TANH_APPROXIMATION": "tanh"}


def unary(function: Callable[[Tensor], Tensor]) -> Operator:
    """An operator with the one input ``x``."""
    return lambda a: function(a["x"])


def binary(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    """An operator with the broadcasting inputs ``x`` and ``y``."""
    return lambda a: function(a["x"], a["y"])


def cast(a: Arguments) -> Tensor:
    """The evaluator converts every result to its declared dtype; only booleans and truncation need care here."""
    dtype = {"fp16": torch.float16, "fp32": torch.float32, "int32": torch.int32, "bool": torch.bool,
             "int8": torch.int8, "uint8": torch.uint8, "int16": torch.int16, "uint16": torch.int32}.get(a.text("dtype"))
    if dtype is None:
        raise UnknownOperator("cast", f"dtype {a.text('dtype')}")
    return a["x"].to(dtype)


def clip(a: Arguments) -> Tensor:
    return a["x"].clamp(a.float("alpha"), a.float("beta"))


def gelu(a: Arguments) -> Tensor:
    mode = a.text("mode", "EXACT")
    if mode == "SIGMOID_APPROXIMATION":
        return a["x"] * torch.sigmoid(1.702 * a["x"])
    if mode not in GELU:
        raise UnknownOperator("gelu", f"mode {mode}")
    return F.gelu(a["x"], approximate=GELU[mode])


def inverse(a: Arguments) -> Tensor:
    return 1 / (a["x"] + a.float("epsilon", 1e-4))


def log(a: Arguments) -> Tensor:
    return torch.log(a["x"] + a.float("epsilon", 1e-45))


def rsqrt(a: Arguments) -> Tensor:
    return torch.rsqrt(a["x"] + a.float("epsilon", 1e-12))


def leaky_relu(a: Arguments) -> Tensor:
    return F.leaky_relu(a["x"], a.float("alpha", 0.01))


def elu(a: Arguments) -> Tensor:
    return F.elu(a["x"], a.float("alpha", 1.0))


def prelu(a: Arguments) -> Tensor:
    """One slope for each channel, the second axis."""
    return F.prelu(a["x"], a["alpha"])


def sigmoid_hard(a: Arguments) -> Tensor:
    return (a.float("alpha", 0.2) * a["x"] + a.float("beta", 0.5)).clamp(0, 1)


def real_div(a: Arguments) -> Tensor:
    return a["x"] / a["y"]


def quantize(a: Arguments) -> Tensor:
    """round(input / scale) + zero point, clamped to the codes of ``output_dtype``; scale scalar or along ``axis``."""
    kind = a.text("output_dtype")
    if kind not in CODES:
        raise UnknownOperator("quantize", f"output_dtype {kind}")
    x = a["input"]
    scale, zero = _affine(a, x)
    return (torch.round(x / scale) + zero).clamp(*CODES[kind])


def dequantize(a: Arguments) -> Tensor:
    """(input - zero point) * scale."""
    x = a["input"]
    scale, zero = _affine(a, x)
    return (x.to(scale.dtype) - zero) * scale


def _affine(a: Arguments, x: Tensor) -> tuple[Tensor, Tensor]:
    scale, zero = a["scale"], a.optional("zero_point")
    zero = torch.zeros((), dtype=scale.dtype) if zero is None else zero.to(scale.dtype)
    if scale.ndim == 0:
        return scale, zero
    shape = [1] * x.ndim
    shape[a.int("axis")] = -1
    return scale.reshape(shape), zero.reshape(shape) if zero.ndim else zero


def select(a: Arguments) -> Tensor:
    return torch.where(a["cond"].bool(), a["a"], a["b"])


TABLE: dict[str, Operator] = {
    "abs": unary(torch.abs), "ceil": unary(torch.ceil), "cos": unary(torch.cos), "erf": unary(torch.erf),
    "exp": unary(torch.exp), "exp2": unary(torch.exp2), "floor": unary(torch.floor), "identity": unary(lambda x: x),
    "logical_not": unary(torch.logical_not), "relu": unary(F.relu), "relu6": unary(F.relu6),
    "round": unary(torch.round), "sigmoid": unary(torch.sigmoid), "sign": unary(torch.sign),
    "silu": unary(F.silu), "sin": unary(torch.sin), "softplus": unary(F.softplus), "softsign": unary(F.softsign),
    "sqrt": unary(torch.sqrt), "square": unary(torch.square), "tanh": unary(torch.tanh),
    "cast": cast, "clip": clip, "elu": elu, "gelu": gelu, "inverse": inverse, "leaky_relu": leaky_relu, "log": log,
    "prelu": prelu, "rsqrt": rsqrt, "sigmoid_hard": sigmoid_hard,
    "add": binary(torch.add), "sub": binary(torch.sub), "mul": binary(torch.mul), "real_div": real_div,
    "quantize": quantize, "dequantize": dequantize,
    "floor_div": binary(torch.floor_divide), "mod": binary(torch.remainder), "pow": binary(torch.pow),
    "maximum": binary(torch.maximum), "minimum": binary(torch.minimum), "equal": binary(torch.eq),
    "not_equal": binary(torch.ne), "greater": binary(torch.gt), "greater_equal": binary(torch.ge),
    "less": binary(torch.lt), "less_equal": binary(torch.le), "logical_and": binary(torch.logical_and),
    "logical_or": binary(torch.logical_or), "select": select,
}
