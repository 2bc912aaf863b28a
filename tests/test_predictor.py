"""The predictor over ONNX Runtime: every kind of image, prompt and stored embedding."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import pocketsam
from pocketsam.batching import decode_padded
from pocketsam.errors import EmbeddingError, ImageError, PromptError
from pocketsam.geometry import Frame, masks_from_logits, upscale_logits
from pocketsam.images import load_rgb
from pocketsam.models.catalog import spec as spec_of
from pocketsam.photos import photo_paths
from pocketsam.predictor import Predictor
from pocketsam.resampling import pillow_resize


@pytest.fixture(scope="module")
def sam(toy_bundle: Path) -> Predictor:
    return pocketsam.load(toy_bundle, threads=2)


@pytest.fixture(scope="module")
def reference(toy_checkpoint: Path) -> Predictor:
    return pocketsam.load("toy_sam", checkpoint=toy_checkpoint, runtime="pytorch", threads=2)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("shape", [(60, 100), (100, 60), (1, 300), (300, 1), (1, 1), (128, 128), (700, 900)])
def test_both_runtimes_agree_on_every_shape(sam: Predictor, reference: Predictor, shape: tuple[int, int]) -> None:
    rgb = noise(*shape)
    point = [(shape[1] / 3, shape[0] / 2)]
    for multimask, count in ((True, 3), (False, 1)):
        results = []
        for predictor in (sam, reference):
            predictor.set_image(rgb)
            results.append(predictor.predict(points=point, multimask=multimask))
        assert results[0].masks.shape == (count, *shape)
        assert results[0].masks.dtype == np.bool_
        assert results[0].scores.dtype == results[0].logits.dtype == np.float32
        assert np.abs(results[0].logits - results[1].logits).max() < 1e-4
        assert (results[0].masks != results[1].masks).mean() < 1e-3


def test_twelve_megapixels(sam: Predictor) -> None:
    sam.set_image(noise(3000, 4000))
    result = sam.predict(box=(100, 200, 3900, 2900), multimask=False)
    assert result.masks.shape == (1, 3000, 4000)


def test_official_order_and_token_zero(sam: Predictor) -> None:
    from pocketsam.prompts import Prompt

    embedding = sam.set_image(noise(60, 100))
    prompt = Prompt.of(embedding.frame, sam.spec, points=[(20, 30)], labels=[1])
    low_res, scores = sam.decode_prompts([prompt])
    multi, single = sam.predict(points=[(20, 30)]), sam.predict(points=[(20, 30)], multimask=False)
    assert np.array_equal(multi.logits, low_res[0, 1:])
    assert np.array_equal(multi.scores, scores[0, 1:])
    assert np.array_equal(single.logits, low_res[0, :1])
    assert multi.best == int(np.argmax(multi.scores))


def test_boxes_in_one_batch_equal_boxes_alone(sam: Predictor) -> None:
    sam.set_image(noise(200, 300))
    rng = np.random.default_rng(1)
    corners = rng.uniform(0, 90, (21, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(20, 100, (21, 2))], axis=1)
    batch = sam.predict_boxes(boxes)
    assert batch.masks.shape == (21, 200, 300)
    for i, box in enumerate(boxes):
        alone = sam.predict(box=box, multimask=False)
        assert np.abs(alone.logits[0] - batch.logits[i]).max() < 1e-4


def test_mask_prompt_round_trip(sam: Predictor, reference: Predictor) -> None:
    answers = []
    for predictor in (sam, reference):
        predictor.set_image(noise(60, 100))
        first = predictor.predict(points=[(20, 30)])
        answers.append(predictor.predict(points=[(20, 30)], mask=first.logits[first.best]).logits)
        assert np.abs(answers[-1] - first.logits).max() > 1e-3
    assert np.abs(answers[0] - answers[1]).max() < 1e-4


def test_embedding_round_trip(sam: Predictor, tmp_path: Path) -> None:
    rgb = noise(60, 100)
    embedding = sam.embed(rgb)
    embedding.save(tmp_path / "photo.npz")
    sam.set_image(rgb)
    expected = sam.predict(points=[(20, 30)])
    sam.set_embedding(tmp_path / "photo.npz", image=rgb)
    assert np.array_equal(sam.predict(points=[(20, 30)]).masks, expected.masks)
    with pytest.raises(EmbeddingError, match="another image"):
        sam.set_embedding(tmp_path / "photo.npz", image=noise(60, 100, seed=5))


def test_embedding_of_another_model_is_refused(sam: Predictor, tmp_path: Path) -> None:
    from dataclasses import replace

    embedding = sam.embed(noise(60, 100))
    for name, change in (("model", {"model": "mobile_sam"}), ("weights", {"weights_sha256": "0" * 64})):
        other = replace(embedding, **change)
        with pytest.raises(EmbeddingError, match="was made by"):
            sam.set_embedding(other)
        other.save(tmp_path / f"{name}.npz")
        with pytest.raises(EmbeddingError, match="was made by"):
            sam.set_embedding(tmp_path / f"{name}.npz")
    other = replace(embedding, image_size=2 * embedding.image_size)
    other.save(tmp_path / "side.npz")
    for given in (other, tmp_path / "side.npz"):
        with pytest.raises(EmbeddingError, match="input side"):
            sam.set_embedding(given)
    data = (tmp_path / "model.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(data[: len(data) // 2])
    with pytest.raises(EmbeddingError, match="cannot be used"):
        sam.set_embedding(tmp_path / "cut.npz")


@pytest.mark.parametrize(("mark", "offset", "value"), [(b"PK\1\2", 8, 1), (b"PK\1\2", 10, 99), (b"(1, 32, 8", 4, 40)],
                         ids=["encrypted", "unknown compression", "open bracket"])
def test_a_damaged_embedding_is_refused(sam: Predictor, tmp_path: Path, mark: bytes, offset: int, value: int) -> None:
    """zipfile and numpy have an error of their own for each."""
    sam.embed(noise(60, 100)).save(tmp_path / "photo.npz")
    data = bytearray((tmp_path / "photo.npz").read_bytes())
    data[data.rindex(mark) + offset] = value
    (tmp_path / "photo.npz").write_bytes(data)
    with pytest.raises(EmbeddingError, match="cannot be used"):
        sam.set_embedding(tmp_path / "photo.npz")


@pytest.mark.parametrize("prompt", [
    {"points": [(1, 2), (3,)]}, {"points": [("a", "b")]}, {"points": [(10**400, 1)]}, {"box": [1, [2], 3, 4]},
    {"points": [(1, 2)], "labels": [[1], [1, 2]]}, {"mask": [[1.0, 2.0], [3.0]]},
])
def test_prompts_that_are_no_arrays(sam: Predictor, prompt: dict[str, Any]) -> None:
    sam.set_image(noise(60, 100))
    with pytest.raises(PromptError, match=r"is no array.*expected"):
        sam.predict(**prompt)


@pytest.mark.parametrize("boxes", [[[1, 2, 3, 4], [1, 2]], [["a", 2, 3, 4]], [[10**400, 2, 3, 4]], [], [1, 2, 3, 4],
                                   np.empty((0, 4)), [[1, 2, 3, np.nan]]])
def test_boxes_that_are_no_arrays(sam: Predictor, boxes: Any) -> None:
    sam.set_image(noise(60, 100))
    with pytest.raises(PromptError, match=r"boxes .*expected"):
        sam.predict_boxes(boxes)


def test_a_prompt_is_answered_on_one_image(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may set the next image while the decoder works."""
    sam = pocketsam.load(toy_bundle, threads=1)
    other = sam.embed(noise(30, 90))
    decode = sam.runtime.decode
    for ask in (lambda: sam.predict(points=[(5, 5)]), lambda: sam.predict_boxes([(1, 1, 20, 20)])):
        sam.set_image(noise(60, 40))
        monkeypatch.setattr(sam.runtime, "decode", lambda *args: (sam.set_embedding(other), decode(*args))[1])
        assert ask().masks.shape[1:] == (60, 40)
        monkeypatch.undo()


