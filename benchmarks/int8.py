"""Put models in int8 and print latency, accuracy and bytes beside fp32 and onnxruntime's own ``quantize_static``.

    EDGECOMPRESS_BENCH_DATA=FOLDER python benchmarks/int8.py MODELS_FOLDER [TABLE ..] [--out DIR] [--runs N]

Tables: resnet20, resnet56, squeezenet. ``quantize_static`` gets what is best for it on x86: uint8 activations, int8
weights with a scale for each channel, all calibration rows. All other rows are what ``edgecompress compress`` makes
with the options that they name. All models of a table take turns in one process, one picture and one thread. What is
taken is the processor time of that thread, so that programs beside it count little. The ratio is that of medians, and
beside it stands what the ratios of ten blocks, one after the other, spread over. The divergence of the outputs (see
``edgecompress.sensitivity``) judges finer than the accuracy. Models that ``--out`` holds already are only measured.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from edgecompress.container import pack
from edgecompress.data import DataSet, batches, split
from edgecompress.inference import open_session, run_session
from edgecompress.model import Model, load_model, signature
from edgecompress.passes.prepare import prepare
from edgecompress.passes.run import run_pass
from edgecompress.runtime.session import load
from edgecompress.save import save_model
from edgecompress.sensitivity import divergence

DATASETS = Path(__file__).parent / "datasets"
_RESNET = (
    "--quantize int8 --step 1.0",
    "--factorize separable --keep 0.65 --quantize int8 --step 0.7",
    "--factorize separable --keep 0.5{} --quantize int8 --step 0.7",
    "--factorize separable --keep 0.5{} --cluster none",
)
MODELS = {
    "resnet20": ("resnet20_cifar10", "cifar10", [each.format(" --allocate") for each in _RESNET]),
    "resnet56": ("resnet56_cifar10", "cifar10", [each.format("") for each in _RESNET]),  # allocating takes 5 minutes
    "squeezenet": (
        "squeezenet_v1.1",
        "imagenet_squeezenet",
        [each.format(" --allocate").replace("1.0", "0.4").replace("0.7", "0.4") for each in _RESNET],
    ),
}
_ROWS, _BLOCKS = 50, 10


@dataclass(frozen=True)
class _Case:
    calibration: DataSet
    test: DataSet
    folder: Path


class _Reader(CalibrationDataReader):
    def __init__(self, model: Model, data: DataSet) -> None:
        self._feeds: Iterator[dict[str, np.ndarray]] = (
            feeds for _, feeds in batches(data, signature(model.proto)[0], _ROWS)
        )

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


def plain(source: Path, case: _Case) -> Path:
    model, out = _prepared(source), case.folder / "plain.onnx"
    if out.exists():
        return out
    save_model(model, case.folder / "prepared.onnx")
    quantize_static(
        case.folder / "prepared.onnx",
        out,
        _Reader(model, case.calibration),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return out


def compressed(source: Path, dataset: str, options: str, folder: Path) -> Path:
    out = folder / options.replace(" ", "_")
    program = [sys.executable, "-m", "edgecompress", "compress", str(source), "--out", str(out)]
    data = ["--data", f"{DATASETS / dataset}.toml"]
    if not (out / "report.json").exists():
        subprocess.run([*program, *options.split(), *data], check=True, stdout=subprocess.DEVNULL)
    return out / "model.onnx"


def _prepared(source: Path) -> Model:
    return run_pass(load_model(source), "prepare", prepare, None)[0]


def _outputs(path: Path, data: DataSet) -> np.ndarray:
    model = load_model(path)
    session = open_session(model)
    found = (run_session(model, session, feeds) for _, feeds in batches(data, signature(model.proto)[0], _ROWS))
    return np.concatenate([next(iter(outputs.values())).copy() for outputs in found])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("tables", nargs="*", default=[*MODELS])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--runs", type=int, default=200)
    options = parser.parse_args()
    for table in options.tables:
        name, dataset, rows = MODELS[table]
        with tempfile.TemporaryDirectory() as temporary:
            folder = (options.out or Path(temporary)) / name
            folder.mkdir(parents=True, exist_ok=True)
            _table(options.models / f"{name}.onnx", dataset, rows, folder=folder, runs=options.runs)


def _table(source: Path, dataset: str, options: list[str], *, folder: Path, runs: int) -> None:
    calibration, test = split(DATASETS / f"{dataset}.toml", None, signature(onnx.load(source))[0])
    assert calibration is not None
    assert test is not None
    case = _Case(calibration, test, folder)
    rows = [("fp32", source, 0.0), ("`quantize_static`", *_timed(lambda: plain(source, case)))]
    for each in options:
        made = _timed(lambda each=each: compressed(source, dataset, each, case.folder))
        rows.append((f"`{each}`", *made))
    _print(source.stem, rows, case, runs)


def _timed(make: Callable[[], Path]) -> tuple[Path, float]:
    began = time.perf_counter()
    return make(), time.perf_counter() - began


def _print(title: str, rows: list[tuple[str, Path, float]], case: _Case, runs: int) -> None:
    blocks = _processor_ms([path for _, path, _ in rows], case.test.feeds(0, 1), runs)
    medians = [float(np.median(each)) for each in blocks]
    print(f"{title}: fp32 {medians[0]:.3f} ms, fastest {blocks[0].min():.3f} ms, {runs} runs each\n")
    print("| | latency | ten blocks | top-1 | divergence | .onnx | .onnx by zstd -19 | .ecz | s |")
    print("|---|---|---|---|---|---|---|---|---|")
    reference = None
    for (name, path, seconds), median, own in zip(rows, medians, blocks, strict=True):
        ratios = np.median(own, axis=1) / np.median(blocks[0], axis=1)
        outputs = _outputs(path, case.test)
        reference = outputs if reference is None else reference
        labels = np.asarray(case.test.labels).reshape(-1)
        top1 = 100 * np.mean(outputs.reshape(len(outputs), -1).argmax(axis=1) == labels[: len(outputs)])
        packed = case.folder / "packed.ecz"
        packed.unlink(missing_ok=True)
        pack(path, packed)
        print(
            f"| {name} | {median / medians[0]:.2f} | {ratios.min():.2f} to {ratios.max():.2f} | {top1:.1f} "
            f"| {divergence({'y': reference}, {'y': outputs}):.4f} | {path.stat().st_size:,} | {_zstd(path):,} "
            f"| {packed.stat().st_size:,} | {seconds:.0f} |",
            flush=True,
        )
    print(flush=True)


def _processor_ms(paths: list[Path], feeds: Mapping[str, np.ndarray], runs: int) -> list[np.ndarray]:
    """Return the processor time of ``runs`` runs of each model, (blocks, runs / blocks), in milliseconds."""
    sessions = [load(path, threads=1) for path in paths]
    found = np.zeros((len(paths), _BLOCKS, runs // _BLOCKS))
    for block in range(-1, _BLOCKS):  # the first one warms up
        for place, session in enumerate(sessions):
            session.run(None, feeds)  # the caches were the others'
            for run in range(found.shape[2]):
                began = time.thread_time_ns()
                session.run(None, feeds)
                found[place, block, run] = (time.thread_time_ns() - began) / 1e6
    return list(found)


def _zstd(path: Path) -> int:
    command = ["zstd", "-19", "--quiet", "--stdout", str(path)]
    return len(subprocess.run(command, check=True, capture_output=True).stdout)


if __name__ == "__main__":
    main()
