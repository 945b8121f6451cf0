"""From a torch module to an ONNX file. torch is an optional extra, imported here alone."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from edgecompress.errors import ModelError, UsageError
from edgecompress.files import refuse_existing, staged_file
from edgecompress.imports import import_callable, is_reference, one_line
from edgecompress.model import INLINE_LIMIT_BYTES, read_signature

OPSET = 18  # what torch's exporter is written for; others are converted from it


def export_onnx(
    factory: str, *, inputs: Sequence[tuple[int, ...]], dynamic_batch: bool, destination: Path, force: bool = False
) -> None:
    """Call ``package.module:factory`` (the current folder is searched first) and write its module as ONNX, opset 18.

    ``inputs`` has one shape for each positional argument of ``forward``, float32. With ``dynamic_batch`` the first
    axis of every input is free. Weights above 1.8 GB go to ``destination`` + ``.data`` beside it.
    Raises ``UsageError`` for a wrong factory or shape, ``ModelError`` where torch is missing or cannot export the
    module, ``OutputError`` where ``destination`` exists (without ``force``) or cannot be written.
    """
    if not is_reference(factory):
        raise UsageError(f"{factory!r} is not package.module:factory", hint="for example torchvision.models:resnet18")
    _check_shapes(inputs, dynamic_batch=dynamic_batch)
    refuse_existing(destination, force=force)
    module = _build(factory)
    tensors = (*module.parameters(), *module.buffers())
    external = sum(each.numel() * each.element_size() for each in tensors) > INLINE_LIMIT_BYTES
    data = destination.with_name(destination.name + ".data")
    if external:
        refuse_existing(data, force=force)
    with staged_file(destination, force=force) as staging, tempfile.TemporaryDirectory(dir=staging.parent) as folder:
        file = Path(folder) / destination.name  # the weights' file is recorded under a name made from this one
        _run_exporter(module, inputs, file, dynamic_batch=dynamic_batch, external=external)
        _check(file, dynamic_batch=dynamic_batch)
        if external:
            (Path(folder) / data.name).replace(data)
        file.replace(staging)


def _check_shapes(inputs: Sequence[tuple[int, ...]], *, dynamic_batch: bool) -> None:
    """Raise ``UsageError`` for shapes that no tensor has."""
    if not inputs:
        raise UsageError(
            "no input shape is given", hint="add --input with the shape of each argument: --input 1,3,32,32"
        )
    for shape in inputs:
        if any(size < 1 for size in shape) or (dynamic_batch and not shape):
            text = ",".join(map(str, shape))
            raise UsageError(f"input shape {text!r} is not one of positive sizes", hint="for example --input 1,3,32,32")


def _build(factory: str) -> Any:
    """Import torch, call the factory, return its module in evaluation mode."""
    try:
        import onnxscript  # noqa: F401  # torch's exporter needs it and fails late without it
        import torch
    except ImportError as error:
        raise ModelError(
            f"export needs torch and onnxscript: {one_line(error)}", hint='pip install "edgecompress[export]"'
        ) from error
    make = import_callable(factory, what="factory", error=UsageError)
    try:
        module = make()
    except Exception as error:  # the user's code may raise anything
        raise ModelError(
            f"factory {factory} failed: {one_line(error)}", hint="it is called without arguments and returns a module"
        ) from error
    if not isinstance(module, torch.nn.Module):
        raise UsageError(
            f"factory {factory} returned {type(module).__name__}, not a torch.nn.Module",
            hint="name a function without arguments that builds the model with its weights",
        )
    return module.eval()


def _run_exporter(
    module: Any, inputs: Sequence[tuple[int, ...]], file: Path, *, dynamic_batch: bool, external: bool
) -> None:
    """Export ``module`` to ``file`` by torch's own exporter."""
    import torch

    # torch.export takes a batch of 1 for a constant, so a free batch is traced with 2
    shapes = [(max(shape[0], 2), *shape[1:]) if dynamic_batch else shape for shape in inputs]
    batch = {0: torch.export.Dim("batch")} if dynamic_batch else None
    try:
        with _quiet(), torch.no_grad():
            torch.onnx.export(
                module,
                tuple(torch.zeros(shape) for shape in shapes),
                file,
                dynamo=True,
                dynamic_shapes=tuple(batch for _ in shapes) if dynamic_batch else None,
                external_data=external,
                opset_version=OPSET,
                verbose=False,
            )
    except Exception as error:  # the exporter runs the user's code and raises many kinds
        if isinstance(error, OSError):
            raise
        cause = error.__cause__ or error
        raise ModelError(
            f"torch cannot export this module: {one_line(cause)}",
            hint="check the shapes given with --input; torch.onnx.export on the module alone shows the whole reason",
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notes off the screen and off stdout, which may carry our JSON; its exception says enough."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    notes = io.StringIO()
    try:
        with contextlib.redirect_stdout(notes), contextlib.redirect_stderr(notes), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _check(file: Path, *, dynamic_batch: bool) -> None:
    """Drop torch's notes from the file (they hold paths of this machine) and check that a free batch is free."""
    import onnx

    proto = onnx.load(file, load_external_data=False)
    graphs = [proto.graph, *proto.functions]
    for entry in (*graphs, *(node for graph in graphs for node in graph.node), *proto.graph.value_info):
        del entry.metadata_props[:]
    for entry in (*proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        del entry.metadata_props[:]
    del proto.metadata_props[:]
    onnx.save(proto, file)
    fixed = [spec.name for spec in read_signature(file)[0] if not spec.shape or spec.shape[0] is not None]
    if dynamic_batch and fixed:
        raise ModelError(
            f"the batch of input {fixed[0]!r} came out fixed",
            hint="the module uses its size: leave --dynamic-batch out",
        )
