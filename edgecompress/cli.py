"""The command line: parse, call, print. No logic."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from edgecompress import __version__
from edgecompress.console import ErrorReportingGroup
from edgecompress.errors import UsageError

app = typer.Typer(
    name="edgecompress",
    cls=ErrorReportingGroup,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
    help="""Make an ONNX model small and fast on an edge device **without retraining**, prove that it still works, and ship it.

    Start with `edgecompress demo`, or:

    1. `edgecompress inspect model.onnx` shows the layers and what can be done with them.
    2. `edgecompress compress model.onnx -o out --data data.npz` writes the compressed model and a report.
    3. `edgecompress bundle out --target x86_64 -o bundle` adds the runtime; `edgecompress bench bundle` times it.

    Exit codes: 0 done, 2 usage or recipe, 3 unusable model or data, 4 malformed file, 5 tolerance missed, 6 budget not reachable,
    7 device, 8 a pass failed (our defect), 9 disk or permission, 130 interrupted.""",
)

ModelArgument = Annotated[Path, typer.Argument(metavar="MODEL", help="An ONNX file (.onnx).")]
AnyModelArgument = Annotated[Path, typer.Argument(help="An .onnx file, an .ecz file or a bundle folder.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON alone on stdout; all else goes to stderr.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace the files that are written, if they exist.")]
ThreadsOption = Annotated[int, typer.Option("--threads", min=1, help="Threads that the runtime uses when it is timed.")]
ShapeOption = Annotated[
    Optional[list[str]],
    typer.Option("--shape", metavar="NAME=DIMS", help="Size of an input's free dimensions, e.g. tokens=1,16. Repeatable."),
]


def _version(show: bool) -> None:
    if show:
        typer.echo(f"edgecompress {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


@app.command()
def inspect(model: ModelArgument, shape: ShapeOption = None, json: JsonOption = False) -> None:
    """Show the layers of a model: shapes, parameters, MACs, share of bytes, and what would be skipped and why."""
    from edgecompress import commands

    commands.inspect(model, shapes=shape or [], json=json)


@app.command()
def compress(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for model.onnx, model.ecz, plan.json, report.json, report.html.")],
    data: Annotated[
        Optional[Path],
        typer.Option(help="Calibration inputs: .npz, folder of images, or dataset.toml. Alone, its last fifth tests."),
    ] = None,
    test_data: Annotated[Optional[Path], typer.Option(help="Inputs to test on; then all of --data calibrates.")] = None,
    recipe: Annotated[Optional[Path], typer.Option(help="Settings by layer and operator (TOML); options here win over its global ones.")] = None,
    plan: Annotated[Optional[Path], typer.Option(help="Re-apply a plan.json of an earlier run, edited or not.")] = None,
    factorize: Annotated[Optional[str], typer.Option(metavar="none|svd", help="Low-rank form of Gemm, MatMul and Conv.  [default: none]")] = None,
    keep: Annotated[Optional[float], typer.Option(help="Share of a layer's parameters that its factors may have.  [default: 0.5]")] = None,
    rank: Annotated[Optional[int], typer.Option(help="The rank of every factorized layer, instead of --keep.")] = None,
    cluster: Annotated[Optional[str], typer.Option(metavar="none|kmeans", help="How values are shared.  [default: kmeans]")] = None,
    bits: Annotated[Optional[int], typer.Option(help="2^N clusters per tensor, 1 to 8.  [default: 5]")] = None,
    no_calibrate: Annotated[bool, typer.Option("--no-calibrate", help="Solve from the weights alone; the data only tests.")] = False,
    shape: ShapeOption = None,
    threads: ThreadsOption = 1,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Compress a model and prove the result: model.onnx, model.ecz, plan.json, report.json and report.html in one folder.

    Examples:

    - `edgecompress compress model.onnx -o out`  from the weights alone
    - `edgecompress compress model.onnx -o out --data calibration.npz --test-data test.npz`
    - `edgecompress compress model.onnx -o out --data dataset.toml --factorize svd --keep 0.6 --bits 4`
    """
    from edgecompress import commands

    settings = {"factorize": factorize, "keep": keep, "rank": rank, "cluster": cluster, "bits": bits}
    commands.compress(
        model,
        out,
        settings=settings,
        sources={"data": data, "test_data": test_data, "recipe": recipe, "plan": plan},
        shapes=shape or [],
        calibrate=not no_calibrate,
        threads=threads,
        force=force,
        json=json,
    )


