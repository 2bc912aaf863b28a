"""Measure segment everything and the tasks on top of it, and write docs/tasks.md.

    python tools/measure_tasks.py BUNDLE PACK [--photos 20] [--edge-photos 20] [--grid 16] [--threads 2]
        [--out docs/tasks.md] [--json numbers.json] [--skip-speed]

PACK is a labelled pack (tar with index.json). Quality is measured with the first runtime of ``--runtimes``; speed with
all of them, calls interleaved in one run so that ratios survive a busy machine. A run is minutes long.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import pocketsam
from pocketsam.clicks import PointDecoder
from pocketsam.doctor import machine
from pocketsam.edge_scores import boundaries, count, summarize
from pocketsam.edges import find_edges
from pocketsam.everything import Settings, default_settings, segment_everything
from pocketsam.folders import Job, prepare, run
from pocketsam.grids import point_grid
from pocketsam.images import load_rgb
from pocketsam.instances import Detection, segment_boxes
from pocketsam.labelled import boxes_of, read_pack
from pocketsam.photos import photo_paths
from pocketsam.predictor import Predictor
from pocketsam.proposals import PROPOSALS, average_recall, propose, recalls

COUNTS = (10, 100, 1000)
SINGLES = 32
PEAK = """
import pathlib, sys
import pocketsam
sam = pocketsam.load(sys.argv[1], runtime=sys.argv[2], threads=int(sys.argv[3]))
n = len(sam.everything(sys.argv[4]))
# Not getrusage: its peak begins with that of the parent process.
status = pathlib.Path("/proc/self/status").read_text()
print(n, int(status.split("VmHWM:")[1].split()[0]) // 1024)
"""


def quality(sam: Predictor, pack: Path, photos: int, edge_photos: int, grid: int) -> dict[str, Any]:
    """Proposals and edges on a pack."""
    settings = replace(PROPOSALS, points_per_side=grid)
    found: dict[int, list[Any]] = {c: [] for c in COUNTS}
    total = images = proposed = 0
    for sample in read_pack(pack, limit=photos):
        truth = boxes_of(sample)
        records = propose(sam, sample.image, settings)
        boxes = np.array([r.box for r in records], np.float64).reshape(-1, 4)
        for c in COUNTS:
            found[c].append(recalls(boxes, truth, c))
        total, images, proposed = total + len(truth), images + 1, proposed + len(records)
        print(f"proposals {images}", file=sys.stderr, flush=True)
    counts = []
    for sample in read_pack(pack, source="bsds", limit=edge_photos):
        counts.append(count(find_edges(sam, sample.image), [boundaries(x) for x in sample.layers]))
        print(f"edges {len(counts)}", file=sys.stderr, flush=True)
    return {"proposals": {"photos": images, "boxes": total, "grid": grid, "proposals_per_photo": proposed / images,
                          **{f"AR@{c}": average_recall(found[c], total) for c in COUNTS}},
            "edges": {"photos": len(counts), **(asdict(summarize(counts)) if counts else {})}}


def speed(sams: dict[str, Predictor], rounds: int) -> dict[str, Any]:
    """Seconds for one photo on each runtime, and the ratio to decoding its points one at a time."""
    rgb = load_rgb(photo_paths()[0])
    rows: dict[str, Any] = {n: {"everything_s": [], "ratio": [], "decode_s": []} for n in sams}
    for sam in sams.values():
        segment_everything(sam, rgb, Settings(points_per_side=4))
    for _ in range(rounds):
        for name, sam in sams.items():
            settings = default_settings(sam.spec.name)
            start = time.perf_counter()
            records = segment_everything(sam, rgb, settings)
            whole = time.perf_counter() - start
            embedding = sam.embed(rgb)
            points = point_grid(settings.points_per_side) * (embedding.frame.width, embedding.frame.height)
            some = points[::len(points) // SINGLES][:SINGLES]
            start = time.perf_counter()
            for _ in PointDecoder(sam, embedding, graphs=False).answers(some, 1):
                pass
            single = (time.perf_counter() - start) / len(some) * len(points)
            start = time.perf_counter()
            for _ in PointDecoder(sam, embedding).answers(points, least_score=settings.pred_iou):
                pass
            batched = time.perf_counter() - start
            rows[name]["everything_s"].append(whole)
            rows[name]["decode_s"].append(batched)
            rows[name]["ratio"].append(single / whole)
            rows[name]["masks"] = len(records)
    return {n: {"everything_s": min(r["everything_s"]), "decode_share": float(np.median(
        np.array(r["decode_s"]) / np.array(r["everything_s"]))), "times_faster_than_singles": float(
        np.median(r["ratio"])), "masks": r["masks"]} for n, r in rows.items()}


def instances(sam: Predictor, seed: int = 0) -> dict[str, Any]:
    """Masks per second for 64 boxes on one photo, encoder excluded."""
    rgb = load_rgb(photo_paths()[0])
    embedding = sam.embed(rgb)
    rng = np.random.default_rng(seed)
    h, w = rgb.shape[:2]
    corners = rng.uniform(0, 0.6, (64, 2)) * (w, h)
    sizes = rng.uniform(0.1, 0.4, (64, 2)) * (w, h)
    boxes = [Detection("x", 1, (float(x), float(y), float(x + a), float(y + b)), 1, 1.0)
             for (x, y), (a, b) in zip(corners, sizes, strict=True)]
    segment_boxes(sam, rgb, boxes[:16], lambda _: embedding)
    start = time.perf_counter()
    segment_boxes(sam, rgb, boxes, lambda _: embedding)
    return {"boxes": len(boxes), "masks_per_second": len(boxes) / (time.perf_counter() - start)}


def peaks(bundle: Path, runtimes: list[str], threads: int, folder: Path) -> dict[str, int]:
    """Peak memory in MiB of a process that segments a 12-megapixel photo."""
    photo = folder / "large.jpg"
    Image.open(photo_paths()[0]).resize((4000, 3000)).save(photo, quality=90)
    out = {}
    for runtime in runtimes:
        done = subprocess.run([sys.executable, "-c", PEAK, str(bundle), runtime, str(threads), str(photo)], check=True,
                              capture_output=True, encoding="utf-8")
        out[runtime] = int(done.stdout.split()[-1])
    return out


def workers(bundle: Path, runtime: str, folder: Path) -> dict[str, Any]:
    """Throughput of two workers over one, one thread each, model loading excluded by a first photo each."""
    photos = photo_paths()[:6]
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for round_ in range(2):
        for n in (1, 2):
            job = Job(folder / f"{round_}-{n}", Settings(points_per_side=16), str(bundle), runtime, threads=1,
                      overlays=False)
            prepare(job, job.open(), photos)
            done: list[float] = []
            run(job, photos, n, lambda d, i, t, done=done: done.append(time.perf_counter()))
            # From the first finished photo to the last: what a long folder would see.
            seconds[n].append((done[-1] - done[n - 1]) / (len(photos) - n))
    return {"photos": len(photos), "ratio": float(np.median(np.array(seconds[1]) / np.array(seconds[2])))}


def page(d: dict[str, Any]) -> str:
    """docs/tasks.md."""
    m, q = d["machine"], d.get("quality", {})
    lines = ["# Tasks on automatic masks", "",
             f"Made by the command below; do not edit. Weights: sha256 `{d['weights_sha256'][:16]}`. {m['cpu']}, "
             f"{m['cores']} cores, {d['threads']} threads, Python {m['python']}, "
             f"{', '.join(f'{k} {v}' for k, v in d['versions'].items())}. Load of the machine when this began: "
             f"{d['load']:.1f}; compare ratios, not seconds.", "", "```console", f"$ {d['command']}", "```", "",
             "## Quality", "",
             f"Measured with {d['runtimes'][0]}.", "",
             "| task | photos | setting | result |", "|---|---|---|---|"]
    p, e = q["proposals"], q["edges"]
    recall = ", ".join(f"AR@{c} {p[f'AR@{c}']:.3f}" for c in COUNTS)
    lines.append(f"| proposals | {p['photos']} ({p['boxes']} boxes) | {p['grid']} x {p['grid']} grid, no filters, "
                 f"NMS 0.9, {p['proposals_per_photo']:.0f} proposals a photo | {recall} |")
    if e["photos"]:
        lines.append(f"| edges (BSDS500 val) | {e['photos']} | 16 x 16 grid, NMS 0.7, tolerance 0.0075 | ODS "
                     f"{e['ods']:.3f}, OIS {e['ois']:.3f}, AP {e['ap']:.3f} |")
    lines += ["", "Average recall is over box IoU 0.5 to 0.95, every region of every layer being an object. The edge "
              "benchmark assigns pixels one to one with the largest matching instead of the cheapest; counts differ "
              "only where both exist.", ""]
    if "speed" in d:
        lines += ["## Speed and memory", "",
                  f"One photo of 600 x 400 pixels, {d['grid']} x {d['grid']} points. *Ratio*: decoding the same points "
                  f"one at a time (extrapolated from {SINGLES}) over everything, encoder and masks included.", "",
                  "| runtime | everything, s (best) | share of decoding | ratio to one at a time | instances, masks/s "
                  "| peak memory, 12 MP, MiB |", "|---|---|---|---|---|---|"]
        for name, r in d["speed"].items():
            lines.append(f"| {name} | {r['everything_s']:.2f} | {r['decode_share']:.0%} | "
                         f"{r['times_faster_than_singles']:.2f} | {d['instances'][name]['masks_per_second']:.1f} | "
                         f"{d['peak_mib'][name]} |")
        lines += ["", f"Folder, two workers over one, one thread each ({d['runtimes'][0]}): "
                  f"{d['workers']['ratio']:.2f} x.", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--photos", type=int, default=20)
    parser.add_argument("--edge-photos", type=int, default=20)
    parser.add_argument("--grid", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--runtimes", default="onnxruntime,openvino,litert")
    parser.add_argument("--out", type=Path, default=Path("docs/tasks.md"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--skip-speed", action="store_true")
    args = parser.parse_args()
    names = args.runtimes.split(",")
    sams = {n: pocketsam.load(args.bundle, runtime=n, threads=args.threads) for n in names}
    options = " ".join(f"--{k} {getattr(args, k.replace('-', '_'))}" for k in ("photos", "edge-photos", "grid",
                                                                               "threads", "runtimes"))
    first = sams[names[0]]
    packages = {"onnxruntime": "onnxruntime", "openvino": "openvino", "litert": "ai-edge-litert"}
    data: dict[str, Any] = {
        "machine": machine(), "threads": args.threads, "runtimes": names, "weights_sha256": first.weights_sha256,
        "load": os.getloadavg()[0], "grid": default_settings(first.spec.name).points_per_side,
        "versions": {n: importlib.metadata.version(packages[n]) for n in names},
        "command": f"python tools/measure_tasks.py {args.bundle} {args.pack.name} {options}",
    }
    if not args.skip_speed:
        with tempfile.TemporaryDirectory() as folder:
            data["speed"] = speed(sams, args.rounds)
            data["instances"] = {n: instances(s) for n, s in sams.items()}
            data["peak_mib"] = peaks(args.bundle, names, args.threads, Path(folder))
            data["workers"] = workers(args.bundle, names[0], Path(folder))
    print(json.dumps(data, indent=2), file=sys.stderr)
    data["quality"] = quality(first, args.pack, args.photos, args.edge_photos, args.grid)
    args.out.write_text(page(data), encoding="utf-8")
    if args.json:
        args.json.write_text(json.dumps(data, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
