"""Measure bytes and decode speed of the `.ecz` codec.

    python benchmarks/codec.py [--values N] [MODEL.onnx ...]

One table: the bytes of a tensor over its zeroth-order entropy, everything counted, and the values a second that each
decoder makes of it on one core, checksums included (C needs cc, JavaScript needs node, zstd -19 the package zstandard).
LZW is there for its bytes. Whole models, if given, follow: their bytes and those of zstd -19.
"""

from __future__ import annotations

import argparse
import ctypes
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from edgecompress import pack
from edgecompress.runtime.decode import read_pieces
from edgecompress.runtime.format import open_ecz, read_container

TARGETS = Path(__file__).parents[1] / "targets"
ROUNDS = 5

NODE = """
import { readFileSync } from "node:fs";
import { decode } from "./ecz.mjs";
const bytes = new Uint8Array(readFileSync("m.ecz"));
let least = Infinity;
for (let round = 0; round < 5; round++) {
  const start = performance.now();
  await decode(bytes);
  least = Math.min(least, performance.now() - start);
}
console.log(least / 1000);
"""

DRIVER = """
#include "ecz.h"
#include <stdlib.h>
static void *allocate(void *user, size_t size) { (void)user; return malloc(size); }
static void release(void *user, void *memory) { (void)user; free(memory); }
int decode(const uint8_t *data, size_t size, uint8_t *out, size_t out_size)
{
    const ecz_allocator allocator = {NULL, allocate, release};
    ecz_container *container;
    int status = ecz_open(data, size, &allocator, &container);
    if (status)
        return status;
    status = ecz_read_file(container, 0, out, out_size);
    ecz_close(container);
    return status;
}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--values", type=int, default=8_000_000)
    parser.add_argument("models", nargs="*", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        columns = ["bits", "ecz", "zstd -19", "LZW", "numpy M/s", "C M/s", "JS M/s", "zstd M/s"]
        print(f"{'values':24}" + "".join(f"{column:>11}" for column in columns))
        for label, values in distributions(arguments.values).items():
            print(f"{label:24}" + "".join(f"{cell:>11}" for cell in row(folder, values)))
        for path in arguments.models:
            print(whole(folder, path))


def distributions(count: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    normal, laplace = generator.normal(size=count), generator.laplace(size=count)
    rare, others = generator.random(count), generator.integers(1, 16, count)
    return {
        "16 clusters": (normal * 2.7 + 7.5).clip(0, 15).astype(np.uint8),
        "16 values, equal": generator.integers(0, 16, count).astype(np.uint8),
        "256 clusters": (normal * 40 + 128).clip(0, 255).astype(np.uint8),
        "normal, step 1.0 sigma": np.rint(normal).astype(np.int8),
        "normal, step 1.4 sigma": np.rint(normal / 1.4).astype(np.int8),
        "normal, step 2.0 sigma": np.rint(normal / 2).astype(np.int8),
        "Laplace, 1.1 bits": np.rint(laplace * 0.35).astype(np.int8),
        "Laplace, 0.5 bits": np.rint(laplace * 0.2).astype(np.int8),
        "95 % zeros, 15 others": np.where(rare < 0.05, others, 0).astype(np.uint8),
        "98 % zeros, 15 others": np.where(rare < 0.02, others, 0).astype(np.uint8),
        "98 % zeros, 1 other": (rare < 0.02).astype(np.uint8),
    }


def row(folder: Path, values: np.ndarray) -> list[str]:
    tensor = numpy_helper.from_array(values, "w")
    graph = onnx.helper.make_graph([], "g", [], [], [tensor])
    (folder / "m.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
    stored = pack(folder / "m.onnx", folder / "m.ecz", force=True).stored_bytes
    counts = np.unique(values, return_counts=True)[1]
    bits = float(counts @ np.log2(values.size / counts)) / values.size
    entropy = bits * values.size / 8
    zstd_bytes, zstd_seconds = zstd(values.tobytes())
    few = values[:1_000_000]
    decoders = [seconds(lambda: read_all(folder)), c_seconds(folder), js_seconds(folder), zstd_seconds]
    sizes = [stored / entropy, zstd_bytes and zstd_bytes / entropy, lzw_bytes(few.tobytes()) / (bits * few.size / 8)]
    return [
        f"{bits:.2f}",
        *(f"{size:.4f}" if size else "-" for size in sizes),
        *(f"{values.size / each / 1e6:.0f}" if each else "-" for each in decoders),
    ]


def seconds(run: Callable[[], object]) -> float:
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def read_all(folder: Path) -> None:
    with open_ecz(folder / "m.ecz") as handle:
        for _ in read_pieces(handle, read_container(handle)):
            pass


def c_seconds(folder: Path) -> float | None:
    library = folder / "libecz.so"
    if not library.exists():
        compiler = shutil.which("cc")
        if compiler is None:
            return None
        (folder / "driver.c").write_text(DRIVER)
        native = TARGETS / "native"
        sources = [str(native / name) for name in ("ecz.c", "ecz_huffman.c", "ecz_inflate.c")]
        options = ["-std=c99", "-O2", "-shared", "-fPIC", f"-I{native}"]
        subprocess.run([compiler, *options, str(folder / "driver.c"), *sources, "-o", str(library)], check=True)
    decode = ctypes.CDLL(str(library)).decode
    decode.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t]
    data, expected = (folder / "m.ecz").read_bytes(), (folder / "m.onnx").read_bytes()
    out = np.zeros(len(expected), np.uint8)
    found = seconds(lambda: decode(data, len(data), out.ctypes.data, out.size))
    assert out.tobytes() == expected
    return found


def js_seconds(folder: Path) -> float | None:
    node = shutil.which("node")
    if node is None:
        return None
    (folder / "ecz.mjs").write_bytes((TARGETS / "web" / "ecz.js").read_bytes())
    (folder / "main.mjs").write_text(NODE)
    done = subprocess.run([node, "main.mjs"], cwd=folder, capture_output=True, text=True, check=True)
    return float(done.stdout)


def zstd(data: bytes) -> tuple[int, float] | tuple[None, None]:
    try:
        import zstandard
    except ImportError:
        return None, None
    stored = zstandard.ZstdCompressor(level=19).compress(data)
    engine = zstandard.ZstdDecompressor()
    return len(stored), seconds(lambda: engine.decompress(stored))


def lzw_bytes(data: bytes) -> int:
    """Return what Lempel-Ziv-Welch takes (Welch 1984), in codes of 9 to 16 bits, with a full table kept."""
    known = {bytes([value]): value for value in range(256)}
    bits = 0
    current = b""
    for value in data:
        longer = current + bytes([value])
        if longer in known:
            current = longer
            continue
        bits += max(9, (len(known) - 1).bit_length())
        if len(known) < 1 << 16:
            known[longer] = len(known)
        current = longer[-1:]
    return (bits + 16) // 8


def whole(folder: Path, path: Path) -> str:
    start = time.perf_counter()
    stored = pack(path, folder / "whole.ecz", force=True).stored_bytes
    taken = time.perf_counter() - start
    with open_ecz(folder / "whole.ecz") as handle:
        decoded = seconds(lambda: list(read_pieces(handle, read_container(handle))))
    size = path.stat().st_size
    other = zstd(path.read_bytes())[0]
    ratio = f", {stored / other:.4f} of zstd -19 ({other})" if other else ""
    return f"{path.name}: {size} -> {stored} bytes{ratio}; packed in {taken:.2f} s, decoded in {1000 * decoded:.0f} ms"


if __name__ == "__main__":
    main()
