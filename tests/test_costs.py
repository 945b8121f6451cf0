from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from test_kernels import X, chain

from edgecompress import costs
from edgecompress.costs import profile_model
from edgecompress.devices import BenchOptions, open_runner
from edgecompress.errors import UsageError

if TYPE_CHECKING:
    from conftest import Cli

OPTIONS = BenchOptions(runs=3)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "edgecompress" / "kernels"


class Local:
    """The local runner with something done to what it measures."""

    def __init__(self, change: Any) -> None:
        self.change, self.inner = change, open_runner("local")

    def measure(self, models: Sequence[Path], **rest: Any) -> Any:
        return self.change(models, self.inner.measure(models, **rest))


def test_the_prediction_is_the_sum_of_the_kernels_and_a_call(tmp_path: Path, own_cache: Path) -> None:
    profile = profile_model(chain(tmp_path / "m.onnx"), device="local", feeds=X, options=OPTIONS)
    assert {(cost.kernel.op, cost.kernel.count) for cost in profile.costs} == {
        ("MatMul", 1),
        ("MatMul", 2),
        ("Tanh", 2),
    }
    total = profile.call_ms + sum(cost.each_ms * cost.kernel.count for cost in profile.costs)
    assert profile.predicted_ms == pytest.approx(total, rel=1e-12)
    assert profile.measured_ms > 0
    assert not any(cost.reused for cost in profile.costs)
    table = json.loads(profile.table.read_text())
    assert profile.table.parent == own_cache
    assert {row["ms"] for row in table["costs"].values()} == {cost.each_ms for cost in profile.costs}
    assert table["threads"] == 1


def test_a_known_kernel_is_not_measured_again(tmp_path: Path) -> None:
    path = chain(tmp_path / "m.onnx")
    first = profile_model(path, device="local", feeds=X, options=OPTIONS)
    second = profile_model(chain(tmp_path / "n.onnx", seed=5), device="local", feeds=X, options=OPTIONS)
    assert all(cost.reused for cost in second.costs)
    assert [cost.each_ms for cost in second.costs] == [cost.each_ms for cost in first.costs]
    again = profile_model(path, device="local", feeds=X, options=OPTIONS, again=True)
    assert not any(cost.reused for cost in again.costs)


def test_another_number_of_threads_has_a_table_of_its_own(tmp_path: Path) -> None:
    path = chain(tmp_path / "m.onnx")
    one = profile_model(path, device="local", feeds=X, options=OPTIONS)
    two = profile_model(path, device="local", feeds=X, options=replace(OPTIONS, threads=2))
    assert one.table != two.table


@pytest.mark.parametrize("damage", ["", "[]", '{"costs": {"a": {"ms": "x"}}}', '{"costs": {"a": {"ms": -1.0}}}'])
def test_a_damaged_table_is_measured_anew(tmp_path: Path, damage: str) -> None:
    path = chain(tmp_path / "m.onnx")
    table = profile_model(path, device="local", feeds=X, options=OPTIONS).table
    table.write_text(damage)
    profile = profile_model(path, device="local", feeds=X, options=OPTIONS)
    assert not any(cost.reused for cost in profile.costs)
    assert len(json.loads(table.read_text())["costs"]) == 3


def test_what_was_measured_before_an_interruption_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def interrupt(_: Sequence[Path], samples: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:  # what a call costs, the first group, the second group
            raise KeyboardInterrupt
        return samples

    path = chain(tmp_path / "m.onnx")
    monkeypatch.setattr(costs, "_GROUP", 2)
    with monkeypatch.context() as patched:
        patched.setattr(costs, "open_runner", lambda _: Local(interrupt))
        with pytest.raises(KeyboardInterrupt):
            profile_model(path, device="local", feeds=X, options=OPTIONS)
    profile = profile_model(path, device="local", feeds=X, options=OPTIONS)
    assert sum(cost.reused for cost in profile.costs) == 2


def test_an_emulated_device_is_refused(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emulated = Local(lambda _, samples: [replace(each, emulated=True) for each in samples])
    monkeypatch.setattr(costs, "open_runner", lambda _: emulated)
    with pytest.raises(UsageError, match="its times mean nothing"):
        profile_model(chain(tmp_path / "m.onnx"), device="qemu://cortex-a72", feeds=X, options=OPTIONS)
    assert not own_cache.exists()


def test_the_command_prints_the_sum_and_what_it_predicts(cli: Cli, tmp_path: Path) -> None:
    path = chain(tmp_path / "m.onnx")
    outcome = cli("profile", path, "--runs", "3")
    assert outcome.code == 0
    assert "3 kernels, 0 of them measured before" in outcome.err
    assert "MatMul" in outcome.out
    facts = cli("profile", path, "--runs", "3", "--json").json
    assert facts["ratio"] == pytest.approx(facts["predicted_ms"] / facts["measured_ms"])
    assert [row["reused"] for row in facts["kernels"]] == [True] * 3
