"""The native bench runner, compiled with the system's compiler and its sanitizers, against what Python computes."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper
import pytest
from tiny import mlp, save

from edgecompress.container import pack
from edgecompress.runtime.measure import output_differences
from edgecompress.runtime.tensors import write_tensor

NATIVE = Path(__file__).parents[1] / "targets" / "native"
BENCH = ["bench.c", "bench_device.c", "bench_files.c", "bench_session.c", "bench_tensor.c", "bench_time.c"]
DECODER = ["ecz.c", "ecz_huffman.c", "ecz_inflate.c"]
STRICT = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", "-O1", "-g"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
TOLERANCE = 1e-3

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def build(folder: Path, name: str, sources: list[str], *options: str) -> Path:
    """Compile with the sanitizers, where the compiler brings their run-time part."""
    compiler = shutil.which("cc") or pytest.skip("there is no C compiler")
    program = folder / name
    places = [str(NATIVE / source) for source in sources]
    for extra in (SANITIZERS, []):
        command = [compiler, *STRICT, *extra, *options, *places, "-ldl", "-o", str(program)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not done.returncode:
            return program
    raise AssertionError(done.stderr)


@pytest.fixture(scope="session", name="bench")
def bench_program(tmp_path_factory: pytest.TempPathFactory) -> Run:
    program = build(tmp_path_factory.mktemp("bench"), "bench", [*BENCH, *DECODER])
    quiet = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}  # what a program that ends keeps is no leak

    def run(*arguments: str | Path, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
        command = [str(program), *map(str, arguments)]
        return subprocess.run(command, cwd=folder, env=quiet, capture_output=True, text=True, check=False, timeout=300)

    return run


@pytest.fixture(scope="session", name="runtime")
def runtime_library() -> Path:
    package = importlib.util.find_spec("onnxruntime")
    places = package.submodule_search_locations if package else None
    found = sorted(Path(places[0]).glob("capi/libonnxruntime.so*")) if places else []
    return found[0] if found else pytest.skip("this build of onnxruntime has no separate C library")


# --- the check of all files ---


def sums(folder: Path, *names: str) -> Path:
    lines = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / "SHA256SUMS").write_text("".join(lines))
    return folder / "SHA256SUMS"


def check(bench: Run, path: Path) -> tuple[int, str]:
    """Return the exit code and the complaint; without a runtime the run ends after the check in any case."""
    done = bench("--check", path, "--library", "/nowhere", "--model", "m", "--expect", "e")
    return done.returncode, done.stderr


def test_files_of_all_lengths_about_a_block_have_the_sha256_that_python_computes(tmp_path: Path, bench: Run) -> None:
    lengths = [0, 1, 3, 54, 55, 56, 57, 63, 64, 65, 118, 119, 120, 127, 128, 129, 65535, 65536, 65537, 1_000_003]
    for length in lengths:
        (tmp_path / f"f{length}").write_bytes(np.random.default_rng(length).bytes(length))
    path = sums(tmp_path, *(f"f{length}" for length in lengths))
    assert check(bench, path)[0] == 7
    for length in (1, 55, 64, 1_000_003):
        place = tmp_path / f"f{length}"
        whole = place.read_bytes()
        place.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        code, said = check(bench, path)
        assert (code, f"error: f{length} was altered" in said) == (4, True)
        place.write_bytes(whole)


@pytest.mark.parametrize("path", ["../f", "/etc/passwd", "a/../f", "./f", "a//f", "", "f\\g", "f\tg", "missing", ".."])
def test_a_sum_of_anything_but_a_plain_file_below_the_folder_is_refused(tmp_path: Path, bench: Run, path: str) -> None:
    (tmp_path / "inner" / "a").mkdir(parents=True)
    for name in ("f", "inner/f"):
        (tmp_path / name).write_bytes(b"")
    digest = hashlib.sha256(b"").hexdigest()
    (tmp_path / "inner" / "SHA256SUMS").write_text(f"{digest}  f\n{digest}  {path}\n")
    code, said = check(bench, tmp_path / "inner" / "SHA256SUMS")
    assert (code, said.startswith("error: ")) == (4, True)


@pytest.mark.parametrize(
    "line", ["", "x", "0" * 63 + "  f", "0" * 64 + " f", "0" * 64 + "f", "G" * 64 + "  f", "A" * 64 + "  f"]
)
def test_a_malformed_line_is_refused(tmp_path: Path, bench: Run, line: str) -> None:
    (tmp_path / "f").write_bytes(b"")
    (tmp_path / "SHA256SUMS").write_text(line + "\n")
    assert check(bench, tmp_path / "SHA256SUMS")[0] == 4


def test_links_and_unlisted_libraries_are_refused(tmp_path: Path, bench: Run) -> None:
    for name in ("lib", "lib/deep", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "f").write_bytes(b"")
    path = sums(tmp_path, "lib/f", "lib/deep/f")
    assert check(bench, path)[0] == 7, "what lies elsewhere needs no sum"
    (tmp_path / "lib/deep/g").write_bytes(b"")
    assert "lib/deep/g is not in SHA256SUMS" in check(bench, path)[1]
    (tmp_path / "lib/deep/g").unlink()
    (tmp_path / "lib/f").unlink()
    (tmp_path / "lib/f").symlink_to("../other/f")
    assert "lib/f is not a plain file" in check(bench, path)[1]
    (tmp_path / "lib/f").unlink()
    (tmp_path / "lib/f").write_bytes(b"")
    (tmp_path / "lib/deep").rename(tmp_path / "elsewhere")
    (tmp_path / "lib/deep").symlink_to("../elsewhere")
    assert "lib/deep/f is not a plain file" in check(bench, path)[1]


# --- tensors ---


@pytest.fixture(scope="session", name="compare")
def compare_program(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("compare")
    program = build(folder, "compare", ["fuzz_bench.c", "bench_tensor.c", "bench_files.c"], "-DBENCH_COMPARE")

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [str(program), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)

    return run


TYPES = ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"]


def pairs() -> list[tuple[float, Any, Any]]:
    """Pairs of values that agree or nearly agree, of every type, with every special value."""
    generator = np.random.default_rng(0)
    found: list[tuple[float, Any, Any]] = []
    for code in TYPES:
        for scale in (0, 0.5, 2, 100):
            wanted = (generator.normal(size=(2, 1, 3)) * 20).astype(code)
            step = np.abs(wanted.astype(np.float64)).max() * TOLERANCE * scale
            found.append((TOLERANCE, (wanted + step).astype(code), wanted))
        found.append((TOLERANCE, np.zeros((0, 3), code), np.zeros((0, 3), code)))
        found.append((TOLERANCE, np.ones((1, 2), code), np.ones((2, 1), code)))
    special = np.array([1, np.nan, np.inf, -np.inf, -65504, 6e-8, 0], "f8")
    for code in ("f2", "f4", "f8"):
        found += [(0.0, np.roll(special, shift).astype(code), special.astype(code)) for shift in (0, 1)]
        found.append((0.0, np.nextafter(np.ones(3, code), np.array(2, code)), np.ones(3, code)))
        found.append((0.0, np.ones(3, code) * (1 + 17 * np.finfo(code).eps), np.ones(3, code)))
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)  # every value there is
    found += [(0.0, halves, halves), (0.0, halves[np.isfinite(halves)] * np.float16(1.5), halves[np.isfinite(halves)])]
    found += [(0.0, np.array(["a", "ü", ""]), np.array(["a", "ü", text])) for text in ("", "b")]
    return found


def test_tensors_are_compared_as_in_python(tmp_path: Path, compare: Run) -> None:
    arguments: list[str | Path] = []
    expected = []
    with np.errstate(all="ignore"):
        for index, (relative, actual, wanted) in enumerate(pairs()):
            places = [tmp_path / f"{index}{kind}.pb" for kind in "aw"]
            for place, value in zip(places, (actual, wanted), strict=True):
                place.write_bytes(write_tensor("t", value))
            arguments += [repr(relative), *places]
            expected.append(not output_differences({"t": actual}, {"t": wanted}, relative=relative))
    done = compare(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line == "same" for line in done.stdout.splitlines()] == expected
    assert 20 < sum(expected) < len(expected) - 20, "both answers are tried"


def test_tensors_of_other_tools_are_read(tmp_path: Path, compare: Run) -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    proto = onnx.numpy_helper.from_array(values, "t")
    proto.doc_string = "from elsewhere"
    (tmp_path / "theirs").write_bytes(proto.SerializeToString())
    (tmp_path / "ours").write_bytes(write_tensor("t", values))
    assert compare("0", tmp_path / "theirs", tmp_path / "ours").stdout == "same\n"


@pytest.mark.parametrize(
    ("proto", "words"),
    [
        (onnx.TensorProto(name="t", dims=[2], data_type=1, float_data=[1, 2]), "raw_data"),
        (onnx.TensorProto(name="t", dims=[2], data_type=1, raw_data=bytes(7)), "shape"),
        (onnx.TensorProto(name="t", dims=[-1], data_type=1, raw_data=b""), "shape"),
        (onnx.TensorProto(name="t", dims=[1 << 40, 1 << 40], data_type=1, raw_data=b""), "shape"),
        (onnx.TensorProto(name="t", dims=[1] * 17, data_type=1, raw_data=bytes(4)), "shape"),
        (onnx.TensorProto(name="t", dims=[2], data_type=8, string_data=[b"a"]), "shape"),
        (onnx.TensorProto(name="t", dims=[2], data_type=99, raw_data=b"a"), "type"),
        (onnx.TensorProto(dims=[1], data_type=2, raw_data=b"a"), "name"),
    ],
)
def test_a_tensor_that_is_none_is_refused(tmp_path: Path, compare: Run, proto: onnx.TensorProto, words: str) -> None:
    (tmp_path / "t").write_bytes(proto.SerializeToString())
    done = compare("0", tmp_path / "t", tmp_path / "t")
    assert (done.returncode, words in done.stdout) == (4, True), done.stdout


# --- running models ---


def case(folder: Path, model: Path, feeds: dict[str, Any], *, change: float = 0.0) -> list[str | Path]:
    """Write the inputs and what Python gets for them; return the arguments that name them."""
    import onnxruntime

    folder.mkdir(exist_ok=True)
    session = onnxruntime.InferenceSession(str(model))
    outputs = session.run(None, feeds)
    arguments: list[str | Path] = ["--input"]
    for name, value in feeds.items():
        (folder / f"in_{name}.pb").write_bytes(write_tensor(name, value))
        arguments.append(folder / f"in_{name}.pb")
    arguments.append("--expect")
    for output, value in zip(session.get_outputs(), outputs, strict=True):
        changed = value + change if change else value
        (folder / f"out_{output.name}.pb").write_bytes(write_tensor(output.name, changed))
        arguments.append(folder / f"out_{output.name}.pb")
    return arguments


@pytest.fixture(name="row")
def one_row() -> dict[str, Any]:
    return {"x": np.random.default_rng(1).normal(size=(1, 16)).astype(np.float32)}


def run_json(bench: Run, *arguments: str | Path) -> Any:
    done = bench("--json", *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_model_is_timed_and_its_report_is_complete(
    tmp_path: Path, bench: Run, runtime: Path, row: dict[str, Any]
) -> None:
    import onnxruntime

    model = mlp(tmp_path / "m.onnx")
    given = ["--library", runtime, "--model", model, *case(tmp_path / "t", model, row)]
    found = run_json(bench, *given, "--runs", "12", "--threads", "1", "--target", 'a"\\\n', "--cores", "0")
    assert (found["schema_version"], found["target"], found["threads"], found["notes"]) == (2, 'a"\\\n', 1, [])
    (one,) = found["results"]
    assert (one["model"], one["outputs_match"], one["samples"], len(one["values_ms"])) == (str(model), True, 12, 12)
    assert one["median_ms"] == pytest.approx(np.median(one["values_ms"]), abs=1e-6)
    assert one["p90_ms"] == pytest.approx(np.percentile(one["values_ms"], 90), abs=1e-6)
    assert one["init_ms"] > 0 < one["first_ms"]
    assert one["peak_rss_bytes"] > 1_000_000
    assert 2 <= len(one["warmup_ms"]) <= 220
    device = found["device"]
    assert (device["onnxruntime"], device["cores"]) == (onnxruntime.__version__, 1)
    assert (device["machine"], device["os"]) == (os.uname().machine, f"{os.uname().sysname} {os.uname().release}")
    assert set(found["after"]) == {"frequency_mhz", "temperature_c"}


def test_a_container_gives_what_its_model_gives(tmp_path: Path, bench: Run, runtime: Path, row: dict[str, Any]) -> None:
    model = mlp(tmp_path / "m.onnx")
    onnx.save(onnx.load(model), tmp_path / "e.onnx", save_as_external_data=True, size_threshold=0, location="w.bin")
    given = case(tmp_path / "t", model, row)
    for source in ("m", "e"):
        pack(tmp_path / f"{source}.onnx", tmp_path / f"{source}.ecz")
    (tmp_path / "w.bin").unlink()  # the container has it
    for source in ("m", "e"):
        found = run_json(bench, "--library", runtime, "--model", tmp_path / f"{source}.ecz", *given, "--runs", "1")
        assert found["results"][0]["outputs_match"] is True


def test_several_models_take_turns_and_are_reported_in_order(
    tmp_path: Path, bench: Run, runtime: Path, row: dict[str, Any]
) -> None:
    models = [mlp(tmp_path / f"{seed}.onnx", seed=seed) for seed in (0, 5)]
    given = [["--model", model, *case(tmp_path / f"t{model.stem}", model, row)] for model in models]
    found = run_json(bench, "--library", runtime, *given[0], "--next", *given[1], "--runs", "3")
    assert [one["model"] for one in found["results"]] == [str(model) for model in models]
    assert [one["samples"] for one in found["results"]] == [3, 3]
    assert found["device"]["memory_shared"] is True
    done = bench("--library", runtime, *given[0], "--next", *given[1][:2], *given[0][2:], "--runs", "3")
    assert (done.returncode, "wrong outputs: 'y' off by" in done.stderr) == (5, True), "each has its own outputs"


def test_texts_and_outputs_without_elements_are_compared(tmp_path: Path, bench: Run, runtime: Path) -> None:
    body = "g (string[N] s, int64[M] i) => (string[M] t, int64[M] j) { t = Gather(s, i)  j = Add(i, i) }"
    model = save(tmp_path / "m.onnx", body)
    texts = np.array(["one", "", "drei ü"], dtype=object)
    for index in ([2, 0, 1, 1], []):
        feeds = {"s": texts, "i": np.array(index, np.int64)}
        given = case(tmp_path / "t", model, feeds)
        assert run_json(bench, "--library", runtime, "--model", model, *given, "--runs", "1")
    (tmp_path / "t/out_t.pb").write_bytes(write_tensor("t", np.array([], dtype=str)))
    (tmp_path / "t/in_i.pb").write_bytes(write_tensor("i", np.array([0], np.int64)))
    assert bench("--library", runtime, "--model", model, *given).returncode == 5


def test_what_goes_wrong_has_its_exit_code(tmp_path: Path, bench: Run, runtime: Path, row: dict[str, Any]) -> None:
    model = mlp(tmp_path / "m.onnx")
    pack(model, tmp_path / "m.ecz")
    damaged = bytearray((tmp_path / "m.ecz").read_bytes())
    damaged[40] ^= 1
    (tmp_path / "d.ecz").write_bytes(damaged)
    (tmp_path / "n.onnx").write_bytes(b"no model")
    right = case(tmp_path / "t", model, row)
    wrong = case(tmp_path / "w", model, row, change=1.0)
    other = case(
        tmp_path / "o",
        save(tmp_path / "o.onnx", "g (float[1] q) => (float[1] y) { y = Relu(q) }"),
        {"q": np.ones(1, np.float32)},
    )
    expected = [
        (2, [], "--model"),
        (2, ["--runs", "0", "--model", model, *right], "--runs 0"),
        (2, ["--runs", "1.5", "--model", model, *right], "--runs 1.5"),
        (2, ["--cores", "40000", "--model", model, *right], "--cores"),
        (7, ["--cores", "4000", "--model", model, *right], "--cores 4000: not possible here"),
        (7, ["--cores", "1023", "--model", model, *right], "--cores 1023: not possible here"),
        (2, ["--cores", "0,", "--model", model, *right], "--cores"),
        (2, ["--nonsense", "1", "--model", model, *right], "--nonsense"),
        (2, ["--model"], "--model"),
        (3, ["--model", tmp_path / "n.onnx", *right], "n.onnx"),
        (3, ["--model", tmp_path / "none.onnx", *right], "none.onnx"),
        (3, ["--model", model, *other], "m.onnx"),
        (4, ["--model", tmp_path / "d.ecz", *right], "d.ecz"),
        (4, ["--model", model, "--input", model, *right[2:]], "m.onnx"),
        (4, ["--check", tmp_path / "none", "--model", model, *right], "none"),
        (5, ["--model", model, *wrong], "'y' off by"),
        (7, ["--library", model, "--model", model, *right], "cannot be loaded"),
    ]
    for code, arguments, words in expected:
        done = bench("--library", runtime, *arguments)
        assert (done.returncode, done.stdout) == (code, ""), (arguments, done.stderr)
        assert (done.stderr.startswith("error: "), words in done.stderr) == (True, True), (arguments, done.stderr)


def test_waiting_without_a_thermometer_is_told(tmp_path: Path, bench: Run, runtime: Path, row: dict[str, Any]) -> None:
    if list(Path("/sys/class/thermal").glob("thermal_zone*")):
        pytest.skip("this machine has a thermometer")
    model = mlp(tmp_path / "m.onnx")
    given = ["--library", runtime, "--model", model, *case(tmp_path / "t", model, row), "--pause-above", "40"]
    assert run_json(bench, *given, "--runs", "1")["notes"] == ["no temperature can be read here: never paused"]
