"""Compressed weights: the ``constexpr`` operators, evaluated once when a program is loaded."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pocketsam.runtimes.mil.arguments import Arguments, Operator
from pocketsam.runtimes.mil.blobs import unpack


def affine_dequantize(a: Arguments) -> Tensor:
    """scale * (quantized - zero point), scale and zero point scalar or along ``axis``."""
    data, scale = a["quantized_data"], a["scale"]
    shape = [1] * data.ndim
    shape[a.int("axis")] = -1
    return (data.float() - _along(a["zero_point"].float(), shape)) * _along(scale.float(), shape)


def blockwise_shift_scale(a: Arguments) -> Tensor:
    """scale * (data - offset), each scale for one block of the data."""
    data, offset = a["data"].float(), a.optional("offset")
    scale = _spread(a["scale"].float(), list(data.shape))
    return (data if offset is None else data - _spread(offset.float(), list(data.shape))) * scale


def lut_to_dense(a: Arguments) -> Tensor:
    """Entries of one lookup table (iOS 16 form) or of one per block, scalar or vector (iOS 18 form)."""
    lut = a["lut"]
    if "shape" in a:
        shape = a.ints("shape")
        bits = round(math.log2(lut.numel()))
        indices = unpack(a["indices"].contiguous().numpy(), bits, math.prod(shape))
        return lut[torch.from_numpy(indices).long()].reshape(shape)
    indices_nd = a["indices"].long()
    # One table for each block of the indices: its number is found by spreading the block numbers.
    blocks, entries, vector = list(lut.shape[:-2]), lut.shape[-2], lut.shape[-1]
    block = _spread(torch.arange(math.prod(blocks)).reshape(blocks), list(indices_nd.shape))
    values = lut.reshape(-1, vector)[block * entries + indices_nd]
    if vector == 1:
        return values[..., 0]
    axis = a.int("vector_axis") % indices_nd.ndim
    return values.movedim(-1, axis + 1).flatten(axis, axis + 1)


def cast(a: Arguments) -> Tensor:
    return a["source_val"].float()


def sparse_to_dense(a: Arguments) -> Tensor:
    """Nonzero values in row-major order of the set bits; iOS 16 packs the bits, iOS 18 has a tensor of them."""
    values, mask = a["nonzero_data"], a["mask"]
    if "shape" in a:
        shape = a.ints("shape")
        mask = torch.from_numpy(unpack(mask.contiguous().numpy(), 1, math.prod(shape))).reshape(shape)
    out = torch.zeros(mask.shape, dtype=values.dtype)
    out[mask.bool()] = values
    return out


def _along(x: Tensor, shape: list[int]) -> Tensor:
    return x.reshape(shape) if x.ndim else x


def _spread(x: Tensor, shape: list[int]) -> Tensor:
    """Repeat each entry over its block, so that ``x`` gets the full shape."""
    for axis, size in enumerate(shape):
        x = x.repeat_interleave(size // x.shape[axis], axis)
    return x


TABLE: dict[str, Operator] = {
    "constexpr_affine_dequantize": affine_dequantize, "constexpr_blockwise_shift_scale": blockwise_shift_scale,
    "constexpr_lut_to_dense": lut_to_dense, "constexpr_cast": cast, "constexpr_sparse_to_dense": sparse_to_dense,
}
