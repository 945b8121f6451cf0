"""The terminal: where messages go, progress bars, and how errors end a command."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from edgecompress.errors import INTERRUPTED_EXIT_CODE, EdgecompressError, ModelError, OutputError, PassError

TRACEBACK_VARIABLE = "EDGECOMPRESS_TRACEBACK"


class ErrorReportingGroup(TyperGroup):
    """Turns every error of a command into ``error:``, ``hint:`` and its exit code; never a traceback, unless asked for."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was chosen."""
        signal.signal(signal.SIGTERM, _interrupt)
        try:
            return super().invoke(ctx)
        except (EdgecompressError, OSError, MemoryError) as error:
            known = _as_known(error)
            _maybe_traceback()
            _say(known)
            raise typer.Exit(known.exit_code) from None
        except KeyboardInterrupt:
            typer.echo("interrupted: nothing was written", err=True)
            raise typer.Exit(INTERRUPTED_EXIT_CODE) from None
        except Exception as error:
            if type(error).__module__.split(".")[0] in ("typer", "click"):
                raise
            _maybe_traceback()
            _say(_defect(error))
            raise typer.Exit(PassError.exit_code) from None


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _maybe_traceback() -> None:
    if os.environ.get(TRACEBACK_VARIABLE):
        traceback.print_exc()


def _as_known(error: BaseException) -> EdgecompressError:
    if isinstance(error, EdgecompressError):
        return error
    if isinstance(error, MemoryError):
        return ModelError("there is not enough memory for this model", hint="use a machine with more memory")
    return OutputError(f"{error}", hint="check the disk and the permissions")


def _defect(error: Exception) -> PassError:
    message = " ".join(f"{type(error).__name__}: {error}".split())[:500]
    return PassError(f"internal error: {message}", hint=f"please report it, with the output under {TRACEBACK_VARIABLE}=1")


def _say(error: EdgecompressError) -> None:
    typer.echo(f"error: {error.message}", err=True)
    if error.hint:
        typer.echo(f"hint: {error.hint}", err=True)


@contextmanager
def progress_step(name: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on stderr while a stage runs (only on a terminal) and yield its ``(done, total)`` callback."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:<10}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
