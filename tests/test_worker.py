from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgecompress.errors import EdgecompressError, FormatError, ModelError, UsageError
from edgecompress.runtime import load
from edgecompress.runtime.frames import receive, send
from edgecompress.runtime.worker import Worker

SQUARES = '<ir_version: 8, opset_import: ["" : 13]> g (float[N, 4] x) => (float[N, 4] y, float[N] s) { %s }'
BODY = "y = Mul(x, x)  s = ReduceSum<keepdims = 0>(y, axes)"
X = {"x": np.arange(8, dtype=np.float32).reshape(2, 4)}


def save(path: Path, text: str) -> Path:
    onnx.save(onnx.parser.parse_model(text), path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    body = "axes = Constant<value_ints = [1]>()  " + BODY
    return save(tmp_path_factory.mktemp("models") / "squares.onnx", SQUARES % body)


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = (
        '<ir_version: 8, opset_import: ["" : 16]> g (float[A] f, int64[B, C] i, bool b, string[D] t, float16[E] h)'
        " => (float[A] f2, int64[B, C] i2, bool b2, string[D] t2, float16[E] h2)"
        " { f2 = Identity(f) i2 = Identity(i) b2 = Identity(b) t2 = Identity(t) h2 = Identity(h) }"
    )
    return save(tmp_path_factory.mktemp("models") / "identity.onnx", text)


def state_of(pid: int) -> str:
    """Return the letter of a process's state as the kernel tells it, empty when there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def is_running(pid: int) -> bool:
    return state_of(pid) not in ("", "Z")


def wait_until_gone(pid: int) -> bool:
    for _ in range(500):
        if not is_running(pid):
            return True
        time.sleep(0.02)
    return False


def open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def child_of(worker: Worker) -> int:
    assert worker._process is not None
    return worker._process.pid


def test_outputs_are_those_of_the_runtime_itself(model: Path) -> None:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    with Worker(model) as worker:
        outputs = worker.run(X)
    assert list(outputs) == ["y", "s"]
    for mine, theirs in zip(outputs.values(), session.run(None, X), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_every_kind_of_array_arrives_unchanged(identity: Path) -> None:
    feeds = {
        "f": np.arange(12, dtype=np.float32)[::-3],  # not contiguous
        "i": np.zeros((0, 5), np.int64),
        "b": np.array(True),
        "t": np.array(["a", "ü", ""], object),
        "h": np.array([1.5, np.inf], np.float16),
    }
    with Worker(identity) as worker:
        outputs = worker.run(feeds)
    for name, value in feeds.items():
        np.testing.assert_array_equal(outputs[f"{name}2"], value)
        assert outputs[f"{name}2"].dtype == value.dtype


def test_a_large_input_arrives_unchanged(model: Path) -> None:
    big = np.random.default_rng(0).random((4_000_000, 4), dtype=np.float32)  # 64 MB, a thousand pipe buffers
    with Worker(model) as worker:
        np.testing.assert_array_equal(worker.run({"x": big})["y"], big * big)
        assert worker.peak_rss_bytes() > big.nbytes


def test_times_are_as_many_as_asked_for(model: Path) -> None:
    with Worker(model) as worker:
        assert len(worker.time(X, 3)) == 3
        assert worker.time(X, 0) == []
        times = worker.time(None, 5)
        assert len(times) == 5
        assert all(value > 0 for value in times)


def test_timing_without_any_inputs_is_refused(model: Path) -> None:
    with Worker(model) as worker, pytest.raises(UsageError, match="no inputs"):
        worker.time(None, 1)


def test_it_knows_its_start_its_memory_and_its_versions(model: Path) -> None:
    with Worker(model, threads=2, low_memory=True) as worker:
        assert worker.init_ms > 0
        assert worker.facts["onnxruntime"] == onnxruntime.__version__
        assert worker.facts["providers"] == ["CPUExecutionProvider"]
        assert 10_000_000 < worker.peak_rss_bytes() < 1_000_000_000
        assert {"numpy", "onnxruntime"} <= worker.imported_packages()
        assert not {"onnx", "typer", "PIL"} & worker.imported_packages()


def test_a_refused_input_is_an_error_and_the_worker_goes_on(model: Path) -> None:
    with Worker(model) as worker:
        with pytest.raises(ModelError, match="x") as caught:
            worker.run({"wrong": X["x"]})
        assert "\n" not in caught.value.message
        assert caught.value.hint
        np.testing.assert_array_equal(worker.run(X)["s"], [14, 126])


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("no.onnx", None, ModelError),
        ("text.onnx", b"hello", ModelError),
        ("cut.ecz", b"\x89ECZ\r\n\x1a\n", FormatError),
    ],
)
def test_an_error_of_loading_is_the_one_that_load_raises(
    tmp_path: Path, name: str, content: bytes | None, kind: type[EdgecompressError]
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(kind) as here:
        load(path)
    with pytest.raises(kind) as there, Worker(path):
        pass
    assert type(there.value) is type(here.value)
    assert (there.value.message, there.value.hint) == (here.value.message, here.value.hint)


def test_a_killed_child_is_an_error_and_leaves_no_zombie(model: Path) -> None:
    with Worker(model) as worker:
        pid = child_of(worker)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ModelError, match=r"the runtime died \(signal 9\) while running .*squares") as caught:
            worker.run(X)
        assert "memory" in caught.value.hint
        with pytest.raises(ChildProcessError):  # already waited for
            os.waitpid(pid, os.WNOHANG)
        with pytest.raises(UsageError, match="not running"):
            worker.run(X)


def test_a_crash_says_its_signal(model: Path) -> None:
    with Worker(model) as worker:
        os.kill(child_of(worker), signal.SIGSEGV)
        with pytest.raises(ModelError, match=r"signal 11\) while timing"):
            worker.time(X, 1)


def test_leaving_ends_the_child(model: Path) -> None:
    with Worker(model) as worker:
        pid = child_of(worker)
    with pytest.raises(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def test_an_error_inside_the_block_ends_the_child(model: Path) -> None:
    pids = []

    def fail() -> None:
        with Worker(model) as worker:
            pids.append(child_of(worker))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with pytest.raises(ChildProcessError):
        os.waitpid(pids[0], os.WNOHANG)


def test_a_child_that_hangs_is_ended(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgecompress.runtime.worker._GRACE_S", 0.1)
    with Worker(model) as worker:
        pid = child_of(worker)
        os.kill(pid, signal.SIGSTOP)
        while state_of(pid) != "T":
            time.sleep(0.01)
    assert not is_running(pid)


def test_an_interrupt_in_the_middle_of_a_run_ends_the_child(model: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with Worker(model) as worker:
            pid = child_of(worker)
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            with pytest.raises(KeyboardInterrupt):
                worker.time(X, 1_000_000_000)
            with pytest.raises(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_ctrl_c_does_not_reach_the_child(model: Path) -> None:
    with Worker(model) as worker:
        assert os.getpgid(child_of(worker)) != os.getpgid(0)
        os.kill(child_of(worker), signal.SIGINT)
        assert len(worker.time(X, 2)) == 2


@pytest.mark.parametrize("busy", [False, True])
def test_the_child_never_outlives_its_parent(model: Path, busy: bool) -> None:
    code = f"""
        import sys, time, numpy as np
        from pathlib import Path
        from edgecompress.runtime.worker import Worker
        with Worker(Path({str(model)!r})) as worker:
            print(worker._process.pid, flush=True)
            worker.time({{"x": np.ones((1, 4), np.float32)}}, 10**9) if {busy} else time.sleep(100)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_running(pid)
        time.sleep(0.1)
        parent.kill()
    assert wait_until_gone(pid)


def test_what_the_child_prints_does_no_harm(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text("import os; print('noise', flush=True); os.write(1, b'more')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with Worker(model) as worker:
        np.testing.assert_array_equal(worker.run(X)["s"], [14, 126])


def test_modules_in_the_current_folder_are_not_imported(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "numpy.py").write_text("raise SystemExit('the wrong numpy')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    with Worker(model) as worker:
        assert "s" in worker.run(X)


def test_nothing_is_left_behind_in_the_temporary_folder(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    descriptors = open_descriptors()
    with Worker(model) as worker:
        worker.run(X)
        assert not list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())
    assert open_descriptors() == descriptors


def test_importing_the_worker_loads_no_runtime() -> None:
    code = "import sys, edgecompress.runtime.worker; print('onnxruntime' in sys.modules, 'onnx' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


arrays = hnp.arrays(
    st.one_of(hnp.floating_dtypes(), hnp.integer_dtypes(), hnp.boolean_dtypes()),
    hnp.array_shapes(min_dims=0, min_side=0, max_side=5),
)


@given(st.dictionaries(st.text(), arrays, max_size=4), st.integers())
def test_a_message_is_received_as_it_was_sent(values: dict[str, Any], number: int) -> None:
    stream = io.BytesIO()
    send(stream, ("run", values, number))
    send(stream, "next")
    stream.seek(0)
    _, received, told = receive(stream)
    assert told == number
    assert list(received) == list(values)
    for name, value in values.items():
        assert received[name].dtype == value.dtype
        np.testing.assert_array_equal(received[name], value)
    assert receive(stream) == "next"


@given(st.integers(0, 200))
def test_a_message_that_breaks_off_is_the_end(length: int) -> None:
    stream = io.BytesIO()
    send(stream, ("run", np.arange(20)))
    whole = stream.getvalue()
    reader: Callable[[], Any] = lambda: receive(io.BytesIO(whole[:length]))  # noqa: E731
    if length < len(whole):
        with pytest.raises(EOFError):
            reader()
    else:
        assert reader()[0] == "run"
