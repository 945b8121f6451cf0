"""Check this bundle, run its model, compare its outputs with the expected ones, time it.

    python3 -I run.py [--runs N] [--threads N] [--cores 0,1] [--pause-above CELSIUS] [--also DIR ...] [--json]

Needs nothing but this folder and the Python that manifest.json names. No file of the folder is imported before the
SHA-256 of every file was checked. Exit codes: 0, 2 usage, 3 model, 4 damaged bundle, 5 wrong outputs, 7 wrong machine.
"""

# Bundles carry this file as run.py; edgecompress.bundle uses its checks. Until they are done: standard library only.

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import stat
import sys
from pathlib import Path, PurePosixPath
from typing import Any

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
CODE_FOLDER = "lib"  # the only folder that anything is imported from: no unlisted file may lie in it
MANIFEST_LIMIT_BYTES = 16_000_000
MAX_THREADS = 1024
_TEXTS = ("target", "system", "architecture", "default_device", "runtime_form", "model")
_LISTS = ("providers", "inputs", "outputs")
_TABLES = ("runtime", "tool", "sizes", "files")
_SHA256 = re.compile("[0-9a-f]{64}")
# What starts a bundle of each form of the runtime.
_ENTRY_POINTS = {
    "wheel": "run.py",
    "native": "run.sh",
    "wasm": "index.html",
    "gradle": "build.gradle.kts",
    "swift": "Package.swift",
    "none": None,
}
# Python's version becomes a part of a command on devices.
_WORD = re.compile("[A-Za-z0-9_.-]{1,80}")
_PYTHON = {"version": re.compile(r"[0-9]{1,2}\.[0-9]{1,3}"), "abi": _WORD, "machine": _WORD, "system": _WORD}
_SIZES = {"installed_bytes", "download_bytes"}


class BundleError(Exception):
    """A bundle that cannot be used, with the exit code for it and what to do next."""

    def __init__(self, message: str, *, hint: str, exit_code: int = 4) -> None:
        super().__init__(message)
        self.message, self.hint, self.exit_code = message, hint, exit_code


