"""The command line: parse, call, print. No logic."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from edgecompress import __version__
from edgecompress.console import run
from edgecompress.errors import UsageError

app = typer.Typer(
    name="edgecompress",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
    help="""Make an ONNX model small and fast on an edge device **without retraining**, prove it, and ship it.

    Start with `edgecompress demo`, or:

    1. `edgecompress inspect model.onnx` shows the layers and what can be done with them.
    2. `edgecompress compress model.onnx -o out --data data.npz` writes the compressed model and a report.
    3. `edgecompress bundle out -o bundle` adds the runtime; `edgecompress bench bundle` times it.

    Exit codes: 0 done, 2 usage or recipe, 3 unusable model or data, 4 malformed file, 5 tolerance missed, 6 budget not
    reachable, 7 device, 8 a pass failed (our defect), 9 disk or permission, 130 interrupted.""",
)


def _number(option: str, wanted: str, kind: type, allowed: Callable[[Any], bool]) -> Callable[[str], Any]:
    """Return a parser whose complaint names the option, the value and what is allowed."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not allowed(value):  # a comparison with NaN is false
            raise UsageError(f"{option} must be {wanted}, not {text!r}", hint="correct the value")
        return value

    return parse


def _count(option: str) -> Callable[[str], int]:
    return _number(option, "a whole number of at least 1", int, lambda value: value >= 1)


_bits = _number("--bits", "a whole number from 1 to 8", int, lambda value: 1 <= value <= 8)


# What the programs of bundles take too.
_threads = _number("--threads", "a whole number from 1 to 1024", int, lambda value: 1 <= value <= 1024)


def _share(option: str) -> Callable[[str], float]:
    return _number(option, "a share above 0 and at most 1", float, lambda value: 0 < value <= 1)


def _positive(option: str) -> Callable[[str], float]:
    return _number(option, "a number above 0", float, lambda value: 0 < value < math.inf)


_decibels = _number("--min-sqnr-db", "a number of decibels", float, lambda value: not math.isnan(value))
_points = _number("--max-drop", "a number of points", float, lambda value: not math.isnan(value))


_degrees = _number("--pause-above", "degrees Celsius, from 1 to 200", float, lambda value: 1 <= value <= 200)


def _cores(text: str) -> tuple[int, ...]:
    numbers = text.split(",") if text else []
    if not all(number.isdecimal() and int(number) < 1024 for number in numbers):
        raise UsageError(f"--cores must be numbers of cores with commas, not {text!r}", hint="as in --cores 0,1")
    return tuple(map(int, numbers))


def _in(panel: str) -> Callable[..., Any]:
    return partial(typer.Option, rich_help_panel=panel)


_what, _data, _output = _in("What to do"), _in("On what data"), _in("Output")

ModelArgument = Annotated[Path, typer.Argument(metavar="MODEL", help="An ONNX file.")]
JsonOption = Annotated[bool, _output("--json", help="Print JSON alone on stdout; all else goes to stderr.")]
ForceOption = Annotated[bool, _output("--force", help="Replace existing files of the same names; others stay.")]
ThreadsOption = Annotated[
    int, typer.Option(metavar="N", parser=_threads, help="Threads of the runtime when it is timed.")
]
ShapeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--shape",
        metavar="NAME=DIMS",
        help="Sizes for an input's free dimensions, as in tokens=1,16; else 1 for the batch, 8 for others. Repeatable.",
    ),
]


def _version(show: bool) -> None:
    if show:
        typer.echo(f"edgecompress {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def inspect(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="An .onnx file, an .ecz file or a bundle.")],
    shape: ShapeOption = None,
    json: JsonOption = False,
) -> None:
    """Show a model's layers: shapes, parameters, MACs, share of the bytes, and what would be skipped and why.

    A layer's name, here and in recipes, plans and reports, is that of its weight.
    """
    from edgecompress import commands

    commands.inspect(model, shapes=shape or [], json=json)


