"""Training batches made on the model's device, from a cache that lies there.

The same draws as ``batches.py`` in law, not in number: all images of a batch at once, without waiting for the device.
A GPU trains on some hundred images a second, more than host threads cut.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pocketsam.training.augment import Augment, apply_colour, colour_factors
from pocketsam.training.batches import LEAST_AREA, MASK_STRIDE, PROPOSED_RATE, Batch, boxes_of, image_weights
from pocketsam.training.packs import Cache

# Candidates for each image of a batch; those whose window shows no region are dropped.
CANDIDATES = 2
SPARE = 8


@dataclass(frozen=True)
class Windows:
    """N windows as :class:`pocketsam.training.augment.Window` describes one: int64 (N,), the last two bool (N,)."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    out_height: Tensor
    out_width: Tensor
    flip: Tensor
    whole: Tensor

    def __getitem__(self, rows: Tensor) -> Windows:
        return Windows(*(v[rows] for v in vars(self).values()))


class DeviceCache:
    """A cache on a device.

    Args:
        cache: decoded packs.
        device: its images and labels are copied there, 1.3 MB an image with one layer at side 512.
    """

    def __init__(self, cache: Cache, device: torch.device) -> None:
        self.size, self.device = cache.size, device
        self.images, self.labels = cache.images.to(device), cache.labels.to(device)
        self.ids = int(cache.labels.max()) + 1
        self.content = torch.tensor(cache.content, device=device)
        self.layers = _ranges(cache.layers, device)
        self.proposed = _ranges(cache.proposed or [[] for _ in cache.layers], device)
        self.weights = image_weights(cache).to(device)

    def batch(self, images: int, prompts: int, size: int, augment: Augment, generator: torch.Generator) -> Batch:
        """Draw a batch; arguments as of :func:`pocketsam.training.batches.make_batch`, the generator on the device.

        A region is large enough when ``LEAST_AREA`` mask pixels have their centre in it.
        """
        index = torch.multinomial(self.weights, CANDIDATES * images + SPARE, replacement=True, generator=generator)
        layers, proposed = self.layers[index], self.proposed[index]
        chance = torch.where(layers[:, 1:] > 0, PROPOSED_RATE * (proposed[:, 1:] > 0), 1.0)
        shown = torch.where(self._random(len(index), generator)[:, None] < chance, proposed, layers)
        first, count = shown.unbind(1)
        layer = first + (self._random(len(index), generator) * count).long()
        windows = self._windows(index, size, augment, generator)
        ids, found = self._regions(layer, windows, prompts, size, generator)
        torch._assert_async(found.sum() >= images)
        chosen = (~found).to(torch.uint8).argsort(stable=True)[:images]
        index, layer, windows, ids = index[chosen], layer[chosen], windows[chosen], ids[chosen]
        pixels, valid = cut_images(self.images[index], windows, size)
        masks = (cut_label_maps(self.labels, layer, windows, size)[:, None] == ids[:, :, None, None]).flatten(0, 1)
        factors = colour_factors(images, augment, generator)
        return Batch(apply_colour(pixels, factors), valid.float(), F.avg_pool2d(masks.float(), MASK_STRIDE),
                     boxes_of(masks), torch.where(windows.whole, index, -1))

    def _random(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.rand(count, generator=generator, device=self.device)

    def _windows(self, index: Tensor, size: int, augment: Augment, generator: torch.Generator) -> Windows:
        whole, place, flip, scale, ratio = torch.rand(5, len(index), 2, generator=generator, device=self.device)
        whole = whole[:, :1] < augment.whole
        low, high = math.log(augment.min_zoom), math.log(augment.max_zoom)
        stretch = math.log(augment.stretch) * (ratio[:, :1] - 0.5) * torch.tensor([1.0, -1.0], device=self.device)
        zoom = torch.where(whole, 1.0, (low + (high - low) * scale[:, :1] + stretch).exp())
        content = self.content[index]
        extent = torch.minimum(content, (self.size / zoom).round().long())
        offset = (place * (content - extent + 1)).long()
        out = (extent * (size * zoom / self.size) + 0.5).long().clamp(1, size)
        mirrored = flip[:, 0] < augment.flip
        (top, left), (height, width), (out_height, out_width) = offset.unbind(1), extent.unbind(1), out.unbind(1)
        return Windows(top, left, height, width, out_height, out_width, mirrored, whole[:, 0] & ~mirrored)

    def _regions(self, layer: Tensor, windows: Windows, prompts: int, size: int,
                 generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Ids (N, P) of visible regions, each once before any twice, and which rows (N,) have any."""
        small = cut_label_maps(self.labels, layer, windows, size, MASK_STRIDE).flatten(1).long()
        areas = torch.zeros(len(small), self.ids, device=self.device)
        areas.scatter_add_(1, small, torch.ones_like(small, dtype=areas.dtype))
        visible = areas >= LEAST_AREA
        visible[:, 0] = False
        keys = torch.rand(visible.shape, generator=generator, device=self.device)
        order, number = keys.masked_fill(~visible, 2.0).argsort(1), visible.sum(1)
        turn = torch.arange(prompts, device=self.device) % number.clamp(min=1)[:, None]
        return order.gather(1, turn), number > 0


def _ranges(rows: list[list[int]], device: torch.device) -> Tensor:
    """First row and number of consecutive rows of each image: int64 (N, 2)."""
    return torch.tensor([(r[0] if r else 0, len(r)) for r in rows], device=device)


def cut_images(images: Tensor, windows: Windows, size: int) -> tuple[Tensor, Tensor]:
    """Show a window of each image, resized as :func:`pocketsam.training.augment.cut_image` does it.

    Args:
        images: uint8 (N, S', S', 3).
        windows: N.
        size: side S of the model frame.

    Returns:
        float32 (N, 3, S, S) of whole numbers, and bool (N, 1, S, S), true where there is content.
    """
    side = images.shape[1]
    rows = _resampling(windows.top, windows.height, windows.out_height, side, size)
    columns = _resampling(windows.left, windows.width, windows.out_width, side, size, windows.flip)
    shown = torch.bmm(rows, images.float().flatten(2)).reshape(-1, size, side, 3)
    pixels = torch.matmul(shown.permute(0, 3, 1, 2), columns.transpose(1, 2)[:, None])
    valid = _inside(windows, torch.arange(size, device=images.device))[:, None]
    return pixels.round().clamp(0, 255) * valid, valid


def cut_label_maps(labels: Tensor, layer: Tensor, windows: Windows, size: int, stride: int = 1) -> Tensor:
    """The same windows of label maps, by nearest pixel, 0 outside the content.

    Args:
        labels: int16 (L, S', S').
        layer: int64 (N,), rows of ``labels``.
        windows: N.
        size: side S of the model frame.
        stride: looks only at the middle of each square of this many pixels.

    Returns:
        int16 (N, S / stride, S / stride).
    """
    position = torch.arange(stride // 2, size, stride, device=labels.device)
    rows = _nearest(windows.top, windows.height, windows.out_height, position)
    columns = _nearest(windows.left, windows.width, windows.out_width, position, windows.flip)
    return labels[layer[:, None, None], rows[:, :, None], columns[:, None]] * _inside(windows, position)


def _inside(windows: Windows, position: Tensor) -> Tensor:
    """Where the shown pixels at these rows and columns hold content: bool (N, positions, positions)."""
    rows, columns = position < windows.out_height[:, None], position < windows.out_width[:, None]
    return rows[:, :, None] & columns[:, None]


def _centres(extent: Tensor, out: Tensor, position: Tensor, flip: Tensor | None) -> Tensor:
    """Where the centre of each shown pixel lies in the window, in cached pixels: float32 (N, positions)."""
    shown = position.expand(len(extent), -1)
    if flip is not None:
        shown = torch.where(flip[:, None], out[:, None] - 1 - shown, shown)
    return (shown + 0.5) * (extent / out)[:, None]


def _nearest(start: Tensor, extent: Tensor, out: Tensor, position: Tensor,
             flip: Tensor | None = None) -> Tensor:
    """Cached pixel under each position, past the content some pixel of the window: int64 (N, positions)."""
    inner = torch.minimum(_centres(extent, out, position, flip).long().clamp(min=0), extent[:, None] - 1)
    return start[:, None] + inner


def _resampling(start: Tensor, extent: Tensor, out: Tensor, side: int, size: int,
                flip: Tensor | None = None) -> Tensor:
    """Antialiased bilinear interpolation of one axis as a matrix: float32 (N, size, side), no meaning past the content.

    A triangle around each centre, as wide as the shown pixel but at least as the cached one, cut at the window's ends.
    """
    position, cached = torch.arange(size, device=start.device), torch.arange(side, device=start.device)
    centres = _centres(extent, out, position, flip)
    inner = cached - start[:, None]
    support = (extent / out).clamp(min=1)[:, None, None]
    weights = (1 - (inner[:, None] + 0.5 - centres[..., None]).abs() / support).clamp(min=0)
    weights = weights * ((inner >= 0) & (inner < extent[:, None]))[:, None]
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-6)
