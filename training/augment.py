"""Augmentation: one crop at a random scale, a flip and colour. Masks are indexed, never interpolated."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pocketsam.training.packs import nearest_index

LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Augment:
    """How strongly to augment.

    Attributes:
        whole: probability of showing the whole image at its normal scale.
        min_zoom, max_zoom: otherwise the scale relative to that, log-uniform.
        stretch: and the most that height and width are scaled apart, log-uniform; 1 keeps their ratio.
        flip: probability of a horizontal flip.
        colour: half-width of the brightness, contrast and saturation factors around 1.
        grey: probability of removing colour.
    """

    whole: float = 0.4
    min_zoom: float = 0.7
    max_zoom: float = 2.0
    stretch: float = 1.0
    flip: float = 0.5
    colour: float = 0.3
    grey: float = 0.05


@dataclass(frozen=True)
class Window:
    """The part of a cached image that is shown: top, left, height, width in the cache, then its size when shown.

    ``whole``: all of the image at its normal scale, not flipped.
    """

    top: int
    left: int
    height: int
    width: int
    out_height: int
    out_width: int
    flip: bool
    whole: bool = False


def uniform(generator: torch.Generator, low: float = 0.0, high: float = 1.0) -> float:
    """One number from a CPU generator."""
    return low + (high - low) * float(torch.rand((), generator=generator))


def sample_window(content: tuple[int, int], cached: int, size: int, augment: Augment,
                  generator: torch.Generator) -> Window:
    """Choose a window.

    Args:
        content: (height, width) of the image in its cache frame.
        cached: side of the cache frame.
        size: side S of the model frame.
    """
    zooms = (1.0, 1.0)
    if uniform(generator) >= augment.whole:
        zoom = uniform(generator, math.log(augment.min_zoom), math.log(augment.max_zoom))
        apart = math.log(augment.stretch) * uniform(generator, -0.5, 0.5) if augment.stretch > 1 else 0.0
        zooms = (math.exp(zoom + apart), math.exp(zoom - apart))
    height, width = (min(c, round(cached / z)) for c, z in zip(content, zooms, strict=True))
    top = int(uniform(generator) * (content[0] - height + 1))
    left = int(uniform(generator) * (content[1] - width + 1))
    out_height, out_width = (min(size, max(1, int(v * (size * z / cached) + 0.5)))
                             for v, z in zip((height, width), zooms, strict=True))
    flip = uniform(generator) < augment.flip
    return Window(top, left, height, width, out_height, out_width, flip, zooms == (1, 1) and not flip)


def cut_image(image: Tensor, window: Window, size: int) -> tuple[Tensor, Tensor]:
    """Show a window of an image.

    Args:
        image: uint8 (S', S', 3) from the cache.
        size: side S of the model frame.

    Returns:
        uint8 (3, S, S), and bool (1, S, S), true where there is content.
    """
    part = image[window.top:window.top + window.height, window.left:window.left + window.width]
    x = part.permute(2, 0, 1)[None].float()
    if (window.height, window.width) != (window.out_height, window.out_width):
        x = F.interpolate(x, (window.out_height, window.out_width), mode="bilinear", antialias=True)
    x = x.flip(-1) if window.flip else x
    out, valid = image.new_zeros(3, size, size), torch.zeros(1, size, size, dtype=torch.bool, device=image.device)
    out[:, :window.out_height, :window.out_width] = x[0].round().clamp(0, 255).to(torch.uint8)
    valid[:, :window.out_height, :window.out_width] = True
    return out, valid


def cut_labels(labels: Tensor, window: Window, size: int) -> Tensor:
    """The same window of a label map, by nearest pixel: int16 (S', S') -> int16 (S, S), 0 outside the content."""
    rows = torch.from_numpy(nearest_index(window.height, window.out_height)).to(labels.device) + window.top
    columns = torch.from_numpy(nearest_index(window.width, window.out_width)).to(labels.device) + window.left
    x = labels[rows][:, columns]
    out = labels.new_zeros(size, size)
    out[:window.out_height, :window.out_width] = x.flip(-1) if window.flip else x
    return out


def colour_factors(images: int, augment: Augment, generator: torch.Generator) -> Tensor:
    """Random brightness, contrast and saturation for B images, sometimes grey: float32 (3, B), beside the generator."""
    place = generator.device
    factors = 1 + augment.colour * (2 * torch.rand(3, images, generator=generator, device=place) - 1)
    factors[2] *= (torch.rand(images, generator=generator, device=place) >= augment.grey).float()
    return factors


def apply_colour(images: Tensor, factors: Tensor) -> Tensor:
    """Change brightness, contrast and saturation: float32 (B, 3, S, S) on 0..255 and (3, B) -> float32 (B, 3, S, S)."""
    brightness, contrast, saturation = factors[..., None, None, None]
    luma = (images * torch.tensor(LUMA, device=images.device)[:, None, None]).sum(1, keepdim=True)
    x = luma + (images - luma) * saturation
    mean = luma.mean((1, 2, 3), keepdim=True)
    y: Tensor = ((mean + (x - mean) * contrast) * brightness).clamp(0, 255)
    return y