_OUT_FILES = "Folder for model.onnx, model.ecz, plan.json, report.json, report.html."
_DATA_KINDS = "Real inputs: an .npz, a folder of images, or a dataset.toml. Alone, its last fifth tests."
_TEST_DATA = "Other inputs to test on; then all of --data calibrates."
_RECIPE = "The same settings by layer and operator; options here win over its global ones."
_PLAN = "Apply the plan of an earlier run, edited or not, instead of all of the above."


@app.command()
def compress(
    model: ModelArgument,
    *,
    out: Annotated[Path, _output("-o", "--out", metavar="DIR", help=_OUT_FILES)],
    factorize: Annotated[
        str | None,
        _what(
            metavar="none|svd|svd_in|svd_bias|separable|tucker2|cp|spectral|auto",
            help="Factorized form of Gemm, MatMul and Conv.  [default: none]",
        ),
    ] = None,
    keep: Annotated[
        float | None,
        _what(
            metavar="SHARE",
            parser=_share("--keep"),
            help="Share of its parameters that a layer may keep.  [default: 0.5]",
        ),
    ] = None,
    rank: Annotated[
        int | None, _what(metavar="N", parser=_count("--rank"), help="The rank of every layer, instead of --keep.")
    ] = None,
    energy: Annotated[
        float | None,
        _what(
            metavar="SHARE",
            parser=_share("--energy"),
            help="svd, tucker2: ranks that hold this share of the energy.",
        ),
    ] = None,
    evbmf: Annotated[bool, _what("--evbmf", help="svd, tucker2: ranks by variational Bayes (EVBMF).")] = False,
    shrink: Annotated[
        float | None,
        _what(
            metavar="SHARE",
            parser=_share("--shrink"),
            help="Share of its outputs that a hidden layer keeps; the next one is refitted (needs --data).",
        ),
    ] = None,
    allocate: Annotated[
        bool, _what("--allocate", help="--keep is the share of all factorized layers together, spent where it helps.")
    ] = False,
    budget_unit: Annotated[
        str | None,
        _what(metavar="parameters|macs", help="What --allocate counts.  [default: parameters]"),
    ] = None,
    cluster: Annotated[
        str | None,
        _what(metavar="none|kmeans|grid", help="Few values a tensor: a codebook, or a step.  [default: kmeans]"),
    ] = None,
    bits: Annotated[
        int | None, _what(metavar="N", parser=_bits, help="2^N values in a codebook, N from 1 to 8.  [default: 5]")
    ] = None,
    step: Annotated[
        float | None,
        _what(
            metavar="SIGMAS",
            parser=_positive("--step"),
            help="The step of a grid, in units of the weights' spread.  [default: 1.0]",
        ),
    ] = None,
    average_bits: Annotated[
        float | None,
        _what(metavar="BITS", parser=_positive("--average-bits"), help="Size the steps of grids: coded bits a weight."),
    ] = None,
    target_size: Annotated[
        int | None,
        _what(
            metavar="BYTES",
            parser=_count("--target-size"),
            help="Size the steps of grids: bytes of model.ecz, everything counted.",
        ),
    ] = None,
    quantize: Annotated[
        str | None,
        _what(metavar="none|int8", help="Run layers in 8 bits, on the codes of their grids (needs --data)."),
    ] = None,
    prune: Annotated[
        float | None, _what(metavar="SHARE", parser=_share("--prune"), help="Share of the weights that become zero.")
    ] = None,
    prune_scope: Annotated[
        str | None,
        _what(
            metavar="global|layer", help="What --prune is a share of: all weights, or each layer's.  [default: global]"
        ),
    ] = None,
    target: Annotated[
        str | None,
        _what(metavar="TARGET", help="Make the ranks of factors multiples of what this target's kernels take at once."),
    ] = None,
    recipe: Annotated[Path | None, _what(metavar="R.toml", help=_RECIPE)] = None,
    plan: Annotated[Path | None, _what(metavar="plan.json", help=_PLAN)] = None,
    data: Annotated[Path | None, _data(metavar="DATA", help=_DATA_KINDS)] = None,
    test_data: Annotated[Path | None, _data(metavar="DATA", help=_TEST_DATA)] = None,
    no_calibrate: Annotated[
        bool, _data("--no-calibrate", help="Solve from the weights alone; the data only tests.")
    ] = False,
    no_asymmetric: Annotated[
        bool, _data("--no-asymmetric", help="Solve each layer by itself, not on what compressed layers before it give.")
    ] = False,
    no_feedback: Annotated[
        bool, _data("--no-feedback", help="Round every weight by itself, not making up for the errors of others.")
    ] = False,
    no_bias_correction: Annotated[
        bool, _data("--no-bias-correction", help="Do not set the mean and spread of outputs right at the end.")
    ] = False,
    self_extracting: Annotated[
        bool,
        _output("--self-extracting", help="Write model_self_extracting.onnx, too: it decodes itself at session start."),
    ] = False,
    shape: ShapeOption = None,
    threads: ThreadsOption = 1,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Compress a model and prove the result.

    With `--data` every step keeps what the layers compute on it, which costs far less accuracy than the weights alone:
    a few hundred unlabelled inputs are enough.

    - `edgecompress compress model.onnx -o out`
    - `edgecompress compress model.onnx -o out --data train.npz --test-data test.npz --bits 4`
    - `edgecompress compress model.onnx -o out --data dataset.toml --factorize separable --keep 0.6`
    """
    from edgecompress import commands

    commands.compress(
        model,
        out,
        settings={
            "factorize": factorize,
            "keep": keep,
            "rank": rank,
            "energy": energy,
            "evbmf": evbmf or None,
            "cluster": cluster,
            "bits": bits,
            "shrink": shrink,
            "allocate": allocate or None,
            "budget_unit": budget_unit,
            "step": step,
            "prune": prune,
            "prune_scope": prune_scope,
            "target": target,
            "quantize": quantize,
            "average_bits": average_bits,
            "target_size": target_size,
        },
        sources={"data": data, "test_data": test_data, "recipe": recipe, "plan": plan},
        shapes=shape or [],
        methods={
            "calibrate": not no_calibrate,
            "asymmetric": not no_asymmetric,
            "correct": not no_bias_correction,
            "feedback": not no_feedback,
            "self_extracting": self_extracting,
        },
        threads=threads,
        force=force,
        json=json,
    )


_VALIDATION_DATA = "What to run both on: an .npz (all rows), a folder of images, or a dataset.toml (its test split)."


@app.command()
def validate(
    original: Annotated[Path, typer.Argument(metavar="ORIGINAL", help="An .onnx file, an .ecz file or a bundle.")],
    compressed: Annotated[Path, typer.Argument(metavar="COMPRESSED", help="What it became: any of these too.")],
    *,
    data: Annotated[Path, typer.Option(metavar="DATA", help=_VALIDATION_DATA)],
    min_sqnr_db: Annotated[
        float | None, typer.Option(metavar="DB", parser=_decibels, help="Least signal-to-error ratio of every output.")
    ] = None,
    max_drop: Annotated[
        float | None, typer.Option(metavar="POINTS", parser=_points, help="Largest drop of the metric.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Compare two models on data; the exit code is 5 when a tolerance is missed.

    - `edgecompress validate model.onnx out/model.ecz --data test.npz --max-drop 0.5`
    """
    from edgecompress import commands

    commands.validate(original, compressed, data=data, min_sqnr_db=min_sqnr_db, max_drop=max_drop, json=json)


@app.command()
def pack(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="MODEL.ecz", help="The .ecz file to write.")],
    force: ForceOption = False,
) -> None:
    """Store any ONNX file, compressed by us or not, with its external data in one .ecz file, without loss."""
    from edgecompress import commands

    commands.pack(model, out, force=force)


