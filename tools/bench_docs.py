"""Measure every model on this machine and write its section of docs/benchmarks.md; sections of models that are not in
the folder stay. One command, resumable:

    python tools/bench_docs.py WORK_FOLDER [MODEL ...] [--checkpoints FOLDER] [--calibration PACK] [--data PACK]
        [--rounds 10] [--write]
    python tools/make_models_doc.py --measured WORK_FOLDER       # the same results, a line for each model

Models without a checkpoint ``FOLDER/MODEL.pt`` get deterministic, untrained weights: speed and size do not depend on
them, and their agreement says how exact the export is; their int8 files are not held to a gate, and ``--data`` is not
asked of them. Official files are known by their sha256. A bundle in the folder
that holds everything is not exported again, a model whose ``bench.json`` is finished is not measured again. What
a format that refuses a model says is kept in the model's folder. ``--discard`` removes what was exported.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import rivals
from pages import page, sections

import pocketsam
from pocketsam.benchmarks.latency import Plan
from pocketsam.benchmarks.options import Options
from pocketsam.benchmarks.results import mark_slower, read, write
from pocketsam.benchmarks.run import RESULT, run, write_reports
from pocketsam.benchmarks.tables import HEADS, accuracy_rows, cells, facts, source_rows
from pocketsam.benchmarks.targets import Target
from pocketsam.builtin import BUILTIN_MODEL, checkpoint_for
from pocketsam.bundle import read_bundle
from pocketsam.doctor import machine
from pocketsam.errors import PocketSamError
from pocketsam.files import sha256_file
from pocketsam.images import load_rgb
from pocketsam.models.checkpoints import CHECKPOINTS
from pocketsam.parity import compare
from pocketsam.photos import photo_paths
from pocketsam.predictor import Predictor
from pocketsam.registry import FORMATS
from pocketsam.registry import MODELS as REGISTERED

ROOT = Path(__file__).resolve().parents[1]
MODELS = (BUILTIN_MODEL, "mobile_sam", "sam_vit_b")
PRECISIONS = ("fp32", "fp16", "int8")
# Long calls: fewer rounds and prompts.
HEAVY = ("sam_vit", "sam_hq_vit_b", "sam2.1", "efficient_sam", "efficientvit_sam_xl", "repvit")
# Of these one calibration image; their layers are rounded one at a time on each.
LARGEST = ("sam_vit_l", "sam_vit_h", "sam2.1_large")
REFUSED = "refused.json"
# Core ML files are not timed elsewhere; where the bundle has them already, their size and agreement are shown.
TIMED = [f for f in FORMATS if f != "coreml" or sys.platform == "darwin"]
INTRO = """\
# Benchmarks

Made by `python tools/bench_docs.py WORK_FOLDER`; do not edit. Each model's table is one run: every row is a process of
its own, pinned to the cores named; rows take turns round by round, so that ratios to PyTorch eager survive a noisy
machine (95 % bootstrap interval in brackets). `encoder ms` and `prompt ms` are medians of the call with its result read
back, ± (p90 - p50) / p50; `x floor` is the distance to the larger of FLOPs / measured GEMM rate and bytes / measured
bandwidth. `agreement` is the mean mask IoU with PyTorch. Memory is the peak of a process that holds both graphs. Method
and limits: [bench-schema.md](bench-schema.md).

Rows *in bf16* are the same files of OpenVINO computed in bf16 where they would be in f32, which a user must ask for and
the processor must have; `auto` never does. torch.compile is PyTorch's own compiler on both halves. Rows named
torch.onnx.export and ORT dynamic int8 are what a plain exporter ships: the model without our rewrites, in ONNX Runtime
with default options, and ONNX Runtime's dynamic quantization of it. The row transformers is Hugging Face's SamModel in
PyTorch, with random weights.

