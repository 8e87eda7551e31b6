"""From traced modules to .onnx files: tracing, cleaning, weights that two graphs share."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import torch
from torch import nn

from ..errors import UserError

# Smaller constants stay inside the graph, where a reader of the file sees them.
SHARED_FROM_BYTES = 1024
PROTOBUF_LIMIT = 2**31 - 1


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports packages that it does not find and deprecations of its own; neither is the user's matter."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def trace(
    module: nn.Module,
    inputs: list[dict[str, Any]],
    outputs: list[dict[str, Any]],
    opset: int,
) -> onnx_ir.Model:
    """``module`` as an ONNX graph for any batch size "N"; ``inputs`` and ``outputs`` as the manifest lists them."""
    batch = torch.export.Dim("N")
    examples, dynamic = [], []
    for entry in inputs:
        # Two images: the tracer would take a batch of one for a constant.
        shape = [2 if size == "N" else size for size in entry["shape"]]
        examples.append(torch.zeros(shape, dtype=getattr(torch, entry["dtype"])))
        dynamic.append({0: batch} if entry["shape"][0] == "N" else None)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module,
            tuple(examples),
            dynamo=True,
            opset_version=opset,
            input_names=[entry["name"] for entry in inputs],
            output_names=[entry["name"] for entry in outputs],
            dynamic_shapes=tuple(dynamic),
            verbose=False,
        )
    model = program.model
    _clean(model)
    domains = {node.domain for node in model.graph.all_nodes()} - {""}
    if domains or model.functions:
        raise RuntimeError(f"the graph uses operators of {sorted(domains)}; expected those of ONNX alone")
    found = model.opset_imports[""]
    if found != opset:
        raise UserError(f"the exporter wrote opset {found} where {opset} was asked for; expected --opset {found}")
    return model


def _clean(model: onnx_ir.Model) -> None:
    """Remove what the tracer notes about itself: stack traces hold paths of this machine and change from run to run."""
    model.metadata_props.clear()
    model.doc_string = None
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
        value.doc_string = None


def save(model: onnx_ir.Model, path: Path) -> None:
    """Write one .onnx file; UserError when it would be larger than the format can hold."""
    inside = (value.const_value for value in model.graph.initializers.values())
    size = sum(tensor.nbytes for tensor in inside if not isinstance(tensor, onnx_ir.ExternalTensor))
    if size >= PROTOBUF_LIMIT:
        raise UserError(f"{path.name} would be {size / 2**30:.1f} GiB; one ONNX file holds less than 2")
    onnx_ir.save(model, path)


def share_weights(models: list[onnx_ir.Model], path: Path) -> None:
    """Move what the graphs of ``models`` have in common into one file ``path`` that all of them refer to."""
    first, *others = models
    common: list[str] = []
    for name, value in first.graph.initializers.items():
        if value.const_value.nbytes >= SHARED_FROM_BYTES and all(_same(value, m, name) for m in others):
            common.append(name)
    tensors = [first.graph.initializers[name].const_value for name in common]
    outside = onnx_ir.external_data.convert_tensors_to_external(tensors, path.parent, path.name)
    for model in models:
        for name, tensor in zip(common, outside, strict=True):
            model.graph.initializers[name].const_value = tensor


def _same(value: onnx_ir.Value, other: onnx_ir.Model, name: str) -> bool:
    if name not in other.graph.initializers:
        return False
    a, b = value.const_value, other.graph.initializers[name].const_value
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def check(path: Path) -> None:
    """ONNX's own full check, shape inference included; RuntimeError when the file is not valid."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise RuntimeError(f"{path.name} is not valid ONNX: {error}") from error


def widened(path: Path) -> onnx.ModelProto:
    """The graph at ``path`` with float32 in place of bfloat16; casts to bfloat16 still round, weights stay rounded.

    For runtimes without bfloat16 convolutions: what they compute with it differs from the original by the rounding of
    intermediate results only.
    """
    model = onnx.load(path)
    graph, narrow, wide = model.graph, onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
    for tensor in graph.initializer:
        _widen(tensor)
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        nodes.append(node)
        for attribute in node.attribute:
            if attribute.HasField("t"):
                _widen(attribute.t)
        if node.op_type == "Cast" and any(a.name == "to" and a.i == narrow for a in node.attribute):
            name = node.output[0]
            node.output[0] = f"{name}_rounded"
            nodes.append(onnx.helper.make_node("Cast", [node.output[0]], [name], to=wide))
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    return model


def _widen(tensor: onnx.TensorProto) -> None:
    if tensor.data_type == onnx.TensorProto.BFLOAT16:
        values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
