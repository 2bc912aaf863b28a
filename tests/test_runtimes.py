"""What each runtime promises beyond masks: pinned precision, delegates, verify, tune, and honest failures."""

from __future__ import annotations

import json
import locale
import os
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import pocketsam
from pocketsam import registry
from pocketsam.bundle import MANIFEST, read_bundle
from pocketsam.errors import BundleError, CheckpointError, MissingDependency, UsageError
from pocketsam.geometry import Frame
from pocketsam.photos import photo_paths
from pocketsam.runtime import sparing
from pocketsam.tune import Candidate, choose, tune

Run = Callable[..., Any]
FORMATS = [f for f in registry.FORMATS if f != "coreml"]


@pytest.fixture
def bundle(toy_everywhere: Path) -> Path:
    """The toy model in every format and precision."""
    return toy_everywhere


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("POCKETSAM_CACHE", str(tmp_path / "cache"))


def test_openvino_precision_is_pinned(bundle: Path, tmp_path: Path) -> None:
    sam = pocketsam.load(bundle, runtime="openvino")
    assert sam.info()["inference_precision"] == "f32"
    hint = str(sam.runtime._encoder.get_property("INFERENCE_PRECISION_HINT"))
    assert "float32" in hint or "f32" in hint
    pocketsam.load(bundle, runtime="openvino", precision="fp16")
    folders = {p.name for p in (tmp_path / "cache").rglob("*-f32")}
    assert len(folders) == 2, "the compiled-model cache is kept apart by precision"


@pytest.mark.parametrize("asked", ["bf16", "f16"])
def test_openvino_computes_in_what_was_asked_or_says_why_not(bundle: Path, tmp_path: Path, asked: str,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    import openvino as ov

    monkeypatch.setenv("POCKETSAM_OPENVINO_PRECISION", asked)
    if {"bf16": "BF16", "f16": "FP16"}[asked] not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(UsageError, match=f"does not compute in {asked}; choose one of f32"):
            pocketsam.load(bundle, runtime="openvino")
        return
    sam = pocketsam.load(bundle, runtime="openvino")
    assert sam.info()["inference_precision"] == asked
    assert f"computed in {asked}" in sam.info()["note"]
    assert len(list((tmp_path / "cache").rglob(f"*-{asked}"))) == 1
    assert {"bf16": "bfloat16", "f16": "float16"}[asked] in str(
        sam.runtime._encoder.get_property("INFERENCE_PRECISION_HINT"))


def test_compute_is_an_argument_too(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes before the environment variable, and is refused where nothing would take it."""
    monkeypatch.setenv("POCKETSAM_OPENVINO_PRECISION", "int4")
    assert pocketsam.load(bundle, runtime="openvino", compute="f32").info()["inference_precision"] == "f32"
    with pytest.raises(UsageError, match="'int8' is unknown; choose one of f32"):
        pocketsam.load(bundle, runtime="openvino", compute="int8")
    with pytest.raises(UsageError, match="unit 'TPU' is unknown"):
        pocketsam.load(bundle, runtime="coreml", compute="TPU")
    for runtime in ("auto", "onnxruntime"):
        with pytest.raises(UsageError, match=f"for coreml and openvino, and the runtime is {runtime}"):
            pocketsam.load(bundle, runtime=runtime, compute="bf16")
    with pytest.raises(UsageError, match="goes with a bundle"):
        pocketsam.load("lite0", compute="bf16")


def test_openvino_leaves_the_locale_alone(bundle: Path) -> None:
    """OpenVINO, compiling in several threads with a cache, would leave "C": text files read as ASCII afterwards."""
    before = locale.setlocale(locale.LC_CTYPE)
    try:
        locale.setlocale(locale.LC_CTYPE, "C.UTF-8")
        for _ in range(3):
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(lambda _: pocketsam.load(bundle, runtime="openvino", threads=1), range(8)))
            assert locale.setlocale(locale.LC_CTYPE) == "C.UTF-8"
    finally:
        locale.setlocale(locale.LC_CTYPE, before)


def test_openvino_runs_where_nothing_can_be_kept(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("POCKETSAM_CACHE", str(tmp_path / "file" / "cache"))
    sam = pocketsam.load(bundle, runtime="openvino", threads=1)
    sam.set_image(np.zeros((60, 100, 3), np.uint8))
    assert sam.predict(points=[(20, 30)]).masks.shape == (3, 60, 100)


@pytest.mark.parametrize(("runtime", "builder"), [("onnxruntime", "_session"), ("openvino", "_read")])
def test_a_click_graph_is_built_once(bundle: Path, runtime: str, builder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first batches come from several threads at once."""
    opened = pocketsam.load(bundle, runtime=runtime, threads=1).runtime
    shapes = {t.name: t.shape for t in opened.spec.graphs()["click_image"].inputs}
    inputs = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    build, built = getattr(opened, builder), []

    def slowly(*args: Any) -> Any:
        built.append(args)
        time.sleep(0.1)
        return build(*args)

    monkeypatch.setattr(opened, builder, slowly)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: opened.click("click_image", inputs), range(4)))
    assert len(built) == 1


