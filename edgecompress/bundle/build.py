"""Build a bundle: place the model, test data and the runtime, write the manifest, run it once where that can be."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy.typing as npt

from edgecompress.artifacts import open_artifact
from edgecompress.bundle.archive import SUFFIXES, write_archive
from edgecompress.bundle.launch import run_program, runs_here
from edgecompress.bundle.manifest import (
    README,
    Component,
    Job,
    Manifest,
    Placed,
    files_below,
    verify_bundle,
    write_checksums,
    write_manifest,
)
from edgecompress.bundle.model_files import find_model, place_model, write_test_data
from edgecompress.bundle.ort import opens_ort_alone
from edgecompress.bundle.program import CODE_FOLDER
from edgecompress.bundle.sbom import write_sbom
from edgecompress.errors import OutputError, UsageError
from edgecompress.files import renamed_in_errors, staged_file, staged_folder
from edgecompress.runtime.worker import Worker

if TYPE_CHECKING:
    from edgecompress.targets import Target

Array = npt.NDArray[Any]

# Of the largest magnitude of an output. Other vector widths add the terms of a float32 sum in another order: at most
# n * 6e-8 for n terms, 6e-4 for ten thousand, and in practice a hundredth of it. A wrong weight shows above 1e-2.
_TOLERANCE = 1e-3
_README = """A model for {target} without a runtime: {model}, one set of inputs and the outputs to expect.

With the runtime of another bundle for that machine, in turns with its model:

  edgecompress bench OTHER .

With Python packages that are installed:

  from edgecompress.runtime import load
  session = load(".")         # an onnxruntime.InferenceSession
