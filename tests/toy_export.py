"""A small exported directory made by hand, so that what reads one is tested without the exporter.

The graphs have the interface of `pdae_fast.export.manifest` and the traits that matter to a runtime: a convolution in
the export's dtype, float32 state, tables indexed by the step, a batch dimension that nothing else depends on.
"""

import numpy as np
from onnx import TensorProto, checker, helper, numpy_helper, save

from pdae_fast.export import manifest as manifests

IMAGE = (1, 8, 8)
LATENT = 6
WIDTH = 4
STEPS = {"decode_step": 4, "invert_step": 3}
OPSET = {"float32": 21, "float16": 21, "bfloat16": 22}  # bfloat16 convolutions came with 22
ONNX_DTYPE = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


def _tensor(entry):
    kind = TensorProto.INT64 if entry["dtype"] == "int64" else TensorProto.FLOAT
    return helper.make_tensor_value_info(entry["name"], kind, entry["shape"])


def _weight(name, values):
    return numpy_helper.from_array(np.asarray(values), name)


def graph(name, dtype="float32", kind="pdae"):
    """One of the four graphs as an ONNX model; the same weights for the same name every time."""
    random = np.random.default_rng(sum(map(ord, name)))
    inputs, outputs = manifests.signature(name, IMAGE, *((LATENT, WIDTH) if kind == "pdae" else (None, None)))

    def draw(*shape, scale=0.3):
        return (random.standard_normal(shape) * scale).astype(np.float32)

    def node(op, sources, target, **attributes):
        nodes.append(helper.make_node(op, sources, [target], **attributes))

    def convolution(source, target, features):
        weight = helper.make_tensor("w", ONNX_DTYPE[dtype], (features, IMAGE[0], 3, 3), draw(features * 9).tolist())
        initializers.append(weight)
        node("Cast", [source], "low", to=ONNX_DTYPE[dtype])
        node("Conv", ["low", "w"], "features_low", pads=[1, 1, 1, 1])
        node("Cast", ["features_low"], target, to=TensorProto.FLOAT)

    nodes, initializers = [], []
    if name == "encoder":
        initializers += [_weight("out", draw(2 * 64, LATENT)), _weight("flat", np.array([0, -1]))]
        convolution("x0", "features", 2)
        node("Tanh", ["features"], "activated")
        node("Reshape", ["activated", "flat"], "rows")
        node("MatMul", ["rows", "out"], "z")
    elif name == "conditioning":
        initializers += [_weight("w", draw(LATENT, 2 * WIDTH)), _weight("shape", np.array([0, 2, WIDTH]))]
        node("MatMul", ["z", "w"], "rows")
        node("Reshape", ["rows", "shape"], "conditioning")
    else:
        steps = STEPS[name]
        initializers += [
            _weight("keep", np.linspace(0.8, 1.1, steps, dtype=np.float32).reshape(steps, 1, 1, 1)),
            _weight("add", np.linspace(-0.5, 0.9, steps, dtype=np.float32).reshape(steps, 1, 1, 1)),
        ]
        convolution("x", "features", WIDTH)
        node("Tanh", ["features"], "activated")
        if kind == "pdae":
            initializers += [
                _weight("two", np.array([1, 1])),
                _weight("axis", np.array([1])),
                _weight("hw", np.array([2, 3])),
            ]
            node("Split", ["conditioning", "two"], "scale_row", axis=1)
            nodes[-1].output.append("shift_row")
            for part in ("scale", "shift"):
                node("Squeeze", [f"{part}_row", "axis"], f"{part}_flat")
                node("Unsqueeze", [f"{part}_flat", "hw"], part)
            node("Mul", ["activated", "scale"], "scaled")
            node("Add", ["scaled", "shift"], "modulated")
        else:
            initializers += [_weight("axis", np.array([1]))]
        node("ReduceMean", ["modulated" if kind == "pdae" else "activated", "axis"], "eps", keepdims=1)
        for table in ("keep", "add"):
            node("Gather", [table, "step"], f"{table}_now", axis=0)
        node("Mul", ["x", "keep_now"], "kept")
        node("Mul", ["eps", "add_now"], "added")
        node("Add", ["kept", "added"], "x_next")
    made = helper.make_graph(nodes, name, [_tensor(t) for t in inputs], [_tensor(t) for t in outputs], initializers)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET[dtype])], ir_version=10)
    checker.check_model(model, full_check=True)
    return model, inputs, outputs


def write_toy(directory, dtype="float32", kind="pdae", max_batch=4, **changed):
    """Fill ``directory`` as `python -m pdae_fast.export onnx` would; ``changed`` fields replace the manifest's."""
    directory.mkdir(parents=True, exist_ok=True)
    graphs = {}
    for name in manifests.GRAPHS[kind]:
        model, inputs, outputs = graph(name, dtype, kind)
        save(model, directory / f"{name}.onnx")
        graphs[name] = manifests.graph_entry(directory / f"{name}.onnx", inputs, outputs)
    pdae = kind == "pdae"
    content = {
        "backend": "onnxruntime",
        "kind": kind,
        "image_shape": list(IMAGE),
        "latent_dim": LATENT if pdae else None,
        "conditioning_width": WIDTH if pdae else None,
        "dtype": dtype,
        "steps": STEPS["decode_step"],
        "encode_steps": STEPS["invert_step"],
        "opset": OPSET[dtype],
        "max_batch": max_batch,
        "graphs": graphs,
        "files": {},
        "versions": {},
    }
    manifests.write(directory, {**content, **changed})
    return directory