def test_unknown_inference_precision(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCKETSAM_OPENVINO_PRECISION", "int4")
    with pytest.raises(UsageError, match="'int4' is unknown; choose one of f32, bf16, f16"):
        pocketsam.load(bundle, runtime="openvino")


def test_onnxruntime_rests_after_a_call(bundle: Path) -> None:
    """Its threads would spin for 50 ms after each call: slower decoders after an encoder, and a battery's loss."""
    sam = pocketsam.load(bundle, runtime="onnxruntime", threads=2)
    burnt = []
    for _ in range(3):
        sam.embed(photo_paths()[0])
        before = time.process_time()
        time.sleep(0.2)
        burnt.append(time.process_time() - before)
    assert min(burnt) < 0.01


def test_litert_reports_what_left_the_delegate(bundle: Path) -> None:
    info = pocketsam.load(bundle, runtime="litert", threads=2).info()
    # Reading uint8 is never delegated; matrix products must be.
    assert "CAST" in info["fallback_ops"]["encoder"]
    assert not {"CONV_2D", "FULLY_CONNECTED", "BATCH_MATMUL"} & set(info["fallback_ops"]["encoder"])


def test_labels_of_other_types(bundle: Path) -> None:
    """int64 labels and integer points, which is what lists and numpy give, mean the same as floats."""
    for runtime in ("onnxruntime", "openvino", "litert"):
        sam = pocketsam.load(bundle, runtime=runtime)
        sam.set_image(np.zeros((60, 100, 3), np.uint8))
        a = sam.predict(points=np.array([[20, 30]]), labels=np.array([1], np.int64))
        b = sam.predict(points=[(20.0, 30.0)], labels=[1.0])
        assert np.array_equal(a.logits, b.logits)


@pytest.mark.parametrize("runtime", [r for r, f in registry.RUNTIME_FORMATS.items() if f in FORMATS])
def test_a_runtime_that_is_not_installed_names_the_command(bundle: Path, runtime: str,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    package = registry.RUNTIME_PACKAGES[runtime]
    for name in [m for m in sys.modules if m.split(".")[0] in (package.module, "tflite_runtime")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, f"pocketsam.runtimes.{runtime}", raising=False)
    monkeypatch.setitem(sys.modules, package.module, None)
    with pytest.raises(MissingDependency, match=rf"pip install 'pocketsam\[{package.extra}\]'"):
        pocketsam.load(bundle, runtime=runtime)


@pytest.mark.parametrize(("runtime", "format_"), [(r, f) for r, f in registry.RUNTIME_FORMATS.items() if f in FORMATS])
def test_a_file_that_the_engine_refuses(bundle: Path, tmp_path: Path, runtime: str, format_: str) -> None:
    """The hash is right, the content is not: the engine's own error becomes one sentence."""
    from pocketsam.files import sha256_path, size_of

    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    data = json.loads((copy / MANIFEST).read_text())
    row = next(a for a in data["artifacts"] if a["format"] == format_ and a["graph"] == "encoder")
    path = copy / row["path"]
    target = path / "model.xml" if path.is_dir() else path
    target.write_bytes(b"not a model at all")
    row.update(sha256=sha256_path(path), bytes=size_of(path))
    (copy / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(BundleError, match="refuses"):
        pocketsam.load(copy, runtime=runtime)


def test_folders_are_hashed_whole(bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    weights = copy / "openvino/encoder.fp32.ir/model.bin"
    data = bytearray(weights.read_bytes())
    data[100] ^= 1
    weights.write_bytes(data)
    with pytest.raises(BundleError, match="does not match its recorded sha256"):
        pocketsam.load(copy, runtime="openvino")
    weights.unlink()
    weights.symlink_to(bundle.resolve() / "openvino/encoder.fp32.ir/model.bin")
    with pytest.raises(BundleError, match="does not match its recorded sha256"):
        pocketsam.load(copy, runtime="openvino")


def test_a_bundle_of_other_tool_versions_loads(bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    data = json.loads((copy / MANIFEST).read_text())
    data["tools"] = dict.fromkeys(data["tools"], "0.0.1")
    (copy / MANIFEST).write_text(json.dumps(data))
    assert pocketsam.load(copy, runtime="onnxruntime").spec.name == "toy_sam"


def test_verify(cli: Run, bundle: Path, toy_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    rgb = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(rgb).save(tmp_path / "images" / "noise.png")
    common = ("--checkpoint", toy_checkpoint, "--images", tmp_path / "images", "--json")
    outcome = cli("verify", bundle, *common)
    rows = json.loads(outcome.out)
    assert outcome.code == 0, rows
    assert {r["format"] for r in rows} == set(registry.FORMATS)
    for row in rows:
        assert row["passed"]
        assert row["measured"]["all"]["prompts"] == 8
        assert set(row["measured"]["max_tensor_error"]) >= {"image_embeddings", "low_res_masks", "iou_predictions"}
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    data = json.loads((copy / MANIFEST).read_text())
    for artifact in data["artifacts"]:
        artifact["measured"]["gate"] = 1.01
    (copy / MANIFEST).write_text(json.dumps(data))
    (copy / "litert/encoder.fp32.tflite").unlink()
    outcome = cli("verify", copy, *common)
    failed = {(r["format"], r["precision"]): r for r in json.loads(outcome.out)}
    assert outcome.code == 1
    assert not any(r["passed"] for r in failed.values())
    assert "incomplete" in failed["litert", "fp32"]["problem"]
    assert failed["onnx", "fp32"]["problem"] == ""


def test_verify_does_not_pass_on_nothing(cli: Run, bundle: Path, toy_checkpoint: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    data = json.loads((copy / MANIFEST).read_text())
    whole = data["artifacts"]

    def verified(artifacts: list[dict[str, Any]]) -> Any:
        (copy / MANIFEST).write_text(json.dumps({**data, "artifacts": artifacts}))
        return cli("verify", copy, "--checkpoint", toy_checkpoint, "--json")

    got = verified([])
    assert (got.code, "holds no artifact" in got.err) == (2, True)
    onnx = [a for a in whole if (a["format"], a["precision"]) == ("onnx", "fp32")]
    got = verified([a for a in onnx if a["graph"] != "encoder"])
    assert (got.code, [r["passed"] for r in json.loads(got.out)]) == (1, [False])
    unlike = [{**a, "inputs": a["inputs"][:1]} if a["graph"] == "click_scores" else a for a in onnx]
    got = verified(unlike)
    assert (got.code, "click graphs" in json.loads(got.out)[0]["problem"]) == (1, True)


def test_verify_refuses_other_weights(bundle: Path, toy_checkpoint: Path, tmp_path: Path) -> None:
    import torch

    from pocketsam.verify import verify

    state = torch.load(toy_checkpoint, weights_only=True)
    state["mask_decoder.iou_token.weight"] += 1
    torch.save(state, tmp_path / "other.pt")
    reference = pocketsam.load("toy_sam", checkpoint=tmp_path / "other.pt", runtime="pytorch")
    with pytest.raises(CheckpointError, match="other weights"):
        verify(read_bundle(bundle), reference, [])


def test_tune_measures_once_and_auto_follows(cli: Run, bundle: Path) -> None:
    lines: list[str] = []
    first = tune(read_bundle(bundle), threads=1, report=lines.append)
    pairs = {(c.runtime, c.precision) for c in first}
    assert len(lines) == len(first) == len(pairs)
    assert {r for r, _ in pairs} == {r for r, f in registry.RUNTIME_FORMATS.items() if f in FORMATS}
    assert all(c.encoder_ms > 0 and c.decoder_ms > 0 and not c.problem for c in first)
    assert tune(read_bundle(bundle), threads=1, report=lines.append) == first
    assert len(lines) == len(pairs), "the second call reads the stored result"
    assert tune(read_bundle(bundle), threads=2) != first, "another thread count is another measurement"
    assert pocketsam.load(bundle, threads=1).info()["runtime"] == choose(first, "fp32").runtime
    data = json.loads(cli("tune", bundle, "--threads", "1", "--json").out)
    assert data["chosen"]["runtime"] == choose(first, "fp32").runtime
    assert data["chosen_any_precision"]["runtime"] == choose(first).runtime


def test_choose_prefers_accuracy_when_equal() -> None:
    exact = Candidate("onnxruntime", "fp32", 100, 10, 1.0)
    equal = Candidate("litert", "int8", 98, 10, 0.98)
    faster = Candidate("litert", "int8", 60, 10, 0.98)
    broken = replace(faster, problem="not installed")
    assert choose([equal, exact]) == exact
    assert choose([faster, exact]) == faster
    assert choose([broken, exact]) == exact
    assert choose([faster, exact], "fp32") == exact
    with pytest.raises(BundleError, match="not installed"):
        choose([broken])


def test_a_slower_and_less_accurate_candidate_is_never_chosen() -> None:
    exact = Candidate("onnxruntime", "fp32", 50, 10, 1.0)
    slow = Candidate("onnxruntime", "int8", 80, 10, 0.98)
    assert choose([slow, exact]) == exact


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGESIZE")


def test_onnx_runtime_gives_encoder_memory_back_where_asked(toy_bundle: Path, tmp_path: Path) -> None:
    from onnx import TensorProto, helper, save

    from pocketsam.runtimes.onnxruntime import open_session

    side, runtime = 2048, pocketsam.load(toy_bundle, runtime="onnxruntime").runtime
    features = [t.name for t in runtime.spec.feature_specs()]
    nodes = [helper.make_node("Cast", ["image"], ["x"], to=TensorProto.FLOAT), helper.make_node("Exp", ["x"], ["y"]),
             *(helper.make_node("ReduceMean", ["y"], [name]) for name in features)]
    graph = helper.make_graph(
        nodes, "big", [helper.make_tensor_value_info("image", TensorProto.UINT8, (1, side, side, 3))],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in features])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), tmp_path / "big.onnx")
    runtime._encoder = open_session(tmp_path / "big.onnx", 1)
    image, frame = np.zeros((1, side, side, 3), np.uint8), Frame.of(side, side, runtime.spec)
    before = resident()
    with sparing(runtime):
        runtime.encode(image, frame)
    assert not runtime.sparing
    given_back = resident() - before
    runtime.encode(image, frame)
    assert resident() - before >= given_back + side * side * 3 * 4
