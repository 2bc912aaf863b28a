"""Operators that move values without computing: shapes, slices, joins, padding and lookups."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pocketsam.runtimes.mil.arguments import Arguments, Operator
from pocketsam.runtimes.mil.errors import UnknownOperator

PAD_MODES = {"constant": "constant", "reflect": "reflect", "replicate": "replicate"}


def reshape(a: Arguments) -> Tensor:
    """-1 is inferred; a 0 in ``shape`` keeps the dimension at the same place counted from the last axis."""
    x, shape = a["x"], a.ints("shape")
    return x.reshape([x.shape[i - len(shape)] if n == 0 else n for i, n in enumerate(shape)])


def transpose(a: Arguments) -> Tensor:
    return a["x"].permute(a.ints("perm"))


def expand_dims(a: Arguments) -> Tensor:
    """Axes count in the output."""
    x, axes = a["x"], a.ints("axes")
    rank = x.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def squeeze(a: Arguments) -> Tensor:
    x = a["x"]
    if "axes" not in a:
        return x.squeeze()
    for axis in sorted((axis % x.ndim for axis in a.ints("axes")), reverse=True):
        x = x.squeeze(axis)
    return x


def slice_by_index(a: Arguments) -> Tensor:
    """Python slicing with masks for open ends; steps may be negative, which torch slicing refuses."""
    x = a["x"]
    begin, end = a.ints("begin"), a.ints("end")
    step = a.ints("stride", [1] * x.ndim)
    masks = {name: [bool(v) for v in a.ints(name, [0] * x.ndim)]
             for name in ("begin_mask", "end_mask", "squeeze_mask")}
    for axis in range(x.ndim):
        if masks["squeeze_mask"][axis]:
            x = x.narrow(axis, begin[axis] % x.shape[axis], 1)
            continue
        window = slice(None if masks["begin_mask"][axis] else begin[axis],
                       None if masks["end_mask"][axis] else end[axis], step[axis])
        picked = torch.tensor(range(*window.indices(x.shape[axis])))
        x = x[(slice(None),) * axis + (window,)] if step[axis] > 0 else x.index_select(axis, picked)
    for axis in reversed(range(x.ndim)):
        if masks["squeeze_mask"][axis]:
            x = x.squeeze(axis)
    return x


def slice_by_size(a: Arguments) -> Tensor:
    """A size of -1 reaches to the end."""
    x = a["x"]
    for axis, (begin, size) in enumerate(zip(a.ints("begin"), a.ints("size"), strict=True)):
        x = x.narrow(axis, begin, x.shape[axis] - begin if size == -1 else size)
    return x


def split(a: Arguments) -> tuple[Tensor, ...]:
    x, axis = a["x"], a.int("axis")
    if "split_sizes" in a:
        return torch.split(x, a.ints("split_sizes"), axis)
    return tuple(x.chunk(a.int("num_splits"), axis))


def concat(a: Arguments) -> Tensor:
    if a.flag("interleave"):
        raise UnknownOperator("concat", "interleave")
    return torch.cat(a.all("values"), a.int("axis"))


def stack(a: Arguments) -> Tensor:
    return torch.stack(a.all("values"), a.int("axis"))


def pad(a: Arguments) -> Tensor:
    """``pad`` lists (before, after) for the last axes, first axis first; torch wants the last axis first."""
    amounts, mode = a.ints("pad"), a.text("mode", "constant")
    if mode not in PAD_MODES:
        raise UnknownOperator("pad", f"mode {mode}")
    pairs = [amounts[i:i + 2] for i in range(0, len(amounts), 2)]
    x = a["x"]
    if mode == "constant":
        return F.pad(x, [n for pair in reversed(pairs) for n in pair], value=a.float("constant_val", 0.0))
    # torch reflects and replicates only the last axes, so zero amounts in front are dropped.
    while pairs and pairs[0] == [0, 0]:
        pairs.pop(0)
    amounts = [n for pair in reversed(pairs) for n in pair]
    return F.pad(x[None], amounts, mode)[0] if len(pairs) >= x.ndim - 1 else F.pad(x, amounts, mode)


def tile(a: Arguments) -> Tensor:
    return a["x"].repeat(a.ints("reps"))


def fill(a: Arguments) -> Tensor:
    return a["value"].reshape(()).expand(a.ints("shape")).clone()


def shape(a: Arguments) -> Tensor:
    return torch.tensor(a["x"].shape, dtype=torch.int32)


def reverse(a: Arguments) -> Tensor:
    x = a["x"]
    return x.flip(a.ints("axes", list(range(x.ndim))))


def range_1d(a: Arguments) -> Tensor:
    return torch.arange(a["start"].item(), a["end"].item(), a["step"].item(), dtype=a["start"].dtype)


def gather(a: Arguments) -> Tensor:
    """Whole slices along ``axis``, indices of any rank."""
    if a.int("batch_dims", 0):
        raise UnknownOperator("gather", "batch_dims")
    x, indices, axis = a["x"], a["indices"].long(), a.int("axis", 0)
    axis %= x.ndim
    picked = x.index_select(axis, (indices % x.shape[axis]).reshape(-1))
    return picked.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1:])


def gather_along_axis(a: Arguments) -> Tensor:
    x, axis = a["x"], a.int("axis", 0)
    return x.gather(axis, a["indices"].long() % x.shape[axis])


def pixel_shuffle(a: Arguments) -> Tensor:
    return F.pixel_shuffle(a["x"], a.int("upscale_factor"))


def pixel_unshuffle(a: Arguments) -> Tensor:
    return F.pixel_unshuffle(a["x"], a.int("downscale_factor"))


def depth_to_space(a: Arguments) -> Tensor:
    """Channels are ordered (block row, block column, channel), unlike torch's pixel_shuffle."""
    x, k = a["x"], a.int("block_size")
    b, c, h, w = x.shape
    x = x.reshape(b, k, k, c // (k * k), h, w).permute(0, 3, 4, 1, 5, 2)
    return x.reshape(b, c // (k * k), h * k, w * k)


def space_to_depth(a: Arguments) -> Tensor:
    """Inverse of :func:`depth_to_space`."""
    x, k = a["x"], a.int("block_size")
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // k, k, w // k, k).permute(0, 3, 5, 1, 2, 4)
    return x.reshape(b, c * k * k, h // k, w // k)


TABLE: dict[str, Operator] = {
    "reshape": reshape, "transpose": transpose, "expand_dims": expand_dims, "squeeze": squeeze,
    "slice_by_index": slice_by_index, "slice_by_size": slice_by_size, "split": split, "concat": concat,
    "stack": stack, "pad": pad, "tile": tile, "fill": fill, "shape": shape, "reverse": reverse,
    "range_1d": range_1d, "gather": gather, "gather_along_axis": gather_along_axis, "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle, "depth_to_space": depth_to_space, "space_to_depth": space_to_depth,
}
