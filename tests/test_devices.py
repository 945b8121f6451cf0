from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from device_samples import RESULT, printing, script_bundle

from edgecompress.devices import BenchOptions, open_runner
from edgecompress.devices import local as local_module
from edgecompress.devices.ssh import SshAddress, arguments, parse_address
from edgecompress.errors import DeviceError, ModelError, UsageError
from edgecompress.latency import LatencySamples
from edgecompress.report.bench import bench_rows, device_line
from edgecompress.runtime.worker import Worker

X = {"x": np.ones((1, 4), np.float32)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    paths = []
    for op in ("Relu", "Sigmoid"):
        text = f'<ir_version: 8, opset_import: ["" : 13]> g (float[N, 4] x) => (float[N, 4] y) {{ y = {op}(x) }}'
        paths.append(folder / f"{op}.onnx")
        onnx.save(onnx.parser.parse_model(text), paths[-1])
    return paths


def test_an_unknown_device_gets_a_suggestion() -> None:
    with pytest.raises(UsageError, match="no device 'locall'") as caught:
        open_runner("locall")
    assert "did you mean 'local'" in caught.value.hint


def test_the_local_device_takes_no_address() -> None:
    with pytest.raises(UsageError, match="takes no address"):
        open_runner("local://somewhere")


@pytest.mark.parametrize("alternate", [True, False])
def test_every_model_gets_its_own_samples(models: list[Path], alternate: bool) -> None:
    seen: list[tuple[int, int]] = []
    options = BenchOptions(runs=12, alternate=alternate)
    measured = open_runner("local").measure(models, feeds=X, options=options, progress=lambda *step: seen.append(step))
    assert [len(samples.values_ms) for samples in measured] == [12, 12]
    assert all(samples.init_ms > 0 and samples.first_ms > 0 and samples.warmup_ms for samples in measured)
    assert all(10_000_000 < samples.peak_rss_bytes < 10**9 for samples in measured)
    assert not any(samples.emulated for samples in measured)
    assert measured[0].metadata["alternating"] is alternate
    assert measured[0].metadata["device"] == "local"
    assert seen[-1] == (24, 24)
    assert seen == sorted(seen)


@pytest.mark.parametrize(("alternate", "together"), [(True, 2), (False, 1)])
def test_only_alternating_holds_two_models_at_a_time(
    models: list[Path], monkeypatch: pytest.MonkeyPatch, alternate: bool, together: int
) -> None:
    alive: list[int] = [0]
    most = [0]

    class Counted(Worker):
        def __enter__(self) -> Counted:
            alive[0] += 1
            most[0] = max(most[0], alive[0])
            return super().__enter__()

        def __exit__(self, *reason: object) -> None:
            super().__exit__(*reason)  # type: ignore[arg-type]
            alive[0] -= 1

    monkeypatch.setattr(local_module, "Worker", Counted)
    open_runner("local").measure(models, feeds=X, options=BenchOptions(runs=2, alternate=alternate))
    assert (most[0], alive[0]) == (together, 0)


def test_options_reach_the_workers(models: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []

    class Noted(Worker):
        def __init__(self, path: Path, **options: object) -> None:
            asked.append({"path": path, **options})
            super().__init__(path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(local_module, "Worker", Noted)
    core = min(os.sched_getaffinity(0))
    options = BenchOptions(threads=2, runs=1, low_memory=True, cores=(core,))
    (samples,) = open_runner("local").measure(models[:1], feeds=X, options=options)
    assert asked == [{"path": models[0], "threads": 2, "low_memory": True, "cores": (core,)}]
    assert samples.metadata["cores"] == 1  # what the process was left with


def test_a_core_that_is_not_there_is_a_usage_error(models: list[Path]) -> None:
    with pytest.raises(UsageError, match="cannot run on the cores 1023") as caught:
        open_runner("local").measure(models[:1], feeds=X, options=BenchOptions(cores=(1023,)))
    assert "lends the cores" in caught.value.hint


def test_waiting_for_a_cooler_machine_is_said(models: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from edgecompress.runtime import measure

    heat = [90.0, 80.0, 60.0]
    monkeypatch.setattr(measure, "temperature_c", lambda: heat.pop(0) if len(heat) > 1 else heat[0])
    monkeypatch.setattr(measure.time, "sleep", lambda _: None)
    (samples,) = open_runner("local").measure(models[:1], feeds=X, options=BenchOptions(runs=2, pause_above=70.0))
    assert samples.metadata["notes"] == ["paused for 2 s in all"]


def test_a_model_that_does_not_run_is_an_error(models: list[Path], tmp_path: Path) -> None:
    one = BenchOptions(runs=1)
    with pytest.raises(ModelError):
        open_runner("local").measure([models[0], tmp_path / "none.onnx"], feeds=X, options=one)
    with pytest.raises(ModelError):
        open_runner("local").measure(models, feeds={"z": X["x"]}, options=one)
    with pytest.raises(UsageError, match="at least 1"):
        open_runner("local").measure(models, feeds=X, options=BenchOptions(runs=0))
    with pytest.raises(UsageError, match="nothing to measure"):
        open_runner("local").measure_bundles([], options=one)


def test_a_bundle_here_is_measured_by_its_own_program(tmp_path: Path) -> None:
    bundle = script_bundle(tmp_path / "b", printing({**RESULT, "threads": 3}))
    (samples,) = open_runner("local").measure_bundles([bundle], options=BenchOptions(runs=3))
    assert (samples.values_ms, samples.metadata["device"], samples.metadata["threads"]) == ((1.0, 1.0, 3.0), "local", 3)
    assert samples.metadata["outputs_match"] is True


def test_a_bundle_for_another_machine_is_not_started_here(tmp_path: Path) -> None:
    bundle = script_bundle(tmp_path / "b", f"touch {tmp_path}/seen", architecture="sparc")
    with pytest.raises(DeviceError, match="the bundle is for sparc, this machine is "):
        open_runner("local").measure_bundles([bundle], options=BenchOptions())
    assert not (tmp_path / "seen").exists()


# Addresses


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pi", SshAddress("pi", None, None, "/tmp")),
        ("pi@board:2222", SshAddress("board", "pi", 2222, "/tmp")),
        ("Board.Local", SshAddress("Board.Local", None, None, "/tmp")),  # names in ssh's configuration have capitals
        ("pi@10.0.0.7/mnt/usb stick/", SshAddress("10.0.0.7", "pi", None, "/mnt/usb stick")),
        ("[fe80::1]:22", SshAddress("fe80::1", None, 22, "/tmp")),
        ("[::1]:22", SshAddress("::1", None, 22, "/tmp")),
        ("PI@pi", SshAddress("pi", "PI", None, "/tmp")),  # the user's name is not the host's
        ("pi@Pi/PI@pi", SshAddress("Pi", "pi", None, "/PI@pi")),
    ],
)
def test_an_ssh_address_is_read_as_it_is_written(text: str, expected: SshAddress) -> None:
    assert parse_address(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":22",
        "::1",
        "-oProxyCommand=x",
        "pi@-oProxyCommand=x",
        "-x@board",
        "board:port",
        "board:99999999",
        "board?x",
        "a b",
    ],
)
def test_what_is_no_ssh_address_or_would_be_an_option_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_address(text)


def test_a_password_in_an_address_is_refused_and_never_repeated() -> None:
    with pytest.raises(UsageError, match="password") as caught:
        open_runner("ssh://pi:s3cret@board")
    assert "s3cret" not in caught.value.message + caught.value.hint


def test_ssh_is_asked_to_ask_nothing_and_gets_only_what_the_address_says() -> None:
    given = arguments(SshAddress("board", None, None, "/tmp"))
    assert given[-2:] == ["--", "board"]
    assert "BatchMode=yes" in given
    assert not {"-l", "-p"} & set(given)
    assert arguments(SshAddress("board", "pi", 22, "/tmp"))[-6:] == ["-l", "pi", "-p", "22", "--", "board"]


@pytest.mark.parametrize(
    "device", ["adb://-s", "adb://a b", "container://", "container://-v", "container://A b", "ssh:pi"]
)
def test_addresses_of_other_devices_are_checked_too(device: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_runner(device)
    assert caught.value.hint


# Programs that devices are reached by, played by scripts


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def write(name: str, script: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)

    return write


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo 'error: device offline' >&2; exit 1", "it is offline"),
        ("echo 'error: device unauthorized.' >&2; exit 1", "does not trust this computer"),
        ("echo 'error: more than one device/emulator' >&2; exit 1", "more than one device"),
        ("echo 'error: device not found' >&2; exit 1", "cannot be reached: error: device not found"),
        ('case "$*" in *get-state) echo device;; *) echo cmd;; esac', "does not tell exit codes"),
        ('case "$*" in *get-state) echo device;; *features) echo shell_v2;; esac', "the device went away"),
    ],
)
def test_what_adb_says_of_a_device_is_told(tmp_path: Path, program, script: str, words: str) -> None:
    program("adb", script)
    with pytest.raises(DeviceError, match=re.escape(words)) as caught:
        open_runner("adb://SERIAL").measure_bundles([script_bundle(tmp_path / "b", "")], options=BenchOptions())
    assert caught.value.hint


