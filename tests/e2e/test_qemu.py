"""Bundles for other processors, emulated: built, checked, run, their instructions counted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from device_samples import sign
from machines import needs_programs
from tiny import DIGITS_MODEL

from edgecompress.bundle import build_bundle, verify_bundle
from edgecompress.bundle.elf import read_elf
from edgecompress.bundle.manifest import CHECKSUMS, write_checksums
from edgecompress.bundle.program import MANIFEST
from edgecompress.container import pack
from edgecompress.devices import BenchOptions, open_runner
from edgecompress.devices.qemu import CPUS, counter_of, find_emulator
from edgecompress.errors import DeviceError, FormatError, ToleranceError, UsageError
from edgecompress.files import sha256_of
from edgecompress.model import load_model
from edgecompress.runtime.tensors import read_tensor, write_tensor
from edgecompress.targets import load_target
from edgecompress.validate import random_sample

pytestmark = [pytest.mark.network, pytest.mark.qemu, pytest.mark.slow]

OPTIONS = BenchOptions(runs=3)


def measure(cpu: str, *folders: Path) -> list[dict[str, Any]]:
    """Return what is known of each bundle after it ran on an emulated processor."""
    needs_programs(CPUS[cpu].program)
    found = open_runner(f"qemu://{cpu}").measure_bundles(folders, options=OPTIONS)
    assert all(samples.emulated for samples in found)
    return [dict(samples.metadata) for samples in found]


def counts(cpu: str) -> bool:
    """Tell whether instructions are counted here: by a QEMU that takes plugins, with one that has been compiled."""
    return counter_of(find_emulator(CPUS[cpu])) is not None


@pytest.mark.parametrize(("cpu", "target"), [("cortex-a72", "arm64"), ("cortex-a7", "armhf")])
def test_a_native_bundle_runs_and_its_instructions_are_counted(
    make_bundle: Callable[..., Path], cpu: str, target: str
) -> None:
    bundle = make_bundle(target, "native")
    manifest = verify_bundle(bundle)
    programs = [bundle / "bench", *(bundle / "lib").iterdir()]
    assert {read_elf(path).machine for path in programs} == {manifest.architecture}
    (found,) = measure(cpu, bundle)
    assert (found["outputs_match"], found["machine"]) == (True, manifest.architecture)
    if counts(cpu):
        # One image takes 1.1 million multiplications; an instruction does up to four of them, and most do none.
        assert 300_000 < found["instructions"] < 10_000_000
        assert found["notes"] == []
    else:
        assert "instructions" not in found
        assert "instructions were not counted" in found["notes"][0]


def test_a_second_model_counts_the_same_in_the_same_runtime(make_bundle: Callable[..., Path], tmp_path: Path) -> None:
    bundle = make_bundle("arm64", "native")
    other = tmp_path / "other"
    sample = random_sample(load_model(DIGITS_MODEL), {})
    pack(DIGITS_MODEL, tmp_path / "m.ecz")
    build_bundle(tmp_path / "m.ecz", other, target=load_target("arm64"), sample=sample, runtime="none")
    first, second = measure("cortex-a72", bundle, other)
    assert (first["outputs_match"], second["outputs_match"]) == (True, True)
    if not counts("cortex-a72"):
        pytest.skip("this QEMU takes no plugins, or there is no C compiler")
    # The same model. Addresses differ from run to run, and with them what loader and allocators do: 200 thousand
    # instructions at most were seen, which three inferences or more share.
    assert abs(second["instructions"] - first["instructions"]) < 200_000


def test_wrong_outputs_damage_and_the_wrong_machine_are_told(make_bundle: Callable[..., Path], tmp_path: Path) -> None:
    bundle = make_bundle("arm64", "native")
    with pytest.raises(DeviceError, match="is for aarch64"):
        measure("cortex-a7", bundle)
    damaged = tmp_path / "damaged"
    shutil.copytree(bundle, damaged)
    (damaged / "lib" / "libc.so.6").write_bytes(b"x")
    with pytest.raises(FormatError, match=r"libc\.so\.6 was altered"):
        measure("cortex-a72", damaged)
    wrong = tmp_path / "wrong"
    shutil.copytree(bundle, wrong)
    place = wrong / "test_data" / "output_0.pb"
    name, value = read_tensor(place.read_bytes())
    place.write_bytes(write_tensor(name, value + 1))
    content = json.loads((wrong / MANIFEST).read_text())
    for name in (MANIFEST, CHECKSUMS):
        (wrong / name).unlink()
    write_checksums(wrong)
    for path, entry in content["files"].items():
        entry.update(sha256=sha256_of(wrong / path), size_bytes=(wrong / path).stat().st_size)
    sign(wrong, content)
    with pytest.raises(ToleranceError, match="off by"):
        measure("cortex-a72", wrong)


def test_a_bundle_of_wheels_runs_with_a_python_that_is_fetched_for_it(make_bundle: Callable[..., Path]) -> None:
    (found,) = measure("cortex-a72", make_bundle("arm64", "wheel"))
    assert (found["outputs_match"], found["machine"]) == (True, "aarch64")
    assert found.get("instructions", 1) > 0


def test_more_threads_than_one_are_refused(make_bundle: Callable[..., Path]) -> None:
    needs_programs(CPUS["cortex-a72"].program)
    runner, bundle = open_runner("qemu://cortex-a72"), make_bundle("arm64", "native")
    with pytest.raises(UsageError, match="one thread"):
        runner.measure_bundles([bundle], options=BenchOptions(threads=2, runs=1))
