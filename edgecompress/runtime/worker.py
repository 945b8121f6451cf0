"""A model in a process of its own: its memory is measured alone, and a crash of the runtime is only an error."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from edgecompress import errors
from edgecompress.errors import EdgecompressError, ModelError, UsageError
from edgecompress.runtime.frames import receive, send
from edgecompress.runtime.measure import device_facts, peak_rss_bytes, time_runs

Array = npt.NDArray[Any]

# Not "-m": runpy warns when the package has imported this module. -P: a numpy.py in the current folder stays out.
_COMMAND = ("-P", "-c", "from edgecompress.runtime.worker import main; main()")
_GRACE_S = 5.0


class Worker:
    """A child process that holds one model; use it as a context manager.

    ``path`` is an .onnx file, an .ecz file or a bundle folder; ``cores`` are those that the child may use, all if none.
    After entering: ``init_ms`` is what loading took (decoding and session creation), ``facts`` describes the machine
    and the versions. Raises what ``load`` raises, and ``ModelError`` when the child dies. The child never outlives this
    process and ignores Ctrl-C; its parent ends it.
    """

    init_ms: float
    facts: dict[str, Any]

    def __init__(self, path: Path, *, threads: int = 1, low_memory: bool = False, cores: Sequence[int] = ()) -> None:
        self._path = Path(path)
        self._options = {"threads": threads, "low_memory": low_memory, "cores": tuple(cores)}
        self._process: subprocess.Popen[bytes] | None = None
        self._replies: BinaryIO | None = None
        self._log: IO[bytes] | None = None

    def __enter__(self) -> Self:
        self._log = tempfile.TemporaryFile()  # has no name: nothing is left behind
        try:
            self._start()
            answer = self._call("loading", "load", str(self._path.absolute()), self._options)
        except BaseException:
            self._end(at_once=True)
            raise
        self.init_ms, self.facts = answer
        return self

    def _start(self) -> None:
        reading, writing = os.pipe()
        self._replies = os.fdopen(reading, "rb")
        try:
            self._process = subprocess.Popen(
                [sys.executable, *_COMMAND, str(writing)],
                stdin=subprocess.PIPE,
                stdout=self._log,  # answers have a pipe of their own: whatever is printed does no harm
                stderr=self._log,
                pass_fds=[writing],
                env={**os.environ, "PYTHONPATH": _search_path()},
                start_new_session=True,  # Ctrl-C in a terminal goes to the parent alone
            )
        except OSError as error:
            hint = "free some memory or end other programs"
            raise ModelError(f"cannot start a process for {self._path}: {error.strerror}", hint=hint) from error
        finally:
            os.close(writing)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(at_once=kind is not None)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run the model once on ``feeds`` (by input name) and return its outputs by name."""
        outputs: dict[str, Array] = self._call("running", "run", _contiguous(feeds))
        return outputs

    def time(self, feeds: Mapping[str, Array] | None, runs: int) -> list[float]:
        """Run ``runs`` times and return each time in milliseconds; ``feeds=None`` takes those of the last call."""
        times: list[float] = self._call("timing", "time", None if feeds is None else _contiguous(feeds), runs)
        return times

    def peak_rss_bytes(self) -> int:
        """Return the most memory that the child has held so far, in bytes."""
        peak: int = self._call("asking for the memory of", "rss")
        return peak

    def imported_packages(self) -> frozenset[str]:
        """Return the names of all top-level modules that the child has imported."""
        names: frozenset[str] = self._call("asking for the packages of", "packages")
        return names

    def _call(self, activity: str, *request: Any) -> Any:
        """Send a request and wait for its answer; a child that is gone or out of step is ended."""
        process, replies = self._process, self._replies
        if process is None or process.stdin is None or replies is None:
            raise UsageError("the worker is not running", hint="use it inside its with block")
        try:
            send(process.stdin, request)
            answer = receive(replies)
        except (BrokenPipeError, EOFError):
            raise self._death(activity) from None
        except BaseException:  # interrupted: the next answer would belong to this request
            self._end(at_once=True)
            raise
        if answer[0] == "ok":
            return answer[1]
        _, name, message, hint = answer
        raise getattr(errors, name)(message, hint=hint)

    def _death(self, activity: str) -> ModelError:
        """Return the error that says how the child ended, and see that it is gone."""
        process, log = self._process, self._log
        code: int | None = None
        last = ""
        if process is not None:
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(_GRACE_S)
        if log is not None:
            log.seek(0, os.SEEK_END)
            log.seek(max(log.tell() - 2000, 0))
            lines = log.read().decode(errors="replace").strip().splitlines()
            last = f": {lines[-1]}" if lines else ""
        self._end(at_once=True)
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        hint = "the model may be damaged or need more than this runtime has; try another onnxruntime version"
        if code == -signal.SIGKILL:
            hint = "most likely the memory ran out; free some, or use a machine with more"
        return ModelError(f"the runtime died ({how}) while {activity} {self._path}{last}", hint=hint)

    def _end(self, *, at_once: bool) -> None:
        """End the child, wait for it, close what belongs to it. Safe to call twice."""
        process, self._process = self._process, None
        if process is not None:
            if at_once:
                process.kill()
            with suppress(OSError):
                if process.stdin is not None:
                    process.stdin.close()  # the child leaves when its input ends
            try:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_GRACE_S)
            finally:  # it hangs, or we are interrupted
                process.kill()
                process.wait()
        for stream in (self._replies, self._log):
            if stream is not None:
                stream.close()


