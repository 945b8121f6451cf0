"""Measure how long a session takes to open: from the original ONNX file, from model.onnx and from model.ecz.

    python benchmarks/startup.py [--rounds N] [--options "--bits 4"] MODEL.onnx [MODEL.onnx ...]

Every model is compressed without data (k-means, 5 bits, unless the options say otherwise) into a temporary folder. The
sessions are opened in one process on one thread, alternated; quoted are medians of the processor's time in milliseconds
(on one thread that is the time taken, and other work disturbs it least), and the ratio to the original file opened in
the same way. ``decode`` is the part of model.ecz that this package spends, from the file to the bytes of the model;
beside it what the C decoder takes for that (if there is cc). What is imported and started once a process is not
counted; the codes of a file are built anew each time.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from codec import c_seconds, read_all

from edgecompress.runtime.codes import build_code
from edgecompress.runtime.session import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--options", default="", help="options for compress")
    parser.add_argument("models", nargs="+", type=Path)
    arguments = parser.parse_args()
    times = "fp32, ms | model.onnx, ms | model.ecz, ms | decode, ms | in C, ms"
    print(f"| model | fp32 bytes | .ecz bytes | {times} | onnx | ecz |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for model in sorted(arguments.models, key=lambda path: path.stat().st_size):
            out = Path(folder) / model.stem
            command = [sys.executable, "-m", "edgecompress", "compress", str(model), "-o", str(out)]
            subprocess.run([*command, *shlex.split(arguments.options)], check=True, stdout=subprocess.DEVNULL)
            print(row(model, out, arguments.rounds), flush=True)


def row(model: Path, out: Path, rounds: int) -> str:
    for name in ("m.ecz", "m.onnx"):  # as codec.py names them
        shutil.copy(out / name.replace("m.", "model."), out / name)
    fp32, folded, ecz, decode = medians(
        rounds,
        lambda: load(model, threads=1),
        lambda: load(out / "model.onnx", threads=1),
        lambda: load(out / "model.ecz", threads=1),
        lambda: read_all(out),
    )
    native = c_seconds(out)
    cells = [model.stem, f"{model.stat().st_size:,}", f"{(out / 'model.ecz').stat().st_size:,}"]
    cells += [f"{1000 * seconds:.1f}" for seconds in (fp32, folded, ecz, decode)]
    cells += [f"{1000 * native:.1f}" if native else "-", f"{folded / fp32:.2f}", f"{ecz / fp32:.2f}"]
    return "| " + " | ".join(cells) + " |"


def medians(rounds: int, *actions: Callable[[], object]) -> list[float]:
    """Return the median processor seconds of each action; they take turns, and the first turn is not counted."""
    times: list[list[float]] = [[] for _ in actions]
    for turn in range(rounds + 1):
        for action, found in zip(actions, times, strict=True):
            build_code.cache_clear()
            start = time.process_time()
            action()
            if turn:
                found.append(time.process_time() - start)
    return [statistics.median(found) for found in times]


if __name__ == "__main__":
    main()
