"""What coverage-guided fuzzing found worth keeping (docs/security.md), fed to both decoders again, checksums off."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from pathlib import Path

import fuzz_reader
import pytest
from ecz_samples import GOLDEN

from edgecompress.runtime import decode, format  # noqa: A004

NATIVE = Path(__file__).parents[1] / "targets" / "native"
SOURCES = [str(NATIVE / name) for name in ("fuzz_ecz.c", "ecz.c", "ecz_huffman.c", "ecz_inflate.c")]
OPTIONS = ["-std=c99", "-O1", "-g", "-DFUZZING_BUILD_MODE_UNSAFE_FOR_PRODUCTION"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
MAIN = """
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int main(int argc, char **argv)
{
    for (int index = 1; index < argc; index++) {
        static uint8_t data[1 << 16];
        FILE *file = fopen(argv[index], "rb");
        size_t size = fread(data, 1, sizeof data, file);
        fclose(file);
        uint8_t *exact = malloc(size + 1); /* so that a byte read too far is noticed */
        for (size_t at = 0; at < size; at++)
            exact[at + 1] = data[at];
        LLVMFuzzerTestOneInput(exact + 1, size);
        free(exact);
    }
    printf("%d\\n", argc - 1);
    return 0;
}
"""


@pytest.fixture(scope="module", name="corpus")
def unpacked_corpus(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("corpus")
    with tarfile.open(GOLDEN / "fuzz_corpus.tar.xz") as archive:
        for member in archive.getmembers():
            content = archive.extractfile(member)
            assert content is not None
            (folder / member.name).write_bytes(content.read())
    return sorted(folder.iterdir())


def test_the_python_reader_decodes_or_refuses_every_input(corpus: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (decode, format):
        monkeypatch.setattr(module, "zlib", module.zlib)  # undone after the test
    fuzz_reader.trust_checksums()
    decoded = [fuzz_reader.feed(path.read_bytes()) for path in corpus]
    assert {True, False} == set(decoded)


def test_the_c_decoder_reads_nothing_beyond_any_input(corpus: list[Path], tmp_path: Path) -> None:
    compiler = shutil.which("cc") or pytest.skip("there is no C compiler")
    (tmp_path / "main.c").write_text(MAIN)
    program = str(tmp_path / "main")
    command = [compiler, *OPTIONS, str(tmp_path / "main.c"), *SOURCES, "-o", program]
    if subprocess.run([*command, *SANITIZERS], capture_output=True, check=False).returncode:
        subprocess.run(command, check=True)  # not every C compiler brings the sanitizers
    done = subprocess.run([program, *map(str, corpus)], capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stdout) == (0, f"{len(corpus)}\n"), done.stderr