def _search_path() -> str:
    """Return our own import path for the child, which may lie where no installer put it (a bundle, a checkout)."""
    root = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join([root, *(entry for entry in sys.path if entry and entry != root)])


def _contiguous(feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Return ``feeds`` in an order that pickle sends without copying."""
    return {name: np.asarray(value, order="C") for name, value in feeds.items()}


# The child's side from here on.


def main() -> None:
    """Serve one parent: requests from stdin until it ends, replies to the descriptor in the first argument."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests, replies = sys.stdin.buffer, os.fdopen(int(sys.argv[1]), "wb")
    threading.Thread(target=_leave_with_parent, args=(requests.fileno(),), daemon=True).start()
    state: dict[str, Any] = {}
    with suppress(EOFError, BrokenPipeError):
        while True:
            action, *arguments = receive(requests)
            _reply(replies, action, state, arguments)
    os._exit(0)  # no finalizer of the runtime can hang or crash here


def _leave_with_parent(descriptor: int) -> None:
    """End this process as soon as nobody holds the other end of its input, even in the middle of a run."""
    watch = select.poll()
    watch.register(descriptor, 0)  # only a hang-up is reported
    watch.poll()
    os._exit(0)


def _reply(replies: BinaryIO, action: str, state: dict[str, Any], arguments: list[Any]) -> None:
    from edgecompress.runtime.session import runtime_error

    try:
        answer: tuple[Any, ...] = ("ok", _ACTIONS[action](state, *arguments))
    except EdgecompressError as error:
        answer = ("error", type(error).__name__, error.message, error.hint)
    except Exception as error:  # onnxruntime's own exceptions have no common base class
        known = runtime_error(error, state.get("path", "the model"))
        full = isinstance(error, MemoryError) or "bad_alloc" in known.message or "Failed to allocate" in known.message
        hint = "check the inputs; for free dimensions give --shape NAME=DIMS, or give data"
        answer = ("error", "ModelError", known.message, "the memory ran out: take a smaller batch" if full else hint)
    send(replies, answer)


def _load(state: dict[str, Any], path: str, options: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    from edgecompress.runtime.session import import_runtime, load

    _pin(options.pop("cores"))
    import_runtime()  # not to be timed
    start = time.perf_counter_ns()
    state["path"] = path
    state["session"] = load(Path(path), **options)
    elapsed = (time.perf_counter_ns() - start) / 1e6
    return elapsed, {**device_facts(), "providers": state["session"].get_providers()}


def _pin(cores: Sequence[int]) -> None:
    """Stay on ``cores``, with the threads that the runtime is going to start; raises ``UsageError``."""
    if not cores:
        return
    try:
        os.sched_setaffinity(0, cores)
    except OSError:
        allowed = ", ".join(map(str, sorted(os.sched_getaffinity(0))))
        wanted = ", ".join(map(str, cores))
        raise UsageError(f"cannot run on the cores {wanted}", hint=f"this machine lends the cores {allowed}") from None


def _run(state: dict[str, Any], feeds: dict[str, Array]) -> dict[str, Any]:
    state["feeds"] = feeds
    session = state["session"]
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, feeds), strict=True))


def _time(state: dict[str, Any], feeds: dict[str, Array] | None, runs: int) -> list[float]:
    if feeds is not None:
        state["feeds"] = feeds
    if "feeds" not in state:
        raise UsageError("there are no inputs to time the model on", hint="pass feeds with the first call")
    session, inputs = state["session"], state["feeds"]
    return time_runs(lambda: session.run(None, inputs), runs)


def _rss(_: dict[str, Any]) -> int:
    return peak_rss_bytes()


def _packages(_: dict[str, Any]) -> frozenset[str]:
    return frozenset(name.partition(".")[0] for name in sys.modules)


_ACTIONS: dict[str, Callable[..., Any]] = {
    "load": _load,
    "run": _run,
    "time": _time,
    "rss": _rss,
    "packages": _packages,
}
