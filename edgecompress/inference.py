"""Run a model that is in memory: to calibrate, and to check passes. Measuring is done in a child process, elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx

from edgecompress.errors import ModelError
from edgecompress.runtime.session import import_runtime, runtime_error

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgecompress.model import Array, Model

_SILENT = 4


def open_session(model: Model, extra_outputs: Sequence[str] = (), *, in_floats: bool = False) -> Any:
    """Return an ``onnxruntime.InferenceSession`` that also yields the inner tensors named in ``extra_outputs``.

    With ``in_floats``, QuantizeLinear and DequantizeLinear are computed as they are written and not fused into integer
    kernels, some of which round more.

    External payloads are mapped by the runtime, so the model may have any size. Raises ``ModelError`` with the
    runtime's reason.
    """
    proto = model.proto
    if extra_outputs:
        exposed = onnx.ModelProto()
        exposed.CopyFrom(proto)
        present = {value.name for value in exposed.graph.output}
        exposed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in extra_outputs if name not in present)
        proto = exposed
    runtime = import_runtime()
    options = runtime.SessionOptions()
    options.log_severity_level = _SILENT
    # Idle threads of the runtime would otherwise keep the cores busy while numpy works on what a run gave.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(model.folder.resolve())
    )
    if in_floats:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    try:
        return runtime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's errors have no common base
        raise runtime_error(error, str(model.path)) from None


def run_session(model: Model, session: Any, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Run a session; return all its outputs by name. Raises ``ModelError`` with the runtime's reason."""
    names = [output.name for output in session.get_outputs()]
    try:
        return dict(zip(names, session.run(names, dict(feeds)), strict=True))
    except Exception as error:
        complaint = runtime_error(error, str(model.path))
        hint = "check the inputs; for free dimensions give --shape NAME=DIMS, or give data"
        raise ModelError(complaint.message, hint=hint) from None


def run_once(model: Model, feeds: Mapping[str, Array], *, in_floats: bool = False) -> dict[str, Array]:
    """Return a model's outputs by name; see ``open_session``. Raises ``ModelError`` with the runtime's reason."""
    return run_session(model, open_session(model, in_floats=in_floats), feeds)
