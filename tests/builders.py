"""Small models written as ONNX text, read as this tool reads them, and run as it runs them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
from onnx import TensorProto, helper, numpy_helper

from edgecompress.data import DataSet
from edgecompress.graph import open_graph
from edgecompress.inference import run_once
from edgecompress.layers import Layer, Skip, find_layers
from edgecompress.metrics import AUTO
from edgecompress.model import Model
from edgecompress.passes.run import run_pass

Array = np.ndarray[Any, Any]


def parse(body: str, *, opset: int = 17, ir_version: int = 8, **weights: Array) -> onnx.ModelProto:
    """Return the model of a graph in ONNX text; the keywords are its initializers."""
    text = f'<ir_version: {ir_version}, opset_import: ["" : {opset}]> {body}'
    proto = onnx.parser.parse_model(text)
    for name, values in weights.items():
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(values), name))
    return proto


def model(body: str | onnx.ModelProto, *, folder: Path = Path(), **rest: Any) -> Model:
    """Return a model in memory, which claims to lie in ``folder``."""
    proto = body if isinstance(body, onnx.ModelProto) else parse(body, **rest)
    return Model(folder / "model.onnx", proto)


def normal(*shape: int, seed: int = 0, dtype: Any = np.float32) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def names(source: Model, kind: str) -> list[str]:
    """Return the names of the initializers, or of another list of the graph, or the operators (``kind="ops"``)."""
    if kind == "ops":
        return [node.op_type for node in source.proto.graph.node]
    return [entry.name for entry in getattr(source.proto.graph, kind)]


def weight_of(source: Model, name: str) -> Array:
    return next(numpy_helper.to_array(each) for each in source.proto.graph.initializer if each.name == name)


def entries(source: Model) -> dict[str, Layer | Skip]:
    return {entry.name: entry for entry in find_layers(open_graph(source))}


def layer(source: Model, name: str = "w") -> Layer:
    found = entries(source)[name]
    assert isinstance(found, Layer), found
    return found


def skip(source: Model, name: str = "w") -> Skip:
    found = entries(source)[name]
    assert isinstance(found, Skip), found
    return found


def run(source: Model, **feeds: Array) -> dict[str, Array]:
    return run_once(source, feeds)


def apply(source: Model, rewrite: Any, feeds: Mapping[str, Array] | None = None) -> Model:
    """Run a pass and check what holds for every pass: the original is not touched, and twice gives the same bytes."""
    before = source.proto.SerializeToString(deterministic=True)
    result, _ = run_pass(source, "tested", rewrite, feeds)
    again, _ = run_pass(source, "tested", rewrite, None)
    assert source.proto.SerializeToString(deterministic=True) == before
    assert result.proto.SerializeToString(deterministic=True) == again.proto.SerializeToString(deterministic=True)
    onnx.checker.check_model(result.proto)
    return result


def external(tensor: TensorProto, location: str, **entries_: Any) -> TensorProto:
    """Return a tensor whose payload lies in a file."""
    kept = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    kept.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries_}.items():
        kept.external_data.add(key=key, value=str(value))
    return kept


def if_model(then_w: Array, else_w: Array, *, outer: str = "", **weights: Array) -> onnx.ModelProto:
    """Return ``y = If(c, x @ then.w, x @ else.w)``: both bodies hold an initializer ``w``; ``outer`` comes first."""
    branches = []
    for values in (then_w, else_w):
        result = helper.make_tensor_value_info("r", TensorProto.FLOAT, None)
        node = helper.make_node("MatMul", ["x", "w"], ["r"])
        branches.append(helper.make_graph([node], "body", [], [result], [numpy_helper.from_array(values, "w")]))
    proto = parse(
        f"g (bool c, float[N, {then_w.shape[0]}] x) => (float[N, M] y) {{ {outer} y = Identity(x) }}", **weights
    )
    proto.graph.node[-1].CopyFrom(
        helper.make_node("If", ["c"], ["y"], then_branch=branches[0], else_branch=branches[1])
    )
    return proto


class Rows:
    """A source of rows that are in memory."""

    def __init__(self, **arrays):
        self.arrays = arrays

    def read(self, rows):
        return {name: values[rows] for name, values in self.arrays.items()}

    def origins(self, rows):
        return set(rows)


def data_of(**arrays):
    count = len(next(iter(arrays.values())))
    return DataSet("rows", Rows(**arrays), np.arange(count), None, AUTO)
