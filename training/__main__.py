"""``python -m pocketsam.training``: train, measure and ship the built-in model; see README.md in this folder."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from pocketsam import load
from pocketsam.errors import PocketSamError
from pocketsam.models.lite0 import lite0
from pocketsam.models.loading import load_model
from pocketsam.training.convert_trunk import convert_trunk
from pocketsam.training.curves import draw_curves
from pocketsam.training.evaluate import evaluate, format_table, table
from pocketsam.training.fit import Stored, Teaching, fit
from pocketsam.training.graft import graft
from pocketsam.training.loop import LOG
from pocketsam.training.packs import build_cache
from pocketsam.training.presets import PRESETS
from pocketsam.training.ranking import rank
from pocketsam.training.ship import load_weights, ship
from pocketsam.training.teach import open_taught, teach


def main(argv: Sequence[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        args.run(args)
    except PocketSamError as e:
        parser.exit(2, f"{parser.prog}: error: {e}\n")


def _fit(args: argparse.Namespace) -> None:
    for name in ("teacher", "propose"):
        if getattr(args, name) and not getattr(args, f"{name}_checkpoint"):
            args.fail(f"--{name} {getattr(args, name)} needs its weights: add --{name}-checkpoint FILE")
    for one, other in (("teacher", "taught"), ("trunk", "initial")):
        if getattr(args, one) and getattr(args, other):
            args.fail(f"--{one} and --{other} exclude each other; give one of them")
    teaching: Teaching | Stored | None = None
    if args.taught:
        teaching = Stored(args.taught, args.distill_embeddings)
    elif args.teacher:
        teaching = Teaching(args.teacher, args.teacher_checkpoint, args.distill_embeddings, args.distill_logits)
    fit(args.data, args.out, args.preset, args.minutes, trunk=args.trunk, initial=args.initial, lr=args.lr,
        seed=args.seed, workers=args.workers, teaching=teaching, stop_after=args.stop_after,
        proposer=(args.propose, args.propose_checkpoint) if args.propose else None)
    draw_curves(args.out / LOG, args.out / "curves.png")


def _evaluate(args: argparse.Namespace) -> None:
    model = load_weights(args.weights).to(args.device)
    results = evaluate(model, args.data, args.size, args.regions, args.seed, args.images)
    rows = table(results)
    print(json.dumps([asdict(r) for r in rows], indent=1) if args.json else format_table(rows))


def _ship(args: argparse.Namespace) -> None:
    print(f"{args.out}: {ship(args.source, args.out):,} bytes")


def _rank(args: argparse.Namespace) -> None:
    for name, x in zip(("before", "after"), rank(args.source, args.data, args.out, args.seed, args.workers),
                       strict=True):
        print(f"{name}: ranked first {x.ranked:.3f}, best of three {x.oracle:.3f}, pearson {x.pearson or 0:.3f}")


def _teach(args: argparse.Namespace) -> None:
    teach(load(args.teacher, runtime=args.runtime, checkpoint=args.checkpoint), args.data, args.out,
          lite0().spec.embed_size)


def _graft(args: argparse.Namespace) -> None:
    student = load_weights(args.initial)
    cache = build_cache(args.data, student.spec.image_size)
    lost = graft(student, load_model(args.teacher, args.checkpoint), open_taught(args.taught, args.data), cache,
                 args.out)
    print(f"{args.out}: the narrower token MLPs lose {lost:.1%} of their outputs' variance")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pocketsam.training", description=__doc__)
    parser.add_argument("--threads", type=int,
                        help="CPU threads; fit on CPUs and rank take one for each of their processes")
    commands = parser.add_subparsers(required=True)
    _add_fit(commands.add_parser("fit", help="train lite0, or continue the run in --out"))
    p = commands.add_parser("evaluate", help="print the quality table of some weights on a pack")
    p.add_argument("weights", type=Path, help="a run's folder (its weight average) or a .safetensors file")
    p.add_argument("--data", type=Path, required=True, help="pack with ground truth")
    p.add_argument("--size", type=int, help="input side instead of the model's")
    p.add_argument("--regions", type=int, help="at most this many regions of each image; default all")
    p.add_argument("--images", type=int, help="at most this many, spread evenly over the pack")
    p.add_argument("--seed", type=int, default=0, help="of the draw of regions")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--json", action="store_true", help="rows for machines")
    p.set_defaults(run=_evaluate)
    p = commands.add_parser("ship", help="write a run's averaged weights as fp16 safetensors")
    p.add_argument("source", type=Path, help="the run's folder")
    p.add_argument("out", type=Path)
    p.set_defaults(run=_ship)
    p = commands.add_parser("rank", help="fit the head that predicts IoU anew, once masks are final; masks stay")
    p.add_argument("source", type=Path, help="a run's folder or a .safetensors file")
    p.add_argument("out", type=Path, help="fp16 safetensors, as ship writes them")
    p.add_argument("--data", type=Path, nargs="+", required=True, help="packs that it was trained on")
    p.add_argument("--workers", type=int, default=2, help="processes that collect answers")
    p.add_argument("--seed", type=int, default=0)
    p.set_defaults(run=_rank)
    p = commands.add_parser("curves", help="draw a run's log as a PNG")
    p.add_argument("source", type=Path, help="the run's folder")
    p.add_argument("out", type=Path)
    p.set_defaults(run=lambda a: draw_curves(a.source / LOG, a.out))
    p = commands.add_parser("convert-trunk", help="convert the published EfficientNet-Lite0 weights")
    p.add_argument("source", type=Path, help="efficientnet-lite0-57934424.pth")
    p.add_argument("out", type=Path)
    p.set_defaults(run=lambda a: convert_trunk(a.source, a.out))
    p = commands.add_parser("teach", help="embed packs with a teacher, once")
    p.add_argument("teacher", help="a bundle, or a model's name with --checkpoint")
    p.add_argument("--runtime", default="auto")
    p.add_argument("--checkpoint", type=Path)
    p.add_argument("--data", type=Path, nargs="+", required=True, help="packs")
    p.add_argument("--out", type=Path, required=True, help="a .npy file; a JSON is written beside it")
    p.set_defaults(run=_teach)
    p = commands.add_parser("graft", help="lite0 with a SAM's prompt decoder, to start from")
    p.add_argument("teacher", help="a SAM-style model's name")
    p.add_argument("--checkpoint", type=Path, required=True)
    p.add_argument("--taught", type=Path, required=True, help="the teacher's embeddings of the packs, made by teach")
    p.add_argument("--initial", type=Path, required=True, help="lite0 weights whose encoder is kept")
    p.add_argument("--data", type=Path, nargs="+", required=True, help="packs")
    p.add_argument("--out", type=Path, required=True)
    p.set_defaults(run=_graft)
    return parser


def _add_fit(p: argparse.ArgumentParser) -> None:
    p.add_argument("--data", type=Path, nargs="+", required=True, help="packs to train on")
    p.add_argument("--out", type=Path, required=True, help="folder of the run")
    p.add_argument("--trunk", type=Path, help="ImageNet weights from convert-trunk")
    p.add_argument("--initial", type=Path, help="start from these lite0 weights: a run's folder or .safetensors")
    p.add_argument("--preset", choices=sorted(PRESETS), default="cpu")
    p.add_argument("--minutes", type=float, default=480, help="length of the run, counted over resumptions")
    p.add_argument("--stop-after", type=float, help="save and stop after this many minutes; call again to continue")
    p.add_argument("--lr", type=float, help="peak learning rate instead of the preset's")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--workers", type=int, default=2, help="threads that decode packs")
    p.add_argument("--propose", help="let this model of the registry propose regions where few are annotated; on CPUs "
                   "that takes seconds a photo")
    p.add_argument("--propose-checkpoint", type=Path)
    p.add_argument("--teacher", help="distil from this model of the registry")
    p.add_argument("--taught", type=Path, help="distil from these embeddings, made by teach, instead")
    p.add_argument("--teacher-checkpoint", type=Path)
    p.add_argument("--distill-embeddings", type=float, default=1.0, help="weight; 0 turns it off")
    p.add_argument("--distill-logits", type=float, default=1.0, help="weight; 0 turns it off")
    p.set_defaults(run=_fit, fail=p.error)


if __name__ == "__main__":
    main()
