"""Put models in int8 and print latency, accuracy and bytes beside fp32 and onnxruntime's own ``quantize_static``.

    EDGECOMPRESS_BENCH_DATA=FOLDER python benchmarks/int8.py MODELS_FOLDER TABLE [--keep SHARE ..]

Tables: resnet20, resnet56, squeezenet. ``quantize_static`` gets what is best for it on x86: uint8 activations, int8
weights with a scale for each channel, all calibration rows. A row ``separable SHARE`` starts from what ``edgecompress
compress --factorize separable`` makes. All models of a table are timed in one alternating run, one picture and one
thread. Numbers are medians; the divergence of the outputs (see ``edgecompress.sensitivity``) is the finer judge.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from edgecompress.container import pack
from edgecompress.data import DataSet, batches, split
from edgecompress.devices import open_runner
from edgecompress.inference import open_session, run_session
from edgecompress.latency import summarize
from edgecompress.model import Model, load_model, signature
from edgecompress.passes.precision import choose_int8, run_int8
from edgecompress.passes.prepare import prepare
from edgecompress.passes.run import run_pass
from edgecompress.save import save_model
from edgecompress.sensitivity import divergence

DATASETS = Path(__file__).parent / "datasets"
MODELS = {
    "resnet20": ("resnet20_cifar10", "cifar10"),
    "resnet56": ("resnet56_cifar10", "cifar10"),
    "squeezenet": ("squeezenet_v1.1", "imagenet_squeezenet"),
}
_ROWS, _RUNS = 50, 100


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


def ours(source: Path, case: _Case) -> tuple[Path, str]:
    model, out = _prepared(source), case.folder / f"{source.parent.name}.int8.onnx"
    choice = choose_int8(model, {}, case.calibration)
    result, _ = run_int8(model, choice.names, choice.ranges, {}, feeds=None)
    save_model(result, out)
    return out, f"{len(choice.names)} of {len(choice.names) + len(choice.reasons)}"


def separable(source: Path, dataset: str, keep: str, folder: Path) -> Path:
    program = [sys.executable, "-m", "edgecompress", "compress", str(source), "--out", str(folder / keep)]
    options = ["--factorize", "separable", "--keep", keep, "--cluster", "none", "--data", f"{DATASETS / dataset}.toml"]
    subprocess.run([*program, *options], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return folder / keep / "model.onnx"


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
    parser.add_argument("table", choices=MODELS)
    parser.add_argument("--keep", nargs="*", default=["0.65", "0.5"])
    options = parser.parse_args()
    name, dataset = MODELS[options.table]
    source = options.models / f"{name}.onnx"
    calibration, test = split(DATASETS / f"{dataset}.toml", None, signature(onnx.load(source))[0])
    assert calibration is not None
    assert test is not None
    with tempfile.TemporaryDirectory() as temporary:
        case = _Case(calibration, test, Path(temporary))
        rows = [("fp32", source, ""), ("quantize_static", *_timed(lambda: (plain(source, case), "all")))]
        rows.append(("int8", *_timed(lambda: ours(source, case))))
        for keep in options.keep:
            small = separable(source, dataset, keep, case.folder)
            rows.append((f"separable {keep}", small, ""))
            rows.append((f"separable {keep}, int8", *_timed(lambda small=small: ours(small, case))))
        _print(rows, case)


def _timed(make: Callable[[], tuple[Path, str]]) -> tuple[Path, str]:
    began = time.perf_counter()
    path, note = make()
    return path, f"{note}, {time.perf_counter() - began:.0f} s"


def _print(rows: list[tuple[str, Path, str]], case: _Case) -> None:
    feeds = case.test.feeds(0, 1)
    samples = open_runner("local").measure([path for _, path, _ in rows], feeds=feeds, threads=1, runs=_RUNS)
    medians = [summarize(each).median_ms for each in samples]
    print(f"fp32 {medians[0]:.3f} ms\n\n| | latency | accuracy | divergence | .onnx | .ecz | layers in int8, seconds |")
    print("|---|---|---|---|---|---|---|")
    reference = None
    for (title, path, note), median in zip(rows, medians, strict=True):
        outputs = _outputs(path, case.test)
        reference = outputs if reference is None else reference
        labels = np.asarray(case.test.labels).reshape(-1)
        top1 = 100 * np.mean(outputs.reshape(len(outputs), -1).argmax(axis=1) == labels[: len(outputs)])
        packed = case.folder / "packed.ecz"
        packed.unlink(missing_ok=True)
        pack(path, packed)
        print(
            f"| {title} | {median / medians[0]:.2f} | {top1:.1f} | {divergence({'y': reference}, {'y': outputs}):.4f} "
            f"| {path.stat().st_size:,} | {packed.stat().st_size:,} | {note} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