def test_raw_prompts_that_cannot_be_used(sam: Predictor) -> None:
    sam.set_image(noise(60, 40))
    with pytest.raises(PromptError, match="prompts is empty"):
        sam.decode_prompts([])
    with pytest.raises(PromptError, match="too large for float32"):
        sam.predict(mask=np.full((32, 32), 1e300))


@pytest.mark.parametrize(("count", "sizes"), [(1, [1]), (13, [1] * 13), (14, [16]), (16, [16]), (19, [16, 1, 1, 1]),
                                              (30, [16, 16])])
def test_a_batch_is_filled_up_when_that_is_faster(count: int, sizes: list[int]) -> None:
    asked: list[int] = []

    def run(size: int, prompts: Any) -> Any:
        asked.append(size)
        return {"x": prompts["point_labels"]}

    labels = np.arange(count, dtype=np.float32)[:, None]
    assert decode_padded({"point_labels": labels}, run)["x"].tolist() == labels.tolist()
    assert asked == sizes


@pytest.mark.parametrize("shape", [(1, 3_200_000), (3_200_000, 1)])
def test_extremely_long_images(shape: tuple[int, int]) -> None:
    height, width = (min(side, 128) for side in shape)
    assert pillow_resize(np.zeros((*shape, 3), np.uint8), height, width).shape == (height, width, 3)


