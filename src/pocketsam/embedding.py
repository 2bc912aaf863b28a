"""Image embeddings that can be stored, so that an image is encoded once and prompted as often as one likes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pocketsam.errors import EmbeddingError
from pocketsam.files import staged_file
from pocketsam.geometry import Frame
from pocketsam.images import MAX_PIXELS
from pocketsam.runtime import Features
from pocketsam.specs import ModelSpec

FORMAT = "pocketsam-embedding-1"


@dataclass(frozen=True)
class Embedding:
    """Encoder features of one image.

    Attributes:
        features: float32 tensors by contract name, e.g. ``image_embeddings`` (1, C, h, w).
        frame: how the image lies in the model frame.
        model: model name.
        weights_sha256: identity of the weights that made it.
        image_sha256: identity of the image (``pocketsam.images.image_id``).
        image_size: input side of the model.
    """

    features: Features
    frame: Frame
    model: str
    weights_sha256: str
    image_sha256: str
    image_size: int

    def save(self, path: str | Path) -> None:
        """Write an npz file atomically."""
        meta = {"format": FORMAT, "model": self.model, "weights_sha256": self.weights_sha256,
                "image_sha256": self.image_sha256, "image_size": self.image_size,
                "height": self.frame.height, "width": self.frame.width}
        with staged_file(Path(path)) as staged, staged.open("wb") as f:
            np.savez(f, **{"meta": np.array(json.dumps(meta)), **self.features})  # type: ignore[arg-type]  # numpy stub


def load_embedding(path: str | Path, spec: ModelSpec, weights_sha256: str) -> Embedding:
    """Read an embedding made by the same model and weights.

    Raises:
        EmbeddingError: unreadable, or made by another model or other weights.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as data:
            meta: dict[str, Any] = json.loads(str(data["meta"]))
            if meta.get("format") != FORMAT:
                raise ValueError("not a PocketSAM embedding")
            # Older files do not say their side; their features have the shapes of it.
            side = int(meta.get("image_size", spec.image_size))
            check_identity(str(path), str(meta["model"]), str(meta["weights_sha256"]), side, spec, weights_sha256)
            features = {t.name: data[t.name] for t in spec.feature_specs()}
        height, width = int(meta["height"]), int(meta["width"])
        if height < 1 or width < 1 or height * width > MAX_PIXELS:
            raise ValueError(f"image size {height} x {width}")
        for t in spec.feature_specs():
            if features[t.name].shape != t.shape or features[t.name].dtype != np.float32:
                raise ValueError(f"{t.name} has the wrong shape or dtype")
    except EmbeddingError:
        raise
    except Exception as e:  # numpy and zipfile raise a dozen unrelated classes for a damaged file
        raise EmbeddingError(f"{path} cannot be used as an embedding ({e}); embed the image again.") from e
    frame = Frame.of(height, width, spec)
    return Embedding(features, frame, spec.name, weights_sha256, str(meta["image_sha256"]), side)


def check_identity(what: str, model: str, weights_sha256: str, image_size: int, spec: ModelSpec,
                   expected_sha256: str) -> None:
    """Raise EmbeddingError unless model name, weights and input side agree."""
    if model != spec.name:
        raise EmbeddingError(f"{what} was made by {model}, this predictor is {spec.name}; embed the image again.")
    if weights_sha256 != expected_sha256:
        raise EmbeddingError(f"{what} was made by {model} with other weights than this predictor's; "
                             "embed the image again.")
    if image_size != spec.image_size:
        raise EmbeddingError(f"{what} was made at the input side {image_size}, this predictor's is {spec.image_size}; "
                             "embed the image again.")
