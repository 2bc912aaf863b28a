"""What is done to an encoder in PyTorch before any format's tool quantizes it: grid, equalized streams, biases."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from pocketsam.builtin import builtin_weights
from pocketsam.export import rewrites
from pocketsam.export.graphs import EncoderGraph
from pocketsam.models.catalog import spec
from pocketsam.models.loading import load_model
from pocketsam.quantize.calibration import collect
from pocketsam.quantize.correction import prepare
from pocketsam.quantize.equalize import equalize
from pocketsam.quantize.grid import Scales


@pytest.mark.parametrize("shape", [(24, 16, 1, 1), (8, 12, 3, 3), (16, 1, 5, 5), (10, 33)])
def test_the_grid_cannot_saturate_and_loses_little(shape: tuple[int, ...]) -> None:
    """Two neighbouring products of 255 and a code stay in 16 bits, whichever neighbours an engine adds."""
    torch.manual_seed(0)
    layer: Any = (torch.nn.Linear(shape[1], shape[0]) if len(shape) == 2 else
                  torch.nn.Conv2d(max(shape[1], 1) * (shape[0] if shape[1] == 1 else 1), shape[0], shape[2],
                                  groups=shape[0] if shape[1] == 1 else 1))
    layer.weight.data = torch.randn(shape)
    full, pairs = Scales("full"), Scales("pairs")
    exact, rounded = full.round(layer), pairs.round(layer)
    scale = pairs.of(rounded.numpy())
    assert scale is not None
    assert full.of(rounded.numpy()) is None or shape[1] == 1, "other weights than those that were rounded"
    column = torch.from_numpy(scale).reshape(-1, *[1] * (len(shape) - 1))
    codes = (rounded / column).round()
    assert torch.allclose(codes * column, rounded, atol=1e-6)
    assert codes.abs().max() <= 127
    taps = codes.flatten(2) if len(shape) > 2 else codes[:, :, None]
    if shape[1] > 1:
        assert ((taps[:, 1:] + taps[:, :-1]).abs().max() * 255) < 2 ** 15
        if taps.shape[2] > 1:
            assert ((taps[:, :, 1:] + taps[:, :, :-1]).abs().max() * 255) < 2 ** 15
    errors = [float((layer.weight.data - w).square().mean()) for w in (exact, rounded)]
    assert errors[1] < 3.9 * errors[0], "a whole bit would cost a factor of four"


def test_streams_are_equalized_without_changing_the_float_model() -> None:
    """The built-in weights with one channel of a stream made small, on a seeded image."""
    model = load_model("lite0", builtin_weights("lite0"))
    rewrites.prepare(model)
    encoder = EncoderGraph(model).eval()
    stream: Any = encoder.encoder.streams()[1]
    for m in stream.writers:
        m.weight.data[0] /= 10
        m.bias.data[0] /= 10
    for m in stream.readers:
        m.weight.data[:, 0] *= 10
    images = [np.random.default_rng(0).integers(0, 256, (1, 512, 512, 3), dtype=np.uint8)]
    with torch.no_grad():
        before = encoder(torch.from_numpy(images[0]))
        peaks = [stage_peaks(model, images[0])]
        assert equalize(encoder, images) == 7
        after = encoder(torch.from_numpy(images[0]))
        peaks.append(stage_peaks(model, images[0]))
    for a, b in zip(before, after, strict=True):
        assert float((a - b).abs().max()) < 1e-4 * float(a.abs().max())
    assert peaks[1].min() / peaks[1].max() > 3 * peaks[0].min() / peaks[0].max()


def stage_peaks(model: Any, rgb: Any) -> Any:
    """Largest magnitude of each channel of the second stage."""
    found: list[Any] = []
    stage = model.image_encoder.trunk.stages[1]
    handle = stage.register_forward_hook(lambda *a: found.append(a[2].abs().amax((0, 2, 3))))
    EncoderGraph(model)(torch.from_numpy(rgb))
    handle.remove()
    return found[0]


def test_corrected_biases_bring_channel_means_back(lite0_images: list[Any]) -> None:
    """The built-in weights: rounded and corrected they are much nearer to float than rounded alone."""
    model = load_model("lite0", builtin_weights("lite0"))
    rewrites.prepare(model)
    encoder = EncoderGraph(model).eval()
    prepared = prepare(encoder, lite0_images, "full", activations=False)
    plain = copy.deepcopy(encoder)
    for layer in [m for m in plain.modules() if isinstance(m, torch.nn.Conv2d)][1:]:
        layer.weight.data = Scales("full").round(layer)
    x = torch.from_numpy(lite0_images[-1])
    with torch.no_grad():
        exact, rounded, corrected = (m(x)[0] for m in (encoder, plain, prepared.module))
    errors = [float((exact - y).square().mean()) for y in (rounded, corrected)]
    assert errors[1] < 0.5 * errors[0]
    assert prepared.layers[0].module.weight.equal(encoder.encoder.trunk.stem.weight), "the first layer stays in float"


@pytest.fixture(scope="module")
def lite0_images() -> list[Any]:
    return list(collect(None, spec("lite0"), count=4).encoder_inputs(spec("lite0")))
