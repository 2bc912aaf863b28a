"""The exported graphs' torch side: fixed slots equal the official dynamic decoder, rewrites are exact."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pocketsam import registry
from pocketsam.export import decoder_rewrites, rewrites
from pocketsam.export.graphs import DecoderGraph, EncoderGraph, example_inputs
from pocketsam.geometry import Frame, to_model_image
from pocketsam.models import layers
from pocketsam.models.sam import SegmentAnything
from pocketsam.models.tiny_vit import AttentionStage, ConvBn, TinyVit
from pocketsam.prompts import Prompt, decoder_inputs
from pocketsam.runtimes.pytorch import PyTorchRuntime

SLOTS = 8


@pytest.fixture(scope="module", autouse=True)
def no_grad() -> None:
    torch.set_grad_enabled(False)


@pytest.fixture(scope="module")
def model(toy_registered: None) -> SegmentAnything:
    torch.manual_seed(1)
    built: SegmentAnything = registry.load("model", "toy_sam")()
    # Default initialisation leaves relative positions and positions at zero, where errors cannot show.
    for p in built.parameters():
        p.copy_(torch.randn_like(p) * (0.2 if p.ndim < 2 else p[0].numel() ** -0.5) + (p.ndim == 1) * (p == 1))
    return built


def prompts(model: SegmentAnything, frame: Frame) -> list[Prompt]:
    rng = np.random.default_rng(0)
    made = []
    for k in range(1, SLOTS):
        xy = rng.uniform(0, 1, (k, 2)) * (frame.width, frame.height)
        made.append(Prompt.of(frame, model.spec, points=xy, labels=rng.integers(0, 2, k)))
    box = (10.5, 20, 150, 90.25)
    made.append(Prompt.of(frame, model.spec, box=box))
    for k in range(1, SLOTS - 1):
        xy = rng.uniform(0, 1, (k, 2)) * (frame.width, frame.height)
        made.append(Prompt.of(frame, model.spec, points=xy, labels=rng.integers(0, 2, k), box=box))
    mask = rng.standard_normal((32, 32)).astype(np.float32)
    made.append(Prompt.of(frame, model.spec, mask=mask))
    made.append(Prompt.of(frame, model.spec, box=box, mask=mask))
    made.append(Prompt.of(frame, model.spec, points=[(30, 40)], labels=[1], mask=mask))
    return made


@pytest.mark.parametrize("form", ["plain", "rewritten", "absorbed"])
def test_fixed_slots_equal_the_dynamic_decoder(model: SegmentAnything, form: str) -> None:
    frame = Frame.of(120, 200, model.spec)
    reference = PyTorchRuntime(model, "toy")
    features = {"image_embeddings": torch.randn(1, 32, 8, 8)}
    forms = {"plain": lambda: model, "rewritten": lambda: rewrites.prepare(copy.deepcopy(model)),
             "absorbed": lambda: decoder_rewrites.with_absorbed_decoder(rewrites.prepare(copy.deepcopy(model)))}
    fixed = DecoderGraph(forms[form](), SLOTS)
    for prompt in prompts(model, frame):
        inputs = decoder_inputs([prompt], frame, model.spec, SLOTS)
        arrays = {k: v.numpy() for k, v in features.items()}
        expected = reference.decode(arrays, inputs)
        got = fixed(features["image_embeddings"], *(torch.from_numpy(v) for v in inputs.values()))
        for name, tensor in zip(("low_res_masks", "iou_predictions"), got, strict=True):
            spread = max(1.0, float(expected[name].std()))
            assert np.abs(tensor.numpy() - expected[name]).max() <= 1e-5 * spread, (prompt, name)


def test_rewritten_decoder_with_skip_features() -> None:
    """lite0's decoder adds skip features while upscaling; the matrix form must add them at the same places."""
    torch.manual_seed(4)
    built: SegmentAnything = registry.load("model", "lite0")()
    spec = built.spec.decoder_graph(SLOTS)
    inputs = example_inputs(spec, 2)
    expected = DecoderGraph(built, SLOTS)(*inputs)
    rewritten = decoder_rewrites.with_absorbed_decoder(rewrites.prepare(copy.deepcopy(built)))
    for got, want in zip(DecoderGraph(rewritten, SLOTS)(*inputs), expected, strict=True):
        assert (got - want).abs().max() <= 2e-5 * max(1.0, float(want.std()))