def test_prompt_without_image(toy_bundle: Path) -> None:
    with pytest.raises(PromptError, match="no image is set"):
        pocketsam.load(toy_bundle).predict(points=[(1, 1)])


def write_tiff(path: Path, values: NDArray[np.int64], kind: str, head: bytes) -> Path:
    """16-bit grey, uncompressed; Pillow writes its own byte order only."""
    end, data = kind[0], values.astype(kind).tobytes()
    height, width = values.shape
    entries = [(256, 3, width), (257, 3, height), (258, 3, 16), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1),
               (278, 3, height), (279, 4, len(data))]
    fields = b"".join(struct.pack(f"{end}HHI", tag, form, 1) + struct.pack(f"{end}{'HH' if form == 3 else 'I'}",
                                                                       *([value, 0] if form == 3 else [value]))
                      for tag, form, value in entries)
    path.write_bytes(head + struct.pack(f"{end}I", 8 + len(data)) + data + struct.pack(f"{end}H", len(entries)) + fields
                     + bytes(4))
    return path


def test_image_modes_look_as_in_a_viewer(tmp_path: Path) -> None:
    grey = (np.arange(64, dtype=np.uint8) * 4).reshape(8, 8)
    rgb = np.stack([grey, grey.T, 255 - grey], axis=-1)
    assert np.array_equal(load_rgb(Image.fromarray(grey)), np.stack([grey] * 3, -1))
    wide = Image.fromarray(grey.astype(np.uint16) * 257)
    wide.save(tmp_path / "wide.png")
    assert np.array_equal(load_rgb(tmp_path / "wide.png"), np.stack([grey] * 3, -1))
    # The same dark picture in either byte order.
    dark = np.full((8, 8), 200)
    order = {"<u2": b"II*\0", ">u2": b"MM\0*"}
    pictures = [load_rgb(write_tiff(tmp_path / f"{i}.tif", dark, kind, head))
                for i, (kind, head) in enumerate(order.items())]
    assert (pictures[0] == 1).all()
    assert np.array_equal(*pictures)
    palette = Image.fromarray(rgb).quantize(64)
    assert np.array_equal(load_rgb(palette), np.asarray(palette.convert("RGB")))
    half = np.dstack([rgb, np.full((8, 8), 128, np.uint8)])
    blended = rgb * (128 / 255) + 255 * (1 - 128 / 255)
    assert np.abs(load_rgb(Image.fromarray(half)) - blended).max() <= 1
    clear = np.dstack([rgb, np.zeros((8, 8), np.uint8)])
    assert (load_rgb(Image.fromarray(clear)) == 255).all()
    assert load_rgb(Image.fromarray(grey > 100)).max() == 255
    assert load_rgb(Image.fromarray(rgb).convert("CMYK")).shape == (8, 8, 3)
    assert load_rgb(Image.fromarray((grey / 255).astype(np.float32))).max() == grey.max()


@pytest.mark.parametrize(("orientation", "turn"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_exif_orientation(tmp_path: Path, orientation: int, turn: int) -> None:
    rgb = noise(20, 30)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(rgb).save(tmp_path / "photo.png", exif=exif)
    assert np.array_equal(load_rgb(tmp_path / "photo.png"), np.rot90(rgb, turn))


def test_wrong_arrays(sam: Predictor) -> None:
    for bad in (np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8),
                np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(ImageError, match="expected"):
            sam.embed(bad)


def test_upscaling_follows_the_official_two_steps() -> None:
    """Against torch, which computes sample positions in float32: about 1e-4 of a pixel at 1000 pixels."""
    import torch
    import torch.nn.functional as F

    spec = spec_of("mobile_sam")
    logits = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
    for height, width in ((480, 720), (3000, 400), (40, 60), (1, 500), (700, 1), (1024, 1024), (900, 1100)):
        frame = Frame.of(height, width, spec)
        x = F.interpolate(torch.from_numpy(logits)[None, None], (1024, 1024), mode="bilinear", align_corners=False)
        x = x[..., :frame.content_height, :frame.content_width]
        x = F.interpolate(x, (height, width), mode="bilinear", align_corners=False)
        assert np.abs(upscale_logits(logits, frame) - x[0, 0].numpy()).max() < 2e-4, (height, width)
        assert masks_from_logits(logits[None], frame).shape == (1, height, width)


def test_photos_are_small_and_listed() -> None:
    paths = photo_paths()
    sources = (paths[0].parent / "SOURCES.md").read_text()
    assert len(paths) >= 6
    for path in paths:
        assert path.stat().st_size < 300_000
        assert path.name in sources
