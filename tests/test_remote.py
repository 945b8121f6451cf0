"""Measuring over a transport. The device is this machine's own shell, the programs are scripts; the faults are real."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from device_samples import MODEL, RESULT, printing, script_bundle, sign

from edgecompress.bundle import verify_bundle
from edgecompress.bundle.outcome import Finished
from edgecompress.devices import BenchOptions
from edgecompress.devices.program import also, arguments, read_result
from edgecompress.devices.remote import RemoteRunner, _interpreter, runs_on
from edgecompress.devices.shell import ShellTransport
from edgecompress.errors import (
    DeviceError,
    EdgecompressError,
    FormatError,
    ModelError,
    OutputError,
    ToleranceError,
    UsageError,
)
from edgecompress.latency import LatencySamples, stability_warnings

OPTIONS = BenchOptions(runs=3)


def shell(parent: Path, **changes: object) -> ShellTransport:
    made = ShellTransport(
        name="ssh://device",
        command=lambda line: ["sh", "-c", line],
        lost=lambda done: DeviceError(f"lost: {done.stderr.decode().strip()}", hint="look"),
        parent=str(parent),
    )
    return replace(made, **changes)  # type: ignore[arg-type]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The folder on the device that temporary ones are made in."""
    folder = tmp_path / "device"
    folder.mkdir()
    return folder


def measure(
    transport: ShellTransport, bundles: Sequence[Path], options: BenchOptions = OPTIONS
) -> list[LatencySamples]:
    return RemoteRunner(lambda: nullcontext(transport)).measure_bundles(bundles, options=options)


def failing(transport: ShellTransport, *bundles: Path) -> EdgecompressError:
    """Measure and return the error; nothing may be left on the device."""
    with pytest.raises(EdgecompressError) as caught:
        measure(transport, bundles)
    assert list(Path(transport.parent).iterdir()) == []
    assert caught.value.hint
    return caught.value


def test_what_the_program_prints_becomes_samples_and_nothing_stays_on_the_device(tmp_path, place) -> None:
    bundle = script_bundle(tmp_path / "b", printing(RESULT))
    (samples,) = measure(shell(place), [bundle])
    assert (samples.init_ms, samples.first_ms, samples.warmup_ms) == (5.0, 2.0, (1.5, 1.25))
    assert samples.values_ms == (1.0, 1.0, 3.0)
    assert samples.peak_rss_bytes == 9_000_000
    assert samples.emulated is False
    facts = samples.metadata
    assert (facts["device"], facts["threads"], facts["cpu_model"]) == ("ssh://device", 2, "Cortex")
    assert (facts["temperature_c"], facts["after"]["temperature_c"]) == (50.5, 61.0)
    assert facts["notes"] == ["paused for 3 s in all"]
    assert facts["outputs_match"] is True
    assert list(place.iterdir()) == []


def test_the_program_gets_the_options_and_the_bundle_as_its_folder_with_its_modes(tmp_path, place) -> None:
    seen = tmp_path / "seen"
    script = f'{{ echo "$@"; ls; test -x lib/tool && echo executable; }} >{seen}\n{printing(RESULT)}'
    options = BenchOptions(runs=7, threads=3, cores=(0, 1), pause_above=70.0)
    measure(shell(place), [script_bundle(tmp_path / "b", script)], options)
    assert seen.read_text().splitlines() == [
        "--json --runs 7 --threads 3 --cores 0,1 --pause-above 70",
        "SHA256SUMS",
        "lib",
        "manifest.json",
        "model.onnx",
        "run.sh",
        "executable",
    ]


def test_only_files_that_the_manifest_lists_leave_this_machine(tmp_path, place) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s")
    bundle = script_bundle(tmp_path / "b", f"ls -A >{tmp_path / 'seen'}; {printing(RESULT)}")
    (bundle / "link").symlink_to(secret)
    measure(shell(place), [bundle])
    assert "link" not in (tmp_path / "seen").read_text().split()


