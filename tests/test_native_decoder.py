"""The C decoder, compiled with the system's compiler and its sanitizers."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ecz_samples import (
    GOLDEN,
    GOLDEN_FILES,
    VIOLATIONS,
    external_tensor,
    forge,
    model,
    spec_example,
    tensor,
    varint,
    with_files,
)

from edgecompress.container import pack

NATIVE = Path(__file__).parents[1] / "targets" / "native"
DECODER = ["ecz.c", "ecz_huffman.c", "ecz_inflate.c"]
STRICT = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", "-O1", "-g"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

Unpack = Callable[[Path, Path], "subprocess.CompletedProcess[str]"]


def build(folder: Path, main: str, *options: str) -> Path:
    compiler = shutil.which("cc") or pytest.skip("there is no C compiler")
    program = folder / Path(main).stem
    sources = [str(NATIVE / name) for name in (main, *DECODER)]
    subprocess.run([compiler, *STRICT, *options, *sources, "-o", str(program)], check=True)
    return program


@pytest.fixture(scope="session", name="sanitizers")
def sanitizers_of_the_compiler(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Not every C compiler brings the run-time part of the sanitizers."""
    compiler = shutil.which("cc") or pytest.skip("there is no C compiler")
    source = tmp_path_factory.mktemp("c") / "empty.c"
    source.write_text("int main(void) { return 0; }\n")
    command = [compiler, *SANITIZERS, str(source), "-o", str(source.with_suffix(""))]
    return SANITIZERS if subprocess.run(command, capture_output=True, check=False).returncode == 0 else []


@pytest.fixture(scope="session", name="unpack")
def unpack_program(tmp_path_factory: pytest.TempPathFactory, sanitizers: list[str]) -> Unpack:
    program = build(tmp_path_factory.mktemp("native"), "ecz_unpack.c", *sanitizers)

    def run(source: Path, target: Path) -> subprocess.CompletedProcess[str]:
        command = [str(program), str(source), str(target)]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)

    return run


@pytest.mark.parametrize("name", GOLDEN_FILES)
def test_the_golden_files_decode_to_the_same_bytes_as_in_python(tmp_path: Path, unpack: Unpack, name: str) -> None:
    done = unpack(GOLDEN / f"{name}.ecz", tmp_path / "m.onnx")
    assert (done.returncode, done.stderr) == (0, "")
    files = [path for path in (tmp_path / "m.onnx", tmp_path / "weights.bin") if path.exists()]
    assert [path.read_bytes() for path in files] == list(GOLDEN_FILES[name]())
    assert len(list(tmp_path.iterdir())) == len(files)


def test_many_tensors_of_many_kinds_decode(tmp_path: Path, unpack: Unpack) -> None:
    generator = np.random.default_rng(0)
    tensors = []
    for index in range(60):
        size = int(generator.integers(1, 30_000))
        scale = float(generator.choice([0.1, 0.3, 1, 3, 20]))
        kind = generator.choice(["codes", "floats", "halves", "zeros", "longs"])
        values = {
            "codes": np.rint(generator.laplace(0, scale, size)).clip(-128, 127).astype(np.int8),
            "floats": generator.normal(0, scale, size).astype(np.float32),
            "halves": generator.normal(0, scale, size).astype(np.float16),
            "zeros": np.zeros(size, np.float32),
            "longs": generator.integers(0, 50, size),
        }[kind]
        types = {"int8": 3, "float32": 1, "float16": 10, "int64": 7}
        dims = (2, size // 2) if size % 2 == 0 else (size,)
        tensors.append(tensor(f"t{index}", types[str(values.dtype)], values.tobytes(), dims))
    data = model(*tensors)
    (tmp_path / "m.onnx").write_bytes(data)
    pack(tmp_path / "m.onnx", tmp_path / "m.ecz")
    done = unpack(tmp_path / "m.ecz", tmp_path / "n.onnx")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "n.onnx").read_bytes() == data