@app.command()
def unpack(
    container: Annotated[Path, typer.Argument(metavar="MODEL.ecz", help="A file that pack or compress wrote.")],
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="MODEL.onnx", help="The file to write; external data goes beside it.")
    ],
    force: ForceOption = False,
) -> None:
    """Restore the ONNX file that is in an .ecz file, byte for byte."""
    from edgecompress import commands

    commands.unpack(container, out, force=force)


@app.command()
def targets(json: JsonOption = False) -> None:
    """List what bundles can be built for."""
    from edgecompress import device_commands

    device_commands.targets(json=json)


_SAMPLE = "Real inputs, as for compress: the first of them becomes the bundle's sample.  [default: random numbers]"
_VERIFY = "Check every file of a bundle, a folder or an archive, against its manifest."
_RUNTIME = "What the runtime comes as: wheel (for Python), native (a C program) or none.  [default: the target's]"
_RUNTIME_FILE = "The runtime's file, or a folder of files, in place of what would be fetched."
_ARCHIVE = "Write one file DIR.tar.gz or, for web and mobile targets, DIR.zip instead of a folder."


@app.command()
def bundle(
    source: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="The folder that compress wrote, or a model file.")
    ] = None,
    *,
    target: Annotated[
        str, typer.Option(metavar="TARGET", help="A target's name, or a TOML file of your own.")
    ] = "x86_64",
    out: Annotated[Path | None, typer.Option("-o", "--out", metavar="DIR", help="The bundle folder to write.")] = None,
    runtime: Annotated[str | None, typer.Option(metavar="FORM", help=_RUNTIME)] = None,
    runtime_file: Annotated[Path | None, typer.Option("--runtime-file", metavar="PATH", help=_RUNTIME_FILE)] = None,
    archive: Annotated[bool, typer.Option("--archive", help=_ARCHIVE)] = False,
    data: Annotated[Path | None, typer.Option(metavar="DATA", help=_SAMPLE)] = None,
    verify: Annotated[Path | None, typer.Option(metavar="BUNDLE", help=_VERIFY)] = None,
    shape: ShapeOption = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Put a model and its runtime into a folder that a target runs, or verify such a folder.

    - `edgecompress bundle out --target arm64 -o bundle`
    - `edgecompress bundle out --target arm64 -o bundle --runtime native --archive`
    - `edgecompress bundle --verify bundle`
    """
    from edgecompress import device_commands

    if verify is not None:
        if source is not None or out is not None:
            raise UsageError("--verify takes a bundle and nothing else", hint="edgecompress bundle --verify DIR")
        device_commands.verify_bundle(verify, json=json)
    elif source is None or out is None:
        raise UsageError("bundle needs OUT and -o DIR", hint="edgecompress bundle OUT --target x86_64 -o DIR")
    else:
        device_commands.bundle(
            source,
            out,
            target=target,
            form=device_commands.BundleForm(runtime=runtime, runtime_file=runtime_file, archive=archive),
            data=data,
            shapes=shape or [],
            force=force,
            json=json,
        )


_SOURCE = "A folder that compress wrote, an .onnx or an .ecz file."
_FOR_TARGET = "The target whose runtime is built."


@app.command("runtime-config")
def runtime_config(
    source: Annotated[Path, typer.Argument(metavar="OUT", help=_SOURCE)],
    *,
    target: Annotated[str, typer.Option(metavar="TARGET", help=_FOR_TARGET)] = "arm64",
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="DIR", help="Write model.ort and the list of operators here.")
    ] = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Show what a model needs of a runtime: operators and types, which accelerators take it, how to build a small one.

    - `edgecompress runtime-config out`
    """
    from edgecompress import device_commands

    device_commands.runtime_config(source, target=target, out=out, force=force, json=json)


