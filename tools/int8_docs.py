"""Measure the int8 artifacts of bundles and write their sections of docs/int8.md, with pictures.

    python tools/int8_docs.py [BUNDLE ...] --data PACK [--images 60] [--checkpoints FOLDER] [--untrained BUNDLE ...]
        [--out docs/int8.md]

Sections of models that are not named stay as they are; each says what it was made by.

Each BUNDLE has fp32 and int8 in every format (``pocketsam export lite0 --to onnx,openvino,litert,coreml --precision
fp32,fp16,int8 --calibration PACK``) and, unless it is lite0, its checkpoint in FOLDER/MODEL.pt; PACK is a labelled pack
that calibration has not seen. The pictures show the shipped photos, whose licences allow it. ``--untrained`` bundles
carry weights that mean nothing: for them sizes, times and layers are reported, and no accuracy.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pages import page, sections

import pocketsam
from pocketsam.benchmarks.work import share_in_8_bits
from pocketsam.builtin import BUILTIN_MODEL
from pocketsam.bundle import Artifact, Bundle, read_bundle
from pocketsam.doctor import machine
from pocketsam.quantize.page import pictures
from pocketsam.quantize.report import Case, Row, measure, three
from pocketsam.registry import FORMATS

PACKAGES = ("torch", "onnxruntime", "openvino", "nncf", "ai-edge-litert", "ai-edge-quantizer", "coremltools")
HEAD = ("# int8", "", "Sections are made by their commands; do not edit.", "",
        "Agreement is the mask IoU with PyTorch in fp32, half boxes, half points, eight an image, on the objects that "
        "PyTorch's own masks show (`pocketsam.parity`). Retention is mIoU against annotated regions (at most eight an "
        "image, box and innermost point) divided by that of PyTorch. Time ratios are to fp32 of the same format, taken "
        "at export in interleaved calls; above 1 is faster. How it is done, and what was tried: "
        "[adr/0006](adr/0006-int8.md).", "")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="*")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--checkpoints", type=Path, default=Path())
    parser.add_argument("--untrained", type=Path, nargs="*", default=[])
    parser.add_argument("--out", type=Path, default=Path("docs/int8.md"))
    args = parser.parse_args(argv)
    made = sections(args.out.read_text(encoding="utf-8") if args.out.exists() else "")
    for path in args.bundles:
        bundle = read_bundle(path)
        made[bundle.spec.name] = trained(bundle, path, args)
    for path in args.untrained:
        bundle = read_bundle(path)
        made[bundle.spec.name] = untrained(bundle, path, args)
    args.out.write_text(page("\n".join(HEAD), made.values()), encoding="utf-8")
    print(f"wrote {args.out}", file=sys.stderr)


def trained(bundle: Bundle, path: Path, args: argparse.Namespace) -> list[str]:
    """The section of a model whose masks mean something."""
    def report(text: str) -> None:
        print(text, file=sys.stderr)

    name = bundle.spec.name
    checkpoint = None if name == BUILTIN_MODEL else args.checkpoints / f"{name}.pt"
    reference = pocketsam.load(name, checkpoint=checkpoint, runtime="pytorch")
    rows, _ = measure(bundle, reference, ["int8"], args.data, args.images, report)
    _, cases = measure(bundle, reference, ["int8"], None, 0, report)
    command = f"{path.name} --data {args.data.name} --images {args.images}"
    command += " --checkpoints FOLDER" if checkpoint else ""
    return [*start(name, command), *accuracy(bundle, rows), *worst(name, cases, args.out)]


def start(name: str, command: str) -> list[str]:
    """Heading of a section, and by what it was made, on what."""
    facts = machine()
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in PACKAGES)
    return [f"## {name}", "", f"`python tools/int8_docs.py {command}`, {facts['cpu']}, {facts['cores']} cores, "
            f"{' '.join(facts['features'])}, 2 threads, Python {sys.version.split()[0]}; {versions}.", ""]


def accuracy(bundle: Bundle, rows: Sequence[Row]) -> list[str]:
    """The table that counts: trained weights."""
    first = next(a for a in bundle.artifacts if a.precision == "int8")
    calibration = first.quantization["calibration"]
    out = [f"Calibrated on {calibration['images']} images of {calibration['source']}. "
           f"{rows[0].measured['images']} images judge.", "",
           "| format | encoder MB | x smaller | mean | box mean / p5 / worst | point mean / p5 / worst | flips | "
           "retention box / point | encoder x fp32 | slower | decoder | layers in float |",
           "|---|---|---|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        kept = row.retention or {}
        ratio = row.encoder.get("time_ratio")
        out.append(" | ".join((
            f"| {row.format}", f"{row.encoder_bytes / 1e6:.2f}", f"{row.encoder['size_ratio']:.2f}",
            f"{row.measured['all']['mean']:.4f}", three(row.measured["box"]), three(row.measured["point"]),
            f"{row.measured['flip_rate']:.1%}", f"{kept['box']:.3f} / {kept['point']:.3f}" if kept else "",
            "not measurable off a Mac" if ratio is None else f"{ratio:.2f}",
            "yes: `auto` does not take it" if row.encoder.get("slower") else "no",
            row.decoder.get("kept_in_float") or "int8", str(len(row.encoder["float_layers"])))) + " |")
    return [*out, ""]


def worst(model: str, cases: Sequence[Case], out: Path) -> list[str]:
    """The worst masks on the shipped photos as pictures beside the page."""
    folder = out.with_suffix("")
    folder.mkdir(exist_ok=True)
    lines = ["### The worst masks on the shipped photos", "", "| prompt | fp32 | int8 | where they differ |",
             "|---|---|---|---|"]
    for i, case in enumerate(cases):
        cells = []
        for name, jpeg in zip(("fp32", "int8", "difference"), pictures(case), strict=True):
            file = f"{model}_{i}_{name}.jpg"
            (folder / file).write_bytes(jpeg)
            cells.append(f"![{name}]({folder.name}/{file})")
        lines.append(f"| {case.title}, IoU {case.iou:.3f} | {' | '.join(cells)} |")
    return [*lines, ""]


def untrained(bundle: Bundle, path: Path, args: argparse.Namespace) -> list[str]:
    """Sizes, times and layers of a model whose weights mean nothing."""
    out = [*start(bundle.spec.name, f"--data {args.data.name} --untrained {path.name}"),
           "Deterministic, untrained weights: sizes, times and what is quantized, and no accuracy.", "",
           "| format | encoder MB fp32 | encoder MB int8 | x smaller | numbers in 8 bits | encoder x fp32 | slower "
           "| decoder |",
           "|---|---|---|---|---|---|---|---|"]
    for format_ in FORMATS:
        rows = {a.graph: a for a in bundle.artifacts if (a.format, a.precision) == (format_, "int8")}
        if rows:
            out.append(_sizes(bundle, bundle.find(format_, "fp32", "encoder"), rows))
    return [*out, ""]


def _sizes(bundle: Bundle, fp32: Artifact, rows: dict[str, Artifact]) -> str:
    facts: dict[str, Any] = rows["encoder"].quantization
    ratio = facts["time_ratio"]
    share = share_in_8_bits(bundle, fp32.format, "int8", "encoder")
    return " | ".join((f"| {fp32.format}", f"{fp32.bytes / 1e6:.1f}", f"{rows['encoder'].bytes / 1e6:.1f}",
                       f"{facts['size_ratio']:.2f}", f"{share:.1%}",
                       "not measurable off a Mac" if ratio is None else f"{ratio:.2f}",
                       "yes: `auto` does not take it" if facts["slower"] else "no",
                       rows["decoder"].quantization.get("kept_in_float") or "int8")) + " |"


if __name__ == "__main__":
    main()
