"""Factorize the models of a folder in every form and way, and print what it costs and what it saves.

    EDGECOMPRESS_BENCH_DATA=FOLDER python benchmarks/factorization.py MODELS_FOLDER TABLE [--cache FILE]

Tables: resnet20, resnet56, squeezenet, mnist, mobilenet, steps. A row is a run of ``edgecompress compress`` without
clusters: calibrated on one part of the data, tested on another, timed in alternating runs of both models on one thread.
With --cache, rows that were run before are read from the file instead.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PLAIN = "--no-calibrate"
CLOSED = "--no-asymmetric --no-bias-correction"
WAYS = {"plain": PLAIN, "each by itself": CLOSED, "calibrated": ""}
CONV_FORMS = ("svd", "svd_in", "tucker2", "separable", "cp")


def _grid(
    forms: tuple[str, ...], shares: tuple[str, ...], ways: tuple[str, ...] = ("plain", "calibrated")
) -> list[tuple[str, str]]:
    return [
        (f"{form}, {way}", f"--factorize {form} --keep {keep} {WAYS[way]}")
        for form in forms
        for keep in shares
        for way in ways
    ]


def _allocated(forms: tuple[str, ...], shares: tuple[str, ...]) -> list[tuple[str, str]]:
    return [
        (f"{form}, allocated {unit}", f"--factorize {form} --keep {keep} --allocate --budget-unit {unit}")
        for form in forms
        for unit in ("parameters", "macs")
        for keep in shares
    ]


TABLES: dict[str, tuple[str, str, list[tuple[str, str]]]] = {
    "resnet20": (
        "resnet20_cifar10",
        "cifar10",
        [
            *_grid(CONV_FORMS, ("0.8", "0.65", "0.5")),
            ("spectral, plain", f"--factorize spectral --keep 0.5 {PLAIN}"),
            ("spectral, calibrated", "--factorize spectral --keep 0.5"),
            *_grid(("auto",), ("0.5",), ("calibrated",)),
            *_allocated(("separable", "auto"), ("0.65", "0.5", "0.35")),
        ],
    ),
    "resnet56": (
        "resnet56_cifar10",
        "cifar10",
        [*_grid(("tucker2", "separable"), ("0.65", "0.5", "0.35")), *_allocated(("separable",), ("0.5", "0.35"))],
    ),
    "squeezenet": (
        "squeezenet_v1.1",
        "imagenet_squeezenet",
        [
            *_grid(("svd", "separable"), ("0.8", "0.65", "0.5", "0.35")),
            *_allocated(("auto",), ("0.8", "0.65")),
        ],
    ),
    "mnist": (
        "mnist_mlp",
        "mnist",
        [
            (f"rank {rank}, {way}", f"--factorize svd --rank {rank} {WAYS[way]}")
            for rank in (50, 25, 18, 10, 7, 5)
            for way in ("plain", "calibrated")
        ],
    ),
    "mobilenet": ("mobilenet_v1_0.25_224", "imagenet_mobilenet", _grid(("svd",), ("0.9", "0.8", "0.65"))),
    "steps": (
        "resnet20_cifar10",
        "cifar10",
        [
            (f"{name}, {keep}", f"--factorize separable --keep {keep} {options}")
            for keep in ("0.5", "0.3")
            for name, options in {
                "from the weights": PLAIN,
                "calibrated": CLOSED,
                "+ correction": "--no-asymmetric",
                "+ asymmetric": "--no-bias-correction",
                "+ both": "",
                "+ both, allocated": "--allocate",
            }.items()
        ],
    ),
}


def measure(model: Path, dataset: str, options: str) -> dict[str, float]:
    """Run one compression; return the figures of a row."""
    data = Path(__file__).parent / "datasets" / f"{dataset}.toml"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "edgecompress", "compress", str(model), "-o", f"{folder}/out"]
        command += ["--data", str(data), "--cluster", "none", *shlex.split(options)]
        began = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            complaint = process.stderr.read() if process.stderr else ""
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - began
        if status:
            sys.exit(f"{shlex.join(command)}\n{complaint}")
        report = json.loads(Path(folder, "out", "report.json").read_text())
    layers = report["layers"]
    before, after = (sum(layer[key] or 0 for layer in layers) for key in ("parameters_before", "parameters_after"))
    work = [sum(layer[key] or 0 for layer in layers) for key in ("macs_before", "macs_after")]
    return {
        "original": report["accuracy"]["original"],
        "compressed": report["accuracy"]["compressed"],
        "agreement": report["accuracy"]["agreement"],
        "error": report["accuracy"]["standard_error_points"],
        "parameters": after / before,
        "macs": work[1] / work[0],
        "latency": report["latency"]["ratio"],
        "seconds": seconds,
        "peak_mib": usage.ru_maxrss / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--cache", type=Path, help="a JSON file of rows that were run before")
    options = parser.parse_args()
    name, dataset, rows = TABLES[options.table]
    known = json.loads(options.cache.read_text()) if options.cache and options.cache.exists() else {}
    print(f"{name}, options beside `--cluster none --data {dataset}.toml`:\n")
    print("| | options | accuracy | drop ± se | agree | parameters | MACs | latency | s | peak MiB |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for title, text in rows:
        key = f"{name} {text}"
        if key not in known:
            known[key] = measure(options.models / f"{name}.onnx", dataset, text)
            if options.cache:
                options.cache.write_text(json.dumps(known, indent=1))
        row = known[key]
        drop = f"{row['original'] - row['compressed']:.1f} ± {row['error']:.1f}"
        print(
            f"| {title} | `{text.strip()}` | {row['compressed']:.2f} | {drop} | {row['agreement']:.1f} "
            f"| {row['parameters']:.3f} | {row['macs']:.3f} | {row['latency']:.2f} "
            f"| {row['seconds']:.0f} | {row['peak_mib']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