def test_of_what_adb_says_only_the_last_line_is_told(tmp_path: Path, program) -> None:
    program("adb", "printf '* daemon not running\\n* daemon started\\nerror: no device\\n' >&2; exit 1")
    with pytest.raises(DeviceError) as caught:
        open_runner("adb://nothere").measure_bundles([script_bundle(tmp_path / "b", "")], options=BenchOptions())
    assert caught.value.message == "adb://nothere cannot be reached: error: no device"


_ENGINE = """
echo "$0 $*" >>{log}
case "$1" in
info) exit {works};;
run) echo container-7;;
exec) shift 3; exec "$@";;
esac"""


def test_the_first_container_engine_that_works_is_taken_and_its_container_removed(tmp_path: Path, program) -> None:
    log = tmp_path / "log"
    program("docker", _ENGINE.format(log=log, works=1))  # a client without a server
    program("podman", _ENGINE.format(log=log, works=0))
    bundle = script_bundle(tmp_path / "b", printing(RESULT))
    (samples,) = open_runner("container://debian:12").measure_bundles([bundle], options=BenchOptions())
    assert samples.metadata["device"] == "container://debian:12"
    said = [line.rpartition("/")[2] for line in log.read_text().splitlines()]
    assert said[:2] == ["docker info", "podman info"]
    assert said[2].startswith("podman run --detach --rm --entrypoint sh debian:12 -c")
    assert all(
        line.startswith("podman exec --interactive container-7 sh -c") for line in said[3:-1] if "podman" in line
    )
    assert said[-1] == "podman rm --force container-7"


