"""Bundles are untrusted: hashes, paths, schema and JSON are checked before anything runs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pocketsam
from pocketsam.bundle import MANIFEST, read_bundle
from pocketsam.errors import BundleError, UnknownName, UsageError
from pocketsam.everything import Settings, segment_everything
from pocketsam.models.catalog import SPECS
from pocketsam.specs import CLICK_GRAPHS, ModelSpec
from pocketsam.tune import tune


@pytest.fixture
def bundle(toy_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(toy_bundle, tmp_path / "copy.bundle"))


def edit(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads((bundle / MANIFEST).read_text())
    change(data)
    (bundle / MANIFEST).write_text(json.dumps(data))


def test_contents(toy_bundle: Path) -> None:
    bundle = read_bundle(toy_bundle)
    assert {a.path for a in bundle.artifacts} == {f"onnx/{g}.fp32.onnx" for g in ("encoder", "decoder", *CLICK_GRAPHS)}
    for artifact in bundle.artifacts:
        assert artifact.measured["all"]["mean"] >= 0.999
        kind = "point" if artifact.graph in CLICK_GRAPHS else "box"
        assert set(artifact.measured[kind]) >= {"mean", "p5", "worst", "prompts"}
        assert bundle.file(artifact).stat().st_size == artifact.bytes
    assert len(bundle.weights_sha256) == 64
    assert bundle.tools["torch"]
    names = {p.name for p in toy_bundle.parent.iterdir()}
    assert not [n for n in names if n.startswith(".")], "staging folders must be gone"


@pytest.mark.parametrize("name", ["onnx/encoder.fp32.onnx", "onnx/decoder.fp32.onnx"])
def test_flipped_byte(bundle: Path, name: str) -> None:
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)
    with pytest.raises(BundleError, match="does not match its recorded sha256"):
        pocketsam.load(bundle)


def test_missing_file(bundle: Path) -> None:
    (bundle / "onnx/decoder.fp32.onnx").unlink()
    with pytest.raises(BundleError, match=r"lacks onnx/decoder\.fp32\.onnx"):
        pocketsam.load(bundle)


@pytest.mark.parametrize("path", ["../outside.onnx", "/etc/passwd", "onnx/../../x", "C:\\x.onnx", "a\\..\\..\\b"])
def test_path_leaving_the_folder(bundle: Path, path: str) -> None:
    edit(bundle, lambda d: d["artifacts"][0].update(path=path))
    with pytest.raises(BundleError, match="outside its folder"):
        read_bundle(bundle)


def test_symbolic_link_leaving_the_folder(bundle: Path, tmp_path: Path) -> None:
    target = bundle / "onnx/encoder.fp32.onnx"
    (tmp_path / "elsewhere.onnx").write_bytes(target.read_bytes())
    target.unlink()
    target.symlink_to(tmp_path / "elsewhere.onnx")
    with pytest.raises(BundleError, match="outside its folder"):
        read_bundle(bundle)
    target.unlink()
    target.symlink_to(target)
    with pytest.raises(BundleError):
        pocketsam.load(bundle)


def test_newer_schema(bundle: Path) -> None:
    edit(bundle, lambda d: d.update(schema=99))
    with pytest.raises(BundleError, match="upgrade pocketsam"):
        read_bundle(bundle)


@pytest.mark.parametrize("change", [
    lambda d: d.pop("artifacts"), lambda d: d.update(slots="many"), lambda d: d.update(slots=10**9),
    lambda d: d.update(model=None), lambda d: d["model"].update(image_size=-5), lambda d: d["model"].update(extra=1),
    lambda d: d["model"].update(image_size=10**9), lambda d: d["model"].update(mean=[1, 2]),
    lambda d: d["artifacts"][0].update(path=7), lambda d: d.update(weights=3), lambda d: d.pop("schema"),
    *[lambda d, v=v: d["artifacts"][0].update(v) for v in (
        {"format": []}, {"precision": None}, {"key": 1}, {"path": "a\0b"}, {"path": "\ud800"}, {"path": "x" * 300},
        {"measured": []}, {"measured": {"all": 1}}, {"measured": {"all": {"mean": "x"}}},
        {"measured": {"all": {"mean": 10**400}}},
        {"measured": {"gate": "abc"}}, {"measured": {"gate": 3}}, {"quantization": 3})],
    *[lambda d, v=v: d["model"].update(v) for v in (
        {"mean": [1e9, 0, 0]}, {"mean": [-1, 0, 0]}, {"std": [1e9, 1, 1]}, {"prompt_size": -4}, {"prompt_size": True},
        {"hq_channels": -1}, {"max_points": -1}, {"stability": ["a", "b"]}, {"stability": [10**400, 1]},
        {"stability": {}}, {"high_res_channels": ["a", "b"]}, {"high_res_channels": [0, 4]}, {"object_score": "yes"},
        {"logit_limit": "x"}, {"logit_limit": 10**400}, {"name": 5})],
])
def test_damaged_manifest(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    edit(bundle, change)
    with pytest.raises(BundleError):
        pocketsam.load(bundle, runtime="onnxruntime")


def test_every_model_passes_its_own_check() -> None:
    for spec in SPECS.values():
        assert ModelSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_not_a_bundle(tmp_path: Path, bundle: Path) -> None:
    with pytest.raises(BundleError, match="does not exist"):
        read_bundle(tmp_path / "nothing.bundle")
    with pytest.raises(BundleError, match="is not a bundle"):
        read_bundle(tmp_path)
    (bundle / MANIFEST).write_text("{" * 100_000)
    with pytest.raises(BundleError, match="cannot be read"):
        read_bundle(bundle)


def test_wrong_graph_in_the_right_place(bundle: Path) -> None:
    """An artifact whose names do not follow the contract is refused before it runs."""
    edit(bundle, lambda d: d["artifacts"][0].update(
        {k: d["artifacts"][1][k] for k in ("path", "sha256", "bytes")}))
    with pytest.raises(BundleError, match="expected"):
        pocketsam.load(bundle)


def test_unknown_precision(bundle: Path) -> None:
    with pytest.raises(UnknownName, match="fp32"):
        pocketsam.load(bundle, precision="fp23")


def test_the_program_may_change_its_folder(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Some graphs are opened when they are first asked for."""
    monkeypatch.chdir(toy_bundle.parent)
    sam = pocketsam.load(toy_bundle.name, runtime="onnxruntime")
    monkeypatch.chdir(tmp_path)
    sam.set_image(np.zeros((40, 60, 3), np.uint8))
    assert len(sam.predict_boxes([(1, 1, 20, 20), (5, 5, 30, 30)]).masks) == 2
    assert segment_everything(sam, np.zeros((40, 60, 3), np.uint8), Settings(points_per_side=2)) is not None


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "litert"])
@pytest.mark.parametrize(("key", "value", "tensor"), [
    ("image_size", 192, "image"), ("embed_size", 16, "image_embeddings"), ("slots", 9, "point_coords")])
