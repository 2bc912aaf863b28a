"""Commands that tell and show: models, doctor, demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pocketsam.commands.console import Json, Threads, escape, out, print_json, progress, table


def models(json_: Json = False) -> None:
    """List supported models, where their official checkpoints are, and the formats that take them."""
    from pocketsam.models.catalog import SPECS
    from pocketsam.models.checkpoints import CHECKPOINTS
    from pocketsam.registry import FORMAT_LIMITS, FORMATS, formats_of

    if json_:
        rows = [{"model": c.model, "file": c.file, "url": c.url, "sha256": c.sha256, "licence": c.licence,
                 "bytes": c.bytes, "image_size": SPECS[c.model].image_size, "formats": formats_of(c.bytes)}
                for c in CHECKPOINTS]
        print_json(rows)
        return
    shown = table("model", "checkpoint", "MB", "licence", "not for", "sha256", "url")
    for c in CHECKPOINTS:
        size = "?" if c.bytes is None else f"{c.bytes / 1e6:.0f}"
        missing = ", ".join(f"{f} (above {FORMAT_LIMITS[f] / 1e9:.1f} GB)" for f in FORMATS
                            if f not in formats_of(c.bytes))
        digest = "unknown" if c.sha256 is None else c.sha256[:12]
        shown.add_row(c.model, c.file, size, c.licence, missing, digest, c.url)
    out.print(shown)


def doctor(json_: Json = False) -> None:
    """Show which runtimes and exporters are usable here, and the command that would add the others."""
    from pocketsam import doctor as checks

    data = checks.report()
    if json_:
        print_json(data)
        return
    machine = data["machine"]
    out.print(f"Python {machine['python']}, {machine['system']}, {machine['cpu']}, {machine['cores']} cores, "
              f"{' '.join(machine['features'])}", highlight=False)
    shown = table("kind", "name", "usable", "version", "to install")
    for kind, rows in (("runtime", data["runtimes"]), ("export", data["exporters"])):
        for row in rows:
            shown.add_row(kind, row["name"], "yes" if row["usable"] else "no", row["version"], escape(row["remedy"]))
    out.print(shown)


def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the page.")] = Path("build"),
    threads: Threads = None,
) -> None:
    """Export the built-in model to every format available here, segment the shipped photos, write one HTML page."""
    from pocketsam.demo import run

    rows, page = run(output, threads, lambda t: progress(t, False))
    shown = table("format", "precision", "MB", "mask agreement", "encoder ms", "prompt ms", "note")
    for row in rows:
        shown.add_row(*(escape(cell) for cell in row))
    out.print(shown)
    out.print(f"page: {page}", highlight=False)