def test_more_bundles_are_pushed_too_and_handed_to_the_first_ones_program(tmp_path, place) -> None:
    both = {**RESULT, "results": [MODEL, {**MODEL, "values_ms": [2.0]}]}
    first = script_bundle(
        tmp_path / "a", f'echo "$@" >{tmp_path / "seen"}; ls .. >>{tmp_path / "seen"}\n{printing(both)}'
    )
    second = script_bundle(tmp_path / "b", "exit 1")
    samples = measure(shell(place), [first, second])
    assert [each.values_ms for each in samples] == [(1.0, 1.0, 3.0), (2.0,)]
    assert (tmp_path / "seen").read_text().splitlines() == [
        "--json --runs 3 --check ../1/SHA256SUMS --next --model ../1/model.onnx --input --expect --tolerance 0.001",
        *("0", "1", "pid"),
    ]


def test_a_program_of_wheels_gets_other_bundles_by_their_folders(tmp_path) -> None:
    manifest = verify_bundle(script_bundle(tmp_path / "b", ""))
    wheel = replace(manifest, runtime_form="wheel")
    assert also(wheel, [(manifest, "../1"), (manifest, "../2")]) == ["--also", "../1", "--also", "../2"]
    assert arguments(BenchOptions()) == ["--runs", "50"]


@pytest.mark.parametrize(
    ("code", "kind"), [(2, UsageError), (3, ModelError), (4, FormatError), (5, ToleranceError), (7, DeviceError)]
)
def test_the_programs_own_errors_keep_their_class_their_words_and_their_hint(tmp_path, place, code, kind) -> None:
    script = f"echo 'error: that went wrong' >&2; echo 'hint: do this' >&2; exit {code}"
    error = failing(shell(place), script_bundle(tmp_path / "b", script))
    assert type(error) is kind
    assert "on ssh://device: that went wrong" in error.message
    assert error.hint == "do this"


def test_a_program_that_dies_says_how_and_with_which_last_words(tmp_path, place) -> None:
    error = failing(shell(place), script_bundle(tmp_path / "b", "echo 'Illegal instruction' >&2; kill -ILL $$"))
    assert isinstance(error, DeviceError)
    assert "signal 4" in error.message
    missing = failing(shell(place), script_bundle(tmp_path / "c", "exec nothing-of-that-name"))
    assert "missing" in missing.message


def test_a_program_that_is_killed_in_the_middle_is_a_device_error(tmp_path, place) -> None:
    bundle = script_bundle(tmp_path / "b", "exec sleep 60")
    killer = threading.Thread(target=lambda: os.kill(int(_written(place, "*/pid")), signal.SIGKILL))
    killer.start()
    error = failing(shell(place), bundle)
    killer.join()
    assert isinstance(error, DeviceError)
    assert "died on ssh://device (signal 9)" in error.message


def test_a_connection_that_ends_in_the_middle_is_lost_whatever_its_exit_code(tmp_path, place) -> None:
    lost = shell(place, command=lambda line: ["sh", "-c", "echo gone >&2; exit 0" if "sleep 60" in line else line])
    bundle = script_bundle(tmp_path / "b", printing(RESULT))
    with pytest.raises(DeviceError, match="lost: gone"):
        lost.run(("sleep 60",), folder=str(place))
    half = shell(place, command=lambda line: ["sh", "-c", line.replace("sh run.sh", "kill -9 $$; true")])
    assert isinstance(failing(half, bundle), DeviceError)


def test_where_cleaning_up_fails_too_the_error_says_what_is_left(tmp_path, place) -> None:
    gone = {"now": False}

    def command(line: str) -> list[str]:
        gone["now"] = gone["now"] or "run.sh" in line
        return ["sh", "-c", "exit 255" if gone["now"] else line]

    with pytest.raises(DeviceError) as caught:
        measure(shell(place, command=command), [script_bundle(tmp_path / "b", "true")])
    (left,) = place.iterdir()
    assert f"{left} may be left on the device" in caught.value.hint