Where Core ML's fp16, and int8, whose float layers compute in fp16, have an agreement of 0, activations of untrained
weights leave the range of fp16 (5 million in EfficientViT-SAM XL1); an export refuses such files by its gate, which is
off here.
"""
UNTRAINED = """\
Deterministic, untrained weights: times and sizes are a trained model's, masks and agreement are not. Which layers int8
keeps in float depends on what 8 bits do to the features: of trained weights they may be fewer or more."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--checkpoints", type=Path)
    parser.add_argument("--calibration", type=Path, help="photos for int8; default: the shipped ones")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--images", type=int, default=60, help="photos of --data")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--discard", action="store_true", help="keep the results only")
    parser.add_argument("--write", action="store_true", help="only write the document from what is in the folder")
    args = parser.parse_args()
    # Workers import the rivals by name.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tools"), os.environ.get("PYTHONPATH", "")])
    for model in () if args.write else args.models:
        measure(model, args)
    target = ROOT / "docs" / "benchmarks.md"
    made = sections(target.read_text(encoding="utf-8")) if target.exists() else {}
    measured = {p.parent.name: read(p) for p in sorted(args.work.glob(f"*/{RESULT}"))}
    made |= {name: section(result) for name, result in measured.items() if finished(result)}
    ordered = [made[m] for m in (*MODELS, *[m for m in REGISTERED if m not in MODELS]) if m in made]
    target.write_text(page(INTRO, ordered), encoding="utf-8")