def test_slot_count_does_not_change_masks(model: SegmentAnything) -> None:
    frame = Frame.of(120, 200, model.spec)
    prompt = Prompt.of(frame, model.spec, points=[(30, 40), (90, 60)], labels=[1, 0])
    features = torch.randn(1, 32, 8, 8)
    answers = []
    for slots in (3, 8, 40):
        inputs = decoder_inputs([prompt], frame, model.spec, slots).values()
        answers.append(DecoderGraph(model, slots)(features, *map(torch.from_numpy, inputs))[0])
    assert torch.allclose(answers[0], answers[1], atol=1e-5)
    assert torch.allclose(answers[0], answers[2], atol=1e-5)


def test_unmasked_padding_would_change_masks(model: SegmentAnything) -> None:
    """The control for the tests above: without slot masking, extra padding points do change the answer."""
    frame = Frame.of(120, 200, model.spec)
    prompt = Prompt.of(frame, model.spec, points=[(30, 40)], labels=[1])
    features = torch.randn(1, 32, 8, 8)
    inputs = [torch.from_numpy(v) for v in decoder_inputs([prompt], frame, model.spec, SLOTS).values()]
    masked = DecoderGraph(model, SLOTS)(features, *inputs)[0]
    padded = model.decode({"image_embeddings": features}, *inputs, fixed_slots=False)[0]
    assert (masked - padded).abs().max() > 1e-2


def test_batch_equals_single_prompts(model: SegmentAnything) -> None:
    frame = Frame.of(120, 200, model.spec)
    graph, features = DecoderGraph(model, SLOTS), torch.randn(1, 32, 8, 8)
    batch = decoder_inputs(prompts(model, frame), frame, model.spec, SLOTS)
    together = graph(features, *map(torch.from_numpy, batch.values()))[0]
    for i in range(len(together)):
        alone = graph(features, *(torch.from_numpy(v[i:i + 1]) for v in batch.values()))[0]
        assert torch.allclose(alone[0], together[i], atol=1e-5)


@pytest.mark.parametrize("value", [0.2, 0.0, -1.0])
def test_small_mask_flags_mean_no_mask(model: SegmentAnything, value: float) -> None:
    inputs = list(example_inputs(model.spec.decoder_graph(SLOTS), 1))
    graph = DecoderGraph(model, SLOTS)
    expected = graph(*inputs[:4], torch.tensor([0.0]))[0]
    assert torch.equal(graph(*inputs[:4], torch.tensor([value]))[0], expected)
    assert not torch.allclose(graph(*inputs[:4], torch.tensor([0.9]))[0], expected)


def test_encoder_graph_pads_exactly(model: SegmentAnything) -> None:
    """The graph sees uint8 padding; the reference pads zeros after normalisation. They must agree."""
    rgb = np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8)
    frame = Frame.of(60, 100, model.spec)
    image = to_model_image(rgb, frame, model.spec)
    expected = PyTorchRuntime(model, "toy").encode(image, frame)["image_embeddings"]
    got = EncoderGraph(model)(torch.from_numpy(image))[0].numpy()
    assert np.abs(got - expected).max() <= 1e-5
    graph = EncoderGraph(model)
    graph.exact_pad = False
    rounded = graph(torch.from_numpy(image))[0].numpy()
    assert np.abs(rounded - expected).max() > 1e-4, "the control: without exact padding the difference shows"


def test_encoder_rewrites_are_exact(model: SegmentAnything) -> None:
    image = example_inputs(model.spec.encoder_graph(), 1)[0]
    expected = EncoderGraph(model)(image)[0]
    got = EncoderGraph(rewrites.prepare(copy.deepcopy(model)))(image)[0]
    assert (got - expected).abs().max() <= 1e-5 * max(1.0, float(expected.std()))


