"""The shape of a benchmark's JSON, as far as reports and comparisons rely on it: a result comes from anywhere."""

from __future__ import annotations

from typing import Any

NUMBER = (int, float)
# A dictionary names keys, optional ones (missing, or null) with a question mark; "*" stands for every key, and a list
# holds the shape of each of its items.
RATIO = {"value": NUMBER, "low": NUMBER, "high": NUMBER}
TIMES = {"p50_ms": NUMBER, "spread": NUMBER, "?min_ms": NUMBER, "?p90_ms": NUMBER, "?p99_ms": NUMBER,
         "?first_ms": NUMBER, "?times_pytorch": RATIO, "?times_against": {**RATIO, "?to": str},
         "?floor": {"?times_floor": NUMBER}}
MASKS = {"prompts": int, "mean": NUMBER, "p5": NUMBER, "worst": NUMBER}
ROW = {"runtime": str, "format": str, "precision": str, "threads": int, "status": str, "?compute": str,
       "?version": str, "?encoder": TIMES, "?decoder": TIMES, "?bytes": {"*": NUMBER}, "?load_ms": NUMBER,
       "?peak_mb": NUMBER, "?slower_than": str, "?fallbacks": int, "?float_layers": {"*": int},
       "?agreement": {"?all": {"mean": NUMBER}, "?box": MASKS, "?point": MASKS, "?flip_rate": NUMBER}}
RESULT = {"complete": bool, "created": str, "device": str, "pocketsam": str, "settings": dict, "rows": [ROW],
          "machine": {"python": str, "system": str, "cpu": str, "cores": int, "features": [str]},
          "model": {"name": str, "image_size": int, "weights_sha256": str},
          "?calm": {"rounds": int, "disturbed": int, "probe_spread": NUMBER}}


def misfit(value: Any, shape: Any, name: str = "") -> str:
    """The first part that is missing or of another type, such as ``model.name``; empty if all fits.

    Times must be above zero, which ratios divide by.
    """
    if isinstance(shape, list):
        if not isinstance(value, list):
            return name
        return next(filter(None, (misfit(v, shape[0], f"{name}[{i}]") for i, v in enumerate(value))), "")
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return name
        return next(filter(None, (_part(value, key, part, name) for key, part in shape.items())), "")
    fits = isinstance(value, shape) and (shape is bool or not isinstance(value, bool))
    return "" if fits and not (name.endswith("p50_ms") and value <= 0) else name


def _part(value: dict[str, Any], key: str, shape: Any, name: str) -> str:
    if key == "*":
        return next(filter(None, (misfit(v, shape, f"{name}.{k}") for k, v in value.items())), "")
    held, optional = value.get(key.removeprefix("?")), key.startswith("?")
    return "" if optional and held is None else misfit(held, shape, f"{name}.{key.removeprefix('?')}".removeprefix("."))
