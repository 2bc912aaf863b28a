"""What this machine can run, and the command that would add the rest."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from pocketsam import registry

# Instruction sets that decide which int8 and float kernels are fast.
CPU_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16",
             "asimd", "asimddp", "i8mm", "bf16", "fphp")


@dataclass(frozen=True)
class Row:
    """One thing checked: name, whether it is usable, its version, and the remedy if it is not."""

    name: str
    usable: bool
    version: str
    remedy: str


def machine() -> dict[str, Any]:
    """Python, system, CPU model, core count and instruction sets: what to quote beside a number."""
    model, flags = _cpu()
    return {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}",
            "cpu": model, "cores": cores(), "features": [f for f in CPU_FLAGS if f in flags]}


def runtimes() -> list[Row]:
    """Each runtime's version, or the pip command that would install it."""
    rows = []
    for name, package in registry.RUNTIME_PACKAGES.items():
        # Other distributions bring the same module, or an older one that is as good.
        version = next(filter(None, map(_version, (package.distribution, *package.others))), "")
        remedy = "" if version else f"pip install 'pocketsam[{package.extra}]'"
        rows.append(Row(name, bool(version), version, remedy))
    return rows


def exporters() -> list[Row]:
    """Each export format: usable only with torch and the format's own packages."""
    rows = []
    for name, needs in registry.FORMAT_PACKAGES.items():
        versions = {d: _version(d) for d in needs.distributions}
        absent = not all(versions.values())
        rows.append(Row(name, not absent, ", ".join(f"{d} {v}" for d, v in versions.items() if v),
                        f"pip install 'pocketsam[{needs.extras}]'" if absent else ""))
    return rows


def report() -> dict[str, Any]:
    """Everything, JSON-safe."""
    return {"machine": machine(), "runtimes": [asdict(r) for r in runtimes()],
            "exporters": [asdict(r) for r in exporters()]}


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def cores() -> int:
    """Cores that this process may use: fewer than the machine's in a container or a batch job's share."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _cpu() -> tuple[str, set[str]]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or "unknown", set()
    fields = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    clean = {k.strip(): v.strip() for k, v in fields}
    # ARM kernels name the board, or nothing.
    name = clean.get("model name") or clean.get("Model") or clean.get("Hardware") or _board() or platform.machine()
    return name or "unknown", set((clean.get("flags") or clean.get("Features") or "").split())


def _board() -> str:
    try:
        return Path("/proc/device-tree/model").read_text(encoding="utf-8", errors="replace").strip("\0 \n")
    except OSError:
        return ""
