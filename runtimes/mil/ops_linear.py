"""Matrix products, convolutions, pooling and resizing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pocketsam.runtimes.mil.arguments import Arguments, Operator
from pocketsam.runtimes.mil.errors import UnknownOperator

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def linear(a: Arguments) -> Tensor:
    return F.linear(a["x"], a["weight"], a.optional("bias"))


def matmul(a: Arguments) -> Tensor:
    x, y = a["x"], a["y"]
    return (x.mT if a.flag("transpose_x") else x) @ (y.mT if a.flag("transpose_y") else y)


def attention(a: Arguments) -> Tensor:
    """Softmax(query key^T / sqrt(width) + mask) value; a boolean mask keeps what is true."""
    return F.scaled_dot_product_attention(a["query"], a["key"], a["value"], a.optional("attn_mask"))


def padding(a: Arguments, size: list[int], kernel: list[int], strides: list[int], dilations: list[int]) -> list[int]:
    """(before, after) for each spatial axis, first axis first."""
    kind = a.text("pad_type", "valid")
    if kind == "valid":
        return [0] * 2 * len(kernel)
    if kind == "custom":
        return a.ints("pad", [0] * 2 * len(kernel))
    if kind not in ("same", "same_lower"):
        raise UnknownOperator(a.operator, f"pad_type {kind}")
    out = []
    for n, k, s, d in zip(size, kernel, strides, dilations, strict=True):
        total = max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
        small, large = total // 2, total - total // 2
        out += [small, large] if kind == "same" else [large, small]
    return out


def padded(x: Tensor, amounts: list[int], value: float = 0.0) -> Tensor:
    """Pad the spatial axes; torch wants the last axis first."""
    pairs = [amounts[i:i + 2] for i in range(0, len(amounts), 2)]
    return F.pad(x, [n for pair in reversed(pairs) for n in pair], value=value) if any(amounts) else x


def conv(a: Arguments) -> Tensor:
    x, weight = a["x"], a["weight"]
    n = x.ndim - 2
    strides, dilations = a.ints("strides", [1] * n), a.ints("dilations", [1] * n)
    amounts = padding(a, list(x.shape[2:]), list(weight.shape[2:]), strides, dilations)
    return CONV[n](padded(x, amounts), weight, a.optional("bias"), strides, 0, dilations, a.int("groups", 1))


def conv_transpose(a: Arguments) -> Tensor:
    """Padding crops the full result, which is the same as torch's padding when both sides are equal.

    coremltools writes the resulting ``output_shape`` into each program; one that asks for another is refused.
    """
    x, weight = a["x"], a["weight"]
    n = x.ndim - 2
    kind = a.text("pad_type", "valid")
    if kind not in ("valid", "custom"):
        raise UnknownOperator("conv_transpose", f"pad_type {kind}")
    strides, dilations = a.ints("strides", [1] * n), a.ints("dilations", [1] * n)
    y = CONV_TRANSPOSE[n](x, weight, a.optional("bias"), strides, 0, 0, a.int("groups", 1), dilations)
    amounts = a.ints("pad", [0] * 2 * n) if kind == "custom" else [0] * 2 * n
    for axis in range(n):
        before, after = amounts[2 * axis:2 * axis + 2]
        y = y.narrow(axis + 2, before, y.shape[axis + 2] - before - after)
    if (wanted := a.ints("output_shape", list(y.shape))) != list(y.shape):
        raise UnknownOperator("conv_transpose", f"output_shape {wanted}: computed {list(y.shape)}")
    return y


def _windows(a: Arguments, value: float) -> tuple[Tensor, list[int], list[int]]:
    """The padded (B, C, H, W) input with kernel and strides."""
    x, kernel = a["x"], a.ints("kernel_sizes")
    if len(kernel) != 2 or a.flag("ceil_mode"):
        raise UnknownOperator(a.operator, "ceil_mode or one or three axes")
    strides = a.ints("strides", [1, 1])
    return padded(x, padding(a, list(x.shape[2:]), kernel, strides, [1, 1]), value), kernel, strides


def avg_pool(a: Arguments) -> Tensor:
    x, kernel, strides = _windows(a, 0.0)
    y = F.avg_pool2d(x, kernel, strides)
    if a.flag("exclude_padding_from_average"):
        ones = padded(torch.ones_like(a["x"]), padding(a, list(a["x"].shape[2:]), kernel, strides, [1, 1]))
        y = y / F.avg_pool2d(ones, kernel, strides)
    return y


def max_pool(a: Arguments) -> Tensor:
    x, kernel, strides = _windows(a, -float("inf"))
    return F.max_pool2d(x, kernel, strides)


def upsample_nearest(a: Arguments) -> Tensor:
    factors = [a.float("scale_factor_height", 1.0), a.float("scale_factor_width", 1.0)]
    if any(f != int(f) for f in factors):
        raise UnknownOperator("upsample_nearest_neighbor", f"scale factors {factors}")
    return a["x"].repeat_interleave(int(factors[0]), -2).repeat_interleave(int(factors[1]), -1)


def upsample_bilinear(a: Arguments) -> Tensor:
    x = a["x"]
    size = [int(x.shape[-2] * a.float("scale_factor_height", 1.0)),
            int(x.shape[-1] * a.float("scale_factor_width", 1.0))]
    corners = a.flag("align_corners", True)
    if not corners and not a.flag("half_pixel_centers", True):
        raise UnknownOperator("upsample_bilinear", "neither align_corners nor half_pixel_centers")
    return F.interpolate(x, size, mode="bilinear", align_corners=corners)


def resize_bilinear(a: Arguments) -> Tensor:
    mode = a.text("sampling_mode", "DEFAULT")
    if mode not in ("UNALIGN_CORNERS", "STRICT_ALIGN_CORNERS"):
        raise UnknownOperator("resize_bilinear", f"sampling_mode {mode}")
    size = [a.int("target_size_height", 1), a.int("target_size_width", 1)]
    return F.interpolate(a["x"], size, mode="bilinear", align_corners=mode == "STRICT_ALIGN_CORNERS")


TABLE: dict[str, Operator] = {
    "linear": linear, "matmul": matmul, "scaled_dot_product_attention": attention, "conv": conv,
    "conv_transpose": conv_transpose, "avg_pool": avg_pool, "max_pool": max_pool,
    "upsample_nearest_neighbor": upsample_nearest, "upsample_bilinear": upsample_bilinear,
    "resize_bilinear": resize_bilinear,
}
