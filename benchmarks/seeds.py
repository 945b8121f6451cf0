"""Print the sources' own tables beside what edgecompress gives: published | ours | why they differ.

    python benchmarks/seeds.py                               every source
    python benchmarks/seeds.py linear wine                   some of them
    python benchmarks/seeds.py --pictures docs/seeds > docs/seeds.md

The output is Markdown. linear and wine need scikit-learn; mnist needs the benchmark data (--data, or the folder that
EDGECOMPRESS_BENCH_DATA names) and is left out with a note where it is missing; skoltech needs torch and onnxscript.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from pathlib import Path

from sources.tables import Options, markdown

from edgecompress.errors import EdgecompressError

SOURCES = {
    "linear": "truncated SVD of a matrix, of Iris, of a photo",
    "wine": "a 13-10-3 network with its bias, and a smaller hidden layer",
    "mnist": "SVD, pruning, k-means and frequencies on three MNIST models",
    "skoltech": "Tucker-2 and its parameter formula on five convolutional networks",
}

INTRODUCTION = """# The sources' own tables

What the sources publish, what edgecompress gives for the same task, and why the two differ. Written by
`python benchmarks/seeds.py --pictures docs/seeds > docs/seeds.md`; nothing is trained but the small Wine network.
*Plain* is the sources' way, which approximates the weights; *calibrated* minimises the error of the layer's output on
unlabelled training inputs. The last decimals of accuracies may change with the releases of the libraries."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    described = "; ".join(f"{name}: {what}" for name, what in SOURCES.items())
    parser.add_argument("sources", nargs="*", metavar="SOURCE", help=f"which to print, all by default ({described})")
    folder = os.environ.get("EDGECOMPRESS_BENCH_DATA")
    parser.add_argument("--data", type=Path, default=Path(folder) if folder else None, help="folder of the data")
    parser.add_argument("--pictures", type=Path, help="folder to write the pictures to")
    options = parser.parse_args()
    for name in options.sources:
        if name not in SOURCES:
            parser.error(f"there is no source {name!r}; choose from {', '.join(SOURCES)}")
    began = time.perf_counter()
    print(INTRODUCTION)
    for name in options.sources or SOURCES:
        start = time.perf_counter()
        module = importlib.import_module(f"sources.{name}")
        print(f"\n## {module.TITLE}", flush=True)
        try:
            for table in module.sections(Options(options.data, options.pictures)):
                print(f"\n{markdown(table)}", flush=True)
        except EdgecompressError as error:
            sys.exit(f"error: {error.message}\nhint: {error.hint}")
        print(f"{name}: {time.perf_counter() - start:.1f} s", file=sys.stderr)
    print(f"in all: {time.perf_counter() - began:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
