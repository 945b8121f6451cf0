"""What a bundle says of itself: its parts, their sizes and checksums; and the check that it still is what it says."""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import edgecompress
from edgecompress.bundle import program
from edgecompress.bundle.program import MANIFEST, SCHEMA_VERSION, BundleError
from edgecompress.errors import FormatError
from edgecompress.files import sha256_of
from edgecompress.targets import is_device

if TYPE_CHECKING:
    from edgecompress.targets import Target

README, LICENSES, TEST_DATA, SBOM, CHECKSUMS = "README.txt", "licenses", "test_data", "sbom.cdx.json", "SHA256SUMS"
_PAPERS = frozenset({README, LICENSES, TEST_DATA, SBOM, CHECKSUMS, "ort"})  # neither model nor runtime


@dataclass(frozen=True)
class Component:
    """Someone else's work of which a bundle carries parts.

    ``source`` is where it came from, ``purl`` its package URL, ``tags`` the systems that its binaries are for,
    ``sha256`` the digest of the package it was taken from, where one was fetched.
    """

    name: str
    version: str
    license: str | None
    source: Literal["pip", "debian", "npm", "maven", "swiftpm", "file"]
    purl: str
    tags: tuple[str, ...] = ()
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class Job:
    """A bundle in the making, for the module that places the runtime.

    ``folder`` is the staged bundle. ``source`` is the model file that it is made of, ``model`` the path of the placed
    one relative to ``folder``, as are ``inputs`` and ``outputs``, the test data. ``imported`` holds the packages that a
    process which ran the model has imported. ``runtime_file`` is what the user gave in place of something fetched.
    """

    folder: Path
    target: Target
    source: Path
    model: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    tolerance: float
    imported: frozenset[str]
    runtime_file: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Placed:
    """What a runtime consists of. ``entry_point`` starts the bundle; ``python`` says which Python it needs, if any."""

    entry_point: str
    components: tuple[Component, ...]
    python: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class SizeRow:
    """Bytes of one part of a bundle on disk, and in a zip archive (deflate, level 6; an .ecz counts as it is)."""

    installed_bytes: int
    download_bytes: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a bundle says of itself, checked. ``files`` maps relative paths to size and SHA-256.

    ``entry_point`` is None where the bundle has no runtime, ``python`` unless it is made of wheels.
    """

    target: str
    system: str
    architecture: str
    default_device: str
    runtime_form: str
    model: str
    entry_point: str | None
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    tolerance: float
    threads: int
    providers: tuple[str, ...]
    python: Mapping[str, Any] | None
    runtime: Mapping[str, Any]
    sizes: Mapping[str, SizeRow]
    files: Mapping[str, Mapping[str, Any]]


def write_manifest(job: Job, form: str, placed: Placed | None, model_files: Sequence[str]) -> None:
    """Write the manifest of a bundle whose other files are complete; ``model_files`` says which hold the model."""
    folder, target = job.folder, job.target
    paths = files_below(folder)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "target": target.name,
        "system": target.system,
        "architecture": target.architecture,
        "default_device": target.default_device,
        "runtime_form": form,
        "model": job.model,
        "entry_point": placed.entry_point if placed else None,
        "inputs": list(job.inputs),
        "outputs": list(job.outputs),
        "tolerance": job.tolerance,
        "threads": target.threads,
        "providers": list(target.runtime.providers),
        "python": dict(placed.python) if placed and placed.python else None,
        "runtime": {part.name: {**asdict(part), "tags": list(part.tags)} for part in placed.components}
        if placed
        else {},
        "tool": {"edgecompress": edgecompress.__version__},
        "sizes": _size_table(folder, paths, model_files),
        "files": {
            path: {"sha256": sha256_of(folder / path), "size_bytes": (folder / path).stat().st_size} for path in paths
        },
    }
    manifest["manifest_sha256"] = program.manifest_digest(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def write_checksums(folder: Path) -> None:
    """Write SHA256SUMS over all files, in the format of sha256sum: ``sha256sum -c SHA256SUMS`` checks the bundle."""
    lines = [f"{sha256_of(folder / path)}  {path}\n" for path in files_below(folder)]
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8")


def verify_bundle(folder: Path) -> Manifest:
    """Check a bundle completely, executing nothing of it, and return its manifest.

    Raises ``FormatError`` for a manifest that is malformed, altered, of another version, or names a path outside the
    folder; for a file that is missing, altered or reached by a link; for a file among the code that is not listed.
    """
    return _read(folder, files=True)


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a bundle whose files were checked before; raises ``FormatError`` as ``verify_bundle``."""
    return _read(folder, files=False)


def _read(folder: Path, *, files: bool) -> Manifest:
    try:
        content = program.read_manifest(folder)
        if files:
            program.check_files(folder, content)
    except BundleError as problem:
        raise FormatError(f"{folder}: {problem.message}", hint=problem.hint) from None
    return manifest_of(content, folder)


def manifest_of(content: Mapping[str, Any], place: Path) -> Manifest:
    """Return the content of a manifest that ``program.parse_manifest`` has passed; ``place`` names it in messages."""
    if not is_device(content["default_device"]):
        raise FormatError(f"{place}: {MANIFEST}: 'default_device' is not a device", hint="build the bundle again")
    sizes = {name: SizeRow(**row) for name, row in content["sizes"].items()}
    fields: dict[str, Any] = {field.name: content.get(field.name) for field in dataclasses.fields(Manifest)}
    lists = {key: tuple(content[key]) for key in ("inputs", "outputs", "providers")}
    return Manifest(**{**fields, **lists, "sizes": sizes})


def files_below(folder: Path) -> list[str]:
    """Return the relative paths, with slashes, of all files below ``folder``, sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def _size_table(folder: Path, paths: Sequence[str], model_files: Sequence[str]) -> dict[str, dict[str, int]]:
    """Return the bytes of each part on disk and in an archive; the manifest is not counted: the table stands in it."""
    rows = {name: [0, 0] for name in ("model", "runtime", "other", "total")}
    with ThreadPoolExecutor() as pool:
        packed_sizes = pool.map(_deflated_size, [folder / path for path in paths])
    for path, packed in zip(paths, packed_sizes, strict=True):
        paper = _PAPERS.intersection(path.split("/")[:-1] or [path])
        part = "model" if path in model_files else "other" if paper else "runtime"
        for name in (part, "total"):
            rows[name][0] += (folder / path).stat().st_size
            rows[name][1] += packed
    return {name: {"installed_bytes": row[0], "download_bytes": row[1]} for name, row in rows.items()}


def _deflated_size(path: Path) -> int:
    packer, total = zlib.compressobj(6, wbits=-15), 0
    with path.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            total += len(packer.compress(block))
    # An archive keeps what does not shrink, such as an .ecz, as it is.
    return min(total + len(packer.flush()), path.stat().st_size)
