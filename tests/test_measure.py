from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecompress.errors import UsageError
from edgecompress.runtime import measure
from edgecompress.runtime.measure import (
    Pause,
    device_facts,
    measure_timers,
    output_differences,
    peak_rss_bytes,
    temperature_c,
    time_runs,
)


class FakeModel:
    """Notes who ran how often; each run takes what the list says, the last entry for ever."""

    def __init__(self, name: str, diary: list[tuple[str, int]], times: Sequence[float]) -> None:
        self.name, self.diary, self.times = name, diary, list(times)

    def __call__(self, runs: int) -> list[float]:
        self.diary.append((self.name, runs))
        return [self.times.pop(0) if len(self.times) > 1 else self.times[0] for _ in range(runs)]


def test_time_runs_calls_as_often_as_it_returns_times() -> None:
    calls: list[int] = []
    times = time_runs(lambda: calls.append(1), 7)
    assert len(calls) == len(times) == 7
    assert all(value >= 0 for value in times)


def test_models_take_turns_in_blocks_after_the_warm_up() -> None:
    diary: list[tuple[str, int]] = []
    first, second = measure_timers([FakeModel("a", diary, [5.0]), FakeModel("b", diary, [9.0])], runs=23)
    blocks = diary[diary.index(("b", 1)) + 1 :][-20:]  # ten blocks for each of the two
    assert [name for name, _ in blocks] == ["a", "b"] * 10
    assert {runs for _, runs in blocks} == {3, 4}  # two or three counted, one before that settles
    assert (first.values_ms, second.values_ms) == ((5.0,) * 23, (9.0,) * 23)


def test_something_may_be_done_before_each_round_of_blocks() -> None:
    diary: list[tuple[str, int]] = []
    models = [FakeModel("a", diary, [5.0]), FakeModel("b", diary, [9.0])]
    measure_timers(models, runs=3, before_block=lambda: diary.append(("pause", 0)))
    assert [name for name, _ in diary[-9:]] == ["pause", "a", "b"] * 3


def test_the_temperature_is_that_of_the_hottest_zone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_THERMAL", tmp_path)
    assert temperature_c() is None
    for index, text in enumerate(["41500\n", "-3000", "54250", "", "broken"]):
        (tmp_path / f"thermal_zone{index}").mkdir()
        (tmp_path / f"thermal_zone{index}" / "temp").write_text(text)
    (tmp_path / "thermal_zone9").mkdir()
    (tmp_path / "cooling_device0").mkdir()
    assert temperature_c() == 54.25


def cool(monkeypatch: pytest.MonkeyPatch, temperatures: list[float | None]) -> list[float]:
    """Let the machine have these temperatures, the last one for ever; return what was slept, as it comes."""
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    monkeypatch.setattr(
        measure, "temperature_c", lambda: temperatures.pop(0) if len(temperatures) > 1 else temperatures[0]
    )
    return slept


def test_a_hot_machine_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    slept = cool(monkeypatch, [80.0, 75.5, 70.0])
    pause = Pause(70.0)
    pause()
    pause()
    assert slept == [1.0, 1.0]
    assert pause.notes() == ["paused for 2 s in all"]


def test_a_machine_that_stays_hot_is_waited_for_no_more_than_five_minutes_in_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slept = cool(monkeypatch, [80.0])
    pause = Pause(70.0)
    pause()
    pause()
    assert sum(slept) == 300.0
    assert pause.notes() == [
        "paused for 300 s in all",
        "it did not cool to 70 degrees within that time: the rest ran hot",
    ]


def test_without_a_limit_or_a_thermometer_nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    slept = cool(monkeypatch, [90.0])
    pause = Pause(None)
    pause()
    assert (slept, pause.notes()) == ([], [])
    slept = cool(monkeypatch, [None])
    pause = Pause(0.0)
    pause()
    assert (slept, pause.notes()) == ([], ["no temperature can be read here: never paused"])


def test_the_first_run_and_the_warm_up_are_kept_apart_from_the_steady_ones() -> None:
    timing = measure_timers([FakeModel("a", [], [90.0, 40.0, 20.0, 10.0, 10.0, 10.0])], runs=4)[0]
    assert timing.first_ms == 90.0
    assert timing.warmup_ms[:3] == (40.0, 20.0, 10.0)
    assert timing.values_ms == (10.0,) * 4


def test_the_warm_up_ends_when_two_batches_agree() -> None:
    # A first run of 60 ms makes batches of one run.
    timing = measure_timers([FakeModel("a", [], [60.0, 50.0, 40.0, 30.0, 29.5, 1.0])], runs=1)[0]
    assert timing.warmup_ms == (50.0, 40.0, 30.0, 29.5)


