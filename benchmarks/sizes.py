"""Bring models down to sizes and print what they keep: accuracy, agreement, latency, time.

    EDGECOMPRESS_BENCH_DATA=FOLDER python benchmarks/sizes.py MODELS_FOLDER [MODEL ..]

A row is a run of ``edgecompress compress`` on the data sets of ``benchmarks/datasets``: calibrated on one part, tested
on another, no training; bytes are those of the whole model.ecz.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GRID = ("--cluster grid --step 0.5", "--cluster grid --step 1.0", "--cluster grid --step 1.4")
MODELS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "resnet20": (
        "resnet20_cifar10",
        "cifar10",
        (
            *("--bits 5", "--bits 4", "--bits 3", "--bits 2", "--bits 3 --no-feedback", "--bits 3 --no-asymmetric"),
            *("--bits 3 --no-bias-correction", "--bits 3 --no-calibrate", *GRID),
            *("--target-size 60000", "--target-size 50000", "--target-size 46000", "--target-size 42000"),
            *("--quantize int8 --step 1.0", "--factorize separable --keep 0.65 --allocate --cluster grid --step 1.0"),
        ),
    ),
    "resnet56": (
        "resnet56_cifar10",
        "cifar10",
        ("--bits 3", "--target-size 145000", "--target-size 120000", "--quantize int8 --step 1.0"),
    ),
    "squeezenet": (
        "squeezenet_v1.1",
        "imagenet_squeezenet",
        ("--bits 5", "--bits 4", "--target-size 550000", "--target-size 450000", "--quantize int8 --step 0.4"),
    ),
    "mobilenet": (
        "mobilenet_v1_0.25_224",
        "imagenet_mobilenet",
        ("--bits 5", "--bits 6", "--target-size 280000", "--target-size 240000"),
    ),
    "mnist": ("mnist_mlp", "mnist", ("--bits 3", "--target-size 20000", "--target-size 14000", "--target-size 10000")),
}


def row(model: Path, dataset: str, options: str) -> str:
    """Run one compression; return its line of the table."""
    data = Path(__file__).parent / "datasets" / f"{dataset}.toml"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "edgecompress", "compress", str(model), "-o", f"{folder}/out"]
        began = time.perf_counter()
        done = subprocess.run(
            [*command, "--data", str(data), *shlex.split(options)], capture_output=True, text=True, check=False
        )
        seconds = time.perf_counter() - began
        if done.returncode:
            sys.exit(f"{shlex.join(command)} {options}\n{done.stderr}")
        report = json.loads(Path(folder, "out", "report.json").read_text())
    size, accuracy = report["size"], report["accuracy"]
    cells = [
        model.stem,
        f"`{options}`",
        f"{size['ecz_bytes']:,}",
        f"x{size['compression_ratio']:.1f}",
        f"{accuracy['compressed']:.2f}",
        f"{accuracy['drop_points']:.1f} ± {accuracy['standard_error_points']:.1f}",
        f"{accuracy['agreement']:.1f}",
        f"{report['latency']['ratio']:.2f}",
        f"{seconds:.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("models", nargs="*", help="all by default")
    options = parser.parse_args()
    if unknown := [name for name in options.models if name not in MODELS]:
        parser.error(f"unknown model {unknown[0]}; there are {', '.join(MODELS)}")
    print("| model | options | model.ecz | ratio | accuracy | drop ± se | agree | latency | s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in options.models or MODELS:
        stem, dataset, runs = MODELS[name]
        for text in runs:
            print(row(options.folder / f"{stem}.onnx", dataset, text), flush=True)


if __name__ == "__main__":
    main()
