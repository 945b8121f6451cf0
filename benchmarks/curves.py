"""Print what models keep at which size, beside plain k-means + Huffman, NNCodec and ``quantize_static``.

    EDGECOMPRESS_BENCH_DATA=FOLDER python benchmarks/curves.py MODELS_FOLDER [MODEL ..] [--nncodec-python PATH]

All rows of a model are judged on the same test rows, without training. ``grid`` and ``kmeans`` are runs of
``edgecompress compress``, report included; their bytes are those of the whole model.ecz. ``quantize_static`` is
onnxruntime's int8 with scales by channel, calibrated on the same rows; its bytes are those of the ONNX file. NNCodec
lives in an environment of its own, whose Python ``--nncodec-python`` names; it gets the float32 tensors of the model,
and its bytes are those of its bitstream, without the graph. Its seconds are those of encoding.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from edgecompress.case import Case, Request, open_case
from edgecompress.data import batches
from edgecompress.passes.prepare import prepare
from edgecompress.passes.run import run_pass
from edgecompress.save import save_model
from edgecompress.validate import validate

DATASETS = Path(__file__).parent / "datasets"
PLAIN = tuple(f"--bits {bits} --no-calibrate" for bits in (5, 4, 3, 2))
MODELS: dict[str, tuple[str, str, tuple[str, ...], tuple[int, ...]]] = {
    "resnet20": (
        "resnet20_cifar10",
        "cifar10",
        tuple(f"--target-size {size}" for size in (70000, 60000, 50000, 46000, 42000)),
        (-28, -24, -22, -20, -18, -16),
    ),
    "resnet56": (
        "resnet56_cifar10",
        "cifar10",
        tuple(f"--target-size {size}" for size in (145000, 120000, 105000)),
        (-28, -24, -20, -16),
    ),
    "squeezenet": (
        "squeezenet_v1.1",
        "imagenet_squeezenet",
        tuple(f"--target-size {size}" for size in (550000, 450000, 400000)),
        (-32, -28, -26, -24),
    ),
    "mobilenet": (
        "mobilenet_v1_0.25_224",
        "imagenet_mobilenet",
        tuple(f"--target-size {size}" for size in (280000, 240000)),
        (-36, -32, -28),
    ),
    "mnist": (
        "mnist_mlp",
        "mnist",
        tuple(f"--target-size {size}" for size in (20000, 14000, 10000)),
        (-16, -12, -8, -4),
    ),
}

NNCODEC = """
import contextlib, os, sys, time
import numpy as np
from nncodec import nn
source, result, qp = sys.argv[1:]
tensors = dict(np.load(source))
with contextlib.redirect_stdout(sys.stderr):
    began = time.perf_counter()
    coded = nn.encode(tensors, {"qp": int(qp), "verbose": False, "results": os.path.dirname(result)})
    seconds = time.perf_counter() - began
    np.savez(result, **nn.decode(coded))
print(len(coded), seconds)
"""


@dataclass(frozen=True)
class Row:
    """One compressed model: how it was made, its bytes, where it is to be judged, the seconds that it took."""

    made: str
    size_bytes: int
    path: Path
    seconds: float


class _Reader(CalibrationDataReader):
    def __init__(self, case: Case) -> None:
        assert case.calibration is not None
        self._feeds = (feeds for _, feeds in batches(case.calibration, case.inputs, 50))

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


def ours(source: Path, dataset: str, options: str, folder: Path) -> Row:
    out = folder / "out"
    command = [sys.executable, "-m", "edgecompress", "compress", str(source), "-o", str(out), "--force"]
    began = time.perf_counter()
    subprocess.run(
        [*command, "--data", str(DATASETS / f"{dataset}.toml"), *shlex.split(options)], check=True, capture_output=True
    )
    seconds = time.perf_counter() - began
    size = json.loads((out / "report.json").read_text())["size"]
    return Row(f"`{options}`", size["ecz_bytes"], out / "model.onnx", seconds)


def plain_int8(case: Case, folder: Path) -> Row:
    model, _ = run_pass(case.model, "prepare", prepare, None)
    save_model(model, folder / "prepared.onnx")
    began = time.perf_counter()
    quantize_static(
        folder / "prepared.onnx",
        folder / "int8.onnx",
        _Reader(case),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    seconds = time.perf_counter() - began
    return Row("`quantize_static`", (folder / "int8.onnx").stat().st_size, folder / "int8.onnx", seconds)


def nncodec(source: Path, qp: int, python: Path, folder: Path) -> Row:
    proto = onnx.load(source)
    floats = [tensor for tensor in proto.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT]
    np.savez(folder / "tensors.npz", **{tensor.name: numpy_helper.to_array(tensor) for tensor in floats})
    command = [str(python), "-c", NNCODEC, str(folder / "tensors.npz"), str(folder / "decoded.npz"), str(qp)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    size, seconds = done.stdout.split()
    with np.load(folder / "decoded.npz") as decoded:
        for tensor in floats:
            tensor.CopyFrom(numpy_helper.from_array(decoded[tensor.name], tensor.name))
    onnx.save(proto, folder / "nncodec.onnx")
    return Row(f"NNCodec, QP {qp}", int(size), folder / "nncodec.onnx", float(seconds))


def rows(name: str, source: Path, case: Case, python: Path | None, folder: Path) -> Iterator[Row]:
    _, dataset, sizes, qps = MODELS[name]
    for options in (*sizes, *PLAIN):
        yield ours(source, dataset, options, folder)
    if python is not None:
        for qp in qps:
            yield nncodec(source, qp, python, folder)
    yield plain_int8(case, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("models", nargs="*", help="all by default")
    parser.add_argument("--nncodec-python", type=Path, help="the Python of an environment that has nncodec")
    options = parser.parse_args()
    if unknown := [name for name in options.models if name not in MODELS]:
        parser.error(f"unknown model {unknown[0]}; there are {', '.join(MODELS)}")
    print("| model | made by | bytes | ratio | accuracy | drop ± se | agree | s |")
    print("|---|---|---|---|---|---|---|---|")
    for name in options.models or MODELS:
        stem, dataset, *_ = MODELS[name]
        source = options.folder / f"{stem}.onnx"
        case = open_case(source, Request(data=DATASETS / f"{dataset}.toml"))
        with tempfile.TemporaryDirectory() as folder:
            for row in rows(name, source, case, options.nncodec_python, Path(folder)):
                found = validate(source, row.path, case.test).comparison
                cells = (
                    *(stem, row.made, f"{row.size_bytes:,}", f"x{source.stat().st_size / row.size_bytes:.1f}"),
                    *(f"{found.compressed:.2f}", f"{found.drop_points:.1f} ± {found.standard_error_points:.1f}"),
                    *(f"{found.agreement:.1f}", f"{row.seconds:.1f}"),
                )
                print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
