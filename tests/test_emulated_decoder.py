"""The C decoder on other processors, emulated by QEMU: 32 and 64 bits, both byte orders, against the Python reader."""

from __future__ import annotations

import importlib.util
import io
import shutil
import subprocess
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from ecz_samples import GOLDEN, GOLDEN_FILES, PREFIX, VIOLATIONS, forge, model, spec_example, tensor

from edgecompress.container import pack
from edgecompress.errors import FormatError
from edgecompress.runtime.decode import read_pieces
from edgecompress.runtime.format import read_container

pytestmark = [pytest.mark.qemu, pytest.mark.slow]

NATIVE = Path(__file__).parents[1] / "targets" / "native"
SOURCES = [str(NATIVE / name) for name in ("ecz.c", "ecz_huffman.c", "ecz_inflate.c")]
OPTIONS = ["-std=c99", "-O2", "-Wall", "-Wextra", "-Werror", "-static", f"-I{NATIVE}"]

# Decodes every file it is given; prints a line each: the status, or length and CRC-32 of what is in it.
DRIVER = r"""
#include "ecz.h"
#include "ecz_internal.h"
#include <stdio.h>
#include <stdlib.h>
static void *allocate(void *user, size_t size) { (void)user; return malloc(size); }
static void release(void *user, void *memory) { (void)user; free(memory); }
static unsigned char data[1 << 20];
int main(int argc, char **argv)
{
    const ecz_allocator allocator = {NULL, allocate, release};
    ecz_crc table;
    ecz_crc_init(&table);
    for (int index = 1; index < argc; index++) {
        FILE *file = fopen(argv[index], "rb");
        size_t size = fread(data, 1, sizeof data, file);
        fclose(file);
        uint32_t crc = 0;
        unsigned long total = 0;
        ecz_container *container;
        int status = ecz_open(data, size, &allocator, &container);
        if (!status) {
            for (size_t each = 0; each < ecz_file_count(container) && !status; each++) {
                size_t length = (size_t)ecz_file_size(container, each);
                uint8_t *out = malloc(length + 1);
                status = ecz_read_file(container, each, out, length);
                crc = ecz_crc_update(&table, crc, out, length);
                total += length;
                free(out);
            }
            ecz_close(container);
        }
        if (status)
            printf("refused\n");
        else
            printf("%lu %08lx\n", total, (unsigned long)crc);
    }
    return 0;
}
"""


@dataclass(frozen=True)
class Machine:
    """A processor: the emulator's name for it, what GNU's and Zig's compilers call it."""

    qemu: str
    gnu: str
    zig: str


MACHINES = {
    "aarch64": Machine("aarch64", "aarch64-linux-gnu", "aarch64-linux-musl"),
    "32 bits": Machine("arm", "arm-linux-gnueabihf", "arm-linux-musleabihf"),
    "big-endian": Machine("s390x", "s390x-linux-gnu", "s390x-linux-musl"),
    "32 bits, big-endian": Machine("mips", "mips-linux-gnu", "mips-linux-musleabi"),
}


def compiler_for(machine: Machine) -> list[str]:
    """The command of a cross-compiler: Debian's, or the one of the package ziglang."""
    gnu = shutil.which(f"{machine.gnu}-gcc")
    if gnu:
        return [gnu]
    if importlib.util.find_spec("ziglang") is None:
        pytest.skip(f"there is neither {machine.gnu}-gcc nor the package ziglang")
    return [sys.executable, "-m", "ziglang", "cc", "-target", machine.zig]


def expected(data: bytes) -> str:
    """What the driver should print, by the Python reader."""
    handle = io.BytesIO(data)
    crc, total = 0, 0
    try:
        for _, piece in read_pieces(handle, read_container(handle)):
            crc = zlib.crc32(piece, crc)
            total += len(piece)
    except FormatError:
        return "refused"
    return f"{total} {crc:08x}"


def many_tensors(folder: Path) -> bytes:
    generator = np.random.default_rng(0)
    codes = [np.rint(generator.laplace(0, scale, 9000)).clip(-128, 127).astype(np.int8) for scale in (0.05, 0.3, 1, 20)]
    tensors = [tensor(f"t{index}", 3, values.tobytes(), (90, 100)) for index, values in enumerate(codes)]
    tensors.append(tensor("turned", 3, codes[0].reshape(90, 100).T.tobytes(), (100, 90)))
    tensors.append(tensor("floats", 1, generator.normal(size=5000).astype("<f4").tobytes(), (50, 100)))
    tensors.append(tensor("longs", 7, generator.integers(0, 50, 3000).astype("<i8").tobytes()))
    (folder / "m.onnx").write_bytes(model(*tensors))
    pack(folder / "m.onnx", folder / "m.ecz")
    return (folder / "m.ecz").read_bytes()


def damaged(data: bytes, generator: np.random.Generator) -> bytes:
    """The file with some bytes of its inflated meta block changed, under right checksums."""
    offset = PREFIX.unpack(data[:32])[3]
    block = bytearray(zlib.decompress(data[offset:], -15))
    for _ in range(int(generator.integers(1, 3))):
        block[int(generator.integers(min(len(block), 300)))] = int(generator.integers(256))
    engine = zlib.compressobj(9, zlib.DEFLATED, -15)
    return forge(bytes(block), data[32:offset], block=engine.compress(bytes(block)) + engine.flush())


@pytest.mark.parametrize("name", MACHINES)
def test_bytes_and_verdicts_are_those_of_the_python_reader(tmp_path: Path, name: str) -> None:
    machine = MACHINES[name]
    emulator = shutil.which(f"qemu-{machine.qemu}-static") or shutil.which(f"qemu-{machine.qemu}")
    if emulator is None:
        pytest.skip(f"there is no qemu-{machine.qemu}")
    compiler = compiler_for(machine)
    (tmp_path / "driver.c").write_text(DRIVER)
    program = str(tmp_path / "driver")
    subprocess.run([*compiler, *OPTIONS, str(tmp_path / "driver.c"), *SOURCES, "-o", program], check=True)

    good = [(GOLDEN / f"{golden}.ecz").read_bytes() for golden in GOLDEN_FILES]
    good += [spec_example(1), spec_example(2), many_tensors(tmp_path)]
    generator = np.random.default_rng(1)
    bad = [damaged(data, generator) for data in good for _ in range(40)]
    bad += [data[: int(generator.integers(len(data)))] for data in good]
    bad += [build() for case, (build, _) in VIOLATIONS.items() if "2^28" not in case]
    files = [*good, *bad]
    paths = [tmp_path / f"{index}.ecz" for index in range(len(files))]
    for path, data in zip(paths, files, strict=True):
        path.write_bytes(data)
    done = subprocess.run([emulator, program, *map(str, paths)], capture_output=True, text=True, check=True)
    verdicts = [expected(data) for data in files]
    assert done.stdout.splitlines() == verdicts
    assert "refused" not in verdicts[: len(good)]
    assert len(set(verdicts[: len(good)])) == len(good) - 1  # two golden files are of one model
    assert verdicts.count("refused") > len(bad) // 2
