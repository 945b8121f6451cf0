"""Compress every ONNX model of a folder with the defaults and print one table: ratio, metric, latency ratio, time.

    python benchmarks/models.py MODELS_FOLDER [--out DIR] [--options "--bits 4"]

A model with a data set in ``benchmarks/datasets`` (its root is the folder that EDGECOMPRESS_BENCH_DATA names) is
calibrated and tested on it; the others run on random inputs. Each is also packed and unpacked, which must be exact.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DATASETS = {
    "resnet20_cifar10": "cifar10",
    "resnet56_cifar10": "cifar10",
    "mnist_mlp": "mnist",
    "mnist_softmax": "mnist",
    "mnist_autoencoder": "mnist_autoencoder",
    "squeezenet_v1.1": "imagenet_squeezenet",
    "mobilenet_v1_0.25_224": "imagenet_mobilenet",
}


def edgecompress(*arguments: object) -> None:
    command = [sys.executable, "-m", "edgecompress", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{shlex.join(command)}\n{done.stderr}")


def same_after_packing(model: Path, folder: Path) -> bool:
    packed, restored = folder / "packed.ecz", folder / "restored.onnx"
    edgecompress("pack", model, "-o", packed, "--force")
    edgecompress("unpack", packed, "-o", restored, "--force")
    return filecmp.cmp(model, restored, shallow=False)


def row(model: Path, out: Path, options: list[str]) -> str:
    folder = out / model.stem
    name = DATASETS.get(model.stem)
    has_data = name is not None and "EDGECOMPRESS_BENCH_DATA" in os.environ
    data = ["--data", Path(__file__).parent / "datasets" / f"{name}.toml"] if has_data else []
    began = time.perf_counter()
    edgecompress("compress", model, "-o", folder, "--force", *data, *options)
    seconds = time.perf_counter() - began
    report = json.loads((folder / "report.json").read_text())
    size, accuracy = report["size"], report["accuracy"]
    sqnr = min((entry["sqnr_db"] for entry in report["outputs"].values() if entry["sqnr_db"] is not None), default=None)
    scores = [accuracy["original"], accuracy["compressed"]]
    metric = f"{accuracy['metric']} " + " -> ".join("?" if score is None else f"{score:.4g}" for score in scores)
    cells = [
        model.stem,
        f"{size['original_bytes']:,}",
        f"{size['ecz_bytes']:,}",
        f"{size['compression_ratio']:.2f}",
        metric if has_data else "random inputs",
        "" if accuracy["agreement"] is None else f"{accuracy['agreement']:.1f} %",
        "" if sqnr is None else f"{sqnr:.1f} dB",
        f"{report['latency']['ratio']:.2f}",
        "yes" if same_after_packing(model, folder) else "NO",
        f"{seconds:.1f} s",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--options", default="", help="more options for compress")
    options = parser.parse_args()
    headers = ["model", "bytes", "`.ecz`", "ratio", "metric", "agreement", "SQNR", "latency", "pack exact", "time"]
    print("| " + " | ".join(headers) + " |\n|" + "---|" * len(headers))
    with tempfile.TemporaryDirectory() as scratch:
        for model in sorted(options.models.glob("*.onnx")):
            print(row(model, options.out or Path(scratch), shlex.split(options.options)), flush=True)


if __name__ == "__main__":
    main()
