"""Training on 8-bit activations."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from pocketsam.builtin import builtin_weights
from pocketsam.models.lite0 import LiteEncoder, lite0
from pocketsam.models.loading import load_model
from pocketsam.training.batches import Batch
from pocketsam.training.quantized import int8_activations, quantized_episode, round_to_levels


@pytest.fixture(autouse=True)
def gradients() -> Iterator[None]:
    with torch.enable_grad():
        yield


def test_rounding_has_256_levels_keeps_zero_and_passes_gradients() -> None:
    x = torch.linspace(-1.3, 2.9, 5000).requires_grad_(True)
    y = round_to_levels(x)
    assert 250 <= len(y.detach().unique()) <= 257
    assert float((y - x).abs().max()) <= 4.2 / 255 / 2 * 1.01
    assert float(round_to_levels(torch.tensor([-1.0, 0.0, 3.0]))[1]) == 0
    y.sum().backward()
    assert x.grad is not None
    assert bool((x.grad == 1).all())


def test_activations_are_rounded_inside_the_context_only() -> None:
    torch.manual_seed(0)
    encoder = lite0().image_encoder
    assert isinstance(encoder, LiteEncoder)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = encoder(x)["image_embeddings"]
        with int8_activations(encoder):
            rounded = encoder(x)["image_embeddings"]
        after = encoder(x)["image_embeddings"]
    assert before.equal(after)
    error = float((rounded - before).norm() / before.norm())
    assert 1e-4 < error < 0.5


def test_an_episode_is_pulled_to_the_float_model() -> None:
    torch.manual_seed(0)
    model = load_model("lite0", builtin_weights("lite0"), 128).requires_grad_(True)
    targets = torch.zeros(2, 32, 32)
    targets[0, 4:18, 6:24] = 1
    targets[1, 16:30, 2:12] = 1
    boxes = torch.tensor([[24.0, 16.0, 96.0, 72.0], [8.0, 64.0, 48.0, 120.0]])
    batch = Batch(torch.rand(1, 3, 128, 128) * 255, torch.ones(1, 1, 128, 128), targets, boxes, torch.tensor([-1]))
    parts = quantized_episode(model, batch, 2, torch.Generator().manual_seed(1), weight=30.0)
    none = quantized_episode(model, batch, 2, torch.Generator().manual_seed(1), weight=0.0)
    assert float(parts["distill"]) > 0
    assert float(none["distill"]) == 0
    assert float(parts["loss"]) == pytest.approx(float(none["loss"] + parts["distill"]), rel=1e-4)
    parts["loss"].backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
