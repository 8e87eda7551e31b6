"""An inference server in one process: strict about what a model repository states, and computing by ONNX Runtime.

It reads the repository that is on disk: every config.pbtxt by a strict parser, the graphs, and model.py of the Python
backend. Requests are checked as the real server checks them against the configuration.
"""

import importlib.util
import json
import re
import sys
import types

import numpy as np
import onnxruntime

TYPES = {"TYPE_FP32": np.float32, "TYPE_INT64": np.int64}
TOKEN = re.compile(r'\s*(?:([A-Za-z_][A-Za-z0-9_]*)|(-?\d+)|"((?:[^"\\]|\\.)*)"|([{}\[\]:,]))')
REPEATED = {"input", "output", "instance_group", "parameters", "cc_model_filenames", "dims"}


def parse(text):
    """The text of a config.pbtxt as dicts and lists; ValueError for anything outside of the small grammar it uses."""
    tokens, at = [], 0
    while text[at:].strip():
        match = TOKEN.match(text, at)
        if not match:
            raise ValueError(f"cannot read {text[at : at + 20]!r}")
        tokens.append(match)
        at = match.end()
    value, rest = _message([(m.lastindex, m[m.lastindex]) for m in tokens])
    if rest:
        raise ValueError(f"{rest[0]} is left over")
    return value


def _message(tokens):
    found = {}
    while tokens and tokens[0] != (4, "}"):
        kind, name = tokens.pop(0)
        if kind != 1:
            raise ValueError(f"a field's name expected, not {name!r}")
        if tokens[:1] == [(4, "{")]:
            tokens.pop(0)
            value, tokens = _message(tokens)
            if tokens[:1] != [(4, "}")]:
                raise ValueError(f"{name} is not closed")
            tokens.pop(0)
        elif tokens[:1] == [(4, ":")]:
            tokens.pop(0)
            value = _list(tokens) if tokens[:1] == [(4, "[")] else _scalar(tokens)
        else:
            raise ValueError(f"{name} has no value")
        if name not in REPEATED and name in found:
            raise ValueError(f"{name} is there twice")
        if name in REPEATED and name != "dims":
            found.setdefault(name, []).append(value)
        else:
            found[name] = value
    return found, tokens


def _list(tokens):
    tokens.pop(0)
    values = [_scalar(tokens)]
    while tokens[:1] == [(4, ",")]:
        tokens.pop(0)
        values.append(_scalar(tokens))
    if tokens.pop(0) != (4, "]"):
        raise ValueError("a list is not closed")
    return values


def _scalar(tokens):
    kind, text = tokens.pop(0)
    if kind == 4:
        raise ValueError(f"a value expected, not {text!r}")
    return int(text) if kind == 2 else text


class Tensor:
    """pb_utils.Tensor; one on a GPU cannot be read by numpy, only passed on."""

    def __init__(self, name, array, on_gpu=False):
        assert isinstance(array, np.ndarray) and array.flags.c_contiguous
        self._name, self._array, self._on_gpu = name, array, on_gpu

    def name(self):
        return self._name

    def is_cpu(self):
        return not self._on_gpu

    def as_numpy(self):
        assert not self._on_gpu, "a tensor in GPU memory has no numpy form"
        return self._array

    def to_dlpack(self):
        return (self._array, self._on_gpu)

    @classmethod
    def from_dlpack(cls, name, capsule):
        return cls(name, *capsule)


