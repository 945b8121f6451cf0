"""Bundles: a folder with a model, the runtime and a program, complete for its target; see docs/bundle.md."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

import edgecompress
from edgecompress import bundle_run
from edgecompress.artifacts import open_artifact
from edgecompress.bundle_files import (
    ENTRY_POINT,
    EXPECTED,
    LICENSES,
    README,
    SAMPLE,
    Component,
    copy_distribution,
    copy_own_code,
    files_below,
    find_model,
    needed_distributions,
    place_model,
    size_table,
    write_arrays,
)
from edgecompress.bundle_run import CODE_FOLDER, MANIFEST, SCHEMA_VERSION, BundleError
from edgecompress.errors import DeviceError, FormatError, OutputError, UsageError
from edgecompress.files import refuse_existing, sha256_of, staged_folder
from edgecompress.runtime.worker import Worker

if TYPE_CHECKING:
    from edgecompress.targets import Target

Array = npt.NDArray[Any]

# Of the largest magnitude of an output. Other vector widths add the terms of a float32 sum in another order: at most
# n * 6e-8 for n terms, 6e-4 for ten thousand, and in practice a hundredth of it. A wrong weight shows above 1e-2.
_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class SizeRow:
    """Bytes of one part of a bundle on disk, and in a zip archive (deflate, level 6; an .ecz counts as it is)."""

    installed_bytes: int
    download_bytes: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a bundle says of itself, checked. ``files`` maps relative paths to size and SHA-256."""

    target: str
    architecture: str
    model: str
    entry_point: str
    threads: int
    python: Mapping[str, Any]
    runtime: Mapping[str, Any]
    sizes: Mapping[str, SizeRow]
    files: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class BundleSummary:
    """A bundle that was built and has run once. ``sizes`` has the rows model, runtime, other, total."""

    folder: Path
    manifest: Manifest
    components: tuple[Component, ...]
    sizes: Mapping[str, SizeRow]


def build_bundle(
    source: Path, destination: Path, *, target: Target, sample: Mapping[str, Array], force: bool = False
) -> BundleSummary:
    """Build the bundle of a model for ``target`` in the folder ``destination`` and run it once.

    ``source`` is a folder written by ``compress`` or an .onnx or .ecz file. ``sample`` holds one set of inputs by name:
    the bundle carries it with the outputs that the model has here. All or nothing; the same input gives the same bytes.
    Raises ``UsageError`` when the target cannot be built here, ``ModelError`` or ``FormatError`` for the model,
    ``DeviceError`` when the finished bundle does not run, ``OutputError`` when it cannot be written.
    """
    refuse_existing(destination, force=force)
    _check_target(target)
    found = find_model(source, target.model_form)
    _check_limits(found, target)
    with staged_folder(destination, force=force) as folder:
        model = place_model(found, folder, target.model_form)
        with Worker(folder / model, threads=target.threads) as worker:
            outputs = worker.run(sample)
            imported = worker.imported_packages()
        write_arrays(folder / SAMPLE, sample)
        write_arrays(folder / EXPECTED, outputs)
        components = _place_runtime(folder, target, imported)
        _place_program(folder, target, components)
        _refuse_leftovers(destination, folder)
        _write_manifest(folder, model, target, components)
        run_program(folder, runs=1, label=destination)
        manifest = verify_bundle(folder)
    return BundleSummary(folder=destination, manifest=manifest, components=tuple(components), sizes=manifest.sizes)


def verify_bundle(folder: Path) -> Manifest:
    """Check a bundle completely, executing nothing of it, and return its manifest.

    Raises ``FormatError`` for a manifest that is malformed, altered, of another version, or names a path outside the
    folder; for a file that is missing, altered or reached by a link; for a file among the code that is not listed.
    """
    try:
        content = bundle_run.read_manifest(folder)
        bundle_run.check_files(folder, content)
        sizes = {name: SizeRow(**row) for name, row in content["sizes"].items()}
    except BundleError as problem:
        raise FormatError(f"{folder}: {problem.message}", hint=problem.hint) from None
    except TypeError:
        raise FormatError(f"{folder}: {MANIFEST}: 'sizes' is malformed", hint="build the bundle again") from None
    keys = ("target", "architecture", "model", "entry_point", "threads", "python", "runtime", "files")
    return Manifest(**{key: content[key] for key in keys}, sizes=sizes)


