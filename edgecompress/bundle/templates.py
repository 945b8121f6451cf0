"""Modules for phones from templates: text files in which ``@NAME@`` stands for a value."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from edgecompress.bundle.licenses import copy_own_license
from edgecompress.bundle.manifest import LICENSES, TEST_DATA, Job, files_below
from edgecompress.bundle.ort import convert_to_ort
from edgecompress.errors import UsageError
from edgecompress.files import sha256_of, shared_folder

_PLACE = re.compile("@([A-Z]+)@")


@dataclass(frozen=True, kw_only=True)
class Phone:
    """How a kind of phone's module is written.

    ``templates`` is a folder below ``targets``. ``accelerators`` gives, for an execution provider of the runtime, the
    name of it in the module. ``entry`` is one line of a literal that maps paths to digests.
    """

    templates: str
    accelerators: Mapping[str, str]
    entry: str


def place_module(job: Job, phone: Phone) -> None:
    """Write a phone's module around the model that is placed already, the ``.ort`` form, and our licence.

    Raises ``UsageError`` for a model in several files and for an execution provider that the published package does
    not have, ``ModelError`` where the model has no ``.ort`` form.
    """
    _check_one_file(job)
    runtime = job.target.runtime
    folder = PurePosixPath(job.model).parent
    paths = files_below(job.folder / folder)
    entries = [phone.entry.format(path=path, sha256=sha256_of(job.folder / folder / path)) for path in paths]
    values = {
        "PACKAGE": runtime.package,
        "VERSION": runtime.version,
        "TARGET": job.target.name,
        "MODEL": PurePosixPath(job.model).name,
        "THREADS": str(job.target.threads),
        "TOLERANCE": repr(job.tolerance),
        "ACCELERATOR": _accelerator(phone, runtime.providers),
        "INPUTS": _texts(job.inputs, folder),
        "OUTPUTS": _texts(job.outputs, folder),
        "DIGESTS": "\n        ".join(entries),
    }
    fill(shared_folder("targets") / phone.templates, job.folder, values)
    convert_to_ort(job.folder / job.model, job.folder / "ort")
    copy_own_license(job.folder / LICENSES)


def fill(templates: Path, folder: Path, values: Mapping[str, str]) -> None:
    """Copy all files below ``templates`` to ``folder`` with their places filled; ``KeyError`` for an unknown one."""
    for path in files_below(templates):
        text = (templates / path).read_text(encoding="utf-8")
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(_PLACE.sub(lambda place: values[place[1]], text), encoding="utf-8")


def _check_one_file(job: Job) -> None:
    """Raise ``UsageError`` where the model has external data, which an application cannot open among its resources."""
    folder, model = (job.folder / job.model).parent, PurePosixPath(job.model).name
    others = [path for path in files_below(folder) if path != model and path.split("/")[0] != TEST_DATA]
    if others:
        raise UsageError(
            f"the weights of {job.source} lie in other files ({others[0]}), which an application cannot open",
            hint="save the model as one file: onnx.save_model(onnx.load(PATH), OTHER_PATH)",
        )


def _accelerator(phone: Phone, providers: tuple[str, ...]) -> str:
    if providers[0] not in phone.accelerators:
        raise UsageError(
            f"the published runtime for {phone.templates} has no execution provider {providers[0]!r}",
            hint=f"allowed: {', '.join(phone.accelerators)}",
        )
    return phone.accelerators[providers[0]]


def _texts(paths: tuple[str, ...], folder: PurePosixPath) -> str:
    return ", ".join(f'"{PurePosixPath(path).relative_to(folder)}"' for path in paths)