def test_the_warm_up_ends_even_when_times_never_settle() -> None:
    endless = [100.0 * 2 ** (index % 2) for index in range(500)]
    timing = measure_timers([FakeModel("a", [], endless)], runs=1)[0]
    assert 1000 <= sum(timing.warmup_ms) < 1300
    quick = [0.01 * 3 ** ((index // 20) % 2) for index in range(5000)]
    timing = measure_timers([FakeModel("a", [], quick)], runs=1)[0]
    assert len(timing.warmup_ms) <= 220


def test_a_slow_model_is_warmed_up_with_one_run() -> None:
    assert measure_timers([FakeModel("a", [], [5000.0])], runs=2)[0].warmup_ms == (5000.0,)


@given(st.integers(1, 200), st.integers(1, 3))
def test_each_model_gets_exactly_the_runs_asked_for(runs: int, models: int) -> None:
    seen: list[tuple[int, int]] = []
    timers = [FakeModel(str(index), [], [1.0]) for index in range(models)]
    timings = measure_timers(timers, runs=runs, progress=lambda done, total: seen.append((done, total)))
    assert [len(timing.values_ms) for timing in timings] == [runs] * models
    assert seen[-1] == (runs * models, runs * models)
    assert seen == sorted(seen)


@pytest.mark.parametrize("runs", [0, -3])
def test_no_runs_is_a_usage_error(runs: int) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        measure_timers([], runs=runs)


def test_the_peak_memory_grows_with_what_is_held() -> None:
    before = peak_rss_bytes()
    held = np.ones(before // 8 + 4_000_000)  # more than has ever been held
    assert peak_rss_bytes() >= held.nbytes
    assert peak_rss_bytes() > before


def test_the_facts_name_the_machine_and_the_versions() -> None:
    facts = device_facts()
    assert facts["numpy"] == np.__version__
    assert facts["machine"] == os.uname().machine
    assert 1 <= facts["cores"] <= (os.cpu_count() or 1)
    assert facts["cpu_model"]


def test_equal_outputs_do_not_differ() -> None:
    outputs = {
        "f": np.array([1.0, np.nan, np.inf, -2.0], np.float32),
        "i": np.array([1, 2]),
        "t": np.array(["a", "b"]),
        "e": np.zeros((0, 3), np.float32),
        "h": np.array([1.0], np.float16),
    }
    as_objects = {**outputs, "t": outputs["t"].astype(object)}
    assert output_differences(as_objects, outputs, relative=1e-3) == {}


@pytest.mark.parametrize(
    ("actual", "wanted", "message"),
    [
        ([1.0, 2.003], [1.0, 2.0], "off by 0.003, allowed 0.002"),
        ([1.0], [1.0, 2.0], "shape"),
        ([1.0, np.nan], [1.0, 2.0], "NaN or Inf"),
        ([1.0, -np.inf], [1.0, np.inf], "NaN or Inf"),
        ([0.0, 1e-30], [0.0, 0.0], "off by 1e-30"),
    ],
)
def test_wrong_floats_are_told(actual: list[float], wanted: list[float], message: str) -> None:
    problems = output_differences({"y": np.array(actual)}, {"y": np.array(wanted)}, relative=1e-3)
    assert message in problems["y"]


def test_floats_may_differ_by_a_share_of_the_largest() -> None:
    wanted = np.array([1000.0, 0.001], np.float32)
    assert not output_differences({"y": wanted + np.float32(0.9)}, {"y": wanted}, relative=1e-3)
    assert output_differences({"y": wanted + np.float32(1.1)}, {"y": wanted}, relative=1e-3)


def test_half_precision_gets_the_room_of_its_own_steps() -> None:
    wanted = np.array([1.0], np.float16)
    assert not output_differences({"y": wanted + np.float16(0.01)}, {"y": wanted}, relative=1e-3)
    assert output_differences({"y": wanted + np.float16(0.03)}, {"y": wanted}, relative=1e-3)


def test_whole_numbers_texts_and_missing_outputs_are_exact() -> None:
    wanted = {"i": np.array([1, 2, 3]), "t": np.array(["a", "b"]), "m": np.array([1])}
    actual = {"i": np.array([1, 2, 4]), "t": np.array(["a", "c"], object)}
    assert output_differences(actual, wanted, relative=1.0) == {
        "i": "1 of 3 values differ",
        "t": "1 of 2 values differ",
        "m": "missing",
    }
    assert "type" in output_differences({"f": np.array([1])}, {"f": np.array([1.0])}, relative=1.0)["f"]
