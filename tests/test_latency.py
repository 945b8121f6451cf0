from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecompress.latency import LatencySamples, ratio, stability_warnings, summarize


def samples(values: list[float], **changes: object) -> LatencySamples:
    base = LatencySamples(init_ms=7.0, first_ms=3.0, warmup_ms=(2.0,), values_ms=tuple(values), peak_rss_bytes=1000)
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def steady(count: int = 40, median: float = 2.0) -> list[float]:
    """Values within two percent of ``median``, in no order, without drift."""
    return list(median * (1 + 0.01 * np.random.default_rng(3).uniform(-1, 1, count)))


times = st.lists(st.floats(0.001, 1e4), min_size=1, max_size=60)


def test_the_summary_of_known_values_is_known() -> None:
    summary = summarize(samples([5.0, 1.0, 4.0, 2.0, 3.0]))
    assert (summary.init_ms, summary.first_ms, summary.peak_rss_bytes, summary.samples) == (7.0, 3.0, 1000, 5)
    assert summary.median_ms == 3.0
    assert summary.p90_ms == pytest.approx(4.6)  # four tenths between the fourth and the last of five


@given(times)
def test_the_summary_does_not_depend_on_the_order(values: list[float]) -> None:
    summary = summarize(samples(values))
    assert summary == summarize(samples(sorted(values)))
    assert min(values) <= summary.median_ms <= summary.p90_ms <= max(values)


@given(times, st.floats(0.1, 10))
def test_the_ratio_is_the_factor_between_the_times(values: list[float], factor: float) -> None:
    slower = samples([value * factor for value in values])
    assert ratio(slower, samples(values)) == pytest.approx(factor, rel=1e-9)


def test_a_ratio_with_emulated_or_zero_times_is_unknown() -> None:
    real, emulated = samples([1.0, 1.0]), samples([1.0, 1.0], emulated=True)
    assert ratio(real, real) == 1.0
    assert ratio(real, emulated) is None
    assert ratio(emulated, real) is None
    assert ratio(real, samples([0.0, 0.0])) is None


def test_no_steady_run_is_an_error() -> None:
    with pytest.raises(ValueError, match="no steady run"):
        summarize(samples([]))


def test_steady_times_give_no_warning() -> None:
    assert stability_warnings(samples(steady(), metadata={"load_average": 0.5, "cores": 2})) == ()


def test_one_interrupted_run_among_many_gives_no_warning() -> None:
    assert stability_warnings(samples([*steady(), 200.0])) == ()


@pytest.mark.parametrize(
    ("values", "changes", "message"),
    [
        (steady(5), {}, "only 5 runs"),
        (steady(40, 0.004), {}, "a run takes 4.0 us"),
        ([2.0, 2.6] * 20, {}, "half of the runs spread over 26%"),
        ([2.0] * 8 + [4.0] * 2 + [2.0] * 8 + [4.0] * 2, {}, "one run in ten takes 2.0 times"),
        ([*steady(20), *steady(20, 2.3)], {}, "the second half is +15%"),
        ([*steady(20, 2.3), *steady(20)], {}, "the second half is -13%"),
        ([*steady(40), 1.0], {}, "the fastest run took 50% of the median"),
        (steady(), {"emulated": True}, "emulated"),
        (steady(), {"metadata": {"load_average": 3.2, "cores": 2}}, "load 3.2 on 2 cores"),
    ],
)
def test_each_doubt_has_its_warning(values: list[float], changes: dict[str, object], message: str) -> None:
    assert any(message in warning for warning in stability_warnings(samples(values, **changes)))


@given(times)
def test_warnings_never_fail_whatever_the_times(values: list[float]) -> None:
    for warning in stability_warnings(samples(values)):
        assert "nan" not in warning


def test_it_needs_numpy_alone() -> None:
    code = "import sys, edgecompress.latency; print([m for m in sys.modules if m.startswith('onnx')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