def run_program(folder: Path, *, runs: int, threads: int | None = None, label: Path | None = None) -> dict[str, Any]:
    """Run a bundle's own program and return what it printed; the caller has verified the bundle.

    It runs isolated, in an empty environment and without this interpreter's packages: the bundle has to bring its own.
    ``label`` names the bundle in messages. Raises ``DeviceError`` when it fails or its outputs are wrong.
    """
    label = label or folder
    command = [sys.executable, "-I", "-S", str(folder.absolute() / ENTRY_POINT), "--json", "--runs", str(runs)]
    if threads is not None:
        command += ["--threads", str(threads)]
    done = subprocess.run(command, cwd=folder, env={}, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode:
        reason, hint = _complaint(done)
        raise DeviceError(f"the bundle {label} does not run here: {reason}", hint=hint)
    try:
        result = json.loads(done.stdout)
    except ValueError as error:
        raise DeviceError(f"the bundle {label} printed no result", hint="build the bundle again") from error
    if not isinstance(result, dict):
        raise DeviceError(f"the bundle {label} printed no result", hint="build the bundle again")
    return result


def _complaint(done: subprocess.CompletedProcess[bytes]) -> tuple[str, str]:
    """Return the error and the hint that a failed program printed."""
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    said = {kind: text for kind, _, text in (line.partition(": ") for line in lines) if kind in ("error", "hint")}
    how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
    died = f"it died ({how})" + (f": {lines[-1]}" if lines else "")
    return said.get("error", died), said.get("hint", "run `python3 -I run.py` in its folder to see more")


def _check_target(target: Target) -> None:
    """Raise ``UsageError`` unless the packages installed here are those of ``target``."""
    here = platform.machine()
    if (platform.system(), here) != ("Linux", target.architecture):
        raise UsageError(
            f"a bundle for {target.name} needs Linux on {target.architecture}; this is {platform.system()} on {here}",
            hint="build it on such a machine: it copies the runtime that is installed there",
        )


def _check_limits(model: Path, target: Target) -> None:
    """Raise ``UsageError`` where a model is newer than what the target's runtime loads."""
    proto = open_artifact(model).proto
    newest = max((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    limits = (("opset", newest, target.max_opset), ("IR version", proto.ir_version, target.max_ir_version))
    for what, found, most in limits:
        if found > most:
            raise UsageError(
                f"{model}: {what} {found} is newer than {target.name} loads (at most {most})",
                hint="export the model for an older version, or bundle for a target with a newer runtime",
            )


def _place_runtime(folder: Path, target: Target, imported: frozenset[str]) -> list[Component]:
    """Copy the installed runtime, what it imported, and our own decoder; return what is not ours."""
    code, licenses = folder / CODE_FOLDER, folder / LICENSES
    copy_own_code(code, licenses)
    distributions = needed_distributions(target.runtime_package, imported)
    return [copy_distribution(distribution, code, licenses) for distribution in distributions]


def _place_program(folder: Path, target: Target, components: Sequence[Component]) -> None:
    shutil.copyfile(Path(bundle_run.__file__), folder / ENTRY_POINT)
    listed = "\n".join(f"  {part.name} {part.version} ({part.license or 'see licenses/'})" for part in components)
    version = platform.python_version_tuple()
    (folder / README).write_text(
        f"""A model with all it needs to run on {target.name}: CPython {version[0]}.{version[1]} and this folder.

  python3 -I run.py            check every file, compare the outputs with the expected ones, time the model
  python3 -I run.py --help     more options

In a program of your own:

  import sys
  sys.path.insert(0, "<this folder>/{CODE_FOLDER}")
  sys.dont_write_bytecode = True          # a file that {MANIFEST} does not list makes the check fail
  from edgecompress.runtime import load
  session = load("<this folder>")         # an onnxruntime.InferenceSession

Inside:
{listed}
  edgecompress {edgecompress.__version__} (its decoder only)
""",
        encoding="utf-8",
    )


def _write_manifest(folder: Path, model: str, target: Target, components: Sequence[Component]) -> None:
    paths = list(files_below(folder))
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "target": target.name,
        "architecture": target.architecture,
        "model": model,
        "entry_point": ENTRY_POINT,
        "sample_input": SAMPLE,
        "expected_output": EXPECTED,
        "tolerance": _TOLERANCE,
        "threads": target.threads,
        "providers": list(target.providers),
        "python": {
            "version": ".".join(platform.python_version_tuple()[:2]),
            "abi": sys.implementation.cache_tag,
            "machine": platform.machine(),
            "system": platform.system(),
        },
        "runtime": {part.name: {**asdict(part), "tags": list(part.tags)} for part in components},
        "tool": {"edgecompress": edgecompress.__version__},
        "sizes": size_table(folder, paths),
        "files": {
            path: {"sha256": sha256_of(folder / path), "size_bytes": (folder / path).stat().st_size} for path in paths
        },
    }
    manifest["manifest_sha256"] = bundle_run.manifest_digest(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _refuse_leftovers(destination: Path, folder: Path) -> None:
    """Refuse to merge into a bundle whose code folder would keep files that the new one does not have."""
    left = set(files_below(destination / CODE_FOLDER)) - set(files_below(folder / CODE_FOLDER))
    if left:
        raise OutputError(
            f"{destination / CODE_FOLDER} holds {len(left)} files of another bundle, e.g. {min(left)}",
            hint=f"remove {destination} or choose another folder",
        )
