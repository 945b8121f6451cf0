"""Write a model of more than 2 GB: a chain of square MatMul layers with their weights in one external data file.

    python benchmarks/make_large_model.py FOLDER [--layers 11] [--width 7400]

The weights are written one layer at a time, so the script itself needs little memory.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper


def external_tensor(name: str, width: int, offset: int) -> TensorProto:
    size = width * width * 4
    tensor = TensorProto(
        name=name, data_type=TensorProto.FLOAT, dims=[width, width], data_location=TensorProto.EXTERNAL
    )
    for key, value in (("location", "large.onnx.data"), ("offset", str(offset)), ("length", str(size))):
        tensor.external_data.add(key=key, value=value)
    return tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=11)
    parser.add_argument("--width", type=int, default=7400)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)

    generator = np.random.default_rng(0)
    nodes, tensors, offset = [], [], 0
    with (options.folder / "large.onnx.data").open("wb") as stream:
        for layer in range(options.layers):
            weight = generator.standard_normal((options.width, options.width), dtype=np.float32)
            weight /= np.sqrt(np.float32(options.width))
            stream.write(weight.data)
            tensors.append(external_tensor(f"w{layer}", options.width, offset))
            offset += weight.nbytes
            source = f"relu{layer - 1}" if layer else "x"
            nodes.append(helper.make_node("MatMul", [source, f"w{layer}"], [f"h{layer}"]))
            nodes.append(helper.make_node("Relu", [f"h{layer}"], [f"relu{layer}"]))
    graph = helper.make_graph(
        nodes,
        "large",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", options.width])],
        [helper.make_tensor_value_info(f"relu{options.layers - 1}", TensorProto.FLOAT, ["N", options.width])],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, options.folder / "large.onnx")


if __name__ == "__main__":
    main()
