"""`pocketsam bench BUNDLE`, `bench compare`, `bench kit`, `bench merge`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pocketsam.commands.console import Json, err, escape, names, out, print_json, progress, table
from pocketsam.errors import BenchmarkError


class DefaultGroup(TyperGroup):
    """`bench BUNDLE` is `bench run BUNDLE`: a first word that is no command of the group goes to ``run``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=DefaultGroup, no_args_is_help=True, help="Measure a bundle on this machine: latency, memory, "
                  "accuracy, distance to the floor. `bench BUNDLE` is short for `bench run BUNDLE`.")
Out = Annotated[Path, typer.Option("-o", "--output", help="Folder for bench.json, bench.csv and bench.html.")]


@app.command()
def run(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    output: Out = Path("bench"),
    data: Annotated[Path | None, typer.Option(help="Labelled pack (tar) or COCO folder: measures agreement and "
                                                   "quality on it.")] = None,
    threads: Annotated[str, typer.Option(help="Thread counts, separated by commas; default: all cores.")] = "",
    against: Annotated[str, typer.Option(help="A runtime that ratios are taken to, besides PyTorch.")] = "",
    checkpoint: Annotated[Path | None, typer.Option(help="The checkpoint for the PyTorch reference; lite0 needs "
                                                         "none.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few calls, no profile: a first look.")] = False,
    rounds: Annotated[int | None, typer.Option(help="Turns of each runtime; default 10.")] = None,
    torch_compile: Annotated[bool, typer.Option("--torch-compile", help="Measure torch.compile too.")] = False,
    compute: Annotated[str, typer.Option(help="Measure OpenVINO in these precisions too, where the processor has them: "
                                              "bf16, f16.")] = "",
    images: Annotated[int, typer.Option(help="Images of --data.")] = 60,
    device: Annotated[str, typer.Option(help="Name of this device in reports; default: its CPU.")] = "",
    json_: Json = False,
) -> None:
    """Measure a bundle, and write the numbers and one page."""
    from pocketsam.benchmarks.latency import QUICK, Plan
    from pocketsam.benchmarks.options import Options
    from pocketsam.benchmarks.run import PAGE, RESULT
    from pocketsam.benchmarks.run import run as measure

    plan = QUICK if quick else Plan()
    if rounds is not None:
        plan = replace(plan, rounds=rounds)
    options = Options(_counts(threads), plan, str(checkpoint or ""), against, data, images, compiled=torch_compile,
                      operators=not quick, device=device, computes=tuple(names(compute)))
    kept = output / RESULT
    before = _written(kept)
    try:
        result = measure(bundle, options, output, lambda t: progress(t, json_))
    except KeyboardInterrupt:
        if _written(kept) != before:
            found = f"what was measured is in {kept}, marked as partial"
        else:
            found = "nothing was measured yet" + (f", and {kept} is that of an earlier run" if before else "")
        err.print(f"interrupted: {found}", highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None
    if json_:
        print_json(result)
        return
    show(result)
    out.print(f"page: {output / PAGE}", highlight=False)


@app.command()
def compare(
    old: Annotated[Path, typer.Argument(help="bench.json from before.")],
    new: Annotated[Path, typer.Argument(help="bench.json from after.")],
    json_: Json = False,
) -> None:
    """Say what became slower, larger or less accurate beyond noise, or is missing; exit code 1 if anything did."""
    from dataclasses import asdict

    from pocketsam.benchmarks.compare import compare as changes
    from pocketsam.benchmarks.compare import remarks
    from pocketsam.benchmarks.results import read

    results = read(old), read(new)
    found = changes(*results)
    for line in remarks(*results):
        err.print(f"note: {escape(line)}", highlight=False, soft_wrap=True)
    if json_:
        print_json([asdict(c) for c in found])
    elif not found:
        out.print("no difference beyond noise")
    else:
        shown = table("what", "measure", "before", "after", "")
        for c in found:
            verdict = "WORSE" if c.worse else "better"
            shown.add_row(escape(c.what), c.measure, escape(c.before), escape(c.after), verdict)
        out.print(shown)
    if any(c.worse for c in found):
        raise typer.Exit(1)


@app.command()
def kit(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    runtime: Annotated[str, typer.Option(help="The engine of the device: onnxruntime, openvino or litert.")],
    precision: Annotated[str, typer.Option(help="Of the files, such as fp32, fp16 or int8.")] = "fp32",
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")] = Path("kit"),
) -> None:
    """Write a folder that measures the bundle on a device without PocketSAM; see benchmarks/device/README.md."""
    from pocketsam.benchmarks.kit import SCRIPT, write_kit
    from pocketsam.bundle import read_bundle

    size = write_kit(read_bundle(bundle), runtime, precision, output)
    out.print(f"{output}: {size / 1e6:.1f} MB of graphs; copy it to the device and run `python {SCRIPT}` there",
              highlight=False)


@app.command()
def merge(
    results: Annotated[list[Path], typer.Argument(help="bench.json files of several devices.")],
    output: Annotated[Path, typer.Option("-o", "--output",
                                         help="Folder for bench.csv and bench.html.")] = Path("merged"),
) -> None:
    """Put the results of several devices into one page and one CSV."""
    from pocketsam.benchmarks.results import merge as together
    from pocketsam.benchmarks.run import CSV, PAGE, write_reports

    write_reports(together(results), output)
    out.print(f"page: {output / PAGE}, table: {output / CSV}", highlight=False)


def show(result: dict[str, Any]) -> None:
    """The main table."""
    from pocketsam.benchmarks.tables import HEADS, cells, facts

    shown = table(*HEADS)
    for row in result["rows"]:
        shown.add_row(*(escape(c) for c in cells(row)))
    out.print(shown)
    out.print(facts(result), highlight=False)


def _written(path: Path) -> int:
    """When a file was written, in nanoseconds; 0 where there is none."""
    return path.stat().st_mtime_ns if path.exists() else 0


def _counts(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(t) for t in names(text))
    except ValueError as e:
        raise BenchmarkError(f"threads is {text!r}; expected whole numbers separated by commas, such as 1,2.") from e
