"""Objects of the user's own code, named ``package.module:object`` on the command line or in a dataset.toml."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

from edgecompress.errors import EdgecompressError, did_you_mean

_REFERENCE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def is_reference(text: str) -> bool:
    """Tell whether ``text`` has the form ``package.module:object``."""
    return _REFERENCE.fullmatch(text) is not None


def import_callable(reference: str, *, what: str, error: type[EdgecompressError]) -> Any:
    """Import what ``reference`` names; the current folder is searched first.

    Raises ``error`` where it is malformed, cannot be imported, is not there or cannot be called.
    """
    if not is_reference(reference):
        raise error(f"{what} {reference!r} is not package.module:name", hint="for example mymodels:build")
    module_name, _, name = reference.partition(":")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as cause:  # the user's module may raise anything while it is imported
        missing = isinstance(cause, ModuleNotFoundError) and module_name.startswith(str(cause.name))
        hint = f"it is looked for in {folder} and on the Python path" if missing else f"correct {module_name} first"
        raise error(f"{what} {reference!r}: cannot import {module_name}: {one_line(cause)}", hint=hint) from cause
    found = getattr(module, name, None)
    if found is None:
        public = [each for each in vars(module) if not each.startswith("_") and callable(getattr(module, each))]
        raise error(f"{what} {reference!r}: {module_name} has no {name!r}", hint=did_you_mean(name, public))
    if not callable(found):
        raise error(f"{what} {reference!r} is {type(found).__name__}, it cannot be called", hint="name a function")
    return found


def one_line(cause: BaseException) -> str:
    """Return an exception of foreign code as one short line: its type and its text."""
    text = " ".join(str(cause).split())
    return f"{type(cause).__name__}: {text[:300]}" if text else type(cause).__name__