def test_graphs_of_another_shape(toy_everywhere: Path, tmp_path: Path, runtime: str, key: str, value: int,
                                 tensor: str) -> None:
    copy = Path(shutil.copytree(toy_everywhere, tmp_path / "copy.bundle"))
    edit(copy, lambda data: (data if key == "slots" else data["model"]).update({key: value}))
    with pytest.raises(BundleError, match=rf"has {tensor} as .*, and bundle\.json says .*; export the bundle again"):
        pocketsam.load(copy, runtime=runtime, threads=1)


def test_an_artifact_that_is_a_pipe(bundle: Path) -> None:
    """Reading it would wait for ever."""
    data = json.loads((bundle / MANIFEST).read_text())
    path = bundle / data["artifacts"][0]["path"]
    path.unlink()
    os.mkfifo(path)
    data["artifacts"][0]["bytes"] = 0
    (bundle / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(BundleError, match="neither a file nor a folder"):
        pocketsam.load(bundle, runtime="onnxruntime")


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2"])
def test_threads_that_are_no_number_of_threads(bundle: Path, threads: Any) -> None:
    for call in (pocketsam.load, tune_of):
        with pytest.raises(UsageError, match="expected a whole number of at least 1"):
            call(bundle, threads=threads)
    one: Any = np.int64(1)
    assert pocketsam.load(bundle, runtime="onnxruntime", threads=one).info()["threads"] == 1


def tune_of(bundle: Path, threads: Any) -> Any:
    return tune(read_bundle(bundle), threads)
