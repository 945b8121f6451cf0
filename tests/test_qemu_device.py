"""The emulated device without an emulator: what it asks for, and how instructions are counted."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from device_samples import script_bundle

from edgecompress.devices import BenchOptions, open_runner, qemu
from edgecompress.errors import DeviceError, UsageError
from edgecompress.report.bench import bench_rows

# A program of which every inference takes 700 instructions, and whose warm-up is longer in a short run, as happens.
SCRIPT = """\
runs=50
while [ $# -gt 0 ]; do
  if [ "$1" = --runs ]; then runs=$2; fi
  shift
done
warm=1,1,1,1,1
count=$((9000 + 700 * (6 + runs)))
if [ "$runs" -ge 4 ]; then warm=1; count=$((9000 + 700 * (2 + runs))); fi
started=$($EDGECOMPRESS_EMULATOR program 'a b') || exit 1
options=${started##*-plugin file=}
options=${options%% *}
if [ "$options" != "${started%% *}" ]; then
  test -f "${options%%,*}" || exit 1
  echo $count >"${options##*,out=}"
fi
cat <<END
{"schema_version": 2, "target": "arm64", "threads": 1, "after": {}, "notes": [],
 "device": {"cpu_model": "$started"},
 "results": [{"model": "m", "outputs_match": true, "init_ms": 1, "first_ms": 1, "warmup_ms": [$warm],
  "values_ms": [$(seq -s, "$runs")], "median_ms": 1, "p90_ms": 1, "samples": $runs, "peak_rss_bytes": 1}]}
END
"""


@pytest.fixture(name="emulator")
def program_that_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program with the emulator's name, which says how it was started."""
    program = tmp_path / "bin" / "qemu-aarch64"
    program.parent.mkdir()
    program.write_text(
        '#!/bin/sh\ncase $1 in -h|--version) echo qemu-aarch64 version 10.0.0 ;; *) echo "$0 $*" ;; esac\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    return program


def test_the_instructions_of_an_inference_are_a_difference(
    tmp_path: Path, emulator: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a b, c"  # the shell splits at spaces, an option of QEMU at commas
    folder.mkdir()
    (folder / "counter, 1.so").touch()
    monkeypatch.setattr(qemu, "counter_of", lambda _: folder / "counter, 1.so")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    bundles = [script_bundle(tmp_path / name, SCRIPT, architecture="aarch64") for name in ("a", "b")]
    found = open_runner("qemu://cortex-a72").measure_bundles(bundles, options=BenchOptions())
    assert [samples.metadata["instructions"] for samples in found] == [700, 700]
    assert [samples.emulated for samples in found] == [True, True]
    assert found[0].metadata["cpu_model"].startswith(f"{emulator} -cpu cortex-a72 -L /")
    assert [path.name for path in folder.iterdir()] == ["counter, 1.so"]


def test_an_emulator_without_plugins_still_checks_the_outputs(tmp_path: Path, emulator: Path) -> None:
    bundle = script_bundle(tmp_path / "a", SCRIPT, architecture="aarch64")
    (found,) = open_runner("qemu://cortex-a53").measure_bundles([bundle], options=BenchOptions())
    assert found.emulated
    assert "instructions" not in found.metadata
    assert "instructions were not counted" in found.metadata["notes"][0]
    assert not list(tmp_path.glob("edgecompress-*"))


def test_what_cannot_be_emulated_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="cortex-a7x") as caught:
        open_runner("qemu://cortex-a7x")
    assert "cortex-a72" in caught.value.hint
    monkeypatch.setenv("PATH", str(tmp_path))
    bundle = script_bundle(tmp_path / "a", SCRIPT, architecture="armv7l")
    with pytest.raises(DeviceError, match="qemu-arm is not installed") as missing:
        open_runner("qemu://cortex-a7").measure_bundles([bundle], options=BenchOptions())
    assert "qemu-user" in missing.value.hint


@pytest.mark.parametrize("cpu", qemu.CPUS.values(), ids=lambda cpu: cpu.name)
def test_a_program_reads_of_the_emulated_processor(tmp_path: Path, cpu: qemu.Cpu) -> None:
    qemu.write_system_files(cpu, tmp_path)
    text = (tmp_path / "proc/cpuinfo").read_text()
    assert f"CPU part\t: {cpu.part}\n" in text
    assert f"CPU architecture: {8 if cpu.machine == 'aarch64' else 7}\n" in text
    assert (tmp_path / "sys/devices/system/cpu/possible").read_text() == "0\n"


def test_an_emulated_processor_takes_its_own_architecture_only(tmp_path: Path, emulator: Path) -> None:
    bundle = script_bundle(tmp_path / "a", SCRIPT, architecture="armv7l")  # a real Cortex-A72 would run it
    with pytest.raises(DeviceError, match="the bundle is for armv7l, qemu://cortex-a72 is aarch64"):
        open_runner("qemu://cortex-a72").measure_bundles([bundle], options=BenchOptions())


@pytest.mark.parametrize("notes", [1, "abc", {}, None])
def test_notes_of_an_emulated_program_that_are_no_list_are_a_device_error(
    tmp_path: Path, emulator: Path, notes: object
) -> None:
    script = SCRIPT.replace('"notes": []', f'"notes": {json.dumps(notes)}')
    bundle = script_bundle(tmp_path / "a", script, architecture="aarch64")
    with pytest.raises(DeviceError, match="no result that can be read"):
        open_runner("qemu://cortex-a72").measure_bundles([bundle], options=BenchOptions())


def test_figures_of_the_machine_that_emulates_are_left_out(tmp_path: Path, emulator: Path) -> None:
    script = SCRIPT.replace('"device": {', '"device": {"cores": 64, "load_average": 70.5, "governor": "x", ')
    bundle = script_bundle(tmp_path / "a", script, architecture="aarch64")
    (found,) = open_runner("qemu://cortex-a72").measure_bundles([bundle], options=BenchOptions())
    assert not {"cores", "load_average", "governor"} & found.metadata.keys()
    assert found.metadata["cpu_model"]
    assert bench_rows("a", [found], [1])[0]["peak_rss_bytes"] is None
