"""What ONNX Runtime's own tools say of a model for phones: the .ort form, the operators, who can accelerate it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edgecompress.errors import ModelError
from edgecompress.runtime.session import import_runtime

CONFIG = "required_operators_and_types.config"
_NO_ONNX = b"ONNX format model is not supported in this build"  # the words of the error in such a library
Verdict = Literal["no", "maybe", "yes"]

# Operators of the XNNPACK execution provider as its documentation lists them; the runtime's tools have no list of it.
# Conv, pooling and Resize in two dimensions only, with constant weights.
_XNNPACK = frozenset(
    {
        ("ai.onnx", "AveragePool"),
        ("ai.onnx", "Conv"),
        ("ai.onnx", "ConvTranspose"),
        ("ai.onnx", "Gemm"),
        ("ai.onnx", "MatMul"),
        ("ai.onnx", "MaxPool"),
        ("ai.onnx", "QLinearConv"),
        ("ai.onnx", "Resize"),
        ("ai.onnx", "Softmax"),
        ("com.microsoft", "QLinearAveragePool"),
        ("com.microsoft", "QLinearSoftmax"),
    }
)


@dataclass(frozen=True, kw_only=True)
class Usability:
    """How much of a model an accelerator takes. ``partitions`` is the number of pieces it takes it in.

    ``verdict`` is the runtime's own judgement: one piece with most of the nodes is worth a try, many pieces cost more
    than they gain. ``shapes_fixed`` tells whether the dimensions that a model leaves open were taken as fixed, which
    ``python -m onnxruntime.tools.make_dynamic_shape_fixed`` does.
    """

    accelerator: str
    shapes_fixed: bool
    nodes: int
    supported: int
    partitions: int
    unsupported: tuple[str, ...]
    verdict: Verdict


def convert_to_ort(model: Path, folder: Path) -> tuple[Path, Path]:
    """Write ``model.ort`` and the list of its operators and types into ``folder`` and return the paths of both.

    The form is that of ``onnxruntime.tools.convert_onnx_models_to_ort``, optimized for ARM: weights are folded to what
    the kernels read, so it is as large as the uncompressed model. Raises ``ModelError`` when the tool refuses it.
    """
    import_runtime()  # for its environment, which the tool inherits: no telemetry
    with tempfile.TemporaryDirectory() as name:
        output = Path(name) / "output"
        output.mkdir()
        command = [
            *_fixed_addresses(),
            sys.executable,
            "-m",
            "onnxruntime.tools.convert_onnx_models_to_ort",
            str(model.absolute()),
        ]
        command += ["--optimization_style", "Fixed", "--enable_type_reduction", "--target_platform", "arm"]
        done = subprocess.run([*command, "--output_dir", str(output)], capture_output=True, text=True, check=False)
        written = [*output.rglob("*.ort"), *output.rglob(f"*{CONFIG}")]
        if done.returncode or len(written) != 2:
            said = (done.stderr.strip() or done.stdout.strip() or "it wrote nothing").splitlines()[-1]
            raise ModelError(f"{model}: cannot be converted to .ort: {said[:300]}", hint="see `edgecompress inspect`")
        folder.mkdir(parents=True, exist_ok=True)
        ort, config = folder / "model.ort", folder / CONFIG
        ort.write_bytes(written[0].read_bytes())
        lines = written[1].read_text(encoding="utf-8").splitlines(keepends=True)
        config.write_text("".join(line for line in lines if not line.startswith("#")), encoding="utf-8")
    return ort, config


def _fixed_addresses() -> list[str]:
    """Return what starts a program without random addresses, where the system has and allows it.

    The runtime writes a table in the order of a hash map whose seed is an address: the same input would not give the
    same bytes.
    """
    prefix = ["setarch", "--addr-no-randomize"]
    if shutil.which(prefix[0]) is None:
        return []
    return prefix if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0 else []


def opens_ort_alone(given: Path) -> bool:
    """Tell whether a runtime's library, or the one in a folder, is a reduced one, which opens no ONNX files."""
    found = sorted(given.glob("libonnxruntime.so*")) if given.is_dir() else [given]
    return any(path.is_file() and _NO_ONNX in path.read_bytes() for path in found)


