"""The error tree: every failure a user can cause or meet, with its exit code and what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EdgecompressError(Exception):
    """Base of all errors raised on purpose.

    ``message`` names the thing, the value and what is allowed; ``hint`` says what to do next.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(EdgecompressError):
    """Options that contradict each other or have a value outside the allowed set."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe or plan that cannot be applied to this model."""


class ModelError(EdgecompressError):
    """A model that is unreadable, invalid or not supported by the tested runtime."""

    exit_code = 3


class DataError(EdgecompressError):
    """A data set that is unreadable or does not fit the model."""

    exit_code = 3


class FormatError(EdgecompressError):
    """A malformed file of ours: a container, a bundle, a manifest."""

    exit_code = 4


class ToleranceError(EdgecompressError):
    """The compressed model is further from the original than was allowed."""

    exit_code = 5


class BudgetError(EdgecompressError):
    """No plan meets the budget."""

    exit_code = 6


class DeviceError(EdgecompressError):
    """The device cannot be reached, or died while measuring."""

    exit_code = 7


class PassError(EdgecompressError):
    """A rewrite produced a wrong graph: a defect of this tool."""

    exit_code = 8


class OutputError(EdgecompressError):
    """The output cannot be written: permission, disk full, already there."""

    exit_code = 9


INTERRUPTED_EXIT_CODE = 130


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """Return ``"did you mean 'x'? "`` plus the allowed set, as the hint for a misspelt ``name``."""
    choices = sorted(allowed)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    suggestion = f"did you mean {close[0]!r}? " if close else ""
    listed = ", ".join(choices[:20]) + (", ..." if len(choices) > 20 else "")
    return f"{suggestion}allowed: {listed}" if choices else suggestion.strip()
