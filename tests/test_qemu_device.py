"""The emulated device without an emulator: what it asks for, and how instructions are counted."""

from __future__ import annotations

from pathlib import Path

import pytest
from device_samples import script_bundle

from edgecompress.devices import BenchOptions, open_runner, qemu
from edgecompress.errors import DeviceError, UsageError

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
case "$EDGECOMPRESS_EMULATOR" in *out=*) echo $count >"${EDGECOMPRESS_EMULATOR##*out=}" ;; esac
cat <<END
{"schema_version": 2, "target": "arm64", "threads": 1, "after": {}, "notes": [],
 "device": {"cpu_model": "$EDGECOMPRESS_EMULATOR"},
 "results": [{"model": "m", "outputs_match": true, "init_ms": 1, "first_ms": 1, "warmup_ms": [$warm],
  "values_ms": [$(seq -s, "$runs")], "median_ms": 1, "p90_ms": 1, "samples": $runs, "peak_rss_bytes": 1}]}
END
"""


@pytest.fixture(name="emulator")
def program_that_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program with the emulator's name; the scripts of these tests never start it."""
    program = tmp_path / "bin" / "qemu-aarch64"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 'qemu-aarch64 version 10.0.0'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    return program


def test_the_instructions_of_an_inference_are_a_difference(
    tmp_path: Path, emulator: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qemu, "counter_of", lambda _: tmp_path / "counter.so")
    bundles = [script_bundle(tmp_path / name, SCRIPT, architecture="aarch64") for name in ("a", "b")]
    found = open_runner("qemu://cortex-a72").measure_bundles(bundles, options=BenchOptions())
    assert [samples.metadata["instructions"] for samples in found] == [700, 700]
    assert [samples.emulated for samples in found] == [True, True]
    assert f"{emulator} -cpu cortex-a72 -L " in found[0].metadata["cpu_model"]


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
