"""What the commands print and write."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pocketsam import doctor, registry, rle
from pocketsam.errors import MissingDependency
from pocketsam.photos import photo_paths

Run = Callable[..., Any]


def test_models_lists_every_checkpoint_in_full(cli: Run) -> None:
    rows = json.loads(cli("models", "--json").out)
    assert {r["model"] for r in rows} >= {"sam_vit_b", "sam_vit_l", "sam_vit_h", "mobile_sam"}
    for row in rows:
        assert row["url"].startswith("https://") or row["model"] == "lite0"
        assert row["licence"]
        # The only weights that a flatbuffer cannot hold.
        assert ("litert" in row["formats"]) == (row["model"] != "sam_vit_h")
        assert row["sha256"] is None or len(row["sha256"]) == 64
    text = "".join(cli("models").out.split())
    assert all(r["url"].replace(" ", "") in text for r in rows), "addresses must not be cut off"


def test_doctor(cli: Run) -> None:
    data = json.loads(cli("doctor", "--json").out)
    assert data["machine"]["cores"] >= 1
    rows = {r["name"]: r for r in data["runtimes"]}
    assert rows["onnxruntime"]["usable"]
    assert rows["onnxruntime"]["version"]
    assert cli("doctor").code == 0


@pytest.mark.parametrize(("text", "name"), [
    ("model name\t: AMD EPYC\nflags\t: avx2\n", "AMD EPYC"),
    ("Features\t: asimd\nModel\t\t: Raspberry Pi 5\n", "Raspberry Pi 5"),
    ("Features\t: asimd\n", "a board"),
])
def test_processors_without_a_model_name(monkeypatch: pytest.MonkeyPatch, text: str, name: str) -> None:
    """ARM kernels name the board, or nothing."""
    def read_text(path: Path, **_: Any) -> str:
        if str(path) not in ("/proc/cpuinfo", "/proc/device-tree/model"):
            raise FileNotFoundError
        return text if path.name == "cpuinfo" else "a board\0"

    monkeypatch.setattr(Path, "read_text", read_text)
    assert doctor._cpu()[0] == name


def test_doctor_advises_extras_that_hold_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]

    def held(names: str) -> set[str]:
        lines = [line for name in names.split(",") for line in extras[name]]
        own = {n for line in lines if line.startswith("pocketsam[") for n in held(line[10:-1])}
        return own | {re.split(r"[>\[]", line)[0] for line in lines}

    for needs in (*registry.FORMAT_PACKAGES.values(), *registry.QUANTIZER_PACKAGES.values()):
        assert set(needs.distributions) <= held(needs.extras)
    monkeypatch.setattr(doctor, "_version", lambda distribution: "")
    assert {r.name: r.remedy for r in doctor.exporters()} == {
        name: f"pip install 'pocketsam[{needs.extras}]'" for name, needs in registry.FORMAT_PACKAGES.items()}


def test_other_distributions_of_an_engine_are_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    held = {"tflite-runtime": "2.14.0", "onnxruntime-gpu": "1.30.0"}
    monkeypatch.setattr(doctor, "_version", lambda distribution: held.get(distribution, ""))
    rows = {r.name: r for r in doctor.runtimes()}
    assert (rows["litert"].usable, rows["litert"].version) == (True, "2.14.0")
    assert (rows["onnxruntime"].usable, rows["openvino"].usable) == (True, False)


@pytest.mark.parametrize("name", [r"a\[/b].jpg", r"C:\data\[abc]\x.jpg"])
def test_names_with_brackets_are_printed_as_they_are(cli: Run, tmp_path: Path, name: str) -> None:
    outcome = cli("segment", name, "--point", "1,1")
    assert outcome.code == 2
    assert name in "".join(outcome.err.splitlines())


@pytest.mark.parametrize(("kind", "name", "module", "extras"), [
    ("format", "onnx", "onnxscript", "export"), ("format", "openvino", "openvino", "export"),
    ("format", "litert", "litert_torch", "all"), ("format", "coreml", "coremltools", "export,coreml"),
    ("quantizer", "openvino", "nncf", "all"), ("quantizer", "litert", "ai_edge_quantizer", "all"),
])
def test_an_exporter_that_is_not_installed_names_the_command(kind: str, name: str, module: str, extras: str,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that imports its converter only when it works."""
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependency, match=rf"needs {module.replace('_', '-')}, .*'pocketsam\[{extras}\]'"):
        registry.load(kind, name)


def test_segment_json_and_files(cli: Run, toy_bundle: Path, tmp_path: Path) -> None:
    photo = photo_paths()[0]
    outcome = cli("segment", photo, "--point", "300,180", "--bundle", toy_bundle, "--json", "-o", tmp_path / "o.png",
                  "--masks", tmp_path / "m", "--threads", "1")
    data = json.loads(outcome.out)
    assert data["runtime"] == "onnxruntime"
    assert data["threads"] == 1
    assert len(data["masks"]) == 3
    size = (data["image"]["height"], data["image"]["width"])
    for row in data["masks"]:
        mask = rle.decode(row["segmentation"])
        assert mask.shape == size
        assert mask.sum() == row["area"]
        png = np.asarray(Image.open(row["file"]))
        assert np.array_equal(png > 0, mask)
    assert Image.open(tmp_path / "o.png").size == size[::-1]
    assert len(list(tmp_path.iterdir())) == 2, "no temporary files stay behind"


def test_segment_boxes(cli: Run, toy_bundle: Path, tmp_path: Path) -> None:
    photo = photo_paths()[0]
    outcome = cli("segment", photo, "--box", "10,10,300,200", "--box", "50,50,400,390", "--bundle", toy_bundle,
                  "--json", "-o", tmp_path / "o.jpg")
    assert len(json.loads(outcome.out)["masks"]) == 2
    assert Image.open(tmp_path / "o.jpg").format == "JPEG"


def test_version(cli: Run) -> None:
    from pocketsam import __version__

    assert cli("--version").out.strip() == __version__


@pytest.mark.parametrize("seed", range(4))
def test_rle_agrees_with_pycocotools(seed: int) -> None:
    from pycocotools import mask as coco

    rng = np.random.default_rng(seed)
    masks = [rng.random((37, 53)) < p for p in (0.0, 0.01, 0.5, 0.99, 1.0)]
    masks.append(np.kron(rng.random((6, 5)) < 0.5, np.ones((90, 70))) > 0)
    masks += [np.zeros((1, 1), bool), np.ones((1, 7), bool)]
    for mask in masks:
        ours = rle.encode(mask)
        official = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert ours["counts"] == official["counts"].decode()
        assert np.array_equal(rle.decode(ours), mask)
