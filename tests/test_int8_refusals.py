"""int8 that is refused, by its gate, its tool or its engine: the rest of the export stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import pocketsam
from pocketsam.bundle import Artifact, read_bundle
from pocketsam.errors import BundleError, ParityError
from pocketsam.photos import photo_paths
from pocketsam.quantize.onnx import OnnxQuantizer
from pocketsam.quantize.pair import Pair

check_source = OnnxQuantizer.check_source


def test_int8_below_its_gate_leaves_the_rest(toy_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "b"
    with pytest.raises(ParityError, match=r"onnx int8 .* below the gate of 1\.0\. .* holds the rest\."):
        pocketsam.export("toy_sam", checkpoint=toy_checkpoint, precisions=["fp32", "int8"], out=out, gate=1.0,
                         images=photo_paths()[:1], calibration_images=2, clicks=False)
    bundle = read_bundle(out)
    assert {a.precision for a in bundle.artifacts} == {"fp32"}
    assert {p.name for p in (out / "onnx").iterdir()} == {Path(a.path).name for a in bundle.artifacts}
    assert pocketsam.load(out, runtime="onnxruntime").info()["precision"] == "fp32"


def test_what_a_tool_cannot_read_is_refused_before_the_preparation(toy_checkpoint: Path, tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object) -> None:
        raise AssertionError

    monkeypatch.setattr(OnnxQuantizer, "check_source", staticmethod(lambda path: check_source(path.parent)))
    monkeypatch.setattr("pocketsam.quantize.stage.prepare", never)
    with pytest.raises(ParityError, match=r"takes models below 2 GiB.* holds the rest\."):
        pocketsam.export("toy_sam", checkpoint=toy_checkpoint, precisions=["fp32", "int8"], out=tmp_path / "b",
                         images=photo_paths()[:1], calibration_images=2, clicks=False)


def test_a_tool_that_fails_leaves_the_rest(toy_checkpoint: Path, tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object, path: Path, keep: frozenset[str] = frozenset()) -> None:
        path.write_bytes(b"half")
        raise ValueError("more dimensions than allowed\nand a second line")

    monkeypatch.setattr(OnnxQuantizer, "write", fail)
    out = tmp_path / "b"
    with pytest.raises(ParityError, match=r"onnxruntime cannot make onnx int8 of this model \(more dimensions than "
                                          r"allowed\); .* holds the rest\."):
        pocketsam.export("toy_sam", checkpoint=toy_checkpoint, precisions=["fp32", "int8"], out=out,
                         images=photo_paths()[:1], calibration_images=2, clicks=False)
    bundle = read_bundle(out)
    assert {a.precision for a in bundle.artifacts} == {"fp32"}
    assert {p.name for p in (out / "onnx").iterdir()} == {Path(a.path).name for a in bundle.artifacts}


@pytest.mark.parametrize(("place", "words"), [
    ("pocketsam.export.onnx.OnnxExporter.export", r"cannot convert the prepared encoder \(no such layout\)"),
    ("pocketsam.quantize.onnx.OnnxQuantizer.layers", r"cannot make onnx int8 of this model \(no such layout\)"),
])
def test_a_tool_that_fails_early_leaves_the_rest(toy_checkpoint: Path, tmp_path: Path, place: str, words: str,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    pocketsam.export("toy_sam", checkpoint=toy_checkpoint, out=tmp_path / "b", images=photo_paths()[:1], clicks=False)

    def fail(*_: object) -> None:
        raise RuntimeError("no such layout")

    monkeypatch.setattr(place, fail)
    with pytest.raises(ParityError, match=words):
        pocketsam.export("toy_sam", checkpoint=toy_checkpoint, precisions=["fp32", "int8"], out=tmp_path / "b",
                         images=photo_paths()[:1], calibration_images=2, clicks=False)
    assert {a.precision for a in read_bundle(tmp_path / "b").artifacts} == {"fp32"}


def test_a_decoder_that_is_refused_stays_in_float(toy_checkpoint: Path, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """The int8 encoder has passed by then."""
    def write(self: OnnxQuantizer, path: Path, keep: frozenset[str] = frozenset()) -> None:
        if self.job.spec.name == "decoder":
            path.write_bytes(b"half")
            raise ValueError("no such kernel")
        whole(self, path, keep)

    whole = OnnxQuantizer.write
    monkeypatch.setattr(OnnxQuantizer, "write", write)
    out = tmp_path / "b"
    bundle = pocketsam.export("toy_sam", checkpoint=toy_checkpoint, precisions=["fp32", "int8"], out=out, gate=0.0,
                              images=photo_paths()[:1], calibration_images=2, clicks=False)
    decoder = bundle.find("onnx", "int8", "decoder")
    assert decoder.path.endswith("decoder.fp32.onnx")
    assert "no such kernel" in decoder.quantization["kept_in_float"]
    assert {p.name for p in (out / "onnx").iterdir()} == {Path(a.path).name for a in bundle.artifacts}


@pytest.mark.parametrize(("both", "reason"), [(0.984, "lowers the mean mask IoU from 0.9900 to 0.9840"), (0.986, "")])
def test_a_decoder_that_costs_masks_stays_in_float(toy_checkpoint: Path, tmp_path: Path, both: float, reason: str,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """However low the gate is: the encoder is most of the time."""
    def agreement(pair: Pair, encoder: Artifact, decoder: Artifact, images: object) -> dict[str, Any]:
        mean = both if decoder.path.endswith("decoder.int8.onnx") else 0.99
        return {"all": {"mean": mean, "worst": mean, "prompts": 8}}

    monkeypatch.setattr(Pair, "_agreement", agreement)
    monkeypatch.setattr(Pair, "_ratio", lambda *_: 2.0)
    bundle = pocketsam.export("toy_sam", checkpoint=toy_checkpoint, precisions=["fp32", "int8"], out=tmp_path / "b",
                              gate=0.0, images=photo_paths()[:1], calibration_images=2, clicks=False)
    decoder = bundle.find("onnx", "int8", "decoder")
    assert reason in decoder.quantization["kept_in_float"]
    assert decoder.path.endswith("decoder.fp32.onnx") == bool(reason)


@pytest.mark.parametrize("error", [RuntimeError("primitive\nand a second line"), BundleError("primitive.")])
def test_an_encoder_that_the_engine_refuses_leaves_the_rest(toy_checkpoint: Path, tmp_path: Path, error: Exception,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("pocketsam.quantize.pair.agreement", fail)
    out = tmp_path / "b"
    with pytest.raises(ParityError, match=r"primitive.* holds the rest\."):
        pocketsam.export("toy_sam", checkpoint=toy_checkpoint, precisions=["fp32", "int8"], out=out,
                         images=photo_paths()[:1], calibration_images=2, clicks=False)
    bundle = read_bundle(out)
    assert {a.precision for a in bundle.artifacts} == {"fp32"}
    assert {p.name for p in (out / "onnx").iterdir()} == {Path(a.path).name for a in bundle.artifacts}