"""


class _Form(NamedTuple):
    """The module whose ``place_runtime(job)`` places a runtime, and where in the bundle the model then lies."""

    module: str
    model_folder: str = ""


_FORMS = {
    "wheel": _Form("edgecompress.bundle.wheel"),
    "native": _Form("edgecompress.bundle.native"),
    "wasm": _Form("edgecompress.bundle.web"),
    "gradle": _Form("edgecompress.bundle.android", "src/main/assets"),
    "swift": _Form("edgecompress.bundle.ios", "Sources/EdgeModel/Model"),
}
_CARRIED = ("wheel", "native", "wasm")  # the others name a published runtime, or none


@dataclass(frozen=True, kw_only=True)
class BundleSummary:
    """A bundle that was built: a folder, or an archive of one.

    ``was_run`` tells whether it was run after it was built; a bundle for another machine could not be.
    """

    path: Path
    manifest: Manifest
    components: tuple[Component, ...]
    was_run: bool


def build_bundle(
    source: Path,
    destination: Path,
    *,
    target: Target,
    sample: Mapping[str, Array],
    runtime: str | None = None,
    runtime_file: Path | None = None,
    force: bool = False,
) -> BundleSummary:
    """Build the bundle of a model for ``target`` in the folder ``destination``, and run it once where it can run here.

    ``source`` is a folder written by ``compress`` or an .onnx or .ecz file. ``sample`` holds one set of inputs by name:
    the bundle carries it with the outputs that the model has here. ``runtime`` is one of ``target.forms`` (None: the
    first), ``runtime_file`` what is used in place of something fetched. All or nothing; the same input gives the same
    bytes. Raises ``UsageError`` when the target cannot be built here or the runtime be had, ``ModelError`` or
    ``FormatError`` for the model, ``DeviceError`` or ``ToleranceError`` when the finished bundle does not run,
    ``OutputError`` when it cannot be written.
    """
    job = _Request(source, target, sample, _form(target, runtime, runtime_file), runtime_file)
    with staged_folder(destination, force=force) as folder:
        summary = _fill(folder, job, destination)
        _refuse_leftovers(destination, folder)
    return summary


def build_archive(
    source: Path,
    destination: Path,
    *,
    target: Target,
    sample: Mapping[str, Array],
    runtime: str | None = None,
    runtime_file: Path | None = None,
    force: bool = False,
) -> BundleSummary:
    """Build a bundle as one file, which unpacks to a folder of its name; as ``build_bundle`` in everything else.

    ``destination`` ends in .tar.gz or .zip.
    """
    job = _Request(source, target, sample, _form(target, runtime, runtime_file), runtime_file)
    suffix = next((suffix for suffix in SUFFIXES if destination.name.endswith(suffix)), "")
    name = destination.name.removesuffix(suffix)
    if not suffix or not name:
        raise UsageError(f"{destination} is no name of an archive", hint=f"let it end in {' or '.join(SUFFIXES)}")
    with (
        staged_file(destination, force=force) as staging,
        TemporaryDirectory(prefix=f".{name}.", dir=destination.parent) as place,
    ):
        folder = Path(place) / name
        folder.mkdir()
        with renamed_in_errors(folder, destination):
            summary = _fill(folder, job, destination)
        write_archive(folder, name, staging, suffix)
    return summary


class _Request(NamedTuple):
    """What a bundle is made of, before anything was looked at."""

    source: Path
    target: Target
    sample: Mapping[str, Array]
    form: str
    runtime_file: Path | None


def _fill(folder: Path, asked: _Request, label: Path) -> BundleSummary:
    """Make a complete bundle of an empty folder and run it where it can run; ``label`` names it in messages."""
    if asked.form == "native" and asked.runtime_file is not None and opens_ort_alone(asked.runtime_file):
        asked = asked._replace(target=replace(asked.target, model_form="ort"))
    found = find_model(asked.source, asked.target.model_form)
    _check_limits(found, asked.target)
    job, model_files = _place_model(found, folder, asked)
    placed = _place_runtime(job, asked.form)
    components = placed.components if placed else ()
    write_sbom(job, components, model_files)
    write_checksums(folder)
    write_manifest(job, asked.form, placed, model_files)
    manifest = verify_bundle(folder)
    was_run = runs_here(manifest)
    if was_run:
        run_program(folder, ["--runs", "1"], label=label)
        verify_bundle(folder)  # running it has left nothing in it
    return BundleSummary(path=label, manifest=manifest, components=components, was_run=was_run)


def _form(target: Target, wanted: str | None, runtime_file: Path | None) -> str:
    """Return the form of the runtime; raises ``UsageError`` for one that the target, or that file, does not have."""
    form = wanted or target.forms[0]
    if form not in target.forms:
        raise UsageError(f"there is no runtime {form!r} for {target.name}", hint=f"allowed: {', '.join(target.forms)}")
    if runtime_file is not None and form not in _CARRIED:
        hint = f"leave --runtime-file out, or choose a runtime that is carried: {', '.join(_CARRIED)}"
        raise UsageError(f"a bundle with the runtime {form!r} carries no runtime: {runtime_file} has no use", hint=hint)
    return form


def _check_limits(model: Path, target: Target) -> None:
    """Raise ``UsageError`` where a model is newer than what the target's runtime loads."""
    proto = open_artifact(model).proto
    newest = max((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    runtime = target.runtime
    limits = (("opset", newest, runtime.max_opset), ("IR version", proto.ir_version, runtime.max_ir_version))
    for what, found, most in limits:
        if found > most:
            raise UsageError(
                f"{model}: {what} {found} is newer than {target.name} loads (at most {most})",
                hint="export the model for an older version, or bundle for a target with a newer runtime",
            )


def _place_model(source: Path, folder: Path, asked: _Request) -> tuple[Job, tuple[str, ...]]:
    """Place the model and the test data, running it for that; return also the names of the model's files."""
    prefix = _FORMS[asked.form].model_folder if asked.form in _FORMS else ""
    inner = folder / prefix
    inner.mkdir(parents=True, exist_ok=True)
    model_files = tuple(_join(prefix, name) for name in place_model(source, inner, asked.target.model_form))
    with Worker(folder / model_files[0], threads=asked.target.threads) as worker:
        outputs = worker.run(asked.sample)
        imported = worker.imported_packages()
    job = Job(
        folder=folder,
        target=asked.target,
        source=source,
        model=model_files[0],
        inputs=tuple(_join(prefix, path) for path in write_test_data(inner, "input", asked.sample)),
        outputs=tuple(_join(prefix, path) for path in write_test_data(inner, "output", outputs)),
        tolerance=_TOLERANCE,
        imported=imported,
        runtime_file=asked.runtime_file,
    )
    return job, model_files


def _join(prefix: str, path: str) -> str:
    return f"{prefix}/{path}" if prefix else path


def _place_runtime(job: Job, form: str) -> Placed | None:
    if form == "none":
        (job.folder / README).write_text(
            _README.format(target=job.target.name, model=job.model),
            encoding="utf-8",
        )
        return None
    placed: Placed = importlib.import_module(_FORMS[form].module).place_runtime(job)
    return placed


def _refuse_leftovers(destination: Path, folder: Path) -> None:
    """Refuse to merge into a bundle whose code folder would keep files that the new one does not have."""
    left = set(files_below(destination / CODE_FOLDER)) - set(files_below(folder / CODE_FOLDER))
    if left:
        raise OutputError(
            f"{destination / CODE_FOLDER} holds {len(left)} files of another bundle, e.g. {min(left)}",
            hint=f"remove {destination} or choose another folder",
        )