class Server:
    """``repository``: the folder with the models; ``on_gpu``: models leave their outputs in GPU memory."""

    def __init__(self, repository, capability="8.9", on_gpu=False):
        self.repository, self.on_gpu, self.log = repository, on_gpu, []
        self.configs = {path.name: parse((path / "config.pbtxt").read_text()) for path in sorted(repository.iterdir())}
        self.sessions, self.capability = {}, capability
        for name, config in self.configs.items():
            assert config["name"] == name, "the server refuses a name that is not the folder's"
            assert config["backend"] in ("onnxruntime", "tensorrt", "python")
            assert config["max_batch_size"] >= 0
            assert config["max_batch_size"] > 0 or "dynamic_batching" not in config
            if config["backend"] != "python":
                self.sessions[name] = self._load(name, config)

    def _load(self, name, config):
        files = {entry["key"]: entry["value"] for entry in config.get("cc_model_filenames", [])}
        path = self.repository / name / "1" / files.get(self.capability, config["default_model_filename"])
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        for declared, real in ((config["input"], session.get_inputs()), (config["output"], session.get_outputs())):
            lead = [-1] if config["max_batch_size"] else []
            stated = {t["name"]: lead + t["dims"] for t in declared}
            assert stated == {t.name: [-1 if isinstance(d, str) else d for d in t.shape] for t in real}, name
            assert all(
                TYPES[t["data_type"]] == (np.int64 if "int64" in r.type else np.float32)
                for t in declared
                for r in real
                if r.name == t["name"]
            )
        return session

    def check(self, name, tensors):
        """What the server refuses before a model sees it: a line, or None."""
        config = self.configs.get(name)
        if config is None:
            return f"no model {name}"
        declared = {t["name"]: t for t in config["input"]}
        if sorted(declared) != sorted(tensors):
            return f"expected inputs {sorted(declared)}, got {sorted(tensors)}"
        limit = config["max_batch_size"]
        for key, array in tensors.items():
            shape = list(array.shape)
            if limit and not 1 <= shape[0] <= limit:
                return f"batch of {shape[0]} for '{name}', which takes 1 to {limit}"
            dims = ([shape[0]] if limit else []) + declared[key]["dims"]
            fits = len(shape) == len(dims) and all(d in (-1, s) for s, d in zip(shape, dims, strict=True))
            if not fits or array.dtype != TYPES[declared[key]["data_type"]]:
                return f"unexpected shape or type for input '{key}' of '{name}': {array.dtype} {shape}"
        if limit and len({len(array) for array in tensors.values()}) > 1:
            return f"inputs of '{name}' have different batch sizes"
        return None

    def compute(self, name, tensors):
        """Outputs of a graph by name."""
        self.log.append((name, int(tensors["step"][0]) if "step" in tensors else None))
        session = self.sessions[name]
        names = [t.name for t in session.get_outputs()]
        return dict(zip(names, session.run(names, tensors), strict=True))

    def pipeline(self, name, monkeypatch):
        """The model of the Python backend, loaded from its model.py with this server behind it."""
        monkeypatch.setitem(sys.modules, "triton_python_backend_utils", self._utils())
        path = self.repository / name / "1" / "model.py"
        spec = importlib.util.spec_from_file_location(f"model_{name}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        model = module.TritonPythonModel()
        config = dict(self.configs[name])
        config["parameters"] = {entry["key"]: entry["value"] for entry in config["parameters"]}
        model.initialize({"model_config": json.dumps(config)})
        return model

    def call(self, model, name, *requests):
        """Responses (a dict of arrays each, or the text of its error) to requests that were merged into one batch."""
        total = sum(len(next(iter(r.values()))) for r in requests)
        assert total <= self.configs[name]["max_batch_size"], "the dynamic batcher makes no such batch"
        for request in requests:
            assert self.check(name, request) is None, self.check(name, request)
        responses = model.execute([{key: Tensor(key, value) for key, value in r.items()} for r in requests])
        assert len(responses) == len(requests)
        return [r.error if r.error else {t.name(): t.as_numpy() for t in r.tensors} for r in responses]

    def _utils(self):
        server = self
        utils = types.ModuleType("triton_python_backend_utils")
        utils.Tensor = Tensor
        utils.TRITONSERVER_MEMORY_CPU = "cpu"
        utils.PreferredMemory = lambda kind, device: kind

        class TritonModelException(Exception):
            pass

        class Response:
            def __init__(self, output_tensors, error=None):
                self.tensors, self.error = output_tensors, error

            def has_error(self):
                return self.error is not None

        class Request:
            def __init__(self, model_name, requested_output_names, inputs, preferred_memory=None):
                self.name, self.wanted, self.inputs, self.memory = (
                    model_name,
                    requested_output_names,
                    inputs,
                    preferred_memory,
                )

            def exec(self):
                tensors = {t.name(): t.to_dlpack()[0] for t in self.inputs}
                refusal = server.check(self.name, tensors)
                if refusal:
                    return types.SimpleNamespace(
                        has_error=lambda: True, error=lambda: types.SimpleNamespace(message=lambda: refusal)
                    )
                results = server.compute(self.name, tensors)
                on_gpu = server.on_gpu and self.memory != "cpu"
                return Response([Tensor(name, results[name], on_gpu) for name in self.wanted])

        def output(response, name):
            return next(t for t in response.tensors if t.name() == name)

        utils.TritonModelException, utils.TritonError = TritonModelException, str
        utils.InferenceRequest, utils.InferenceResponse = Request, Response
        utils.get_input_tensor_by_name = lambda request, name: request[name]
        utils.get_output_tensor_by_name = output
        return utils
