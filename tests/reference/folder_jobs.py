"""Small folder jobs of `pocketsam everything`, as the tests of folders run them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pocketsam.everything import Settings
from pocketsam.folders import Job

Run = Callable[..., Any]
OPTIONS = ("--grid", "2", "--pred-iou", "0", "--stability", "0", "--nms", "1", "--threads", "1")


def everything(cli: Run, photos: Path, out: Path, bundle: Path, *more: object) -> Any:
    return cli("everything", photos, "-o", out, "--bundle", bundle, *OPTIONS, *more)


def job_of(toy_bundle: Path, out: Path) -> Job:
    return Job(out, Settings(points_per_side=2, pred_iou=0, stability=0), str(toy_bundle), "onnxruntime", threads=1)
