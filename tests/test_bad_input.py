"""Bad input: one clear sentence, exit code 2, nothing written."""

from __future__ import annotations

import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

Run = Callable[..., Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one good photo and many bad ones."""
    rgb = np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8)
    Image.fromarray(rgb).save(tmp_path / "good.png")
    Image.fromarray(rgb).save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:600])
    (tmp_path / "text.png").write_text("this is not an image")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "bomb.png").write_bytes(png(40_000, 40_000))
    (tmp_path / "large.png").write_bytes(png(16_320, 12_240))
    (tmp_path / "icc.png").write_bytes(png(100, 60, (b"iCCP", b"p\0\0" + zlib.compress(bytes(2**21)))))
    # Orientation 6, and a resolution that is a text.
    tags = struct.pack("<HHHII HHI4s I", 2, 0x0112, 3, 1, 6, 0x011A, 2, 3, b"a", 0)
    Image.fromarray(rgb).save(tmp_path / "exif.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0" + tags)
    return tmp_path


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG without a pixel, whatever size it claims."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = ((b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in rows)


def refused(outcome: Any, *words: str) -> None:
    """Exit code 2 and one sentence on stderr that holds ``words``; nothing on stdout."""
    assert outcome.code == 2, outcome
    text = " ".join(outcome.err.split())
    assert text.count("error:") == 1
    assert "Traceback" not in text
    assert outcome.out == ""
    for word in words:
        assert word in text, text


IMAGES = [
    ("missing.png", "does not exist"), ("cut.jpg", "truncated"), ("cut.png", "truncated"),
    ("text.png", "not an image"), ("empty.png", "not an image"), ("bomb.png", "megapixels"), (".", "is a folder"),
    ("large.png", "megapixels (Image size (199756800 pixels) exceeds limit of 178956970"), ("icc.png", "too large"),
    ("exif.jpg", "damaged"), (f"{'x' * 300}/y.png", "name too long"),
]


@pytest.mark.parametrize(("name", "words"), IMAGES)
def test_images(cli: Run, toy_bundle: Path, folder: Path, name: str, words: str) -> None:
    outcome = cli("segment", folder / name, "--point", "5,5", "--bundle", toy_bundle, "-o", folder / "out.png",
                  "--masks", folder / "masks")
    refused(outcome, words)
    assert not (folder / "out.png").exists()
    assert not (folder / "masks").exists()


def test_a_folder_goes_on_after_bad_images(cli: Run, toy_bundle: Path, folder: Path, tmp_path: Path) -> None:
    outcome = cli("everything", folder, "-o", tmp_path / "out", "--bundle", toy_bundle, "--grid", "1")
    assert outcome.code == 1, outcome
    assert "2 photos segmented, 0 done earlier, 8 unreadable" in outcome.out
    assert sorted(p.name for p in (tmp_path / "out/labels").iterdir()) == ["good.png.json", "whole.jpg.json"]
    refused(cli("everything", folder / ("x" * 300), "-o", tmp_path / "o", "--bundle", toy_bundle), "name too long")


PROMPTS = [
    (["--point", "100,5"], "outside the image of 100 x 60"), (["--point", "-1,5"], "outside the image"),
    (["--point", "5,60"], "outside the image"), (["--point", "5,5,2"], "use 1 for foreground and 0 for background"),
    (["--point", "5,5,-1"], "use 1 for foreground"), (["--point", "5,5,0.5"], "use 1 for foreground"),
    (["--point", "nan,5"], "NaN"), (["--point", "inf,5"], "infinity"), (["--point", "5"], "expected x,y"),
    (["--point", "a,b"], "expected x,y"), (["--point", "1,2,3,4"], "expected x,y"),
    (["--box", "50,10,50,40"], "x1 > x0"), (["--box", "50,40,80,10"], "y1 > y0"),
    (["--box", "10,10,101,40"], "leaves the image"), (["--box", "-1,10,50,40"], "leaves the image"),
    (["--box", "1,2,3"], "expected x0,y0,x1,y1"), (["--box", "nan,1,20,20"], "NaN"), ([], "no prompt was given"),
    ([a for i in range(8) for a in ("--point", f"{i},{i}")], "--slots 9"),
    (["--box", "1,1,50,50", *[a for i in range(7) for a in ("--point", f"{i},{i}")]], "a box takes two slots"),
    (["--box", "1,1,50,50", "--box", "2,2,9,9", "--point", "3,3"], "several boxes cannot be combined"),
    (["--box", "1,1,50,50", "--box", "2,2,9,9", "--multimask"], "three masks of one object"),
]


@pytest.mark.parametrize(("arguments", "words"), PROMPTS)
def test_prompts(cli: Run, toy_bundle: Path, folder: Path, arguments: list[str], words: str) -> None:
    outcome = cli("segment", folder / "good.png", *arguments, "--bundle", toy_bundle, "-o", folder / "out.png")
    refused(outcome, words)
    assert not (folder / "out.png").exists()


def test_the_same_calls_without_the_fault_succeed(cli: Run, toy_bundle: Path, folder: Path) -> None:
    """The control for this file: the fixtures are good enough to work."""
    common = ("--bundle", toy_bundle, "-o", folder / "out.png", "--masks", folder / "masks")
    assert cli("segment", folder / "good.png", "--point", "99,59,0", "--box", "0,0,100,60", *common).code == 0
    assert (folder / "out.png").exists()
    assert len(list((folder / "masks").iterdir())) == 1
    points = [a for i in range(7) for a in ("--point", f"{i},{i}")]
    assert cli("segment", folder / "whole.jpg", *points, "--multimask", *common).code == 0
    assert len(list((folder / "masks").iterdir())) == 3


@pytest.mark.parametrize(("name", "kind"), [("o.png", "PNG"), ("o.JPG", "JPEG"), ("o.webp", "WEBP"), ("o.bmp", "BMP"),
                                           ("o", "PNG")])
def test_a_picture_is_what_its_name_says(cli: Run, toy_bundle: Path, folder: Path, name: str, kind: str) -> None:
    command = ("segment", folder / "good.png", "--point", "5,5", "--bundle", toy_bundle, "-o", folder / name)
    assert cli(*command).code == 0
    with Image.open(folder / name) as picture:
        assert picture.format == kind


def test_output_places(cli: Run, toy_bundle: Path, toy_checkpoint: Path, folder: Path) -> None:
    good = ("segment", folder / "good.png", "--point", "5,5", "--bundle", toy_bundle)
    refused(cli(*good, "-o", folder), "is a folder")
    refused(cli(*good, "-o", folder / "good.png" / "x.png"), "cannot write")
    refused(cli(*good, "--masks", folder / "good.png"), "cannot write")
    refused(cli(*good, "-o", folder / "x.gif"), "x.gif names no kind of picture")
    refused(cli("edges", folder / "good.png", "-o", folder / "x.tif"), "x.tif names no kind of picture")
    refused(cli("export", "toy_sam", "--checkpoint", toy_checkpoint, "-o", folder / "good.png" / "b"), "cannot write")
    refused(cli("export", "toy_sam", "--checkpoint", toy_checkpoint, "-o", folder), "is not a bundle")


def test_names(cli: Run, toy_bundle: Path, toy_checkpoint: Path, folder: Path) -> None:
    out = folder / "b"
    refused(cli("export", "mobilesam", "--checkpoint", toy_checkpoint, "-o", out), "unknown model", "'mobile_sam'")
    refused(cli("export", "toy_sam", "--checkpoint", toy_checkpoint, "--to", "onxx", "-o", out), "did you mean 'onnx'")
    refused(cli("export", "toy_sam", "--checkpoint", toy_checkpoint, "--precision", "fp31", "-o", out), "'fp32'")
    refused(cli("export", "toy_sam", "--checkpoint", toy_checkpoint, "--slots", "1", "-o", out), "expected 2 to 512")
    refused(cli("export", "toy_efficient_sam", "--checkpoint", toy_checkpoint, "--slots", "5", "-o", out),
            "expected 6 to 512")
    refused(cli("export", "toy_sam", "--checkpoint", toy_checkpoint, "--gate", "1.5", "-o", out), "from 0 to 1")
    segment = ("segment", folder / "good.png", "--point", "5,5")
    refused(cli(*segment, "--bundle", toy_bundle, "--runtime", "onnxruntme"), "did you mean 'onnxruntime'")
    refused(cli(*segment, "--bundle", toy_bundle, "--precision", "int9"), "unknown precision")
    refused(cli(*segment, "--precision", "int8"), "'int8' goes with a bundle")
    refused(cli(*segment, "--bundle", toy_bundle, "--threads", "0"), "at least 1")
    refused(cli(*segment, "--bundle", folder / "no.bundle"), "does not exist")
    refused(cli(*segment, "--bundle", toy_bundle, "--runtime", "pytorch"), "checkpoint")
    assert not out.exists()


def test_damaged_bundles(cli: Run, toy_bundle: Path, folder: Path) -> None:
    bundle = Path(shutil.copytree(toy_bundle, folder / "copy.bundle"))
    manifest = (bundle / "bundle.json").read_text()
    segment = ("segment", folder / "good.png", "--point", "5,5", "--bundle", bundle, "-o", folder / "out.png")
    (bundle / "bundle.json").write_text(manifest.replace('"schema": 1', '"schema": 2'))
    refused(cli(*segment), "upgrade pocketsam")
    (bundle / "bundle.json").write_text(manifest.replace("onnx/encoder", "../encoder"))
    refused(cli(*segment), "outside its folder")
    (bundle / "bundle.json").write_text(manifest)
    data = bytearray((bundle / "onnx/encoder.fp32.onnx").read_bytes())
    data[1000] ^= 1
    (bundle / "onnx/encoder.fp32.onnx").write_bytes(data)
    refused(cli(*segment), "does not match its recorded sha256")
    (bundle / "onnx/encoder.fp32.onnx").unlink()
    refused(cli(*segment), "lacks onnx/encoder.fp32.onnx")
    assert not (folder / "out.png").exists()


def test_wrong_checkpoints(cli: Run, toy_checkpoint: Path, folder: Path) -> None:
    import torch

    out = folder / "b"
    refused(cli("export", "mobile_sam", "--checkpoint", toy_checkpoint, "-o", out), "is not mobile_sam", "missing keys",
            "unexpected keys", "looks like")
    (folder / "cut.pt").write_bytes(toy_checkpoint.read_bytes()[:5000])
    refused(cli("export", "toy_sam", "--checkpoint", folder / "cut.pt", "-o", out), "is damaged")
    (folder / "text.pt").write_text("hello")
    refused(cli("export", "toy_sam", "--checkpoint", folder / "text.pt", "-o", out), "is damaged")
    refused(cli("export", "toy_sam", "--checkpoint", folder / "none.pt", "-o", out), "does not exist")
    refused(cli("export", "toy_sam", "--checkpoint", folder, "-o", out), "is a folder")
    torch.save({"epoch": 3}, folder / "empty.pt")
    refused(cli("export", "toy_sam", "--checkpoint", folder / "empty.pt", "-o", out), "holds no weights")
    state = torch.load(toy_checkpoint, weights_only=True)
    state["mask_decoder.iou_token.weight"][0, 0] = float("nan")
    torch.save(state, folder / "nan.pt")
    refused(cli("export", "toy_sam", "--checkpoint", folder / "nan.pt", "-o", out), "NaN or infinity in mask_decoder")
    assert not out.exists()


def test_checkpoints_are_never_executed(cli: Run, folder: Path) -> None:
    import pickle

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (folder / "owned",))

    (folder / "evil.pt").write_bytes(pickle.dumps({"model": Evil()}))
    refused(cli("export", "toy_sam", "--checkpoint", folder / "evil.pt", "-o", folder / "b"), "not executed")
    assert not (folder / "owned").exists()