def manifest_digest(manifest: dict[str, Any]) -> str:
    """Return the SHA-256 of a manifest's content, its own ``manifest_sha256`` left out."""
    rest = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a bundle after checking its form; raises ``BundleError``."""
    path = folder / MANIFEST
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise _damaged(f"{MANIFEST} is not a plain file")
        with path.open("rb") as stream:
            content = stream.read(MANIFEST_LIMIT_BYTES + 1)
    except OSError as error:
        reason = error.strerror or error
        raise _damaged(f"{MANIFEST} cannot be read: {reason}", "name the folder of a bundle") from error
    return parse_manifest(content)


def parse_manifest(content: bytes) -> dict[str, Any]:
    """Return the manifest that the bytes hold after checking its form; raises ``BundleError``."""
    try:
        if len(content) > MANIFEST_LIMIT_BYTES:
            raise _damaged(f"{MANIFEST} is larger than any that was written")
        manifest = json.loads(content)
        if not isinstance(manifest, dict):
            raise _damaged(f"{MANIFEST} is not a JSON object")
        version = manifest.get("schema_version")
        if type(version) is not int or version != SCHEMA_VERSION:
            hint = "use the version of edgecompress that built it"
            raise _damaged(f"schema_version {version!r:.40} is not supported (allowed: {SCHEMA_VERSION})", hint)
        _check_form(manifest)
    except (ValueError, RecursionError) as error:
        raise _damaged(f"{MANIFEST} is not JSON, or nested too deeply") from error
    return manifest


def _check_form(manifest: dict[str, Any]) -> None:
    """Check the types of all entries that this program or its caller reads; raises ``BundleError``."""
    _check_types(manifest)
    for path, entry in manifest["files"].items():
        _check_entry(path, entry)
    for path in (manifest["model"], manifest.get("entry_point"), *manifest["inputs"], *manifest["outputs"]):
        if path is not None and path not in manifest["files"]:  # without a runtime there is no entry point
            raise _damaged(f"{MANIFEST}: {path!r:.80} is not among the files")
    _check_runtime(manifest)
    _check_texts(manifest)
    if manifest.get("manifest_sha256") != manifest_digest(manifest):
        raise _damaged(f"{MANIFEST} was altered: it does not match its own SHA-256")


def _check_types(manifest: dict[str, Any]) -> None:
    kinds: tuple[tuple[tuple[str, ...], Any, str], ...] = (
        (_TEXTS, str, "a text"),
        (_TABLES, dict, "an object"),
        (("entry_point",), str | None, "a text"),  # null without a runtime
        (("python",), dict | None, "an object"),  # null without Python
    )
    for keys, kind, name in kinds:
        for key in keys:
            if not isinstance(manifest.get(key), kind):
                raise _damaged(f"{MANIFEST}: {key!r} is not {name}")
    for key in _LISTS:
        if not isinstance(manifest.get(key), list) or not all(isinstance(item, str) for item in manifest[key]):
            raise _damaged(f"{MANIFEST}: {key!r} is not a list of texts")
    if type(manifest.get("tolerance")) not in (int, float) or not 0 < manifest["tolerance"] < 1e9:
        raise _damaged(f"{MANIFEST}: 'tolerance' is not a positive number")
    if type(manifest.get("threads")) is not int or not 0 < manifest["threads"] <= MAX_THREADS:
        raise _damaged(f"{MANIFEST}: 'threads' is not a whole number from 1 to {MAX_THREADS}")
    for row in manifest["sizes"].values():
        good = isinstance(row, dict) and row.keys() == _SIZES
        if not good or any(type(size) is not int or size < 0 for size in row.values()):
            raise _damaged(f"{MANIFEST}: 'sizes' is malformed")


def _check_runtime(manifest: dict[str, Any]) -> None:
    """Refuse an entry point that no bundle of that form has, and a Python that is not described, or not needed."""
    form, entry_point, python = manifest["runtime_form"], manifest.get("entry_point"), manifest.get("python")
    if form not in _ENTRY_POINTS or entry_point != _ENTRY_POINTS[form]:
        raise _damaged(f"{MANIFEST}: a bundle of the form {form!r:.40} is not started by {entry_point!r:.80}")
    if (python is not None) != (form == "wheel"):
        raise _damaged(f"{MANIFEST}: 'python' does not go with the form {form!r}")
    if python is None:
        return
    for key, pattern in _PYTHON.items():
        if not isinstance(python.get(key), str) or not pattern.fullmatch(python[key]):
            raise _damaged(f"{MANIFEST}: 'python' has no {key} that can be")


def _check_texts(manifest: dict[str, Any]) -> None:
    """Refuse texts with characters that a terminal would obey instead of showing them."""
    waiting: list[Any] = [manifest]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, str) and not value.isprintable():
            raise _damaged(f"{MANIFEST}: {value!a:.80} holds characters that cannot be printed")


def is_inside(path: str) -> bool:
    """Tell whether ``path`` is the plain relative one of a file below a bundle, on every system."""
    pure = PurePosixPath(path)
    odd = path in ("", ".", MANIFEST) or "\\" in path or ":" in path or not path.isprintable()
    return not (odd or pure.is_absolute() or ".." in pure.parts or str(pure) != path)


def _check_entry(path: str, entry: Any) -> None:
    """Refuse a path that is not the plain relative one of a file below the bundle, and a malformed size or digest."""
    if not is_inside(path):
        raise _damaged(f"{MANIFEST}: {path!r:.80} is not a path inside the bundle")
    if not isinstance(entry, dict) or not _SHA256.fullmatch(str(entry.get("sha256"))):
        raise _damaged(f"{MANIFEST}: {path!r:.80} has no SHA-256")
    if type(entry.get("size_bytes")) is not int or entry["size_bytes"] < 0:
        raise _damaged(f"{MANIFEST}: {path!r:.80} has no size")


def check_files(folder: Path, manifest: dict[str, Any]) -> None:
    """Check that every listed file is there unaltered and that no other one lies among the code.

    Raises ``BundleError``. Nothing is imported or run here.
    """
    for path, entry in manifest["files"].items():
        _check_plain(folder, path, entry["size_bytes"])
    for unlisted in _unlisted_code(folder, manifest):
        shown = unlisted if unlisted.isprintable() else ascii(unlisted)
        raise _damaged(f"{shown} is not in {MANIFEST}", "remove it, or copy the bundle again")
    for path, entry in manifest["files"].items():
        if _sha256(folder / path) != entry["sha256"]:
            raise _damaged(f"{path} was altered: its SHA-256 is not that in {MANIFEST}")


def _check_plain(folder: Path, path: str, size: int) -> None:
    """Check that ``path`` is a plain file of ``size`` bytes that is reached without a link."""
    *parents, name = PurePosixPath(path).parts
    place = folder
    try:
        for part in parents:
            place = place / part
            if not stat.S_ISDIR(place.lstat().st_mode):
                raise _damaged(f"{path}: {part} is not a folder, or a link to one")
        found = (place / name).lstat()
    except (OSError, ValueError) as error:
        raise _damaged(f"{path} is missing") from error
    if not stat.S_ISREG(found.st_mode):
        raise _damaged(f"{path} is not a plain file")
    if found.st_size != size:
        raise _damaged(f"{path} was altered: it has {found.st_size} bytes instead of {size}")


def _unlisted_code(folder: Path, manifest: dict[str, Any]) -> list[str]:
    found = []
    for root, folders, names in os.walk(folder / CODE_FOLDER):
        links = [name for name in folders if (Path(root) / name).is_symlink()]
        found += [(Path(root) / name).relative_to(folder).as_posix() for name in (*names, *links)]
    return sorted(set(found) - set(manifest["files"]))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise _damaged(f"{path.name} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def _damaged(message: str, hint: str = "copy or build the bundle again") -> BundleError:
    return BundleError(message, hint=hint)


# What follows runs in the bundle only.


def main() -> int:
    """Run the program and return its exit code."""
    options = _parser().parse_args()
    try:
        folder = Path(__file__).resolve().parent
        own = read_manifest(folder)
        _check_machine(own)
        others = [Path(other).resolve() for other in options.also]
        bundles = [(folder, own), *((other, read_manifest(other)) for other in others)]
        for place, manifest in bundles:
            check_files(place, manifest)
        _pin(options.cores)
        _import_only_from(folder / CODE_FOLDER)
        from edgecompress.runtime.bench import measure_bundles, table

        how = {"runs": options.runs, "threads": options.threads, "pause_above": options.pause_above}
        result = {"schema_version": SCHEMA_VERSION, **measure_bundles(bundles, **how)}
        print(json.dumps(result, indent=1, allow_nan=False) if options.json else table(result, own))
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # those of edgecompress cannot be named before its code was checked
        known = hasattr(error, "exit_code")
        print(f"error: {'' if known else 'the bundle does not run here: '}{error}", file=sys.stderr)
        print(f"hint: {getattr(error, 'hint', 'see README.txt')}", file=sys.stderr)
        return int(getattr(error, "exit_code", 7))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="run.py", description="Check, run and time the model of this bundle.")
    parser.add_argument("--runs", type=_positive, default=50, metavar="N", help="timed runs (default: %(default)s)")
    parser.add_argument("--threads", type=_threads, metavar="N", help="threads (default: what manifest.json says)")
    parser.add_argument("--cores", type=_cores, metavar="LIST", help="run on these cores only, as in 0,1")
    parser.add_argument(
        "--pause-above", type=_degrees, metavar="CELSIUS", help="wait between blocks of runs while it is hotter"
    )
    parser.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="DIR",
        help="another bundle, whose model takes turns with this one on this one's runtime; repeatable",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    return parser


def _positive(text: str, most: int = 1_000_000) -> int:
    if not re.fullmatch("[0-9]{1,7}", text) or not 0 < int(text) <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {most}")
    return int(text)


def _threads(text: str) -> int:
    return _positive(text, MAX_THREADS)


def _cores(text: str) -> set[int]:
    if not re.fullmatch(r"\d{1,4}(,\d{1,4})*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of cores such as 0,1")
    return {int(number) for number in text.split(",")}


def _degrees(text: str) -> float:
    if not re.fullmatch(r"\d{1,3}(\.\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a temperature in degrees Celsius")
    return float(text)


def _pin(cores: set[int] | None) -> None:
    if cores is None:
        return
    try:
        os.sched_setaffinity(0, cores)
    except OSError as error:
        allowed = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        hint = f"this process may use the cores {allowed}"
        raise BundleError(
            f"cannot run on the cores {sorted(cores)}: {error.strerror}", hint=hint, exit_code=7
        ) from None


def _check_machine(manifest: dict[str, Any]) -> None:
    wanted = manifest.get("python") or {}
    here = {"abi": sys.implementation.cache_tag, "machine": platform.machine(), "system": platform.system()}
    for key, value in here.items():
        if value != wanted.get(key):
            hint = f"run it with Python {wanted.get('version')} on {manifest['architecture']}"
            raise BundleError(
                f"this bundle is for {key} {wanted.get(key)!r}, here it is {value!r}", hint=hint, exit_code=7
            )


def _import_only_from(code: Path) -> None:
    """Make ``code`` and the standard library all that can be imported, and write nothing into the bundle."""
    sys.dont_write_bytecode = True
    kept = (Path(os.__file__).parent.name, "lib-dynload")
    library = [entry for entry in sys.path if Path(entry).name in kept or entry.endswith(".zip")]
    sys.path[:] = [str(code), *library]


if __name__ == "__main__":
    sys.exit(main())
