from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from edgecompress.devices import local as local_module
from edgecompress.devices import open_runner
from edgecompress.errors import ModelError, UsageError
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
        open_runner("local:somewhere")


@pytest.mark.parametrize("alternate", [True, False])
def test_every_model_gets_its_own_samples(models: list[Path], alternate: bool) -> None:
    seen: list[tuple[int, int]] = []
    measured = open_runner("local").measure(
        models, feeds=X, threads=1, runs=12, alternate=alternate, progress=lambda *step: seen.append(step)
    )
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
    open_runner("local").measure(models, feeds=X, runs=2, alternate=alternate)
    assert (most[0], alive[0]) == (together, 0)


def test_options_reach_the_workers(models: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []

    class Noted(Worker):
        def __init__(self, path: Path, *, threads: int = 1, low_memory: bool = False) -> None:
            asked.append({"path": path, "threads": threads, "low_memory": low_memory})
            super().__init__(path, threads=threads, low_memory=low_memory)

    monkeypatch.setattr(local_module, "Worker", Noted)
    open_runner("local").measure(models[:1], feeds=X, threads=2, runs=1, low_memory=True)
    assert asked == [{"path": models[0], "threads": 2, "low_memory": True}]


def test_a_model_that_does_not_run_is_an_error(models: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        open_runner("local").measure([models[0], tmp_path / "none.onnx"], feeds=X, runs=1)
    with pytest.raises(ModelError):
        open_runner("local").measure(models, feeds={"z": X["x"]}, runs=1)
    with pytest.raises(UsageError, match="at least 1"):
        open_runner("local").measure(models, feeds=X, runs=0)
