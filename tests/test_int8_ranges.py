"""Ranges of activations, and shifts of layers without a bias, in what is prepared for 8 bits."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pocketsam import registry
from pocketsam.models.catalog import spec
from pocketsam.quantize.correction import prepare
from pocketsam.quantize.grid import column, nearest, steps
from pocketsam.quantize.ranges import clipped, round_values
from pocketsam.quantize.recipes import Job, check


def test_ranges_look_at_every_channel_of_tokens() -> None:
    """With a stride of eight over 512 channels only every eighth would be seen, and the outlier of another clipped."""
    tokens = torch.randn(1, 2 ** 15, 512, generator=torch.Generator().manual_seed(0))
    tokens[..., 1] *= 40
    span = float(tokens.abs().max())
    low, high = clipped(tokens, (-span, span))
    shares = [span * s for s in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)]
    best = min(shares, key=lambda h: float((round_values(tokens, -h, h) - tokens).square().mean()))
    assert (low, high) == (-best, best)


class Bright(nn.Module):
    """Two linear layers, of which the second one has no bias and reads what has a large mean."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.act, self.last = nn.Conv2d(3, 32, 4, 4), nn.ReLU(), nn.Conv2d(32, 64, 1, bias=False)
        self.stem.weight.data *= 3
        self.requires_grad_(False)

    def forward(self, image: Tensor) -> tuple[Tensor]:
        return (self.last(self.read(image)),)

    def read(self, image: Tensor) -> Tensor:
        found: Tensor = self.act(self.stem(image.permute(0, 3, 1, 2).float() / 255))
        return found


def test_a_layer_without_bias_gets_one_for_the_shift_of_rounding() -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (1, 64, 64, 3), dtype=np.uint8) for _ in range(4)]
    module = Bright()
    prepared = prepare(module, images, "full", activations=False)
    assert module.last.bias is None
    assert prepared.module.last.bias is not None
    errors = []
    for image in map(torch.from_numpy, images):
        truth, got = module(image)[0], prepared.module(image)[0]
        plain = copy.deepcopy(module)
        weight = plain.last.weight.data
        scale = steps(weight, "full")
        plain.last.weight.data = nearest(weight, scale) * column(scale, 4)
        errors.append([float((other - truth).square().mean()) for other in (got, plain(image)[0])])
    ours, nearest_ = np.mean(errors, 0)
    assert ours < 0.5 * nearest_, (ours, nearest_)


def test_ranges_are_those_of_several_images() -> None:
    """One image of eight is forty times as bright; ranges cut to the others would take most of it away."""
    rng = np.random.default_rng(0)
    dark = [rng.integers(0, 6, (1, 64, 64, 3), dtype=np.uint8) for _ in range(7)]
    bright = rng.integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pocketsam.quantize.correction.BATCH_BYTES", 1)
        prepared = prepare(Bright(), [*dark, bright], "full", activations=True)
    last = prepared.layers[-1]
    assert last.reads[1] > 0.7 * float(Bright().read(torch.from_numpy(bright)).max())


class Enlarging(nn.Module):
    """A transposed convolution behind a plain one, as in SAM-HQ's encoder."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.wide, self.large = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 1), nn.ConvTranspose2d(8, 8, 2, 2)
        self.requires_grad_(False)

    def forward(self, image: Tensor) -> tuple[Tensor]:
        return (self.large(self.wide(self.stem(image.permute(0, 3, 1, 2).float() / 255 - 0.5))),)


def test_litert_knows_transposed_convolutions(tmp_path: Path) -> None:
    """Its interpreter calls them by another name than its quantizer does."""
    graph = spec("lite0").encoder_graph()
    contract = replace(graph, inputs=(replace(graph.inputs[0], shape=(1, 32, 32, 3)),),
                       outputs=(replace(graph.outputs[0], shape=(1, 8, 16, 16)),))
    images = [np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)]
    found = prepare(Enlarging().eval(), images, "full", activations=True).written("bound", rounds_outputs=True)
    registry.load("format", "litert").export(found.module, contract, "fp32", tmp_path / "encoder.tflite")
    job = Job(contract, tmp_path / "encoder.tflite", found.module, "int8", lambda _: ({"image": i} for i in images), 2,
              found)
    tool = check("litert", "int8")(job)
    layers = tool.layers()
    assert [found.layer_of(weights) is not None for weights in layers.values()] == [False, True, True]
    for keep, smaller in ((frozenset(layers), False), (frozenset(list(layers)[:2]), True)):
        tool.write(tmp_path / f"{smaller}.tflite", keep)
    assert (tmp_path / "True.tflite").stat().st_size < (tmp_path / "False.tflite").stat().st_size