def test_without_a_container_engine_the_error_names_them(tmp_path: Path, program, monkeypatch) -> None:
    bundle = script_bundle(tmp_path / "b", "")
    for name in ("docker", "podman", "buildah"):
        program(name, "exit 1")
    with pytest.raises(DeviceError, match="docker and podman and buildah cannot be used here"):
        open_runner("container://debian:12").measure_bundles([bundle], options=BenchOptions())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DeviceError, match="there is no docker, podman or buildah"):
        open_runner("container://debian:12").measure_bundles([bundle], options=BenchOptions())


# What bench says


def _samples(median: float, **changes: object) -> LatencySamples:
    facts = {"device": "d", "threads": 1, "outputs_match": True, **changes.pop("facts", {})}  # type: ignore[dict-item]
    return LatencySamples(
        init_ms=1.0, first_ms=1.0, warmup_ms=(), values_ms=(median,) * 10, peak_rss_bytes=1, metadata=facts, **changes
    )


def test_every_row_is_compared_with_the_first() -> None:
    rows = bench_rows("abc", [_samples(4.0), _samples(3.0), _samples(8.0)], [1, 2, 3])
    assert [row["ratio"] for row in rows] == [1.0, 0.75, 2.0]
    assert [(row["model"], row["size_bytes"], row["outputs_match"]) for row in rows][1] == ("b", 2, True)


def test_of_an_emulated_run_no_time_is_told_but_the_instructions() -> None:
    runs = [_samples(1.0, emulated=True, facts={"instructions": count}) for count in (200, 50)]
    rows = bench_rows("ab", runs, [None, None])
    assert [(row["median_ms"], row["values_ms"], row["first_ms"]) for row in rows] == [(None, None, None)] * 2
    assert [row["ratio"] for row in rows] == [1.0, 0.25]
    assert rows[0]["warnings"] == ["emulated: these times say nothing about a real device"]
    unknown = bench_rows("ab", [_samples(1.0, emulated=True)] * 2, [None, None])
    assert [row["ratio"] for row in unknown] == [None, None]


def test_the_device_is_described_with_its_clock_and_heat_before_and_after() -> None:
    facts = {"cpu_model": "Cortex-A72", "cores": 4, "temperature_c": 50.4, "frequency_mhz": 1500.0, "governor": None}
    after = {"temperature_c": 61.2, "frequency_mhz": 1500.0}
    line = device_line({**facts, "after": after, "os": "Linux 6", "onnxruntime": "1.31.1"})
    assert line == "Cortex-A72, 4 cores, 1500 MHz, 50 → 61 °C, Linux 6, onnxruntime 1.31.1"
    assert device_line({"cpu_model": "a\x1b[31m"}).isprintable()