@pytest.mark.parametrize("case", VIOLATIONS)
def test_a_file_that_breaks_a_rule_is_refused_with_an_error_code(tmp_path: Path, unpack: Unpack, case: str) -> None:
    (tmp_path / "h.ecz").write_bytes(VIOLATIONS[case][0]())
    done = unpack(tmp_path / "h.ecz", tmp_path / "m.onnx")
    assert done.returncode == 4, done.stderr
    assert done.stderr.startswith("error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["h.ecz"]


@pytest.mark.parametrize(
    "name",
    ["a/b", "..", "a\\b", "a\nb", ".a", "\u202egpj", "\ud800", "\xff", "x" * 256, "a\u200bb"],
)
def test_a_file_name_that_is_not_plain_is_refused(tmp_path: Path, unpack: Unpack, name: str) -> None:
    raw = b"\xff" if name == "\xff" else name.encode("utf-8", "surrogatepass")
    head = bytes.fromhex("8008 00 00 02 00 00 00000000 00")
    data = head + varint(len(raw)) + raw + bytes.fromhex("01 8316dc8c 0078")
    (tmp_path / "h.ecz").write_bytes(forge(data, b""))
    done = unpack(tmp_path / "h.ecz", tmp_path / "m.onnx")
    assert done.returncode == 4
    assert "malformed" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["h.ecz"]


def test_a_plain_name_beyond_ascii_is_written(tmp_path: Path, unpack: Unpack) -> None:
    (tmp_path / "g.ecz").write_bytes(with_files(model(external_tensor("t", 2, "größe", 0, 1)), {"größe": b"x"}))
    assert unpack(tmp_path / "g.ecz", tmp_path / "g.onnx").returncode == 0
    assert (tmp_path / "größe").read_bytes() == b"x"


def test_a_file_that_the_model_does_not_refer_to_is_never_written(tmp_path: Path, unpack: Unpack) -> None:
    (tmp_path / "h.ecz").write_bytes(with_files(model(external_tensor("t", 2, "w", 0, 1)), {"Makefile": b"x"}))
    done = unpack(tmp_path / "h.ecz", tmp_path / "m.onnx")
    assert done.returncode == 4
    assert "does not refer to" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["h.ecz"]


def test_existing_files_are_kept(tmp_path: Path, unpack: Unpack) -> None:
    for kept in ("m.onnx", "weights.bin", "weights.bin.partial"):
        (tmp_path / kept).write_bytes(b"mine")
        done = unpack(GOLDEN / "modes.ecz", tmp_path / "m.onnx")
        assert done.returncode == 9
        assert "the file exists" in done.stderr
        assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(kept, b"mine")]
        (tmp_path / kept).unlink()


def test_every_flipped_bit_and_every_truncation_of_a_small_file_is_found(tmp_path: Path, sanitizers: list[str]) -> None:
    program = build(tmp_path, "fuzz_ecz.c", "-DECZ_FLIP", *sanitizers)
    (tmp_path / "example.ecz").write_bytes(spec_example())
    (tmp_path / "long.ecz").write_bytes(spec_example(2))
    (tmp_path / "small.ecz").write_bytes(small_file(tmp_path))
    files = [str(tmp_path / name) for name in ("example.ecz", "long.ecz", "small.ecz")]
    done = subprocess.run([str(program), *files], capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")


def small_file(folder: Path) -> bytes:
    """Classes, a transposed copy, phrases, raw and deflated planes in some hundred bytes."""
    generator = np.random.default_rng(1)
    scale = generator.choice([0.3, 3], (30, 1, 1))
    grid = np.rint(generator.normal(size=(30, 10, 9)) * scale).astype(np.int8)
    matrix = np.rint(generator.laplace(0, 0.3, (50, 60))).astype(np.int8)
    tensors = [
        tensor("grid", 3, grid.tobytes(), (30, 10, 3, 3)),
        tensor("matrix", 3, matrix.tobytes(), (50, 60)),
        tensor("turned", 3, matrix.T.tobytes(), (60, 50)),
        tensor("zeros", 1, bytes(3000)),
    ]
    (folder / "s.onnx").write_bytes(model(*tensors))
    pack(folder / "s.onnx", folder / "s.ecz")
    return (folder / "s.ecz").read_bytes()
