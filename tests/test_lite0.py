"""The built-in model: size, shapes, operators, and the ImageNet conversion."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pocketsam.errors import CheckpointError
from pocketsam.models.lite0 import MEAN, SPEC, STAGES, STD, Trunk, lite0
from pocketsam.models.sam import SegmentAnything
from pocketsam.training.convert_trunk import SOURCE_EPS, convert_trunk, load_trunk, remap
from pocketsam.training.rounds import set_input_size


@pytest.fixture(scope="module")
def model() -> SegmentAnything:
    torch.manual_seed(0)
    return lite0()


def test_at_most_seven_million_parameters(model: SegmentAnything) -> None:
    assert sum(p.numel() for p in model.parameters()) <= 7_000_000


def test_features_have_the_shapes_of_the_contract(model: SegmentAnything) -> None:
    with torch.no_grad():
        features = model.encode(torch.zeros(1, 3, SPEC.image_size, SPEC.image_size))
    assert {k: tuple(v.shape) for k, v in features.items()} == {t.name: t.shape for t in SPEC.feature_specs()}


@pytest.mark.parametrize("size", [128, 192])
def test_other_input_sizes_decode_too(model: SegmentAnything, size: int) -> None:
    set_input_size(model, size)
    with torch.no_grad():
        features = model.encode(torch.zeros(2, 3, size, size))
        logits, scores = model.decode(features, torch.rand(2, 3, 2) * size, torch.ones(2, 3), None, None)
    set_input_size(model, SPEC.image_size)
    assert logits.shape == (2, 4, size // 4, size // 4)
    assert scores.shape == (2, 4)


def test_the_pad_colour_normalises_to_exactly_zero(model: SegmentAnything) -> None:
    pixels = torch.tensor(SPEC.pad_color, dtype=torch.uint8).expand(1, 4, 4, 3)
    assert not model.normalize(pixels).any()


def test_only_operators_that_quantize_well(model: SegmentAnything) -> None:
    plain = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU6)
    leaves = [m for m in model.image_encoder.modules() if not list(m.children())]
    assert all(isinstance(m, plain) for m in leaves)
    assert not any(isinstance(m, (nn.GELU, nn.SiLU, nn.Sigmoid)) for m in model.modules())


def published_state(seed: int = 0) -> dict[str, Tensor]:
    """Random tensors under the published file's names, without its classifier."""
    torch.manual_seed(seed)
    state: dict[str, Tensor] = {}

    def add(conv: str, bn: str, out: int, inp: int, kernel: int) -> None:
        state[f"{conv}.weight"] = torch.randn(out, inp, kernel, kernel) / math.sqrt(inp * kernel * kernel)
        state[f"{bn}.weight"], state[f"{bn}.bias"] = torch.rand(out) + 0.5, torch.randn(out)
        state[f"{bn}.running_mean"], state[f"{bn}.running_var"] = torch.randn(out), torch.rand(out) + 0.1

    add("_conv_stem", "_bn0", 32, 3, 3)
    width, i = 32, 0
    for stage in STAGES:
        for _ in range(stage.blocks):
            hidden = width * stage.expand
            if stage.expand > 1:
                add(f"_blocks.{i}._expand_conv", f"_blocks.{i}._bn0", hidden, width, 1)
            add(f"_blocks.{i}._depthwise_conv", f"_blocks.{i}._bn1", hidden, 1, stage.kernel)
            add(f"_blocks.{i}._project_conv", f"_blocks.{i}._bn2", stage.width, hidden, 1)
            width, i = stage.width, i + 1
    return state


def test_conversion_folds_colours_and_epsilon() -> None:
    state = published_state()
    trunk = Trunk().eval()
    load_trunk(trunk, remap(state))
    pixels = torch.rand(1, 3, 16, 16) * 255
    with torch.no_grad():
        # Our padding of one pixel: output (i, j) sees the window that starts at pixel 2 i - 1, 2 j - 1.
        theirs = nn.functional.conv2d((pixels[..., 1:, 1:] - 127) / 128, state["_conv_stem.weight"], stride=2)
        theirs = nn.functional.batch_norm(theirs, state["_bn0.running_mean"], state["_bn0.running_var"],
                                          state["_bn0.weight"], state["_bn0.bias"], eps=SOURCE_EPS)
        mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
        ours = trunk.stem((pixels - mean) / std)
    torch.testing.assert_close(ours[..., 1:, 1:], theirs, rtol=1e-4, atol=1e-4)


def test_conversion_writes_a_file_that_loads_strictly(tmp_path: Path) -> None:
    torch.save(published_state(), tmp_path / "published.pth")
    convert_trunk(tmp_path / "published.pth", tmp_path / "trunk.safetensors")
    load_trunk(Trunk(), load_file(tmp_path / "trunk.safetensors"))
    with pytest.raises(CheckpointError, match="not a trunk"):
        load_trunk(Trunk(), {"other": torch.zeros(1)})