@pytest.mark.parametrize(
    "printed",
    [
        "",
        "not JSON",
        "[]",
        json.dumps({**RESULT, "results": []}),
        json.dumps({**RESULT, "results": [{**MODEL, "outputs_match": False}]}),
        json.dumps({**RESULT, "results": [{**MODEL, "values_ms": [1.0, float("nan")]}]}),
        json.dumps({**RESULT, "results": [{**MODEL, "values_ms": [10**400]}]}),
        json.dumps({**RESULT, "results": [{**MODEL, "values_ms": [1e308, 1e308]}]}),  # their sum is infinite
        json.dumps({**RESULT, "results": [{**MODEL, "peak_rss_bytes": 10**400}]}),
        json.dumps({**RESULT, "results": [{**MODEL, "instructions": 10**400}]}),
        json.dumps({**RESULT, "results": [1]}),
        json.dumps({**RESULT, "notes": 1}),
        json.dumps({**RESULT, "notes": "abc"}),
        json.dumps({**RESULT, "notes": {"a": 1}}),
        json.dumps({**RESULT, "after": {"frequency_mhz": "fast"}}),
        json.dumps({**RESULT, "device": {"temperature_c": 10**400}}),
        json.dumps({**RESULT, "results": [{**MODEL, "first_ms": -1}]}),
        json.dumps({**RESULT, "results": [{**MODEL, "peak_rss_bytes": "9"}]}),
        json.dumps({**RESULT, "device": {"cpu_model": ["a"]}}),
        json.dumps({**RESULT, "device": None}),
        "[" * 100_000,
    ],
)
def test_a_result_that_is_none_is_refused(printed: str) -> None:
    with pytest.raises(DeviceError, match="no result"):
        read_result(printed.encode(), device="d", models=1)


def test_no_steady_run_is_no_result() -> None:
    with pytest.raises(DeviceError, match="no result"):
        read_result(json.dumps({**RESULT, "results": [{**MODEL, "values_ms": []}]}).encode(), device="d", models=1)


def test_nothing_but_known_facts_of_a_device_gets_into_a_report() -> None:
    device = {
        **RESULT["device"],
        "environment": {"TOKEN": "s3cret"},
        "password": "s3cret",
        "os": "Linux\x1b[31m" + "x" * 999,
    }
    (samples,) = read_result(json.dumps({**RESULT, "device": device}).encode(), device="d", models=1)
    assert "s3cret" not in repr(samples)
    assert samples.metadata["os"] == ("Linux[31m" + "x" * 999)[:200]


def test_a_clock_that_fell_is_warned_of() -> None:
    device = {**RESULT["device"], "frequency_mhz": 1800.0}
    (samples,) = read_result(json.dumps({**RESULT, "device": device}).encode(), device="d", models=1)
    assert any("1800 to 1500 MHz" in warning for warning in stability_warnings(samples))
    steady = replace(samples, metadata={**samples.metadata, "frequency_mhz": 1510.0})
    assert not any("MHz" in warning for warning in stability_warnings(steady))


def test_a_disk_without_room_is_found_before_anything_is_copied(tmp_path, full_disk) -> None:
    disk = full_disk(64)
    error = failing(shell(disk), script_bundle(tmp_path / "b", "true", payload=200_000))
    assert isinstance(error, OutputError)
    assert "65,536 bytes left" in error.message


def test_a_device_that_cannot_tell_its_space_finds_out_while_it_writes(tmp_path, full_disk) -> None:
    disk = full_disk(64)
    blind = shell(disk, command=lambda line: ["sh", "-c", f"df() {{ return 1; }}\n{line}"])
    error = failing(blind, script_bundle(tmp_path / "b", "true", payload=200_000))
    assert isinstance(error, OutputError)
    assert "no space left" in error.message


def test_a_folder_that_cannot_be_made_is_an_output_error(tmp_path) -> None:
    with pytest.raises(OutputError, match="cannot make a folder"):
        measure(shell(tmp_path / "nowhere"), [script_bundle(tmp_path / "b", "true")])


def _flip_a_byte(bundle: Path) -> None:
    content = bytearray((bundle / "model.onnx").read_bytes())
    content[3] ^= 1
    (bundle / "model.onnx").write_bytes(content)


def _leave_the_folder(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"]["../outside"] = manifest["files"].pop("lib/tool")
    sign(bundle, manifest)


def _link_out(bundle: Path) -> None:
    (bundle / "model.onnx").rename(bundle.parent / "elsewhere")
    (bundle / "model.onnx").symlink_to(bundle.parent / "elsewhere")


@pytest.mark.parametrize("harm", [_flip_a_byte, _leave_the_folder, _link_out])
def test_a_tampered_bundle_is_refused_before_the_device_is_touched(tmp_path, harm: Callable[[Path], None]) -> None:
    def untouched() -> ShellTransport:
        raise AssertionError("the device was touched")

    good, bad = script_bundle(tmp_path / "a", "true"), script_bundle(tmp_path / "b", "true")
    harm(bad)
    for folders in ([bad], [good, bad]):
        with pytest.raises(FormatError):
            RemoteRunner(untouched).measure_bundles(folders, options=OPTIONS)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("form", "entry_point"), [("none", None), ("wasm", "index.html"), ("gradle", "build.gradle.kts")]
)
def test_a_bundle_without_a_program_for_a_shell_is_refused(tmp_path, form, entry_point) -> None:
    bundle = script_bundle(tmp_path / "b", "true")
    manifest = json.loads((bundle / "manifest.json").read_text())
    if entry_point:
        (bundle / "run.sh").rename(bundle / entry_point)
        manifest["files"][entry_point] = manifest["files"].pop("run.sh")
    sign(bundle, {**manifest, "runtime_form": form, "entry_point": entry_point})
    with pytest.raises(UsageError, match=f"no program for a shell .its runtime is '{form}'."):
        measure(shell(tmp_path), [bundle])


