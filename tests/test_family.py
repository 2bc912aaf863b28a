"""What the families differ in: preprocessing, upscaling, prompt conventions, rewrites, other input sides."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pocketsam import registry
from pocketsam.errors import PromptError, UsageError
from pocketsam.export import decoder_rewrites, rewrites
from pocketsam.export.graphs import DecoderGraph, EncoderGraph, example_inputs
from pocketsam.geometry import Frame, to_exact_image, to_model_image, upscale_logits
from pocketsam.models.catalog import spec as spec_of
from pocketsam.models.efficient_vit import ConvLayer, LinearAttention
from pocketsam.models.sam_vit import SamVit
from pocketsam.prompts import Prompt, decoder_inputs
from pocketsam.runtimes.pytorch import PyTorchRuntime

TOYS = ("toy_sam", "toy_edge", "toy_hq", "toy_sam2", "toy_efficient_sam")
SLOTS = 8


@pytest.fixture(scope="module", autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def seeded(name: str) -> nn.Module:
    torch.manual_seed(1)
    model = registry.load("model", name)()
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.2)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(std=0.1)
            m.running_var.uniform_(0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize("name", TOYS)
def test_rewrites_are_exact(toy_registered: None, name: str) -> None:
    model = seeded(name)
    image = example_inputs(model.spec.encoder_graph(), 1)
    inputs = example_inputs(model.spec.decoder_graph(SLOTS), 2)
    prepared = rewrites.prepare(copy.deepcopy(model))
    pairs = [*zip(EncoderGraph(model)(*image), EncoderGraph(prepared)(*image), strict=True)]
    expected = DecoderGraph(model, SLOTS)(*inputs)
    for form in (prepared, decoder_rewrites.with_absorbed_decoder(prepared)):
        pairs += zip(expected, DecoderGraph(form, SLOTS)(*inputs), strict=True)
    for want, got in pairs:
        assert (want - got).abs().max() <= 5e-5 * max(1.0, float(want.std()))


@pytest.mark.parametrize("name", TOYS)
def test_fixed_slots_equal_the_official_form(toy_registered: None, name: str) -> None:
    model = seeded(name)
    spec, frame = model.spec, Frame.of(120, 200, model.spec)
    features = {t.name: torch.randn(t.shape).numpy() for t in spec.feature_specs()}
    fixed = DecoderGraph(rewrites.prepare(copy.deepcopy(model)), SLOTS)
    reference = PyTorchRuntime(model, name)
    for kwargs in ({"points": [(30, 40)]}, {"box": (10, 20, 150, 90)},
                   {"box": (10, 20, 150, 90), "points": [(30, 40), (50, 60)], "labels": [0, 1]}):
        inputs = decoder_inputs([Prompt.of(frame, spec, **kwargs)], frame, spec, SLOTS)
        want = reference.decode(features, inputs)
        got = fixed(*map(torch.from_numpy, features.values()), *map(torch.from_numpy, inputs.values()))
        assert list(want) == spec.decoder_graph(SLOTS).output_names
        for a, b in zip(want.values(), got, strict=True):
            assert np.abs(a - b.numpy()).max() <= 2e-5 * max(1.0, float(a.std()))


def test_no_tensor_above_four_dimensions(toy_registered: None) -> None:
    for name in TOYS:
        model = rewrites.prepare(seeded(name))
        for graph, spec in ((EncoderGraph(model), model.spec.encoder_graph()),
                            (DecoderGraph(model, SLOTS), model.spec.decoder_graph(SLOTS))):
            program = torch.export.export(graph.eval(), example_inputs(spec, 1))
            ranks = [n.meta["val"].ndim for n in program.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
            assert max(ranks) <= 4, name


def test_linear_attention_equals_its_definition() -> None:
    """Position by position: values weighted by ReLU products of query and key, divided by their sum."""
    torch.manual_seed(0)
    layer = LinearAttention(32, 3).eval()
    layer.proj = ConvLayer(64, 64, norm=False, act=False)
    layer.proj.conv.weight.copy_(torch.eye(64)[..., None, None])
    x = torch.randn(1, 32, 4, 5)
    qkv = layer.qkv(x)
    for i, part in enumerate((qkv, layer.aggreg[0](qkv))):
        q, k, v = part.flatten(2)[0].split(32)
        weights = F.relu(q).T @ F.relu(k)
        want = (v @ (weights / weights.sum(1, keepdim=True)).T).reshape(32, 4, 5)
        assert torch.allclose(layer(x)[0, 32 * i:32 * (i + 1)], want, atol=1e-4)


@pytest.mark.parametrize("size", [(120, 200), (37, 50), (600, 300)])
def test_upscaling_equals_torch(size: tuple[int, int]) -> None:
    low = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
    for name, mode in (("sam2.1_tiny", "bilinear"), ("efficient_sam_ti", "bicubic")):
        want = F.interpolate(torch.from_numpy(low)[None, None], size, mode=mode, align_corners=False)[0, 0].numpy()
        # Not closer, because torch computes positions in fp32.
        assert np.abs(upscale_logits(low, Frame.of(*size, spec_of(name))) - want).max() <= 2e-4


@pytest.mark.parametrize("size", [(120, 200), (1300, 700)])
def test_float_preprocessing_equals_torch(size: tuple[int, int]) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    for name, antialias in (("sam2.1_tiny", True), ("efficient_sam_ti", False)):
        spec = spec_of(name)
        frame = Frame.of(*size, spec)
        planes = torch.from_numpy(rgb).permute(2, 0, 1)[None].float()
        want = F.interpolate(planes, (1024, 1024), mode="bilinear", antialias=antialias)[0].permute(1, 2, 0).numpy()
        assert np.abs(to_exact_image(rgb, frame, spec)[0] - want).max() <= 2e-3
        assert np.abs(to_model_image(rgb, frame, spec)[0] - want).max() <= 1.1, "rounded to uint8, twice at most"


def test_prompt_conventions() -> None:
    """SAM: points, corners, padding only without a box. SAM 2: corners first, always padding. EfficientSAM: six."""
    both = {"points": [(30, 40)], "labels": [0], "box": (10, 20, 150, 90)}
    expected = {"sam_vit_b": ([0, 2, 3], [1, -1]), "sam2.1_tiny": ([2, 3, 0, -1], [1, -1]),
                "efficient_sam_ti": ([2, 3, 0, -1, -1, -1], [1, -1, -1, -1, -1, -1])}
    for name, (with_box, click) in expected.items():
        spec = spec_of(name)
        frame = Frame.of(120, 200, spec)
        assert Prompt.of(frame, spec, **both).tokens(frame, spec)[1].tolist() == with_box
        assert Prompt.of(frame, spec, points=[(30, 40)]).tokens(frame, spec)[1].tolist() == click
    spec = spec_of("efficient_sam_ti")
    frame = Frame.of(120, 200, spec)
    with pytest.raises(PromptError, match="at most 6 points"):
        Prompt.of(frame, spec, points=[(1, 1)] * 7).tokens(frame, spec)
    with pytest.raises(PromptError, match="takes no mask prompt"):
        Prompt.of(frame, spec, mask=np.zeros((256, 256), np.float32))


def test_prompts_live_in_their_own_frame() -> None:
    """EfficientViT-SAM encodes at 512 and prompts at 1024."""
    frame = Frame.of(480, 720, spec_of("efficientvit_sam_l0"))
    assert (frame.content_height, frame.content_width, frame.prompt_height, frame.prompt_width) == (341, 512, 683, 1024)
    assert frame.to_model(np.array([[720.0, 480.0]])).tolist() == [[1024.0, 683.0]]


@pytest.mark.parametrize("name", ["efficienttam_ti", "edge_sam", "efficientvit_sam_l0", "lite0"])
def test_other_input_sides(name: str) -> None:
    model = registry.load("model", name)(image_size=256)
    outputs = model.encode(torch.randn(1, 3, 256, 256))
    assert {k: tuple(v.shape) for k, v in outputs.items()} == {t.name: t.shape for t in model.spec.feature_specs()}
    native = registry.load("model", name)().state_dict()
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in native.items()}
    with pytest.raises(UsageError, match="multiple of 64"):
        spec_of(name).resized(300)


def test_positional_tables_are_resized() -> None:
    """A ViT for 128 pixels at 256: tables are interpolated, and export freezes them without a change."""
    torch.manual_seed(0)
    encoder = SamVit(32, 2, 2, (1,), image_size=256, window=3, out=32, table_size=128).eval()
    for p in encoder.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.2)
    x = torch.randn(1, 3, 256, 256)
    before = encoder(x)["image_embeddings"]
    rewrites.freeze_tables(encoder)
    assert encoder.blocks[1].attn.frozen is not None
    assert torch.allclose(encoder(x)["image_embeddings"], before, atol=1e-5)