@app.command()
def validate(
    original: AnyModelArgument,
    compressed: AnyModelArgument,
    data: Annotated[Path, typer.Option(help="What to run both on: .npz (all rows), folder of images, or dataset.toml (its test split).")],
    min_sqnr_db: Annotated[Optional[float], typer.Option(help="Least signal-to-noise ratio of every output, in dB.")] = None,
    max_drop: Annotated[Optional[float], typer.Option(help="Largest drop of the metric, in points.")] = None,
    json: JsonOption = False,
) -> None:
    """Compare two models on data; exit 5 when a tolerance is missed."""
    from edgecompress import commands

    commands.validate(original, compressed, data=data, min_sqnr_db=min_sqnr_db, max_drop=max_drop, json=json)


@app.command()
def pack(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("-o", "--out", help="The .ecz file to write.")],
    force: ForceOption = False,
) -> None:
    """Store any ONNX file, with its external data, without loss in one smaller .ecz file."""
    from edgecompress import commands

    commands.pack(model, out, force=force)


@app.command()
def unpack(
    container: Annotated[Path, typer.Argument(metavar="MODEL.ecz", help="A file that pack or compress wrote.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The ONNX file to write; external data goes beside it.")],
    force: ForceOption = False,
) -> None:
    """Restore the ONNX file that is in an .ecz file, byte for byte."""
    from edgecompress import commands

    commands.unpack(container, out, force=force)


@app.command()
def bundle(
    source: Annotated[Optional[Path], typer.Argument(metavar="OUT", help="The folder that compress wrote, or a model file.")] = None,
    target: Annotated[str, typer.Option(help="What to build for: a name, or a TOML file of your own.")] = "x86_64",
    out: Annotated[Optional[Path], typer.Option("-o", "--out", help="The bundle folder to write.")] = None,
    verify: Annotated[Optional[Path], typer.Option(metavar="DIR", help="Check every file of a bundle against its manifest.")] = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Put a model and its runtime into a folder that a target runs, or verify such a folder."""
    from edgecompress import commands

    if verify is not None:
        if source is not None or out is not None:
            raise UsageError("--verify takes a bundle and nothing else", hint="edgecompress bundle --verify DIR")
        commands.verify_bundle(verify, json=json)
    elif source is None or out is None:
        raise UsageError("bundle needs OUT and -o DIR", hint="edgecompress bundle OUT --target x86_64 -o DIR")
    else:
        commands.bundle(source, out, target=target, force=force, json=json)


@app.command()
def bench(
    model: Annotated[Path, typer.Argument(metavar="MODEL_OR_BUNDLE", help="An .onnx file, an .ecz file or a bundle folder.")],
    device: Annotated[str, typer.Option(help="Where to measure.")] = "local",
    against: Annotated[Optional[Path], typer.Option(metavar="ORIGINAL", help="Measure this model too, in alternating runs.")] = None,
    threads: ThreadsOption = 1,
    runs: Annotated[int, typer.Option(min=1, help="Steady runs after the warm-up.")] = 50,
    shape: ShapeOption = None,
    json: JsonOption = False,
) -> None:
    """Measure start-up, latency and peak memory; with --against, the ratio of medians in alternating runs."""
    from edgecompress import commands

    commands.bench(model, device=device, against=against, threads=threads, runs=runs, shapes=shape or [], json=json)


@app.command()
def export(
    factory: Annotated[str, typer.Argument(metavar="PACKAGE.MODULE:FACTORY", help="A function that returns a torch.nn.Module.")],
    input: Annotated[list[str], typer.Option("--input", metavar="DIMS", help="Shape of an input, e.g. 1,3,32,32. Repeatable.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The ONNX file to write.")],
    dynamic_batch: Annotated[bool, typer.Option("--dynamic-batch", help="Leave the first dimension free.")] = False,
    force: ForceOption = False,
) -> None:
    """Export a torch module to ONNX (needs the optional extra: pip install "edgecompress[export]")."""
    from edgecompress import commands

    commands.export(factory, out, inputs=input, dynamic_batch=dynamic_batch, force=force)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write to; it is replaced on every run.")] = Path("edgecompress-demo"),
) -> None:
    """Compress a small digit classifier that ships with the tool, validate it, bundle it, time it, and show the report."""
    from edgecompress import commands

    commands.demo(out)


def main() -> None:
    """Run the command line."""
    app()
