"""A module that is run again from a later layer on gives what it gives when it is run whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from pocketsam import registry
from pocketsam.export.graphs import EncoderGraph
from pocketsam.quantize.grid import Weighted
from pocketsam.quantize.hooks import Hook, hooked
from pocketsam.quantize.prefix import Prefix

MODELS = ["lite0", "mobile_sam", "edge_sam", "efficient_sam_ti", "efficientvit_sam_l0", "sam2.1_tiny",
          "sam_hq_vit_tiny"]


def shifted(layer: nn.Module) -> Iterator[Hook]:
    yield layer, "after", lambda _, __, output: output + 1


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_layers_asked_for_in_turn(name: str) -> None:
    torch.manual_seed(0)
    encoder = EncoderGraph(registry.load("model", name)(image_size=256).eval())
    batch = torch.randint(256, (1, 256, 256, 3), dtype=torch.uint8)
    order: list[nn.Module] = []
    weighted = [part for part in encoder.modules() if isinstance(part, Weighted)]
    with hooked((part, "before", lambda part, _: order.append(part)) for part in weighted):
        encoder(batch)
    chosen = [part for part in order[::max(1, len(order) // 8)] if order.count(part) == 1]
    prefix = Prefix(encoder, batch)
    for layer in [*chosen, chosen[-1]]:
        with hooked(shifted(layer)):
            want = encoder(batch)
        assert all(torch.equal(a, b) for a, b in zip(prefix.run(layer, shifted(layer)), want, strict=True))
    after = encoder(batch)
    assert not all(torch.equal(a, b) for a, b in zip(after, want, strict=True)), "the change must be seen"


class Counted(nn.Linear):
    ran: ClassVar[list[nn.Module]] = []

    def forward(self, input: Tensor) -> Tensor:
        self.ran.append(self)
        return super().forward(input)


class Chain(nn.Module):
    """Layers in pairs; ``act`` runs behind each."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs = nn.ModuleList(nn.Sequential(Counted(4, 4), Counted(4, 4)) for _ in range(3))
        self.act = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        for pair in self.pairs:
            x = self.act(pair(x))
        return x


@torch.no_grad()
def test_what_lies_before_a_layer_does_not_run() -> None:
    chain = Chain()
    layers = [layer for pair in chain.pairs for layer in pair]
    prefix = Prefix(chain, torch.ones(1, 4))
    for layer in layers:
        Counted.ran.clear()
        prefix.run(layer, ())
        # What a call meets on its way is known to the next one.
        assert Counted.ran == layers[max(0, layers.index(layer) - 1):]
    assert "forward" not in vars(chain.pairs[0]), "nothing must stay behind"
