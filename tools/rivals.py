"""What people would use instead, opened as runtimes, so that a benchmark can time them in the same rounds.

Files of the ONNX rivals lie in a folder that ``make`` fills; none of them has our rewrites, options or checks.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from pocketsam.benchmarks.targets import Target
from pocketsam.files import staged_file
from pocketsam.geometry import Frame
from pocketsam.images import Rgb
from pocketsam.models.catalog import spec as spec_of
from pocketsam.runtime import Features, Tensors
from pocketsam.specs import DEFAULT_SLOTS

PLAIN, DYNAMIC, TRANSFORMERS = "torch.onnx.export", "ORT dynamic int8", "transformers"


def make(model: str, checkpoint: Path, folder: Path) -> None:
    """Write ``plain.<graph>.onnx`` and ``dynamic.<graph>.onnx``: the model as it is, and what ORT makes of it."""
    import torch
    from onnxruntime.quantization import QuantType, quantize_dynamic

    from pocketsam.export.graphs import DecoderGraph, EncoderGraph, example_inputs
    from pocketsam.models.loading import load_model

    folder.mkdir(parents=True, exist_ok=True)
    loaded = load_model(model, checkpoint)
    graphs = {"encoder": (EncoderGraph(loaded), loaded.spec.encoder_graph()),
              "decoder": (DecoderGraph(loaded, DEFAULT_SLOTS), loaded.spec.decoder_graph(DEFAULT_SLOTS))}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    for name, (graph, spec) in graphs.items():
        plain = folder / f"plain.{name}.onnx"
        if not plain.exists():
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                program = torch.onnx.export(graph.eval(), example_inputs(spec, 1), dynamo=True, opset_version=18,
                                            input_names=spec.input_names, output_names=spec.output_names,
                                            verbose=False)
                assert program is not None
                with staged_file(plain) as staged:
                    program.save(str(staged), external_data=False)
        dynamic = folder / f"dynamic.{name}.onnx"
        if not dynamic.exists():
            with staged_file(dynamic) as staged:
                quantize_dynamic(str(plain), str(staged), weight_type=QuantType.QInt8)


class PlainOnnx:
    """A pair of ONNX files in ONNX Runtime with default options."""

    def __init__(self, model: str, encoder: Path, decoder: Path) -> None:
        import onnxruntime as ort

        self.spec, self.slots = spec_of(model), DEFAULT_SLOTS
        self._encoder = ort.InferenceSession(str(encoder), providers=["CPUExecutionProvider"])
        self._decoder = ort.InferenceSession(str(decoder), providers=["CPUExecutionProvider"])
        self._version = ort.__version__

    def encode(self, image: Rgb, frame: Frame) -> Features:
        names = [t.name for t in self.spec.feature_specs()]
        return dict(zip(names, self._encoder.run(names, {"image": image}), strict=True))

    def decode(self, features: Features, prompts: Tensors) -> Tensors:
        names = self.spec.decoder_graph(self.slots).output_names
        wanted = {i.name for i in self._decoder.get_inputs()}
        rows = []
        for i in range(len(prompts["point_labels"])):
            one = {k: v[i:i + 1] for k, v in prompts.items()}
            rows.append(self._decoder.run(names, {k: v for k, v in {**features, **one}.items() if k in wanted}))
        return {n: np.concatenate([r[k] for r in rows]) for k, n in enumerate(names)}

    def info(self) -> dict[str, Any]:
        return {"runtime": PLAIN, "version": self._version, "weights_sha256": ""}


class Transformers:
    """Hugging Face's SamModel (ViT-B), PyTorch eager, with random weights: its speed does not depend on them."""

    def __init__(self, threads: int) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        torch.manual_seed(0)
        self.spec, self.slots = spec_of("sam_vit_b"), DEFAULT_SLOTS
        self._model = transformers.SamModel(transformers.SamConfig()).eval()
        self._version = transformers.__version__

    def encode(self, image: Rgb, frame: Frame) -> Features:
        import torch

        with torch.inference_mode():
            x = torch.from_numpy(image).permute(0, 3, 1, 2).float() / 255
            return {"image_embeddings": self._model.get_image_embeddings(x).numpy()}

    def decode(self, features: Features, prompts: Tensors) -> Tensors:
        import torch

        points = torch.from_numpy(prompts["point_coords"][:, None, :1])
        with torch.inference_mode():
            out = self._model(image_embeddings=torch.from_numpy(features["image_embeddings"]), input_points=points,
                              input_labels=torch.ones(points.shape[:3], dtype=torch.long))
        return {"low_res_masks": out.pred_masks[:, 0].numpy(), "iou_predictions": out.iou_scores[:, 0].numpy()}

    def info(self) -> dict[str, Any]:
        return {"runtime": TRANSFORMERS, "version": self._version, "weights_sha256": ""}


def open_plain(target: Target) -> PlainOnnx:
    """``target.source`` is ``model:folder``."""
    model, folder = target.source.split(":", 1)
    stem = "dynamic" if target.precision == "int8" else "plain"
    return PlainOnnx(model, Path(folder) / f"{stem}.encoder.onnx", Path(folder) / f"{stem}.decoder.onnx")


def open_transformers(target: Target) -> Transformers:
    return Transformers(target.threads)
