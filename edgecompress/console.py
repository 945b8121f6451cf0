"""The terminal: what goes to which stream, progress bars, and how a command ends."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

import typer

from edgecompress.errors import (
    INTERRUPTED_EXIT_CODE,
    EdgecompressError,
    ModelError,
    OutputError,
    PassError,
    UsageError,
)
from edgecompress.files import output_errors

TRACEBACK_VARIABLE = "EDGECOMPRESS_TRACEBACK"
"""Set in the environment, it shows the traceback of every error: for reporting a defect."""

_FILE_WIDTH = 120
_ENDING_SIGNALS = ("SIGTERM", "SIGHUP")


def run(app: typer.Typer) -> NoReturn:
    """Run an application and exit.

    Every error becomes ``error:``, ``hint:`` and the exit code of its class, all on stderr; never a traceback, unless
    the environment asks for one.
    """
    _prepare_streams()
    with _ended_like_ctrl_c(), warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")  # a package's advice to programmers is none to users
        code = _exit_code(app)
    _flush()
    sys.exit(code)


def _exit_code(app: typer.Typer) -> int:
    try:
        result = app(standalone_mode=False)
        if result != INTERRUPTED_EXIT_CODE:
            return result if isinstance(result, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        pass
    except SystemExit as left:  # typer gave up on a closed pipe
        return left.code if isinstance(left.code, int) else 1
    except Exception as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            traceback.print_exc()
        known = _as_known(error)
        if not known.message:  # called without a command: typer has shown the help
            return known.exit_code
        _say(f"error: {known.message}", *([f"hint: {known.hint}"] if known.hint else []))
        return known.exit_code
    _say("interrupted: nothing half-written is left")
    return INTERRUPTED_EXIT_CODE


def _as_known(error: Exception) -> EdgecompressError:
    """Return any error as one of ours."""
    if isinstance(error, EdgecompressError):
        return error
    if isinstance(error, MemoryError):
        return ModelError("there is not enough memory for this model", hint="use a machine with more memory")
    if isinstance(error, OSError):
        try:
            with output_errors(Path(error.filename or tempfile.gettempdir())):
                raise error
        except OutputError as known:
            return known
    complaint = getattr(error, "format_message", None)  # typer's; its base class differs between its versions
    if complaint is not None:
        context = getattr(error, "ctx", None)
        path = context.command_path if context is not None else "edgecompress"
        return UsageError(" ".join(complaint().split()).rstrip("."), hint=f"see '{path} --help'")
    message = " ".join(f"{type(error).__name__}: {error}".split())[:500]
    return PassError(
        f"internal error: {message}", hint=f"please report it with the output under {TRACEBACK_VARIABLE}=1"
    )


@contextmanager
def _ended_like_ctrl_c() -> Iterator[None]:
    """Treat the signals that end a program like Ctrl-C, so that they too leave no half file and no child behind."""
    previous: dict[int, Any] = {}
    for name in _ENDING_SIGNALS:
        number = getattr(signal, name, None)
        # one that is ignored stays so: that is what nohup is for
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:
            previous[number] = signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _prepare_streams() -> None:
    """Make writing safe: a stream that is closed swallows, a character that a stream cannot show is escaped."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 - lives as long as we do
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _swallow(stream: TextIO | Any) -> None:
    """Let what is still to be written to a closed pipe vanish; the command's work and exit code stay what they are."""
    with suppress(OSError, ValueError), Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            _swallow(stream)


def _say(*lines: str) -> None:
    """Print lines to stderr as they are: a path in them is never wrapped."""
    try:
        print(*lines, sep="\n", file=sys.stderr, flush=True)
    except (OSError, ValueError):
        _swallow(sys.stderr)


def note(text: str) -> None:
    """Tell the user something that is not the result: on stderr."""
    _say(text)


def show(*parts: Any) -> None:
    """Print tables and lines, the result for a reader: on stdout."""
    from rich.console import Console

    with _to_stdout():
        console = Console(file=sys.stdout)
        if not console.is_terminal and "COLUMNS" not in os.environ:
            console = Console(file=sys.stdout, width=_FILE_WIDTH)
        with console.capture() as capture:
            for part in parts:
                console.print(part, markup=False, highlight=False)
        sys.stdout.write("\n".join(line.rstrip() for line in capture.get().splitlines()).strip("\n") + "\n\n")


def show_json(value: Any) -> None:
    """Print a value as strict JSON: alone on stdout."""
    text = value if isinstance(value, str) else json.dumps(value, indent=2, allow_nan=False) + "\n"
    with _to_stdout():
        sys.stdout.write(text)


@contextmanager
def _to_stdout() -> Iterator[None]:
    """Write and flush; a reader that has seen enough (``| head``) ends the output, not the command."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        _swallow(sys.stdout)
    except OSError as error:
        _swallow(sys.stdout)
        raise OutputError(f"cannot write to stdout: {error.strerror or error}", hint="check where it goes") from error


@contextmanager
def progress_step(name: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on stderr while a stage runs (only on a terminal) and yield its ``(done, total)`` callback."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
