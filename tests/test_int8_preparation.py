"""What is done to an encoder in PyTorch before any format's tool quantizes it: grid, rounding,
ranges, equalized streams, biases."""

from __future__ import annotations

import copy
import time
from typing import Any

import numpy as np
import pytest
import torch

from pocketsam.builtin import builtin_weights
from pocketsam.export import rewrites
from pocketsam.export.graphs import EncoderGraph
from pocketsam.models.catalog import spec
from pocketsam.models.loading import load_model
from pocketsam.quantize.agreement import time_ratio
from pocketsam.quantize.calibration import collect
from pocketsam.quantize.correction import prepare
from pocketsam.quantize.equalize import equalize
from pocketsam.quantize.grid import column, nearest, steps
from pocketsam.quantize.ranges import affine, clipped, round_values
from pocketsam.quantize.rounding import round_weights

SHAPES = [(24, 16, 1, 1), (8, 12, 3, 3), (16, 1, 5, 5), (10, 33)]


def layer_and_inputs(shape: tuple[int, ...]) -> tuple[Any, torch.Tensor]:
    """A layer with seeded weights, and inputs whose channels depend on each other and differ in size."""
    generator = torch.Generator().manual_seed(0)
    if len(shape) == 2:
        layer: Any = torch.nn.Linear(shape[1], shape[0])
        inputs = torch.randn(2, 300, shape[1], generator=generator)
        inputs = inputs @ torch.randn(shape[1], shape[1], generator=generator) * torch.logspace(-1, 1, shape[1])
    else:
        depthwise = shape[1] == 1
        channels = shape[0] if depthwise else shape[1]
        layer = torch.nn.Conv2d(channels, shape[0], shape[2], padding=shape[2] // 2, stride=2,
                                groups=channels if depthwise else 1)
        noise = torch.randn(2, channels, 40, 36, generator=generator)
        smooth = torch.nn.functional.avg_pool2d(noise, 5, 1, 2)
        mixed = torch.einsum("bchw,cd->bdhw", smooth, torch.randn(channels, channels, generator=generator))
        inputs = mixed * torch.logspace(-1, 1, channels)[:, None, None]
    layer.weight.data = torch.randn(shape, generator=generator)
    return layer.requires_grad_(False), inputs


@pytest.mark.parametrize("shape", SHAPES)
def test_the_grid_cannot_saturate_and_loses_little(shape: tuple[int, ...]) -> None:
    """Two neighbouring products of 255 and a code stay in 16 bits, whichever neighbours an engine adds."""
    layer, inputs = layer_and_inputs(shape)
    weight = layer.weight.data
    for rounded, scale in ((nearest(weight, s := steps(weight, "pairs")) * column(s, weight.ndim), s),
                           round_weights(layer, inputs, "pairs", torch.Generator().manual_seed(0))):
        codes = (rounded / column(scale, weight.ndim)).round()
        assert torch.allclose(codes * column(scale, weight.ndim), rounded, atol=1e-6)
        assert codes.abs().max() <= 127
        taps = codes.flatten(2) if len(shape) > 2 else codes[:, :, None]
        if shape[1] > 1:
            assert ((taps[:, 1:] + taps[:, :-1]).abs().max() * 255) < 2 ** 15
            if taps.shape[2] > 1:
                assert ((taps[:, :, 1:] + taps[:, :, :-1]).abs().max() * 255) < 2 ** 15
    full, pairs = (nearest(weight, s) * column(s, weight.ndim) for s in (steps(weight, "full"), steps(weight, "pairs")))
    errors = [float((weight - w).square().mean()) for w in (full, pairs)]
    assert errors[1] < 3.9 * errors[0], "a whole bit would cost a factor of four"


@pytest.mark.parametrize("grid", ["full", "pairs"])
@pytest.mark.parametrize("shape", SHAPES)
def test_rounding_with_feedback_keeps_what_a_layer_computes(shape: tuple[int, ...], grid: Any) -> None:
    """On the inputs it looked at, the output changes less than by rounding to the nearest, apart from its mean."""
    layer, inputs = layer_and_inputs(shape)
    weight = layer.weight.data.clone()
    rounded, scale = round_weights(layer, inputs, grid, torch.Generator().manual_seed(0))
    assert layer.weight.data.equal(weight), "the module is left alone"
    plain = steps(weight, grid)
    exact, errors = layer(inputs), []
    for candidate in (rounded, nearest(weight, plain) * column(plain, weight.ndim)):
        layer.weight.data = candidate
        difference = layer(inputs) - exact
        axes = (0, 1) if len(shape) == 2 else (0, 2, 3)
        errors.append(float((difference - difference.mean(axes, keepdim=True)).square().mean()))
    assert errors[0] < 0.8 * errors[1]
    if grid == "full":
        # Tools that find the scale from the largest weight must find this one.
        assert torch.allclose(rounded.abs().flatten(1).amax(1) / 127, scale, rtol=1e-5)


def test_dead_and_constant_inputs_are_rounded_to_the_nearest() -> None:
    layer, inputs = layer_and_inputs((24, 16, 1, 1))
    rounded, scale = round_weights(layer, torch.zeros_like(inputs), "full", torch.Generator())
    assert rounded.equal(nearest(layer.weight.data, scale) * column(scale, 4))