@app.command("runtime-build")
def runtime_build(
    source: Annotated[Path, typer.Argument(metavar="OUT", help=_SOURCE)],
    *,
    tree: Annotated[Path, typer.Option("--source", metavar="ORT_TREE", help="A source tree of ONNX Runtime.")],
    target: Annotated[str, typer.Option(metavar="TARGET", help=_FOR_TARGET)],
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="DIR", help="Folder for libonnxruntime.so, model.ort and the list.")
    ],
    define: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="A setting for CMake. Repeatable.")
    ] = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Build ONNX Runtime with the operators of one model alone: 2 MB instead of 25; half an hour on two cores.

    It needs a source tree, CMake and a compiler for the target, and goes on where an interrupted build stopped.

    - `edgecompress runtime-build out --source onnxruntime --target arm64 -o small`
    - `edgecompress bundle out --target arm64 --runtime native --runtime-file small/libonnxruntime.so -o bundle`
    """
    from edgecompress import device_commands

    device_commands.runtime_build(source, out, tree=tree, target=target, defines=define or [], force=force, json=json)


_DEVICE = (
    "local, ssh://USER@HOST:PORT, adb://SERIAL, container://IMAGE, qemu://CPU or browser://.  "
    "[default: local, or the target's where a bundle does not run here]"
)


@app.command()
def bench(
    models: Annotated[
        list[Path] | None,
        typer.Argument(metavar="MODEL_OR_BUNDLE...", help="ONNX files, .ecz files or bundle folders."),
    ] = None,
    *,
    device: Annotated[str | None, typer.Option(metavar="DEVICE", help=_DEVICE)] = None,
    threads: Annotated[
        int | None,
        typer.Option(metavar="N", parser=_threads, help="Threads of the runtime.  [default: the target's, else 1]"),
    ] = None,
    runs: Annotated[int, typer.Option(metavar="N", parser=_count("--runs"), help="Runs after the warm-up.")] = 50,
    cores: Annotated[str, typer.Option(metavar="LIST", help="Run on these cores only, as in 0,1.")] = "",
    pause_above: Annotated[
        float | None,
        typer.Option(
            metavar="CELSIUS", parser=_degrees, help="Wait between blocks of runs while the device is hotter than this."
        ),
    ] = None,
    serve: Annotated[
        bool,
        typer.Option("--serve", help="Print the address of a web bundle's page and wait until a browser opens it."),
    ] = False,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Where --serve listens; 0.0.0.0 lets the whole network in.")
    ] = "127.0.0.1",
    shape: ShapeOption = None,
    json: JsonOption = False,
) -> None:
    """Measure start-up, latency and peak memory on a device; several models take turns and are compared with the first.

    - `edgecompress bench model.onnx out/model.ecz`
    - `edgecompress bench bundle --device ssh://pi@raspberrypi`
    """
    from edgecompress import device_commands
    from edgecompress.devices import BenchOptions

    options = BenchOptions(threads=threads, runs=runs, cores=_cores(cores), pause_above=pause_above)
    listen = host if serve else None
    device_commands.bench(models or [], device=device, options=options, listen=listen, shapes=shape or [], json=json)


@app.command()
def profile(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="An .onnx or .ecz file, or a folder of compress.")],
    *,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="Where to measure, as for bench.")] = "local",
    threads: ThreadsOption = 1,
    runs: Annotated[int, typer.Option(metavar="N", parser=_count("--runs"), help="Runs of each kernel.")] = 50,
    again: Annotated[bool, typer.Option("--again", help="Measure kernels of the table again.")] = False,
    shape: ShapeOption = None,
    json: JsonOption = False,
) -> None:
    """Measure what each kernel of a model takes on a device, and compare their sum with the model.

    Each distinct operator, shape and type is measured once and kept in a table of that device.

    - `edgecompress profile out/model.ecz`
    """
    from edgecompress import device_commands
    from edgecompress.devices import BenchOptions

    options = BenchOptions(threads=threads, runs=runs)
    device_commands.profile(model, device=device, options=options, again=again, shapes=shape or [], json=json)


@app.command()
def export(
    factory: Annotated[
        str, typer.Argument(metavar="PACKAGE.MODULE:FACTORY", help="A function that returns a torch.nn.Module.")
    ],
    *,
    inputs: Annotated[
        list[str], typer.Option("--input", metavar="DIMS", help="Shape of an input, as in 1,3,32,32. Repeatable.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="MODEL.onnx", help="The ONNX file to write.")],
    dynamic_batch: Annotated[bool, typer.Option("--dynamic-batch", help="Leave the first dimension free.")] = False,
    force: ForceOption = False,
) -> None:
    """Export a torch module to ONNX; needs the optional extra, `pip install "edgecompress[export]"`."""
    from edgecompress import commands

    commands.export(factory, out, inputs=inputs, dynamic_batch=dynamic_batch, force=force)


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="DIR", help="Folder to write to; replaced on every run.")
    ] = Path("edgecompress-demo"),
) -> None:
    """Compress a small digit classifier that ships with the tool, validate, bundle and time it, and show the report."""
    from edgecompress import commands

    commands.demo(out)


def main() -> NoReturn:
    """Run the command line."""
    run(app)
