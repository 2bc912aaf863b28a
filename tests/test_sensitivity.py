"""Layers whose activations no single range suits are found, and stay in float in every format."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pocketsam.quantize.correction import Prepared, prepare


class Spiked(nn.Module):
    """Convolutions with GELU between; two channels before the depthwise one are ``spike`` times larger, and its weights
    there as much smaller.
    """

    def __init__(self, spike: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.expand = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 32, 1)
        self.depthwise = nn.Conv2d(32, 32, 3, 1, 1, groups=32)
        self.project, self.last = nn.Conv2d(32, 16, 1), nn.Conv2d(16, 8, 1)
        self.act = nn.GELU()
        for layer in (self.expand, self.depthwise, self.project, self.last):
            # Biases alone would be most of every channel.
            layer.weight.data *= 4
            assert layer.bias is not None
            layer.bias.data *= 0
        self.expand.weight.data[:2] *= spike
        self.depthwise.weight.data[:2] /= spike
        self.requires_grad_(False)

    def forward(self, image: Tensor) -> tuple[Tensor]:
        x = self.act(self.stem(image.permute(0, 3, 1, 2).float() / 64 - 2))
        x = self.act(self.depthwise(self.act(self.expand(x))))
        return (self.last(self.act(self.project(x))),)


@pytest.fixture(scope="module")
def images() -> list[Any]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (1, 32, 32, 3), dtype=np.uint8) for _ in range(2)]


def prepared_for(spike: float, images: list[Any]) -> Prepared:
    return prepare(Spiked(spike).eval(), images, "full", activations=True)


def test_a_layer_behind_a_few_large_channels_stays_in_float(images: list[Any]) -> None:
    found = prepared_for(300.0, images)
    module: Any = found.module
    assert [layer.module for layer in found.sensitive] == [module.depthwise]
    assert found.sensitive[0].scales is None
    assert torch.equal(module.depthwise.weight, Spiked(300.0).depthwise.weight), "its weights are not rounded"
    assert module.project.weight.ne(Spiked(300.0).project.weight).any()


def test_a_plain_model_has_none(images: list[Any]) -> None:
    assert not prepared_for(1.0, images).sensitive


def test_formats_find_float_layers_by_their_weights(images: list[Any]) -> None:
    found = prepared_for(300.0, images)
    module: Any = found.module
    layouts = {"a": module.stem.weight.numpy(), "b": module.expand.weight.numpy(),
               "c": module.depthwise.weight.numpy().transpose(1, 2, 3, 0), "d": module.project.weight.numpy()}
    assert found.in_float(layouts) == ["a", "c"]