def test_rare_extremes_are_clipped_and_plain_values_are_not() -> None:
    even = torch.linspace(-2, 6, 10_000)
    assert clipped(even, (-2.0, 6.0)) == (-2.0, 6.0)
    tailed = torch.cat([torch.randn(100_000, generator=torch.Generator().manual_seed(0)), torch.tensor([12.0, -12.0])])
    low, high = clipped(tailed, (-12.0, 12.0))
    assert low == -high
    assert 4 < high < 10
    errors = [float((round_values(tailed, -h, h) - tailed).square().mean()) for h in (high, 12.0, 4.8)]
    assert errors[0] == min(errors)
    scale, zero = affine(-1.0, 3.0)
    values = round_values(torch.tensor([-9.0, 0.0, 9.0]), -1.0, 3.0)
    assert values.tolist() == pytest.approx([-zero * scale, 0.0, (255 - zero) * scale])


def test_layers_are_found_by_their_weights_in_any_layout(lite0_images: list[Any]) -> None:
    model = load_model("lite0", builtin_weights("lite0"))
    rewrites.prepare(model)
    prepared = prepare(EncoderGraph(model).eval(), lite0_images[:1], "full", activations=True)
    for layer in prepared.layers[prepared.leading:]:
        weights = layer.module.weight.numpy()
        assert prepared.layer_of(weights.transpose(0, 2, 3, 1)) is layer
        assert prepared.layer_of(weights.transpose(1, 2, 3, 0)) is layer
    assert prepared.layer_of(prepared.layers[0].module.weight.numpy()) is None, "the first layer stays in float"
    assert prepared.layer_of(np.zeros((3, 3), np.float32)) is None


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
        weight = layer.weight.data
        layer.weight.data = nearest(weight, steps(weight, "full")) * column(steps(weight, "full"), 4)
    x = torch.from_numpy(lite0_images[-1])
    with torch.no_grad():
        exact, rounded, corrected = (m(x)[0] for m in (encoder, plain, prepared.module))
    errors = [float((exact - y).square().mean()) for y in (rounded, corrected)]
    assert errors[1] < 0.5 * errors[0]
    assert prepared.layers[0].module.weight.equal(encoder.encoder.trunk.stem.weight), "the first layer stays in float"


@pytest.fixture(scope="module")
def lite0_images() -> list[Any]:
    return list(collect(None, spec("lite0"), count=4).encoder_inputs(spec("lite0")))


class WithClassifier(torch.nn.Module):
    """Two layers that run, and one between them in the module that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(3, 64, 3)
        self.head = torch.nn.Linear(64, 1000)
        self.second = torch.nn.Conv2d(64, 64, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.second(self.first(image.permute(0, 3, 1, 2).float() / 255).relu())
        return y


def test_layers_that_do_not_run_are_left_alone() -> None:
    torch.manual_seed(0)
    module = WithClassifier().eval().requires_grad_(False)
    image = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    prepared = prepare(module, [image], "full", True)
    assert [tuple(layer.module.weight.shape) for layer in prepared.layers] == [(64, 3, 3, 3), (64, 64, 3, 3)]
    assert [layer.scales is None for layer in prepared.layers] == [True, False]
    assert torch.equal(prepared.module.head.weight, module.head.weight)


def test_kernels_too_large_for_litert_s_tool_are_rounded_as_others() -> None:
    """EfficientViT-SAM XL has a 1 x 1 convolution with 48 MiB of weights."""
    from ai_edge_quantizer import qtyping
    from ai_edge_quantizer.algorithms.uniform_quantize import uniform_quantize_tensor as functions

    from pocketsam.quantize.litert import LARGE, large_kernels

    data = np.random.default_rng(0).standard_normal((3, 1, 2, LARGE // 16), np.float32)
    assert data.nbytes > LARGE
    scale = np.abs(data).max((1, 2, 3), keepdims=True) / 127
    params = qtyping.UniformQuantParams(num_bits=8, quantized_dimension=0, scale=scale,
                                        zero_point=np.zeros_like(scale, dtype=np.int32), symmetric=True)
    before = functions.uniform_quantize
    with large_kernels():
        codes = functions.uniform_quantize(data, params)
    assert functions.uniform_quantize is before
    assert codes.dtype == np.int8
    assert codes.shape == data.shape
    assert np.abs(codes * scale - data).max() <= scale.max() / 2 * 1.001


@pytest.mark.parametrize(("seconds", "calls"), [(30.0, 14), (0.0, 4)])
def test_calls_that_take_long_are_timed_in_fewer_rounds(monkeypatch: pytest.MonkeyPatch, seconds: float,
                                                        calls: int) -> None:
    monkeypatch.setattr("pocketsam.quantize.agreement.SECONDS", seconds)
    made = []
    assert time_ratio(lambda: made.append(1), lambda: time.sleep(0.002)) > 1
    # Warm-up included: two and twelve rounds, or one and three.
    assert len(made) == calls
