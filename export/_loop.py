"""reconstruct.onnx: encoder, conditioning and both loops in one graph."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..errors import UserError
from . import manifest
from ._tracing import PROTOBUF_LIMIT


def compose(directory: Path, kind: str, steps: int, encode_steps: int) -> onnx.ModelProto:
    """One graph out of the exported ones in ``directory``: x0 -> x (and z).

    The steps become bodies of ONNX Loops; their weights are held once, by the outer graph. UserError when that is more
    than one file can hold.
    """
    builder = _Builder()
    parts = {name: onnx.load(directory / f"{name}.onnx") for name in manifest.GRAPHS[kind]}
    if sum(model.ByteSize() for model in parts.values()) - parts["invert_step"].ByteSize() >= PROTOBUF_LIMIT:
        raise UserError("--single-file: the weights are more than the 2 GiB that one ONNX file holds; leave it out")
    conditioning = {}
    if kind != "prior":
        conditioning = {"conditioning": "conditioning"}
        builder.nodes += builder.inline(parts["encoder"], "encoder", {"x0": "x0"}, {"z": "z"})
        builder.nodes += builder.inline(parts["conditioning"], "conditioning", {"z": "z"}, conditioning)
    for graph, count, source, target in (
        ("invert_step", encode_steps, "x0", "x_T"),
        ("decode_step", steps, "x_T", "x"),
    ):
        builder.nodes.append(builder.loop(parts[graph], graph, count, source, target, conditioning))
    example = parts["decode_step"]
    image = _shaped(example.graph.input[0], "x0")
    results = [_shaped(example.graph.output[0], "x")]
    if kind != "prior":
        results.append(_shaped(parts["encoder"].graph.output[0], "z"))
    graph = helper.make_graph(builder.nodes, "reconstruct", [image], results, list(builder.weights.values()))
    return helper.make_model(graph, opset_imports=example.opset_import, ir_version=example.ir_version)


def _shaped(value: onnx.ValueInfoProto, name: str) -> onnx.ValueInfoProto:
    copy = onnx.ValueInfoProto()
    copy.CopyFrom(value)
    copy.name = name
    return copy


class _Builder:
    """Collects nodes under prefixed names, and initializers once for each content."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, TensorProto] = {}
        self._by_content: dict[tuple, str] = {}

    def _weight(self, tensor: TensorProto, prefix: str) -> str:
        digest = hashlib.sha256(numpy_helper.to_array(tensor).tobytes()).digest()
        content = (tensor.data_type, tuple(tensor.dims), digest)
        if content not in self._by_content:
            name = f"{prefix}/{tensor.name}"
            self.weights[name] = TensorProto()
            self.weights[name].CopyFrom(tensor)
            self.weights[name].name = name
            self._by_content[content] = name
        return self._by_content[content]

    def inline(
        self, model: onnx.ModelProto, prefix: str, inputs: dict[str, str], outputs: dict[str, str]
    ) -> list[onnx.NodeProto]:
        """The nodes of ``model`` with its inputs and outputs connected to the names given."""
        names = {"": "", **inputs, **outputs}
        names |= {tensor.name: self._weight(tensor, prefix) for tensor in model.graph.initializer}
        nodes = []
        for node in model.graph.node:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.name = f"{prefix}/{node.name}"
            copy.input[:] = [names.get(name, f"{prefix}/{name}") for name in node.input]
            copy.output[:] = [names.get(name, f"{prefix}/{name}") for name in node.output]
            nodes.append(copy)
        return nodes

    def loop(
        self,
        step: onnx.ModelProto,
        prefix: str,
        count: int,
        source: str,
        target: str,
        conditioning: dict[str, str],
    ) -> onnx.NodeProto:
        """A Loop that applies ``step`` ``count`` times to ``source``."""
        constants = {
            "count": np.array(count, np.int64),
            "true": np.array(True),
            "one": np.array([1], np.int64),
        }
        held = {k: self._weight(numpy_helper.from_array(v, k), f"{prefix}/loop") for k, v in constants.items()}
        index, going, x = (f"{prefix}/{name}" for name in ("index", "going", "x"))
        body = [
            helper.make_node("Reshape", [index, held["one"]], [f"{prefix}/step"], f"{prefix}/as_step"),
            *self.inline(step, prefix, {"x": x, **conditioning}, {}),
            helper.make_node("Identity", [going], [f"{prefix}/on"], f"{prefix}/go_on"),
        ]
        graph = helper.make_graph(
            body,
            prefix,
            [
                helper.make_tensor_value_info(index, TensorProto.INT64, []),
                helper.make_tensor_value_info(going, TensorProto.BOOL, []),
                _shaped(step.graph.input[0], x),
            ],
            [
                helper.make_tensor_value_info(f"{prefix}/on", TensorProto.BOOL, []),
                _shaped(step.graph.output[0], f"{prefix}/x_next"),
            ],
        )
        return helper.make_node("Loop", [held["count"], held["true"], source], [target], f"{prefix}/loop", body=graph)