def test_conv_bn_fusion() -> None:
    torch.manual_seed(2)
    block = nn.Sequential(ConvBn(3, 8, 3, 2, 1), nn.GELU(), ConvBn(8, 8, 3, 1, 1, groups=8)).eval()
    for m in block.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
            m.weight.normal_()
    x = torch.randn(1, 3, 17, 17)
    expected = block(x)
    rewrites.fuse_conv_bn(block)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in block.modules())
    assert (block(x) - expected).abs().max() <= 1e-5


def test_frozen_window_bias() -> None:
    torch.manual_seed(3)
    stage = AttentionStage(32, 1, 2, 7, None).eval()
    stage.blocks[0].attn.attention_biases.normal_()
    x = torch.randn(1, 32, 16, 16)
    expected = stage(x)
    rewrites.freeze_tables(stage)
    assert torch.equal(stage(x), expected)


@torch.no_grad()
def test_split_heads_and_folded_norms_are_exact() -> None:
    """One attention stage of TinyViT with windows that need padding, and weights that a wrong fold would show."""
    torch.manual_seed(0)
    stage = AttentionStage(64, 2, 2, 7, None).eval()
    for p in stage.parameters():
        p.uniform_(-0.5, 0.5)
    x = torch.randn(1, 64, 10, 12)
    want = stage(x)
    rewrites.freeze_tables(stage)
    rewrites.split_heads(stage)
    split = stage(x)
    rewrites.fold_norms(stage)
    folded = stage(x)
    scale = float(want.abs().max())
    assert (split - want).abs().max() <= 1e-5 * scale
    assert (folded - want).abs().max() <= 1e-5 * scale
    assert all(m.weight is None for m in stage.modules() if isinstance(m, nn.LayerNorm))


def traced_ranks(graph: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, int]:
    program = torch.export.export(graph, inputs)
    return {str(n.target): n.meta["val"].ndim for n in program.graph.nodes if isinstance(n.meta.get("val"), Tensor)}


@pytest.mark.parametrize("name", ["toy_sam", "mobile_sam", "lite0"])
def test_no_tensor_above_four_dimensions(toy_registered: None, name: str) -> None:
    built = rewrites.prepare(registry.load("model", name)())
    absorbed = decoder_rewrites.with_absorbed_decoder(built)
    for graph, spec in ((EncoderGraph(built), built.spec.encoder_graph()),
                        (DecoderGraph(built, SLOTS), built.spec.decoder_graph(SLOTS)),
                        (DecoderGraph(absorbed, SLOTS), built.spec.decoder_graph(SLOTS))):
        ranks = traced_ranks(graph.eval(), example_inputs(spec, 1))
        assert max(ranks.values()) <= 4, {k: r for k, r in ranks.items() if r > 4}


def test_tiny_vit_bias_follows_its_weights() -> None:
    """Upstream caches the gathered bias and goes stale when weights load after eval(); ours gathers on every call."""
    encoder = TinyVit().eval()
    attn = encoder.layers[1].blocks[0].attn
    before = attn.bias().clone()
    attn.attention_biases.normal_()
    assert not torch.equal(attn.bias(), before)




@pytest.mark.parametrize("name", ["toy_sam", "toy_sam2", "toy_efficient_sam"])
def test_attention_in_parts_is_exact(toy_registered: None, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Graphs whose logits would be too large answer their queries in parts: the same features, smaller tensors."""
    torch.manual_seed(0)
    built: SegmentAnything = registry.load("model", name)().eval()
    for p in built.parameters():
        # Relative positions start at zero, where errors cannot show.
        if not p.any():
            nn.init.normal_(p, std=0.2)
    encoder, image = EncoderGraph(built), example_inputs(built.spec.encoder_graph(), 1)
    want, largest = encoder(*image)[0], []
    for limit in (2**30, 5000):
        monkeypatch.setattr(layers, "LOGIT_BYTES", limit)
        program = torch.export.export(encoder, image)
        assert (program.module()(*image)[0] - want).abs().max() <= 2e-5 * want.abs().max()
        largest.append(max(n.meta["val"].numel() for n in program.graph.nodes if "softmax" in n.name))
    assert largest[1] <= largest[0] / 4
