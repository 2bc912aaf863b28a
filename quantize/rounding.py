"""Rounding of weights that looks at what a layer reads: the error of one weight is taken up by those after it.

Frantar et al. 2022 ("GPTQ: accurate post-training quantization for generative pre-trained transformers", algorithm 1):
columns are rounded in turn, those with the largest inputs first, and what each loses is spread over the columns that
are still free, so that the layer's output, not the weights, stays near. Convolutions are seen as matrix products of
their unfolded inputs; a depthwise one is a small problem for each channel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketsam.quantize.grid import INT8, PAIR, Grid, Weighted, channels_first, column, nearest, steps

# Positions of the input from which its second moments are taken, and at least so many for each column.
POSITIONS = 8192
PER_COLUMN = 4
# Added to the diagonal of the second moments, as a share of its mean.
DAMPING = 0.01
# How often scales are widened until no two neighbours saturate; weights are rounded to the nearest after that.
TRIES = 6
# Columns whose losses are handed to all later ones in one product; within a block, column by column.
BLOCK = 64


@torch.no_grad()
def round_weights(module: Weighted, inputs: Tensor, grid: Grid, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Weights on a grid, and the grid.

    Args:
        module: float.
        inputs: what it reads, rounded as it will be.
        generator: draws the positions that are looked at.

    Returns:
        Weights in float, of the module's shape, and (O,) scales.
    """
    weight = channels_first(module)
    scales = steps(weight, grid)
    codes = None if isinstance(module, nn.ConvTranspose2d) else _fed_back(module, inputs, scales, grid, generator)
    if codes is None:
        codes = nearest(weight, scales), scales
    rounded = codes[0] * column(codes[1], weight.ndim)
    return (rounded.transpose(0, 1) if isinstance(module, nn.ConvTranspose2d) else rounded).contiguous(), codes[1]


def _fed_back(module: nn.Conv2d | nn.Linear, inputs: Tensor, scales: Tensor, grid: Grid,
              generator: torch.Generator) -> tuple[Tensor, Tensor] | None:
    """Codes and the scales they need; None if the inputs say nothing, or no scale was found."""
    weight = module.weight.data
    groups = module.groups if isinstance(module, nn.Conv2d) else 1
    columns = _columns(module, inputs, generator)
    moments = columns.transpose(1, 2) @ columns / columns.shape[1]
    factor = _factor(moments.double())
    if factor is None:
        return None
    for _ in range(TRIES):
        grouped = weight.reshape(groups, weight.shape[0] // groups, -1)
        codes = _feedback(grouped, scales.reshape(groups, -1), *factor).reshape(weight.shape)
        wider = steps(codes, grid)
        if float(wider.max()) * PAIR <= PAIR + 1:
            return codes, scales
        scales = scales * wider.clamp(min=1)
    return None


def _columns(module: nn.Conv2d | nn.Linear, inputs: Tensor, generator: torch.Generator) -> Tensor:
    """What the rows of the weights are multiplied with at random positions, less its mean, (groups, positions, K).

    The mean is left out because a shift of the output is corrected in the bias.
    """
    if isinstance(module, nn.Linear):
        rows = inputs.flatten(0, -2)
        found = rows[_some(len(rows), rows.shape[1], generator)][None]
    else:
        assert not isinstance(module.padding, str)
        (down, right), kernel = module.stride, module.kernel_size
        padded = F.pad(inputs, (module.padding[1], module.padding[1], module.padding[0], module.padding[0]))
        height, width = ((padded.shape[2 + i] - module.dilation[i] * (kernel[i] - 1) - 1) // module.stride[i] + 1
                         for i in range(2))
        chosen = _some(len(inputs) * height * width, module.weight[0].numel(), generator)
        image, y, x = chosen // (height * width), chosen // width % height * down, chosen % width * right
        taps = [padded[image, :, y + i * module.dilation[0], x + j * module.dilation[1]]
                for i in range(kernel[0]) for j in range(kernel[1])]
        # (positions, C, taps) -> (groups, positions, C / groups * taps)
        found = torch.stack(taps, 2).reshape(len(chosen), module.groups, -1).transpose(0, 1)
    return found - found.mean(1, keepdim=True)


def _some(count: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(count, generator=generator)[:max(POSITIONS, PER_COLUMN * columns)]


def _factor(moments: Tensor) -> tuple[Tensor, Tensor] | None:
    """(G, K) order of the columns, and (G, K, K) upper Cholesky factors of the inverse moments in that order; None if
    there is no such factor.

    With the columns in reverse, H = R^T R for an upper R, and the factor of the inverse is R^-T, reversed again: one
    triangular inverse in place of a full one and a second factorisation.
    """
    size = moments.shape[1]
    diagonal = torch.diagonal(moments, dim1=1, dim2=2)
    added = DAMPING * diagonal.mean(1, keepdim=True) + (diagonal <= 0)
    moments = moments + torch.diag_embed(added.clamp(min=1e-9))
    order = diagonal.argsort(1, descending=True)
    back = order.flip(1)
    moments = moments.gather(1, back[:, :, None].expand(-1, -1, size)).gather(2, back[:, None].expand(-1, size, -1))
    upper, failed = torch.linalg.cholesky_ex(moments, upper=True)
    if bool(failed.any()):
        return None
    one = torch.eye(size, dtype=upper.dtype).expand_as(upper)
    return order, torch.linalg.solve_triangular(upper, one, upper=True).mT.flip(1, 2).contiguous()


def _feedback(weight: Tensor, scales: Tensor, order: Tensor, factor: Tensor) -> Tensor:
    """(G, R, K) weights and (G, R) scales -> codes of the same shape."""
    # Columns first, so that one is a piece of memory.
    expanded = order[:, :, None].expand(-1, -1, weight.shape[1])
    free = (weight / scales[:, :, None]).double().transpose(1, 2).gather(1, expanded)
    # Tools that take the scale from a channel's largest weight must find that one where it was.
    kept = free.abs() == free.abs().amax(1, keepdim=True)
    fixed = free.round()
    codes, lost = torch.empty_like(free), torch.empty_like(free)
    size = free.shape[1]
    for start in range(0, size, BLOCK):
        end = min(start + BLOCK, size)
        for k in range(start, end):
            now = free[:, k]
            codes[:, k] = torch.where(kept[:, k], fixed[:, k], now.round()).clamp(-INT8, INT8)
            lost[:, k] = (now - codes[:, k]) / factor[:, k, k, None]
            free[:, k + 1:end] -= factor[:, k, k + 1:end, None] * lost[:, k, None]
        free[:, end:] -= factor[:, start:end, end:].mT @ lost[:, start:end]
    return torch.empty_like(codes).scatter_(1, expanded, codes).transpose(1, 2).to(weight.dtype).contiguous()