def test_without_alternating_every_bundle_is_measured_by_its_own_program(tmp_path, place) -> None:
    second = {**RESULT, "results": [{**MODEL, "values_ms": [2.0]}]}
    bundles = [script_bundle(tmp_path / "a", printing(RESULT)), script_bundle(tmp_path / "b", printing(second))]
    samples = measure(shell(place), bundles, BenchOptions(alternate=False))
    assert [each.values_ms for each in samples] == [(1.0, 1.0, 3.0), (2.0,)]
    assert list(place.iterdir()) == []


def test_a_bundle_for_another_machine_is_never_copied(tmp_path, place) -> None:
    error = failing(shell(place), script_bundle(tmp_path / "b", "true", architecture="sparc"))
    assert "the bundle is for sparc" in error.message
    assert runs_on("armv7l", "aarch64")  # 32-bit programs run on most 64-bit ARM kernels
    assert not runs_on("aarch64", "armv7l")


def test_nothing_but_a_version_of_python_gets_into_a_line_of_shell(tmp_path, place) -> None:
    manifest = verify_bundle(script_bundle(tmp_path / "b", "true"))
    for version in (f"3.11;touch {tmp_path}/seen;", "3.11\n", "3", None, "-3.11"):
        with pytest.raises(FormatError, match="as its Python"):
            _interpreter(shell(place), replace(manifest, python={"version": version}), str(place))
    assert not (tmp_path / "seen").exists()
    assert _interpreter(shell(place), replace(manifest, python={"version": "3.11"}), str(place))[1:3] == ("-I", "-S")


def test_a_device_that_does_not_answer_is_given_up(place) -> None:
    started = time.monotonic()
    with pytest.raises(DeviceError, match="did not answer"):
        shell(place).run(("sleep", "60"), folder=str(place), timeout_s=0.2)
    assert time.monotonic() - started < 30  # not a measurement: it must not be the 60 s of the program


def test_remove_takes_nothing_but_folders_of_its_own(place) -> None:
    with pytest.raises(ValueError, match="not a folder that was made here"):
        shell(place).remove(str(place))


def test_a_transport_whose_program_is_missing_says_so(place) -> None:
    with pytest.raises(DeviceError, match="cannot start no-such-program"):
        shell(place, command=lambda line: ["no-such-program", line]).machine()


def test_a_mark_of_the_end_is_not_part_of_what_was_said(place) -> None:
    done = shell(place).run(("sh", "-c", "echo out; echo err >&2; exit 9"), folder=str(place))
    assert done == Finished(9, b"out\n", b"err\n")


_CTRL_C = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_remote import measure, shell
measure(shell(Path({place!r})), [Path({bundle!r})])
"""


def test_ctrl_c_ends_the_program_on_the_device_and_removes_its_folder(tmp_path, place) -> None:
    bundle = script_bundle(tmp_path / "b", "exec sleep 60")
    code = _CTRL_C.format(tests=str(Path(__file__).parent), place=str(place), bundle=str(bundle))
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    running = int(_written(place, "*/pid"))
    process.send_signal(signal.SIGINT)
    assert b"KeyboardInterrupt" in process.communicate(timeout=60)[1]
    assert list(place.iterdir()) == []
    assert not Path(f"/proc/{running}/exe").exists()


def _written(place: Path, pattern: str) -> str:
    """Wait for a file with something in it and return that."""
    for _ in range(1200):
        for path in place.glob(pattern):
            if text := path.read_text().strip():
                return text
        time.sleep(0.05)
    raise AssertionError(f"nothing was written to {place}/{pattern}")
