"""Exporting to a place that holds a bundle already: it is extended or refused, never silently replaced."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import pocketsam
from pocketsam.bundle import MANIFEST, Bundle, read_bundle, to_json
from pocketsam.errors import OutputError, ParityError, UsageError
from pocketsam.export import pipeline
from pocketsam.photos import photo_paths
from pocketsam.specs import CLICK_GRAPHS

Run = Callable[..., Any]
FEW: Mapping[str, Any] = {"images": photo_paths()[:1], "calibration_images": 2, "gate": 0.0}


@pytest.fixture
def bundle(toy_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(toy_bundle, tmp_path / "toy.bundle"))


def files(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def rewrite(path: Path, change: Callable[[Bundle], Bundle]) -> None:
    """Change the manifest of a bundle."""
    (path / MANIFEST).write_text(to_json(change(read_bundle(path))))


def test_other_weights_and_other_slots_are_refused(cli: Run, bundle: Path, toy_checkpoint: Path,
                                                   tmp_path: Path) -> None:
    before = files(bundle)
    state = torch.load(toy_checkpoint, weights_only=True)
    other = tmp_path / "other.pt"
    torch.save({k: v + 1e-3 if v.is_floating_point() else v for k, v in state.items()}, other)
    for call in (("quantize", bundle, "--checkpoint", other),
                 ("export", "toy_sam", "--checkpoint", other, "-o", bundle),
                 ("export", "toy_sam", "--checkpoint", toy_checkpoint, "--slots", "4", "-o", bundle)):
        got = cli(*call)
        assert got.code == 2
        assert "choose another folder or remove it" in " ".join(got.err.split())
    assert files(bundle) == before


def test_what_another_version_described_otherwise_is_not_dropped(bundle: Path, toy_checkpoint: Path) -> None:
    rewrite(bundle, lambda b: replace(b, spec=replace(b.spec, logit_limit=1.0), artifacts=(
        *b.artifacts, *(replace(a, format="litert") for a in b.artifacts))))
    before = files(bundle)
    with pytest.raises(OutputError, match=r"another version of pocketsam.* all that it holds \(litert fp32 too"):
        pocketsam.export("toy_sam", checkpoint=toy_checkpoint, formats=["onnx"], out=bundle)
    assert files(bundle) == before


def test_precisions_that_are_named_twice_are_made_once(bundle: Path, toy_checkpoint: Path) -> None:
    made = pocketsam.export("toy_sam", checkpoint=toy_checkpoint, precisions=["fp32", "fp32"], out=bundle, **{
        k: v for k, v in FEW.items() if k == "images"})
    paths = [a.path for a in made.artifacts]
    assert len(paths) == len(set(paths))


def test_options_of_int8_without_int8_are_refused(toy_checkpoint: Path, tmp_path: Path) -> None:
    for options in ({"calibration": tmp_path}, {"search_seconds": 5.0}):
        with pytest.raises(UsageError, match="are for int8"):
            pocketsam.export("toy_sam", checkpoint=toy_checkpoint, out=tmp_path / "x", **options)


@pytest.mark.parametrize("text", ['{"name": "the bundle of a web page"}', "{", '{"schema": 99, "model": {}}'])
def test_what_is_no_bundle_of_ours_is_not_replaced(toy_checkpoint: Path, tmp_path: Path, text: str) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / MANIFEST).write_text(text)
    with pytest.raises(OutputError, match="is not a bundle that can be extended"):
        pocketsam.export("toy_sam", checkpoint=toy_checkpoint, out=mine)
    assert (mine / MANIFEST).read_text() == text


def test_a_kept_artifact_must_pass_the_gate_that_is_asked(bundle: Path, toy_checkpoint: Path) -> None:
    """One that was let in by a lower gate, or judged on other photos, is measured again."""
    def spoilt(b: Bundle) -> Bundle:
        return replace(b, artifacts=tuple(replace(a, measured={**a.measured, "gate": 0.1}) for a in b.artifacts))

    rewrite(bundle, spoilt)
    lines: list[str] = []
    made = pocketsam.export("toy_sam", checkpoint=toy_checkpoint, out=bundle, report=lines.append)
    assert "measuring onnx fp32 on 3 images" in lines
    assert {a.measured["gate"] for a in made.artifacts} == {0.999}
    lines.clear()
    pocketsam.export("toy_sam", checkpoint=toy_checkpoint, out=bundle, report=lines.append)
    assert not any(line.startswith("measuring") for line in lines)
    pocketsam.export("toy_sam", checkpoint=toy_checkpoint, out=bundle, images=photo_paths()[3:4], report=lines.append)
    assert "measuring onnx fp32 on 1 images" in lines


def test_a_kept_artifact_below_the_gate_is_refused(bundle: Path, toy_checkpoint: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    before = files(bundle)
    monkeypatch.setitem(pocketsam.parity.GATES, "fp32", 1.1)
    with pytest.raises(ParityError, match=r"below the gate of 1\.1"):
        pocketsam.export("toy_sam", checkpoint=toy_checkpoint, out=bundle)
    assert files(bundle) == before


def test_files_that_int8_shares_with_fp32_may_be_made_anew(bundle: Path, toy_checkpoint: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """Converters need not write the same bytes twice."""
    export, again = pocketsam.export, {"checkpoint": toy_checkpoint, "out": bundle}
    export("toy_sam", precisions=["fp32", "int8"], **again, **FEW)

    def unlike(b: Bundle) -> Bundle:
        """As if another version of a tool had made the fp32 files."""
        for a in b.artifacts:
            if a.precision == "fp32":
                (b.root / a.path).write_bytes((b.root / a.path).read_bytes() + b"\x82\x01\x00")
        return b

    unlike(read_bundle(bundle))
    lines: list[str] = []
    made = export("toy_sam", precisions=["fp32"], report=lines.append, **again)
    assert "exporting onnx/decoder.fp32.onnx" in lines
    assert {a.precision for a in made.artifacts} == {"fp32", "int8"}
    for precision in ("fp32", "int8"):
        pocketsam.load(bundle, runtime="onnxruntime", precision=precision)


def test_int8_says_what_its_own_encoder_does_to_clicks(bundle: Path, toy_checkpoint: Path) -> None:
    made = pocketsam.export("toy_sam", checkpoint=toy_checkpoint, out=bundle, precisions=["fp32", "int8"], **FEW)
    clicks = {a.precision: a.measured["all"]["mean"] for a in made.artifacts if a.graph in CLICK_GRAPHS}
    assert clicks["int8"] < clicks["fp32"]


def test_int8_follows_the_click_graphs_of_its_bundle(toy_checkpoint: Path, tmp_path: Path) -> None:
    options = {"checkpoint": toy_checkpoint, "out": tmp_path / "b", "precisions": ["fp32", "int8"], **FEW}
    assert not {a.graph for a in pocketsam.export("toy_sam", clicks=False, **options).artifacts} & set(CLICK_GRAPHS)
    made = pocketsam.export("toy_sam", **options)
    assert {a.graph for a in made.artifacts if a.precision == "int8"} >= set(CLICK_GRAPHS)


def test_versions_of_what_is_kept_stay(bundle: Path, toy_checkpoint: Path) -> None:
    made = pocketsam.export("toy_sam", checkpoint=toy_checkpoint, out=bundle, formats=["openvino"], clicks=False)
    assert {a.format for a in made.artifacts} == {"onnx", "openvino"}
    rewrite(bundle, lambda b: replace(b, tools={**b.tools, "of the other format": "1"}))
    made = pocketsam.export("toy_sam", checkpoint=toy_checkpoint, out=bundle, formats=["onnx"])
    assert made.tools["of the other format"] == "1"


@pytest.mark.slow
def test_quantize_keeps_the_side_and_takes_no_clicks_of_its_own(cli: Run, tmp_path: Path) -> None:
    out = tmp_path / "small.bundle"
    pocketsam.export("lite0", out=out, image_size=128, clicks=False)
    before = {a.path: a.sha256 for a in read_bundle(out).artifacts}
    got = cli("quantize", out, "--gate", "0", "--calibration-images", "2", "--json")
    assert got.code == 0, got.err
    assert [r["recipe"] for r in json.loads(got.out)] == ["int8"]
    made = read_bundle(out)
    assert made.spec.image_size == 128
    assert before.items() <= {a.path: a.sha256 for a in made.artifacts}.items()
    assert not {a.graph for a in made.artifacts} & set(CLICK_GRAPHS)


def test_a_bundle_with_the_name_of_its_model(cli: Run, toy_bundle: Path, toy_checkpoint: Path, tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(toy_bundle, tmp_path / "toy_sam")
    monkeypatch.chdir(tmp_path)
    got = cli("verify", "toy_sam", "--checkpoint", toy_checkpoint)
    assert got.code == 0, got.err


def test_a_place_that_changed_meanwhile_is_not_replaced(bundle: Path, toy_checkpoint: Path, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """Another export finished, or someone put a file into an empty folder."""
    empty = tmp_path / "empty"
    empty.mkdir()
    prove = pipeline._prove
    for out, change in ((bundle, lambda: (bundle / MANIFEST).write_text((bundle / MANIFEST).read_text() + " ")),
                        (empty, lambda: (empty / "mine").write_text("mine"))):
        def meanwhile(*args: Any, change: Callable[[], object] = change) -> Bundle:
            change()
            return prove(*args)

        monkeypatch.setattr(pipeline, "_prove", meanwhile)
        with pytest.raises(OutputError, match="was changed while this export ran"):
            pocketsam.export("toy_sam", checkpoint=toy_checkpoint, out=out, images=photo_paths()[:1], clicks=False)
    assert (bundle / MANIFEST).read_text().endswith(" ")
    assert [p.name for p in empty.iterdir()] == ["mine"]


def test_a_damaged_artifact_of_another_format_is_not_dropped(bundle: Path, toy_checkpoint: Path) -> None:
    again = {"checkpoint": toy_checkpoint, "out": bundle, "images": photo_paths()[:1], "clicks": False}
    made = pocketsam.export("toy_sam", formats=["openvino"], **again)
    (weights,) = (bundle / made.find("openvino", "fp32", "decoder").path).glob("*.bin")
    weights.write_bytes(weights.read_bytes()[:-1])
    before = files(bundle)
    with pytest.raises(OutputError, match=r"openvino/decoder.* missing or damaged .* export openvino fp32 anew"):
        pocketsam.export("toy_sam", formats=["onnx"], **again)
    assert files(bundle) == before
    pocketsam.export("toy_sam", formats=["onnx", "openvino"], **again)
    assert pocketsam.load(bundle, runtime="openvino").info()["precision"] == "fp32"


def test_an_export_is_proven_in_f32_whatever_is_asked_elsewhere(toy_checkpoint: Path, tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCKETSAM_OPENVINO_PRECISION", "none")
    made = pocketsam.export("toy_sam", checkpoint=toy_checkpoint, formats=["openvino"], precisions=["fp32", "int8"],
                            out=tmp_path / "b", clicks=False, **FEW)
    assert {a.precision for a in made.artifacts} == {"fp32", "int8"}
    with pytest.raises(UsageError, match="inference precision 'none' is unknown"):
        pocketsam.load(tmp_path / "b", runtime="openvino")
