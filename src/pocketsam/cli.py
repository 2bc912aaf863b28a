"""The ``pocketsam`` command: registers what ``commands`` holds and turns errors into exit codes."""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

import pocketsam
from pocketsam.commands import bench, bundles, everything, info, quantize, segment, tasks
from pocketsam.commands.console import err, escape, out
from pocketsam.errors import PocketSamError

app = typer.Typer(help="Segment Anything on phones, browsers and boards: export, run and measure, checked against "
                       "PyTorch.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
for command in (info.models, bundles.export, segment.segment, everything.everything, tasks.instances, tasks.proposals,
                tasks.edges, bundles.verify, bundles.tune, quantize.quantize, info.demo, info.doctor):
    app.command()(command)
app.add_typer(bench.app, name="bench")


def main() -> None:
    """Entry point: a PocketSamError becomes one sentence and exit code 2."""
    # A file's name may hold bytes that no encoding has.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app()
    except PocketSamError as e:
        err.print(f"[bold red]error:[/] {escape(str(e))}", soft_wrap=True, highlight=False)
        sys.exit(2)


def _version(show: bool) -> None:
    if show:
        out.print(pocketsam.__version__)
        raise typer.Exit


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True,
                                                help="Print the version and exit.")] = False) -> None:
    """Options of every command."""


if __name__ == "__main__":
    main()
