"""int8: calibration data, recipes in every format, the gate, the search, and honest failures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import pocketsam
from pocketsam import registry
from pocketsam.benchmarks.work import share_in_8_bits
from pocketsam.bundle import read_bundle
from pocketsam.errors import ImageError, ParityError, UnsupportedModel, UsageError
from pocketsam.images import load_rgb
from pocketsam.models.catalog import spec
from pocketsam.photos import CALIBRATION_IMAGES, photo_paths
from pocketsam.quantize.agreement import slower
from pocketsam.quantize.calibration import collect
from pocketsam.quantize.recipes import RECIPES, check
from pocketsam.quantize.search import Search, try_attention
from pocketsam.tune import Candidate, choose

Run = Callable[..., Any]
HAVE = {"onnx": ("int8", "int8-weights"), "openvino": ("int8", "int8-weights"),
        "litert": ("int8", "int8-dynamic", "int8-weights"), "coreml": ("int8", "int8-weights")}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("POCKETSAM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ten different small photos, one copy, and two files that are no images."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(10):
        Image.fromarray(rng.integers(0, 256, (90, 160, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    shutil.copy(folder / "0.png", folder / "copy.png")
    (folder / "text.jpg").write_text("not an image")
    (folder / "cut.png").write_bytes((folder / "1.png").read_bytes()[:200])
    return folder


def test_shipped_photos_are_filled_up_and_warned_about() -> None:
    found = collect(None, spec("lite0"))
    assert (len(found.images), found.distinct) == (CALIBRATION_IMAGES, len(photo_paths()))
    assert any("only 7 different" in w and "--calibration" in w for w in found.warnings)
    again = collect(None, spec("lite0"))
    assert all(np.array_equal(a, b) for a, b in zip(found.images, again.images, strict=True))
    other = collect(None, spec("lite0"), seed=1)
    assert not all(a.shape == b.shape for a, b in zip(found.images, other.images, strict=True))


def test_bad_calibration_files_are_named_and_counted(photos: Path) -> None:
    found = collect(photos, spec("lite0"))
    text = " ".join(found.warnings)
    assert found.distinct == 10
    assert len(found.skipped) == 2
    assert "2 calibration files were skipped" in text
    assert "text.jpg" in text
    assert "cut.png" in text
    assert "copies of other calibration images were dropped (1)" in text
    assert "smaller than the model's 512" in text


def test_copies_leave_their_place_to_other_photos(photos: Path) -> None:
    for i in range(5):
        shutil.copy(photos / "0.png", photos / f"copy{i}.png")
    found = collect(photos, spec("lite0"), 9)
    assert (len(found.images), found.distinct) == (9, 9)
    few = " ".join(collect(photos, spec("lite0"), 4).warnings)
    assert "only 4 different calibration photos: " in few
    assert "with --calibration-images." in few


def test_identical_calibration_images_warn(tmp_path: Path) -> None:
    for i in range(12):
        Image.new("RGB", (600, 600), (9, 9, 9)).save(tmp_path / f"{i}.png")
    found = collect(tmp_path, spec("lite0"))
    assert found.distinct == 1
    assert any("only 1 different" in w for w in found.warnings)


def test_calibration_folders_that_cannot_be_used(cli: Run, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no JPEG"):
        collect(tmp_path, spec("lite0"))
    (tmp_path / "a.jpg").write_text("no")
    with pytest.raises(ImageError, match="none of the 1 calibration images"):
        collect(tmp_path, spec("lite0"))
    out = tmp_path / "x.bundle"
    outcome = cli("export", "lite0", "--precision", "int8", "--calibration", tmp_path / "absent", "-o", out)
    assert outcome.code == 2
    assert "neither a folder nor a pack" in " ".join(outcome.err.split())
    assert not out.exists()


def test_decoder_inputs_cover_every_label_and_the_mask(toy_checkpoint: Path) -> None:
    runtime = pocketsam.load("toy_sam", checkpoint=toy_checkpoint, runtime="pytorch", threads=2).runtime
    rows = list(collect(None, runtime.spec, count=1).decoder_inputs(runtime, 8))
    labels = np.concatenate([r["point_labels"] for r in rows])
    assert set(np.unique(labels)) == {-2.0, -1.0, 0.0, 1.0, 2.0, 3.0}
    assert {float(r["has_mask_input"][0]) for r in rows} == {0.0, 1.0}
    assert any(r["mask_input"].std() > 0 for r in rows)
    assert rows[0]["image_embeddings"].shape == (1, 32, 8, 8)
    # What does not fit into few slots is left out.
    least = runtime.spec.least_slots
    assert 0 < len(list(collect(None, runtime.spec, count=1).decoder_inputs(runtime, least))) < len(rows)


@pytest.mark.parametrize("format_", list(registry.FORMATS))
def test_formats_refuse_what_they_do_not_have(format_: str) -> None:
    assert check(format_, "int8-weights").recipes == HAVE[format_]
    for recipe in set(RECIPES) - set(HAVE[format_]):
        with pytest.raises(UnsupportedModel, match=f"{format_} has no recipe {recipe}"):
            check(format_, recipe)


@pytest.mark.parametrize("model", ["toy_sam", "toy_edge", "toy_hq", "toy_sam2", "toy_efficient_sam"])
def test_every_family_can_be_calibrated(model: str, family_checkpoint: Callable[[str], Path]) -> None:
    """EfficientSAM takes no mask prompt."""
    runtime = pocketsam.load(model, checkpoint=family_checkpoint(model), runtime="pytorch").runtime
    few = replace(collect(None, runtime.spec), images=(load_rgb(photo_paths()[0]),))
    found = list(few.decoder_inputs(runtime, runtime.slots))
    graph = runtime.spec.decoder_graph(runtime.slots)
    assert len(found) == 5
    assert all(inputs.keys() == set(graph.input_names) for inputs in found)


CASES = [(f, r) for f, recipes in HAVE.items() for r in recipes]


# One of each in the fast tests; the rest runs in CI.
QUICK = {("onnx", "int8"), ("litert", "int8-weights")}


def marked(cases: Sequence[tuple[str, str]]) -> list[Any]:
    return [pytest.param(*c, marks=[] if c in QUICK else [pytest.mark.slow]) for c in cases]


@pytest.mark.parametrize(("format_", "recipe"), marked(CASES))
def test_every_recipe_runs_and_is_recorded(toy_everywhere: Path, toy_checkpoint: Path, tmp_path: Path, format_: str,
                                           recipe: str) -> None:
    """The toy model has random weights, so only the machinery is judged here, not how well int8 keeps its masks."""
    out = Path(shutil.copytree(toy_everywhere, tmp_path / "toy.bundle"))
    rgb = load_rgb(photo_paths()[1])
    bundle = pocketsam.export("toy_sam", checkpoint=toy_checkpoint, formats=[format_], precisions=["fp32", recipe],
                              out=out, images=[rgb], gate=0.3)
    encoder, decoder = (bundle.find(format_, recipe, g) for g in ("encoder", "decoder"))
    fp32 = bundle.find(format_, "fp32", "encoder")
    assert encoder.bytes < fp32.bytes
    assert encoder.sha256 != fp32.sha256
    assert encoder.quantization["recipe"] == recipe
    assert encoder.quantization["calibration"]["images"] == CALIBRATION_IMAGES
    assert (encoder.quantization["time_ratio"] is None) == (format_ == "coreml")
    assert decoder.quantization["kept_in_float"] == "" or decoder.path.endswith(bundle.find(format_, "fp32",
                                                                                           "decoder").path)
    runtime = next(r for r, f in registry.RUNTIME_FORMATS.items() if f == format_)
    exact, quantized = (pocketsam.load(out, runtime=runtime, precision=p).embed(rgb).features["image_embeddings"]
                        for p in ("fp32", recipe))
    # Random weights amplify rounding; a wrong scale, axis or layout gives an error as large as the tensor.
    assert 0 < np.abs(exact - quantized).mean() < 0.5 * np.abs(exact).mean()
    assert share_in_8_bits(bundle, format_, "fp32", "encoder") < 0.001
    # The first layer is 39 % of the toy model, and Core ML leaves its small matrices alone.
    assert share_in_8_bits(bundle, format_, recipe, "encoder") > 0.5
    assert stored_compactly(out / encoder.path, format_, recipe)
    lines: list[str] = []
    pocketsam.export("toy_sam", checkpoint=toy_checkpoint, formats=[format_], precisions=["fp32", recipe], out=out,
                     images=[rgb], gate=0.3, report=lines.append)
    assert f"kept {format_} {recipe}" in lines


def stored_compactly(path: Path, format_: str, recipe: str) -> bool:
    """LiteRT: equal vectors are shared, which a plain rewrite undoes; OpenVINO: no indentation."""
    if format_ == "openvino":
        return b"\n" not in (path / "model.xml").read_bytes()
    if (format_, recipe) != ("litert", "int8"):
        return True
    from ai_edge_litert.tools import flatbuffer_utils

    plain = flatbuffer_utils.convert_object_to_bytearray(flatbuffer_utils.read_model(str(path)))
    return path.stat().st_size < 0.99 * len(plain)


def test_unreachable_gate_writes_nothing(cli: Run, toy_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "toy.bundle"
    outcome = cli("export", "toy_sam", "--checkpoint", toy_checkpoint, "--precision", "int8", "--gate", "1",
                  "--no-clicks", "-o", out)
    assert outcome.code == 2
    said = " ".join(outcome.err.split())
    assert "onnx int8 agrees with PyTorch by a mean mask IoU of at most" in said
    assert said.endswith("Nothing was written.")
    assert [p.name for p in tmp_path.iterdir() if p.name != "cache"] == []


def test_int8_alone_leaves_no_fp32_encoder(toy_checkpoint: Path, tmp_path: Path) -> None:
    bundle = pocketsam.export("toy_sam", checkpoint=toy_checkpoint, precisions=["int8"], out=tmp_path / "b", gate=0.0,
                              clicks=False)
    assert {a.precision for a in bundle.artifacts} == {"int8"}
    assert not (tmp_path / "b/onnx/encoder.fp32.onnx").exists()
    pocketsam.load(tmp_path / "b", runtime="onnxruntime", precision="int8")


def test_interrupted_export_keeps_the_old_bundle(toy_everywhere: Path, toy_checkpoint: Path, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    out = Path(shutil.copytree(toy_everywhere, tmp_path / "toy.bundle"))
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pocketsam.quantize.onnx.OnnxQuantizer.write", stop)
    with pytest.raises(KeyboardInterrupt):
        pocketsam.export("toy_sam", checkpoint=toy_checkpoint, precisions=["fp32", "int8"], out=out, gate=0.0)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert {p.name for p in tmp_path.iterdir()} == {"toy.bundle", "cache"} & {p.name for p in tmp_path.iterdir()}


def search(calls: list[frozenset[str]], gate: float, seconds: float = 60) -> Search:
    """Eight layers, of which b and g break the masks."""
    def measure(keep: frozenset[str], images: Sequence[Any]) -> dict[str, Any]:
        calls.append(keep)
        return {"all": {"mean": 0.9 + 0.03 * ("b" in keep) + 0.05 * ("g" in keep)}}

    return Search(list("abcdefgh"), measure, [], [], gate, seconds, "key", lambda text: None, lambda: 1.0)


def test_search_keeps_what_breaks_masks_and_goes_on_where_it_stopped() -> None:
    calls: list[frozenset[str]] = []
    found = search(calls, 0.97).run()
    assert found.keep == ("b", "g")
    assert [step["float_layers"] for step in found.path] == [["g"], ["b"]]
    first = len(calls)
    assert search(calls, 0.97).run().keep == ("b", "g")
    assert len(calls) - first == 3, "only the judged sets are measured again; trials were remembered"


def test_search_stops_in_time_and_leaves_the_best_on_disk() -> None:
    calls: list[frozenset[str]] = []
    assert search(calls, 0.97, 0).run().keep == ()
    assert calls == [frozenset()]
    found = search(calls, 1.0).run()
    assert found.measured["all"]["mean"] == pytest.approx(0.98)
    assert calls[-1] == frozenset(found.keep)


@pytest.mark.parametrize(("mean", "ratio", "in_float"), [(0.98, 1.5, False), (0.97, 1.5, True), (0.98, 1.21, True)])
def test_attention_in_8_bits_must_be_faster_and_keep_the_masks(mean: float, ratio: float, in_float: bool) -> None:
    names = frozenset({"a", "b"})
    ratios = iter((1.2, ratio))
    said: list[str] = []

    def measure(keep: frozenset[str], images: Sequence[Any]) -> dict[str, Any]:
        return {"all": {"mean": 0.981 if keep == names else mean}}

    kept, rows = try_attention(names, measure, [], lambda: next(ratios), said.append)
    assert kept == (names if in_float else frozenset())
    assert rows == [{"int8": False, "mean": 0.981, "ratio": 1.2}, {"int8": True, "mean": mean, "ratio": ratio}]
    assert ("stay in float" in said[0]) == in_float


def test_nothing_is_measured_without_global_attention() -> None:
    def never(*args: object) -> Any:
        raise AssertionError("measured")

    assert try_attention(frozenset(), never, [], never, never) == (frozenset(), [])


def test_auto_never_takes_int8_that_is_slower_than_fp32_of_its_runtime() -> None:
    exact = Candidate("openvino", "fp32", 50, 10, 1.0)
    slow = Candidate("openvino", "int8", 80, 10, 0.98)
    other = Candidate("litert", "int8", 90, 10, 0.98)
    assert choose([slow, exact, other]) == exact
    assert choose([slow, exact, other], "int8") == other, "asked for by name: one that is no slower than its fp32"
    assert choose([slow, exact], "int8") == slow, "there is no other"
    assert slower(0.8)
    assert not slower(1.0)
    assert not slower(None)


def test_quantize_command(cli: Run, toy_bundle: Path, toy_checkpoint: Path, tmp_path: Path,
                          monkeypatch: pytest.MonkeyPatch) -> None:
    out = Path(shutil.copytree(toy_bundle, tmp_path / "toy.bundle"))
    page = tmp_path / "int8.html"
    common = ("--checkpoint", toy_checkpoint, "--gate", "0", "--html", page)
    outcome = cli("quantize", out, *common, "--json")
    assert outcome.code == 0, outcome.err
    (row,) = json.loads(outcome.out)
    assert row["measured"]["images"] == len(photo_paths())
    assert row["measured"]["box"]["prompts"] == row["measured"]["point"]["prompts"] == 4 * len(photo_paths())
    assert row["retention"] is None
    text = page.read_text()
    assert text.count("<img") == 15
    assert "size ratio" in text
    assert "encoder time ratio" in cli("quantize", out, *common).out
    made = read_bundle(out).find("onnx", "int8", "encoder")
    assert made.quantization["calibration"]["distinct"] == 7
    # Told before the work.
    for words, options in (("unknown recipe 'fp16'", ("--recipe", "fp16")),
                           ("0 images", ("--pack", "x", "--images", 0)),
                           ("cannot be used as a pack", ("--pack", tmp_path / "none.tar")),
                           ("cannot write", ("--html", out / "bundle.json" / "x.html"))):
        refused = cli("quantize", out, "--checkpoint", toy_checkpoint, *options)
        assert refused.code == 2
        assert words in " ".join(refused.err.split())
    # One that misses its gate does not take the place of one that did not.
    monkeypatch.setattr("pocketsam.quantize.pair.Pair._encoder", below)
    outcome = cli("quantize", out, *common, "--calibration-images", "2")
    assert outcome.code == 2
    assert "Too rough." in outcome.err
    assert "encoder time ratio" in outcome.out, "what is there is reported"
    assert read_bundle(out).find("onnx", "int8", "encoder") == made
    assert pocketsam.load(out, runtime="onnxruntime", precision="int8").info()["precision"] == "int8"


def below(*_: Any) -> None:
    raise ParityError("Too rough.")


@pytest.mark.parametrize(("format_", "recipe"), marked([c for c in CASES if c[1] != "int8-dynamic"]))
def test_layers_kept_in_float_are_larger(toy_everywhere: Path, tmp_path: Path, format_: str, recipe: str) -> None:
    """Names that ``layers`` gives are names that ``write`` understands."""
    from pocketsam.files import size_of
    from pocketsam.quantize.recipes import Job

    bundle = read_bundle(toy_everywhere)
    row = bundle.find(format_, "fp32", "encoder")
    images = collect(None, bundle.spec, count=2)
    job = Job(bundle.spec.encoder_graph(), bundle.file(row), None, recipe,
              lambda batch: ({"image": i} for i in images.encoder_inputs(bundle.spec)))
    tool = check(format_, recipe)(job)
    names = list(tool.layers())
    assert len(names) >= 8
    sizes = []
    for i, keep in enumerate((frozenset(), frozenset(names[:len(names) // 2]), frozenset(names))):
        path = tmp_path / f"{i}{Path(row.path).suffix}"
        tool.write(path, keep)
        sizes.append(size_of(path))
    assert sizes[0] < sizes[1] < sizes[2]
    assert sizes[2] >= 0.9 * row.bytes