def measure(model: str, args: argparse.Namespace) -> None:
    """Export what is missing, then benchmark with the rivals in the same rounds."""
    folder = args.work / model
    if (folder / RESULT).exists() and finished(read(folder / RESULT)):
        print(f"{model}: measured before")
        return
    checkpoint = find_checkpoint(model, args.checkpoints or args.work)
    bundle = args.work / f"{model}.bundle"
    weights = checkpoint_for(model, checkpoint)
    if not holds_everything(bundle, sha256_file(weights)):
        export_apart(model, checkpoint, bundle, folder, args.calibration)
    led = model in MODELS
    plain = args.work / f"{model}.rivals" / sha256_file(weights)[:12]
    others = rival_targets(model, weights, plain) if led else ()
    heavy = model.startswith(HEAVY)
    rounds = max(3, args.rounds // 3) if heavy else args.rounds
    plan = Plan(rounds, extra=rounds // 2, **({"calls": (1, 10), "warmup": 1} if heavy else {}))
    data = args.data if is_trained(model, checkpoint) else None
    options = Options(plan=plan, checkpoint=str(checkpoint or ""), data=data, images=args.images, regions=8,
                      rivals=others, operators=led, compiled=led, computes=("bf16",), photos=3 if led else 1)
    result = run(bundle, options, folder, print)
    add_rival_facts(result, model, checkpoint, others, plain)
    result["model"]["trained"] = is_trained(model, checkpoint)
    write(result, folder / RESULT)
    write_reports([result], folder)
    if args.discard:
        shutil.rmtree(bundle)
        shutil.rmtree(args.work / f"{model}.rivals", ignore_errors=True)


def finished(result: dict[str, Any]) -> bool:
    """Whether a result is complete and got what is added after the run: ``trained`` is the last of it."""
    return result["complete"] and "trained" in result["model"]


def export_apart(*arguments: Any) -> None:
    """:func:`export` in a process that ends, for it may keep 13 GB that the rows of SAM ViT-H want."""
    process = multiprocessing.get_context("spawn").Process(target=export, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"The export of {arguments[0]} failed, see above.")


def export(model: str, checkpoint: Path | None, bundle: Path, folder: Path, calibration: Path | None) -> None:
    """Every format that takes the model; what the others say is written down.

    lite0 and the models that lead the documents are exported at once and must not fail.
    """
    def make(formats: list[str], precisions: list[str], **options: Any) -> None:
        pocketsam.export(model, checkpoint=checkpoint, formats=formats, precisions=precisions, out=bundle,
                         calibration=calibration, report=print, **options)

    if model in MODELS:
        make(list(TIMED), list(PRECISIONS), gate=None if is_trained(model, checkpoint) else 0.0)
        return
    # One photo and few calibration images: their weights show no accuracy.
    count = 1 if model in LARGEST else 3 if model.startswith(HEAVY) else 8
    few: dict[str, Any] = {"images": photo_paths()[:1], "calibration_images": count, "clicks": False}
    refused: dict[str, str] = {}

    def attempt(formats: list[str], precision: str) -> bool:
        try:
            make(formats, list(dict.fromkeys(["fp32", precision])), **few, gate=None if precision == "fp32" else 0.0)
        except PocketSamError as e:
            refused[f"{' '.join(formats)} {precision}"] = str(e)
            return False
        return True

    taken = [f for f in FORMATS if attempt([f], "fp32")]
    for format_ in [f for f in taken if f != "onnx"]:
        attempt([format_], "fp16")
    # Together, as they share what is prepared.
    if taken and not attempt(taken, "int8"):
        refused.popitem()
        for format_ in taken:
            attempt([format_], "int8")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REFUSED).write_text(json.dumps(refused, indent=2) + "\n", encoding="utf-8")


def holds_everything(bundle: Path, file_sha256: str) -> bool:
    """Whether a bundle of these weights is there with an encoder for every format and precision that is measured."""
    if not bundle.is_dir():
        return False
    opened = read_bundle(bundle)
    held = {(a.format, a.precision) for a in opened.artifacts if a.graph == "encoder"}
    wanted = {(f, p) for f in TIMED for p in PRECISIONS if (f, p) != ("onnx", "fp16")}
    return opened.weights.get("file_sha256") == file_sha256 and held >= wanted


def is_trained(model: str, checkpoint: Path | None) -> bool:
    """Whether the weights are the built-in ones or an official file."""
    return checkpoint is None or sha256_file(checkpoint) in {c.sha256 for c in CHECKPOINTS if c.model == model}


def find_checkpoint(model: str, folder: Path) -> Path | None:
    if model == BUILTIN_MODEL:
        return None
    path = folder / f"{model}.pt"
    if not path.exists():
        subprocess.run([sys.executable, str(ROOT / "tests/reference/make_checkpoint.py"), model, str(path)], check=True)
    return path


def rival_targets(model: str, checkpoint: Path, folder: Path) -> tuple[Target, ...]:
    threads = int(machine()["cores"])
    rivals.make(model, checkpoint, folder)
    found = [Target(rivals.PLAIN, "fp32", threads, source=f"{model}:{folder}", factory="rivals:open_plain"),
             Target(rivals.DYNAMIC, "int8", threads, source=f"{model}:{folder}", factory="rivals:open_plain")]
    if model == "sam_vit_b" and importlib.util.find_spec("transformers"):
        found.append(Target(rivals.TRANSFORMERS, "fp32", threads, factory="rivals:open_transformers"))
    return tuple(found)


def add_rival_facts(result: dict[str, Any], model: str, checkpoint: Path | None, others: tuple[Target, ...],
                    folder: Path) -> None:
    """Size and agreement of the ONNX rivals, on the shipped photos."""
    reference = pocketsam.load(model, checkpoint=checkpoint, runtime="pytorch")
    images = [load_rgb(p) for p in photo_paths()[:3]]
    for target in others:
        row = next(r for r in result["rows"] if (r["runtime"], r["precision"]) == (target.runtime, target.precision))
        if target.runtime == rivals.TRANSFORMERS or row["status"] != "ok":
            continue
        stem = "dynamic" if target.precision == "int8" else "plain"
        row["bytes"] = {g: (folder / f"{stem}.{g}.onnx").stat().st_size for g in ("encoder", "decoder")}
        try:
            row["agreement"] = compare(reference, Predictor(rivals.open_plain(target)), images).summary()
        except PocketSamError as e:
            row["status"] = str(e)


def section(result: dict[str, Any]) -> list[str]:
    """What the document says of one model; nothing in it is typed by hand."""
    mark_slower(result["rows"])
    out = [f"## {result['model']['name']}", "", facts(result), ""]
    out += [] if result["model"].get("trained") else [UNTRAINED, ""]
    if calm := result.get("calm", {}).get("disturbed"):
        out += [f"The machine was disturbed in {calm} of {result['calm']['rounds']} rounds.", ""]
    out += table([list(HEADS), *(cells(r) for r in result["rows"])])
    if (accuracy := accuracy_rows(result)) and any(r.get("quality") for r in result["rows"]):
        by_source = [r for r in source_rows(result) if r[0] in ("runtime", "pytorch")]
        out += ["", "Accuracy on labelled images:", "", *table(accuracy), "", *table(by_source)]
    return out


def table(rows: list[list[str]]) -> list[str]:
    """Markdown."""
    lines = ["| " + " | ".join(r) + " |" for r in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


if __name__ == "__main__":
    main()
