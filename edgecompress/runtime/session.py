"""Opening a model in ONNX Runtime: an ONNX file, an `.ecz` container or a bundle folder."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgecompress.errors import FormatError, ModelError
from edgecompress.runtime.decode import read_pieces
from edgecompress.runtime.format import is_ecz, open_ecz, read_container
from edgecompress.runtime.layout import is_plain_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnxruntime

_SILENT = 4  # the runtime's log level for fatal errors only
_MODEL_LIMIT = 1 << 31  # protocol buffers, and so the runtime, take less than 2 GB at once


def load(
    path: str | Path,
    *,
    threads: int | None = None,
    low_memory: bool = False,
    providers: Sequence[str] = ("CPUExecutionProvider",),
) -> onnxruntime.InferenceSession:
    """Open the model at ``path``: an ONNX file, an `.ecz` file, or a bundle folder. Its content tells which.

    An `.ecz` file is decoded in memory; nothing is written. ``threads`` is the number of threads within an operator
    (None: the runtime's choice). ``low_memory`` keeps weights in their compressed form and rebuilds them one by one
    during every run, which is slower. The runtime's own log is silenced.

    Raises ``FormatError`` for a damaged `.ecz` file or bundle and ``ModelError`` for all that the runtime refuses.
    """
    model = resolve(Path(path))
    runtime = import_runtime()
    options = _options(runtime, threads, low_memory=low_memory)
    buffers: dict[str, memoryview] = {}
    source: str | bytes = str(model)
    if _is_packed(model):
        source, buffers = _decode(model)
    try:
        if buffers:
            options.add_external_initializers_from_files_in_memory(
                list(buffers), list(buffers.values()), [len(buffer) for buffer in buffers.values()]
            )
        session = runtime.InferenceSession(source, options, providers=list(providers))
    except MemoryError:
        raise ModelError(f"{path}: not enough memory to load the model", hint="try low_memory=True") from None
    except Exception as error:  # the runtime's errors have no common base
        raise runtime_error(error, str(path)) from None
    return session


def resolve(path: Path) -> Path:
    """Return the model file that ``path`` stands for: itself, or the one that the bundle's manifest names."""
    if not path.is_dir():
        if not path.exists():
            raise ModelError(f"{path}: there is no such file or folder", hint="check the path")
        return path
    manifest = path / "manifest.json"
    try:
        name = json.loads(manifest.read_bytes())["model"]
    except FileNotFoundError:
        packed = path / "model.ecz"  # what compress writes beside its report
        hint = f"did you mean {packed}?" if packed.is_file() else "name a model file or a bundle"
        raise ModelError(f"{path}: a folder without manifest.json", hint=hint) from None
    except OSError as error:
        raise ModelError(f"cannot read {manifest}: {error.strerror or error}", hint="check the path") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise FormatError(f"{manifest}: malformed, it names no model", hint="build the bundle again") from None
    if not isinstance(name, str) or not all(is_plain_name(part) for part in name.split("/")):
        raise FormatError(f"{manifest}: {name!r} is no file of the bundle", hint="build the bundle again")
    if not (path / name).is_file():
        raise FormatError(f"{path}: the model {name!r} is missing", hint="build the bundle again")
    return path / name


def import_runtime() -> Any:
    """Import onnxruntime, silent and private. Raises ``ModelError`` with the command that installs it."""
    # The official builds report to their maker and leave a file in the temporary folder, unless told not to.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"ONNX Runtime cannot be imported: {reason}", hint="install it: python -m pip install onnxruntime"
        ) from None
    onnxruntime.set_default_logger_severity(_SILENT)
    return onnxruntime


def _options(runtime: Any, threads: int | None, *, low_memory: bool) -> Any:
    """Return the session's options."""
    options = runtime.SessionOptions()
    options.log_severity_level = _SILENT
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    if low_memory:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_cpu_mem_arena = False  # the arena would keep every rebuilt weight until the run ends
        options.enable_mem_pattern = False
        # By default the runtime rebuilds all weights first, as their nodes depend on nothing, and then holds them all.
        options.execution_order = runtime.ExecutionOrder.PRIORITY_BASED
    return options


def _is_packed(path: Path) -> bool:
    """Return whether ``path`` is an `.ecz` file."""
    try:
        with path.open("rb") as handle:
            return is_ecz(handle)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}", hint="check the path") from None


def _decode(path: Path) -> tuple[bytes, dict[str, memoryview]]:
    """Return the model's bytes and those of its external files by name."""
    with open_ecz(path) as handle:
        container = read_container(handle)
        if container.files[0].length >= _MODEL_LIMIT:
            raise ModelError(f"{path}: the runtime cannot load 2 GB from memory", hint="unpack the file first")
        model = io.BytesIO()
        buffers = {entry.name: bytearray() for entry in container.files[1:]}
        for entry, piece in read_pieces(handle, container):
            if entry.name:
                buffers[entry.name] += piece
            else:
                model.write(piece)
        return model.getvalue(), {name: memoryview(buffer) for name, buffer in buffers.items()}


_NOISE = re.compile(
    r"\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : "  # status code
    r"|/[^\s:]*?onnxruntime[^\s:]*\.(?:h|cc|cpp):\d+ .*?\) (?=[A-Z])"  # place in its sources
    r"|Load model from .*? failed:"
)


def runtime_error(error: Exception, name: str) -> ModelError:
    """Return what the runtime raised as a ``ModelError`` of one line without the places in its sources."""
    text = " ".join(str(error).split()) or type(error).__name__
    import onnxruntime

    version = onnxruntime.__version__
    opset = re.search(r"Opset (\d+) is under development.*?domain (\S*) is till opset (\d+)", text)
    if opset:
        number, domain, known = opset.groups()
        which = "opset" if domain in {"", "ai.onnx"} else f"opset of {domain}"
        return ModelError(
            f"{name}: {which} {number} is newer than onnxruntime {version} loads, which is up to {known}",
            hint="convert the model to an older opset or update onnxruntime",
        )
    text = _NOISE.sub("", text)
    return ModelError(f"{name}: onnxruntime {version} refuses it: {text}", hint="check the model with the ONNX checker")
