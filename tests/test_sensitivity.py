"""Layers whose activations no single range suits are found, get scales, or stay in float in every format."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from pocketsam import registry
from pocketsam.models.catalog import spec
from pocketsam.quantize import sensitivity
from pocketsam.quantize.channels import ChannelScale, Form, Plan, Side, can_scale, put, write_scales
from pocketsam.quantize.correction import Layer, Prepared, prepare
from pocketsam.quantize.recipes import Job, check
from pocketsam.quantize.sensitivity import _costs, _decibels, _Judge, mend
from pocketsam.specs import GraphSpec


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


def prepared_for(spike: float, images: list[Any], light: int = 0) -> Prepared:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pocketsam.quantize.sensitivity.LIGHT", light)
        return prepare(Spiked(spike).eval(), images, "full", activations=True)


def test_scales_mend_what_a_few_large_channels_spoil(images: list[Any]) -> None:
    found = prepared_for(300.0, images)
    module: Any = found.module
    assert not found.sensitive
    for scale in (module.expand[-1], module.depthwise[0]):
        assert isinstance(scale, ChannelScale)
        assert scale.factors.max() / scale.factors.min() > 100


def test_layers_of_little_work_stay_in_float_instead(images: list[Any]) -> None:
    found = prepared_for(300.0, images, light=64)
    module: Any = found.module
    # The cheaper one first: nine products for each output against sixteen, and as much noise.
    assert [layer.module for layer in found.sensitive] == [module.depthwise, module.expand]
    assert found.sensitive[0].scales is None
    assert torch.equal(module.depthwise.weight, Spiked(300.0).depthwise.weight), "its weights are not rounded"
    assert module.project.weight.ne(Spiked(300.0).project.weight).any()
    # Formats find them by their weights, in whatever layout.
    layouts = {"a": module.stem.weight.numpy(), "b": module.expand.weight.numpy(),
               "c": module.depthwise.weight.numpy().transpose(1, 2, 3, 0), "d": module.project.weight.numpy()}
    assert found.in_float(layouts) == ["a", "b", "c"]


def chain() -> tuple[nn.Sequential, list[Layer]]:
    """Ten layers of which the sixth has a range that is much too wide, and the third one that is too wide."""
    torch.manual_seed(0)
    linear = [nn.Linear(32, 32, bias=False).requires_grad_(False) for _ in range(10)]
    for m in linear:
        nn.init.orthogonal_(m.weight)
    spans = [{2: 20.0, 5: 400.0}.get(i, 5.0) for i in range(10)]
    layers = [Layer(m, reads=(-s, s), writes=(-s, s), written=4) for m, s in zip(linear, spans, strict=True)]
    return nn.Sequential(*linear, Alone()), layers


def test_neighbours_that_are_harmless_together_are_not_asked_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "HARMLESS", 20.0)
    module, layers = chain()
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    judge = _Judge(module, torch.randn(256, 32))
    want = [judge.activations([layer]) for layer in layers]
    calls.clear()
    found, groups = judge.alone(layers)
    # One to know the layers, three groups, and the four of the second group.
    assert len(calls) == 8
    assert found[4:8] == pytest.approx(want[4:8])
    assert found[5] == min(found) < 10
    for group in (range(4), range(8, 10)):
        assert all(groups[i] == group for i in group)
        assert all(20 < found[i] == found[group[0]] < want[i] for i in group)
    assert set(groups) == {0, 1, 2, 3, 8, 9}


def test_the_worst_of_a_harmless_group_has_its_turn_first(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("HARMLESS", 20.0), ("ENOUGH", 45.0), ("MOST", 1.0)):
        monkeypatch.setattr(sensitivity, name, value)
    module, layers = chain()
    found = {}
    for size in (1, 4):
        monkeypatch.setattr(sensitivity, "GROUP", size)
        found[size] = [layers.index(layer) for layer in mend(module, layers, [torch.randn(256, 32)], 1)]
    assert found[1][:2] == found[4][:2] == [5, 2]


@pytest.mark.parametrize("enough", [30.0, 45.0, 60.0])
def test_groups_change_nothing_in_what_stays_in_float(images: list[Any], enough: float,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "ENOUGH", enough)
    monkeypatch.setattr(sensitivity, "HARMLESS", 20.0)
    # At 60 dB layers of the harmless group have their turn too.
    monkeypatch.setattr(sensitivity, "MOST", 1.0)
    found = {}
    for size in (1, 2):
        monkeypatch.setattr(sensitivity, "GROUP", size)
        prepared = prepared_for(300.0, images, light=64)
        found[size] = [prepared.layers.index(layer) for layer in prepared.sensitive]
    assert found[1] == found[2] != []


class Alone(nn.Module):
    """Feature maps are several."""

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x,)


def test_float_costs_weights_and_products() -> None:
    wide, early = Layer(nn.Linear(64, 64), written=1 * 64 * 4), Layer(nn.Conv2d(8, 8, 1), written=64 * 8 * 4)
    # 4096 and 64 weights, 4096 products each.
    assert _costs([wide, early]) == pytest.approx([4096 / 4160 + 0.5, 64 / 4160 + 0.5])


def test_a_plain_model_is_left_alone(images: list[Any]) -> None:
    found = prepared_for(1.0, images)
    assert not found.sensitive
    assert not any(isinstance(m, ChannelScale) for m in found.module.modules())


@pytest.mark.parametrize("form", ["multiply", "divide", "bound", "reshape"])
@pytest.mark.parametrize("layer", [nn.Linear(6, 4), nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(6, 12, 3, groups=6)])
@pytest.mark.parametrize("chosen", [["before"], ["behind"], ["before", "behind"]])
def test_scales_change_nothing_in_float(layer: nn.Linear | nn.Conv2d, form: Form, chosen: list[str]) -> None:
    torch.manual_seed(0)
    layer = copy.deepcopy(layer)
    holder = nn.ModuleList([layer])
    x = torch.randn(2, 5, 6) if isinstance(layer, nn.Linear) else torch.randn(2, 6, 8, 8)
    expected, weights = layer(x), layer.weight.clone()
    before, behind = torch.rand(6) + 0.1, torch.rand(len(weights)) + 0.1
    sides = {"before": Side(before, (-1.0, 1.0)), "behind": Side(behind, (-2.0, 2.0))}
    known = Layer(layer, [torch.ones(len(weights))], (-9.0, 9.0), (-9.0, 9.0))
    put(holder, known, Plan(**{side: sides[side] for side in chosen}))
    write_scales(holder, form)
    torch.testing.assert_close(holder[0](x), expected)
    assert not torch.equal(layer.weight, weights)
    assert known.reads == ((-1.0, 1.0) if "before" in chosen else (-9.0, 9.0))
    assert known.writes == ((-2.0, 2.0) if "behind" in chosen else (-9.0, 9.0))
    torch.testing.assert_close(known.means[0] * (behind if "behind" in chosen else 1), torch.ones(len(weights)))


def test_scales_behind_go_back_where_outputs_stay_in_float(images: list[Any]) -> None:
    found = prepared_for(300.0, images)
    x = torch.from_numpy(images[0])
    other = found.written("reshape", rounds_outputs=False)
    torch.testing.assert_close(other.module(x), found.module(x), rtol=1e-4, atol=1e-4)
    module: Any = other.module
    assert isinstance(module.expand[-1], nn.Identity)
    assert isinstance(module.depthwise[0], ChannelScale)
    kept: Any = found.module
    layer = other.layer_of(module.expand[0].weight.numpy())
    assert layer is not None
    assert found.layer_of(module.expand[0].weight.numpy()) is None
    assert layer.scales is not None
    codes = module.expand[0].weight / layer.scales[:, None, None, None]
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)
    assert isinstance(kept.expand[-1], ChannelScale)
    assert found.written("divide", rounds_outputs=True) is found


def test_layers_that_mix_some_channels_get_no_scales() -> None:
    assert not can_scale(nn.Conv2d(8, 8, 3, groups=4))
    assert can_scale(nn.Conv2d(8, 16, 3, groups=8))


@pytest.fixture(scope="module")
def contract() -> GraphSpec:
    graph = spec("lite0").encoder_graph()
    return replace(graph, inputs=(replace(graph.inputs[0], shape=(1, 32, 32, 3)),),
                   outputs=(replace(graph.outputs[0], shape=(1, 8, 16, 16)),))


@pytest.mark.parametrize("format_", ["onnx", "openvino", "litert"])
def test_converters_leave_scales_where_they_are(format_: str, images: list[Any], contract: GraphSpec,
                                                tmp_path: Path) -> None:
    tool = check(format_, "int8")
    found = prepared_for(300.0, images).written(tool.scales, tool.rounds_outputs)
    exporter = registry.load("format", format_)
    source = tmp_path / f"encoder.{exporter.extension}"
    exporter.export(found.module, contract, "fp32", source)
    job = Job(contract, source, found.module, "int8", lambda _: ({"image": i} for i in images), 2, found)
    layers = tool(job).layers()
    known = [found.layer_of(weights) for weights in layers.values()]
    assert len(known) == 5
    assert known[0] is None, "the first layer stays in float"
    assert None not in known[1:], "the converter changed weights that were rounded"


def test_the_file_keeps_what_scales_mend(images: list[Any], contract: GraphSpec, tmp_path: Path) -> None:
    def decibels(scaled: bool) -> float:
        with pytest.MonkeyPatch.context() as patch:
            if not scaled:
                patch.setattr("pocketsam.quantize.correction.mend", lambda *_: [])
            found = prepared_for(300.0, images).written("divide", rounds_outputs=True)
        source, path = tmp_path / "encoder.onnx", tmp_path / f"{scaled}.onnx"
        registry.load("format", "onnx").export(found.module, contract, "fp32", source)
        job = Job(contract, source, found.module, "int8", lambda _: ({"image": i} for i in images), 2, found)
        check("onnx", "int8")(job).write(path)
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        ours = torch.from_numpy(session.run(None, {"image": images[0]})[0])
        return _decibels(Spiked(300.0)(torch.from_numpy(images[0]))[0], ours)

    assert decibels(scaled=False) < 10
    assert decibels(scaled=True) > 20