def mobile_usability(model: Path) -> tuple[Usability, ...]:
    """Return what NNAPI, CoreML (both formats) and XNNPACK could take of a model in ONNX form.

    The model is judged after the runtime has folded what is constant, so decoders in its graph do not count. Where it
    has open dimensions and an accelerator needs fixed ones, a second row judges it with these fixed. Only types of
    operators are looked at, as the runtime's own check does. Raises ``ModelError`` when the model does not load.
    """
    import_runtime()  # before its tools import it: silent, no telemetry
    from onnxruntime.tools.mobile_helpers.usability_checker import check_shapes
    from onnxruntime.tools.onnx_model_utils import ModelProtoWithShapeInfo, optimize_model

    with tempfile.TemporaryDirectory() as name:
        folded = Path(name) / "model.onnx"
        try:
            optimize_model(model, folded, use_external_initializers=True)
            shaped = ModelProtoWithShapeInfo(folded)
        except Exception as error:  # the runtime's own classes, and what its tool lets through
            raise ModelError(f"{model}: {str(error)[:300]}", hint="check it with `edgecompress inspect`") from error
        proto = shaped.model_with_shape_info
        dynamic = bool(check_shapes(proto.graph)[0])
        rows = []
        for accelerator, check in _checks().items():
            rows.append(_usability(accelerator, check(proto, True), shapes_fixed=False))
            if dynamic and rows[-1].verdict != "yes":
                rows.append(_usability(accelerator, check(proto, False), shapes_fixed=True))
        return (*rows, _xnnpack(proto))


def _checks() -> dict[str, Callable[[Any, bool], Any]]:
    from onnxruntime.tools.mobile_helpers.usability_checker import check_coreml_partitions, check_nnapi_partitions

    return {
        "NNAPI": check_nnapi_partitions,
        "CoreML NeuralNetwork": lambda proto, fixed: check_coreml_partitions(
            proto, fixed, "coreml_supported_neuralnetwork_ops.md"
        ),
        "CoreML MLProgram": lambda proto, fixed: check_coreml_partitions(
            proto, fixed, "coreml_supported_mlprogram_ops.md"
        ),
    }


def _usability(accelerator: str, info: Any, *, shapes_fixed: bool) -> Usability:
    return Usability(
        accelerator=accelerator,
        shapes_fixed=shapes_fixed,
        nodes=info.num_nodes,
        supported=info.num_supported_nodes,
        partitions=info.num_partitions,
        unsupported=tuple(sorted(info.unsupported_ops)),
        verdict=_VERDICTS[info.suitability().name],
    )


_VERDICTS: dict[str, Verdict] = {"NO": "no", "MAYBE": "maybe", "YES": "yes"}


def _xnnpack(proto: Any) -> Usability:
    """Judge by operators. It runs on the CPU, so pieces cost no copies: half of the nodes are worth a try."""
    names = [(node.domain or "ai.onnx", node.op_type) for node in proto.graph.node]
    # Activations between its operators are taken with them where they only clamp.
    taken = [name in _XNNPACK or name in {("ai.onnx", "Relu"), ("ai.onnx", "Clip")} for name in names]
    starts = [now and not before for before, now in zip([False, *taken], taken, strict=False)]
    share = sum(taken) / max(len(taken), 1)
    return Usability(
        accelerator="XNNPACK",
        shapes_fixed=False,
        nodes=len(names),
        supported=sum(taken),
        partitions=sum(starts),
        unsupported=tuple(sorted({":".join(name) for name, fits in zip(names, taken, strict=True) if not fits})),
        verdict="yes" if share > 0.75 else "maybe" if share > 0.5 else "no",
    )
