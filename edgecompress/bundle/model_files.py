"""What goes into a bundle whatever the runtime: the model in its form, and test data."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from edgecompress.bundle.manifest import CHECKSUMS, LICENSES, README, SBOM, TEST_DATA, files_below
from edgecompress.bundle.program import CODE_FOLDER, MANIFEST, is_inside
from edgecompress.errors import ModelError, RecipeError
from edgecompress.runtime.tensors import write_tensor

if TYPE_CHECKING:
    from edgecompress.targets import ModelForm

Array = npt.NDArray[Any]

# What the forms of the runtime place at the top of a bundle, and the bundle itself.
_OWN_NAMES = frozenset({"run.py", "run.sh", "bench", "index.html", CODE_FOLDER, README, LICENSES, TEST_DATA, SBOM})
_RESERVED = _OWN_NAMES | {CHECKSUMS, MANIFEST}
_FILES = {"ecz": "model.ecz", "onnx": "model.onnx", "self_extracting": "model_self_extracting.onnx", "ort": "model.ort"}


def find_model(source: Path, form: ModelForm) -> Path:
    """Return the model file to bundle: of a folder the one in the target's form, else the other one."""
    if not source.is_dir():
        if not source.is_file():
            raise ModelError(f"{source}: no such file or folder", hint="name a folder written by compress, or a model")
        return source
    for name in (_FILES[form], "model.ecz", "model.onnx"):
        if (source / name).is_file():
            return source / name
    raise ModelError(
        f"{source}: no model.ecz or model.onnx in it", hint="name a folder written by compress, or a model"
    )


@contextmanager
def as_onnx(source: Path) -> Iterator[Path]:
    """Yield the model of ``source`` (a folder, .onnx or .ecz) as an ONNX file, unpacked where it is in a container."""
    from edgecompress.container import unpack
    from edgecompress.runtime.format import is_ecz

    found = find_model(source, "onnx")
    with found.open("rb") as stream:
        packed = is_ecz(stream)
    if not packed:
        yield found
        return
    with tempfile.TemporaryDirectory(prefix="edgecompress-") as name:
        model = Path(name) / "model.onnx"
        unpack(found, model)
        yield model


def place_model(source: Path, folder: Path, form: ModelForm) -> tuple[str, ...]:
    """Put the model in the wanted form, with its external data, into the empty ``folder``; return its files' names.

    The first one is the model. A model that would not be smaller self-extracting, or would take too much memory to
    start, is placed as plain ONNX.
    """
    _PLACERS[form](source, folder, folder / ("model.onnx" if form == "self_extracting" else _FILES[form]))
    names = files_below(folder)
    for name in names:
        if not is_inside(name):
            hint = "rename the data file: printable letters, no colon, no backslash"
            raise ModelError(f"{source}: its data file {name!a} has a name that not every system can have", hint=hint)
        if name.split("/")[0] in _RESERVED:
            raise ModelError(
                f"{source}: its data file {name} has a name that the bundle needs", hint="rename the data file"
            )
    return tuple(sorted(names, key=lambda name: (name not in {"model.onnx", *_FILES.values()}, name)))


def write_test_data(folder: Path, kind: str, arrays: Mapping[str, Array]) -> tuple[str, ...]:
    """Write one file for each array and return their paths; ``kind`` is ``input`` or ``output``.

    Raises ``DataError`` for what is no tensor.
    """
    (folder / TEST_DATA).mkdir(exist_ok=True)
    paths = tuple(f"{TEST_DATA}/{kind}_{index}.pb" for index in range(len(arrays)))
    for path, (name, value) in zip(paths, arrays.items(), strict=True):
        (folder / path).write_bytes(write_tensor(name, value))
    return paths


def _is_packed(path: Path) -> bool:
    from edgecompress.artifacts import is_container

    return is_container(path)


def _place_ecz(source: Path, _: Path, destination: Path) -> None:
    from edgecompress.container import pack

    if _is_packed(source):
        shutil.copyfile(source, destination)  # never loaded: it may be larger than the memory
    else:
        pack(source, destination)


def _place_onnx(source: Path, folder: Path, destination: Path) -> None:
    from edgecompress.container import unpack

    if _is_packed(source):
        unpack(source, destination)
    else:
        shutil.copyfile(source, destination)
        _place_external_data(source, folder)


def _place_self_extracting(source: Path, folder: Path, destination: Path) -> None:
    from edgecompress.artifacts import open_artifact
    from edgecompress.passes.run import run_pass
    from edgecompress.passes.self_extracting import extract_in_graph
    from edgecompress.save import save_model

    with tempfile.TemporaryDirectory() as name:
        plain = Path(name) / destination.name
        _place_onnx(source, plain.parent, plain)
        try:
            model, changes = run_pass(open_artifact(plain), "self-extracting", extract_in_graph, None)
        except RecipeError:  # its start would take too much memory, or the opset is too old
            changes = ()
        if changes:
            save_model(model, destination)
            return
    _place_onnx(source, folder, destination)


def _place_external_data(source: Path, folder: Path) -> None:
    from edgecompress.model import parse_model
    from edgecompress.tensors import all_tensors, external_range, is_external

    tensors = [tensor for tensor in all_tensors(parse_model(source)) if is_external(tensor)]
    for data in sorted({external_range(tensor, source.parent)[0] for tensor in tensors}):
        place = folder / data.relative_to(source.parent)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(data, place)


def _place_ort(source: Path, folder: Path, destination: Path) -> None:
    from edgecompress.bundle.ort import convert_to_ort

    with tempfile.TemporaryDirectory() as name:
        plain = Path(name) / destination.with_suffix(".onnx").name
        _place_onnx(source, plain.parent, plain)
        convert_to_ort(plain, folder)


_PLACERS = {
    "ecz": _place_ecz,
    "onnx": _place_onnx,
    "self_extracting": _place_self_extracting,
    "ort": _place_ort,
}
