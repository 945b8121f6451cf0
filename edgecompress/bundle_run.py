"""Check this bundle, run its model, compare its outputs with the expected ones, time it.

    python3 -I run.py [--runs N] [--threads N] [--json]

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

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
CODE_FOLDER = "lib"  # the only folder that anything is imported from: no unlisted file may lie in it
_MANIFEST_LIMIT_BYTES = 16_000_000
_ROLES = ("model", "entry_point", "sample_input", "expected_output")
_TEXTS = ("target", "architecture", *_ROLES)
_LISTS, _NUMBERS = ("providers",), ("threads", "tolerance")
_TABLES = ("python", "runtime", "tool", "sizes", "files")
_SHA256 = re.compile("[0-9a-f]{64}")


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
        if not stat.S_ISREG(path.lstat().st_mode) or path.stat().st_size > _MANIFEST_LIMIT_BYTES:
            raise _damaged(f"{MANIFEST} is not a plain file of reasonable size")
        manifest = json.loads(path.read_bytes())
    except OSError as error:
        reason = error.strerror or error
        raise _damaged(f"{MANIFEST} cannot be read: {reason}", "name the folder of a bundle") from error
    except (ValueError, RecursionError) as error:
        raise _damaged(f"{MANIFEST} is not JSON") from error
    if not isinstance(manifest, dict):
        raise _damaged(f"{MANIFEST} is not a JSON object")
    version = manifest.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:
        hint = "use the version of edgecompress that built it"
        raise _damaged(f"schema_version {version!r:.40} is not supported (allowed: {SCHEMA_VERSION})", hint)
    try:
        _check_form(manifest)
    except RecursionError as error:
        raise _damaged(f"{MANIFEST} is nested too deeply") from error
    return manifest


def _check_form(manifest: dict[str, Any]) -> None:
    """Check the types of all entries that this program or its caller reads."""
    for keys, kind, name in ((_TEXTS, str, "a text"), (_TABLES, dict, "an object"), (_LISTS, list, "a list")):
        for key in keys:
            if not isinstance(manifest.get(key), kind):
                raise _damaged(f"{MANIFEST}: {key!r} is not {name}")
    for key in _NUMBERS:
        if type(manifest.get(key)) not in (int, float) or not 0 < manifest[key] < 1e9:
            raise _damaged(f"{MANIFEST}: {key!r} is not a positive number")
    for path, entry in manifest["files"].items():
        _check_entry(path, entry)
    for role in _ROLES:
        if manifest[role] not in manifest["files"]:
            raise _damaged(f"{MANIFEST}: {role} {manifest[role]!r:.80} is not among the files")
    if manifest.get("manifest_sha256") != manifest_digest(manifest):
        raise _damaged(f"{MANIFEST} was altered: it does not match its own SHA-256")


def _check_entry(path: str, entry: Any) -> None:
    """Refuse a path that is not the plain relative one of a file below the bundle, and a malformed size or digest."""
    pure = PurePosixPath(path)
    odd = not path or path in (".", MANIFEST) or any(letter in "\\:" or ord(letter) < 32 for letter in path)
    if odd or pure.is_absolute() or ".." in pure.parts or str(pure) != path:
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
        raise _damaged(f"{unlisted} is not in {MANIFEST}", "remove it, or copy the bundle again")
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
    parser = argparse.ArgumentParser(prog="run.py", description="Check, run and time the model of this bundle.")
    parser.add_argument("--runs", type=_positive, default=50, metavar="N", help="timed runs (default: %(default)s)")
    parser.add_argument("--threads", type=_positive, metavar="N", help="threads (default: what manifest.json says)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    options = parser.parse_args()
    try:
        folder = Path(__file__).resolve().parent
        manifest = read_manifest(folder)
        _check_machine(manifest)
        check_files(folder, manifest)
        _import_only_from(folder / CODE_FOLDER)
        result = _measure(folder, manifest, options.threads or int(manifest["threads"]), options.runs)
        print(json.dumps(result, indent=1, allow_nan=False) if options.json else _table(result, manifest))
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # those of edgecompress cannot be named before its code was checked
        known = hasattr(error, "exit_code")
        print(f"error: {'' if known else 'the bundle does not run here: '}{error}", file=sys.stderr)
        print(f"hint: {getattr(error, 'hint', 'see README.txt')}", file=sys.stderr)
        return int(getattr(error, "exit_code", 7))
    return 0


def _positive(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= 1_000_000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 1000000")
    return int(text)


def _check_machine(manifest: dict[str, Any]) -> None:
    here = {"abi": sys.implementation.cache_tag, "machine": platform.machine(), "system": platform.system()}
    for key, value in here.items():
        wanted = manifest["python"].get(key)
        if value != wanted:
            hint = f"run it with Python {manifest['python'].get('version')} on {manifest['architecture']}"
            raise BundleError(f"this bundle is for {key} {wanted!r}, here it is {value!r}", hint=hint, exit_code=7)


def _import_only_from(code: Path) -> None:
    """Make ``code`` and the standard library all that can be imported, and write nothing into the bundle."""
    sys.dont_write_bytecode = True
    kept = (Path(os.__file__).parent.name, "lib-dynload")
    library = [entry for entry in sys.path if Path(entry).name in kept or entry.endswith(".zip")]
    sys.path[:] = [str(code), *library]


def _measure(folder: Path, manifest: dict[str, Any], threads: int, runs: int) -> dict[str, Any]:
    import time

    import numpy as np

    from edgecompress.runtime import measure
    from edgecompress.runtime.session import import_runtime, load

    import_runtime()  # not to be timed
    with np.load(folder / manifest["sample_input"]) as stored:
        feeds = dict(stored)
    start = time.perf_counter_ns()
    session = load(folder / manifest["model"], threads=threads, providers=manifest["providers"])
    init_ms = (time.perf_counter_ns() - start) / 1e6
    timings = measure.measure_timers(
        [lambda count: measure.time_runs(lambda: session.run(None, feeds), count)], runs=runs
    )[0]
    peak = measure.peak_rss_bytes()
    _check_outputs(folder, manifest, session, feeds)
    return {
        "schema_version": SCHEMA_VERSION,
        "target": manifest["target"],
        "model": manifest["model"],
        "outputs_match": True,
        "threads": threads,
        "init_ms": init_ms,
        "first_ms": timings.first_ms,
        "median_ms": float(np.median(timings.values_ms)),
        "p90_ms": float(np.percentile(timings.values_ms, 90)),
        "samples": runs,
        "peak_rss_bytes": peak,
        "warmup_ms": timings.warmup_ms,
        "values_ms": timings.values_ms,
        "sizes": manifest["sizes"],
        "device": measure.device_facts(),
    }


def _check_outputs(folder: Path, manifest: dict[str, Any], session: Any, feeds: dict[str, Any]) -> None:
    """Compare the outputs with those that the model had where the bundle was built."""
    import numpy as np

    from edgecompress.runtime.measure import output_differences

    with np.load(folder / manifest["expected_output"]) as stored:
        expected = dict(stored)
    names = [output.name for output in session.get_outputs()]
    actual = dict(zip(names, session.run(None, feeds), strict=True))
    problems = output_differences(actual, expected, relative=manifest["tolerance"])
    if problems:
        said = "; ".join(f"{name!r} {problem}" for name, problem in problems.items())
        hint = "this processor or build of the runtime computes differently: do not use the bundle here"
        raise BundleError(f"wrong outputs: {said}", hint=hint, exit_code=5)


def _table(result: dict[str, Any], manifest: dict[str, Any]) -> str:
    device = result["device"]
    rows = [
        ("model", f"{result['model']}, onnxruntime {device['onnxruntime']}, {result['threads']} thread(s)"),
        ("device", f"{device['cpu_model']}, {device['cores']} cores, {device['os']}"),
        ("outputs", f"as expected (within {manifest['tolerance']:g} of the largest)"),
        ("start", f"{result['init_ms']:.1f} ms"),
        ("first run", f"{result['first_ms']:.3f} ms"),
        ("median", f"{result['median_ms']:.3f} ms   ({result['samples']} runs)"),
        ("p90", f"{result['p90_ms']:.3f} ms"),
        ("memory", f"{result['peak_rss_bytes'] / 1e6:.1f} MB at most"),
    ]
    for name, size in result["sizes"].items():
        rows.append((f"{name} size", f"{size['installed_bytes']:>11,} bytes, {size['download_bytes']:>11,} compressed"))
    return "\n".join(f"{name:<14} {value}" for name, value in rows)


if __name__ == "__main__":
    sys.exit(main())
