"""A CUDA runtime and a TensorRT that compute on the CPU, strict where the real ones are unforgiving.

Device memory is host memory filled with NaN bits. Work is queued on streams and runs only when a stream is
synchronised, so a missing wait, an argument that is freed too early or a wrong order gives wrong numbers. A capture
records instead of queueing, and fails on what may not be captured: copies from the host, synchronisation, a first run
after a change of shapes. The "engines" are ONNX files, evaluated by ONNX Runtime.
"""

import ctypes
import enum
import types

import numpy as np
import onnx
import onnxruntime

DTYPE = {
    "tensor(float)": ("FLOAT", np.float32),
    "tensor(float16)": ("HALF", np.float16),
    "tensor(int64)": ("INT64", np.int64),
}


class Status(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorLaunchFailure = 719
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901


class Stream:
    def __init__(self, number):
        self.number = number
        self.queue = []
        self.capture = None
        self.invalid = False

    def __int__(self):
        return self.number

    def add(self, work):
        (self.queue if self.capture is None else self.capture).append(work)


def memory(address, size):
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


class FakeCuda(types.SimpleNamespace):
    """Stands for the module cuda.bindings.runtime; ``fail`` maps a function's name to the status it returns."""

    cudaError_t = Status
    cudaStreamNonBlocking = 1
    cudaDeviceAttr = types.SimpleNamespace(
        cudaDevAttrComputeCapabilityMajor="major", cudaDevAttrComputeCapabilityMinor="minor"
    )
    cudaMemcpyKind = types.SimpleNamespace(
        cudaMemcpyHostToDevice="up", cudaMemcpyDeviceToHost="down", cudaMemcpyDeviceToDevice="within"
    )
    cudaStreamCaptureMode = types.SimpleNamespace(cudaStreamCaptureModeThreadLocal="thread")

    def __init__(self, capability="8.9", devices=1, limit=2**30):
        super().__init__(capability=capability, devices=devices, limit=limit)
        self.fail, self.allocated, self.streams, self.graphs, self.log = {}, {}, {}, set(), []

    def __getattribute__(self, name):
        value = super().__getattribute__(name)
        if not name.startswith("cuda") or not callable(value) or name == "cudaError_t":
            return value

        def call(*arguments):
            self.log.append(name)
            if name in self.fail:
                if name == "cudaStreamEndCapture":  # the stream leaves capture mode also when this fails
                    arguments[0].capture = None
                return (self.fail[name], None) if name != "cudaMemcpyAsync" else (self.fail[name],)
            return value(*arguments)

        return call

    def cudaGetDeviceCount(self):
        return Status.cudaSuccess, self.devices

    def cudaSetDevice(self, device):
        return (Status.cudaSuccess,)

    def cudaDeviceGetAttribute(self, attribute, device):
        return Status.cudaSuccess, int(self.capability.split(".")[attribute == "minor"])

    def cudaGetErrorString(self, status):
        return Status.cudaSuccess, status.name.encode()

    def cudaStreamCreateWithFlags(self, flags):
        stream = Stream(1000 + len(self.streams))
        self.streams[stream.number] = stream
        return Status.cudaSuccess, stream

    def cudaStreamDestroy(self, stream):
        del self.streams[stream.number]
        return (Status.cudaSuccess,)

    def cudaMalloc(self, size):
        if sum(a.nbytes for a in self.allocated.values()) + size > self.limit:
            return Status.cudaErrorMemoryAllocation, None
        array = np.full(size, 0xFF, np.uint8)
        self.allocated[array.ctypes.data] = array
        return Status.cudaSuccess, array.ctypes.data

    def cudaFree(self, address):
        del self.allocated[address]
        return (Status.cudaSuccess,)

    def inside(self, address, size):
        return any(a <= address and address + size <= a + v.nbytes for a, v in self.allocated.items())

    def cudaMemcpyAsync(self, target, source, size, kind, stream):
        if kind != "within" and stream.capture is not None:
            stream.invalid = True
            return (Status.cudaErrorStreamCaptureUnsupported,)
        for address, place in ((target, kind != "down"), (source, kind != "up")):
            assert not place or self.inside(address, size), f"{kind}: {size} bytes at {address} are not on the device"
        if kind == "up":
            taken = memory(source, size).copy()
            stream.add(lambda: memory(target, size).__setitem__(slice(None), taken))
        else:
            stream.add(lambda: memory(target, size).__setitem__(slice(None), memory(source, size)))
        return (Status.cudaSuccess,)

    def cudaStreamSynchronize(self, stream):
        if stream.capture is not None:
            stream.invalid = True
            return (Status.cudaErrorStreamCaptureUnsupported,)
        while stream.queue:
            stream.queue.pop(0)()
        return (Status.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream, mode):
        stream.capture, stream.invalid = [], False
        return (Status.cudaSuccess,)

    def cudaStreamEndCapture(self, stream):
        captured, stream.capture = stream.capture, None
        if stream.invalid:
            return Status.cudaErrorStreamCaptureInvalidated, None
        self.graphs.add(id(captured))
        return Status.cudaSuccess, captured

    def cudaGraphDestroy(self, graph):
        self.graphs.remove(id(graph))
        return (Status.cudaSuccess,)

    def cudaGraphInstantiate(self, graph, flags):
        executable = list(graph)
        self.graphs.add(id(executable))
        return Status.cudaSuccess, executable

    def cudaGraphExecDestroy(self, executable):
        self.graphs.remove(id(executable))
        return (Status.cudaSuccess,)

    def cudaGraphLaunch(self, executable, stream):
        stream.queue.extend(executable)
        return (Status.cudaSuccess,)


class Named(types.SimpleNamespace):
    """An enumeration's members by name, equal to themselves only."""

    def __init__(self, *names):
        super().__init__(**{name: types.SimpleNamespace(name=name) for name in names})


def fake_tensorrt(cuda, version="11.4.0", profile=(1, 4), capturable=None):
    """A module that stands for ``tensorrt``.

    profile: fewest and most images. capturable: what is_stream_capturable says; None: there is no such method; "fails":
    it says yes, and a run under capture fails.
    """
    trt = types.SimpleNamespace(__version__=version, built=[], contexts=[])
    trt.DataType = Named("FLOAT", "HALF", "BF16", "INT64")
    trt.TensorIOMode = Named("INPUT", "OUTPUT")
    trt.TensorLocation = Named("DEVICE", "HOST")
    trt.NetworkDefinitionCreationFlag = enum.IntEnum("Flag", {"STRONGLY_TYPED": 1})
    trt.BuilderFlag = enum.IntEnum("BuilderFlag", {"TF32": 5})
    trt.ProfilingVerbosity = enum.IntEnum("Verbosity", {"DETAILED": 2})

    class ILogger:
        Severity = enum.IntEnum("Severity", {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2})

        def __init__(self):
            pass

    class Context:
        def __init__(self, engine):
            self.engine, self.shapes, self.address, self.warm, self.runs = engine, {}, {}, False, 0
            trt.contexts.append(self)
            if capturable is not None:
                self.is_stream_capturable = lambda handle: bool(capturable)

        def set_input_shape(self, name, shape):
            self.warm = False
            declared = self.engine.tensors[name][1]
            fits = len(shape) == len(declared) and all(
                profile[0] <= s <= profile[1] if isinstance(d, str) else s == d
                for s, d in zip(shape, declared, strict=True)
            )
            self.shapes[name] = tuple(shape)
            return fits

        def set_tensor_address(self, name, address):
            self.address[name] = address
            return True

        def infer_shapes(self):
            return [name for name in self.engine.inputs if name not in self.shapes]

        def get_tensor_shape(self, name):
            (batch,) = {s[0] for n, s in self.shapes.items() if isinstance(self.engine.tensors[n][1][0], str)}
            return tuple(batch if isinstance(d, str) else d for d in self.engine.tensors[name][1])

        def execute_async_v3(self, handle):
            stream = cuda.streams[handle]
            if stream.capture is not None and (capturable == "fails" or not self.warm):
                stream.invalid = True
                self.engine.log.log(ILogger.Severity.ERROR, "allocates during capture")
                return False
            self.warm = True
            shapes = {name: self.get_tensor_shape(name) for name in self.engine.tensors}
            places, engine = dict(self.address), self.engine

            def at(name):
                dtype = np.dtype(engine.tensors[name][2])
                size = int(np.prod(shapes[name])) * dtype.itemsize
                assert cuda.inside(places[name], size), f"{name} is outside of device memory"
                return memory(places[name], size).view(dtype).reshape(shapes[name])

            def work():
                self.runs += 1
                results = engine.session.run(engine.outputs, {name: at(name).copy() for name in engine.inputs})
                for name, value in zip(engine.outputs, results, strict=True):
                    at(name)[...] = value

            stream.add(work)
            return True

    class Engine:
        def __init__(self, content, log):
            self.session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
            self.log = log
            self.inputs = [t.name for t in self.session.get_inputs()]
            self.outputs = [t.name for t in self.session.get_outputs()]
            both = [*self.session.get_inputs(), *self.session.get_outputs()]
            self.tensors = {t.name: (DTYPE[t.type][0], t.shape, DTYPE[t.type][1]) for t in both}
            self.num_io_tensors = len(self.tensors)
            self.host = ()

        def get_tensor_name(self, i):
            return [*self.tensors][i]

        def get_tensor_dtype(self, name):
            return getattr(trt.DataType, self.tensors[name][0])

        def get_tensor_shape(self, name):
            return tuple(-1 if isinstance(d, str) else d for d in self.tensors[name][1])

        def get_tensor_mode(self, name):
            return trt.TensorIOMode.INPUT if name in self.inputs else trt.TensorIOMode.OUTPUT

        def get_tensor_location(self, name):
            return trt.TensorLocation.HOST if name in trt.on_host else trt.TensorLocation.DEVICE

        def create_execution_context(self):
            return Context(self)

    class Runtime:
        def __init__(self, log):
            self.log = log

        def deserialize_cuda_engine(self, content):
            try:
                return Engine(content, self.log)
            except Exception:
                self.log.log(ILogger.Severity.ERROR, "not an engine")
                return None

    class Parser:
        num_errors = 0

        def __init__(self, network, log):
            self.network = network

        def parse_from_file(self, path):
            self.network.load(path)
            return True

    class Network:
        def load(self, path):
            self.content = onnx.load(path).SerializeToString()  # with the weights that lie beside it
            engine = Engine(self.content, None)

            def tensor(name):
                return types.SimpleNamespace(
                    name=name, dtype=engine.get_tensor_dtype(name), shape=engine.get_tensor_shape(name)
                )

            self.ins, self.outs = [tensor(n) for n in engine.inputs], [tensor(n) for n in engine.outputs]
            self.num_inputs, self.num_outputs = len(self.ins), len(self.outs)
            self.get_input, self.get_output = self.ins.__getitem__, self.outs.__getitem__
            graph = onnx.load_from_string(self.content).graph
            dtypes = {1: "FLOAT", 10: "HALF", 16: "BF16"}
            self.layers = [
                types.SimpleNamespace(
                    type=types.SimpleNamespace(name="CONVOLUTION"),
                    num_outputs=1,
                    get_output=lambda j, w=w: types.SimpleNamespace(dtype=getattr(trt.DataType, dtypes[w.data_type])),
                )
                for node in graph.node
                if node.op_type == "Conv"
                for w in graph.initializer
                if w.name == node.input[1]
            ]
            self.num_layers, self.get_layer = len(self.layers), self.layers.__getitem__

        def get_flag(self, flag):
            return True

    class Config:
        def __init__(self):
            self.flags, self.cache = {trt.BuilderFlag.TF32}, None

        def set_flag(self, flag):
            self.flags.add(flag)

        def clear_flag(self, flag):
            self.flags.discard(flag)

        def add_optimization_profile(self, shapes):
            self.shapes = shapes.shapes
            return 0

        def create_timing_cache(self, content):
            return None if content == b"bad" else types.SimpleNamespace(serialize=lambda: content + b"+")

        def set_timing_cache(self, cache, ignore_mismatch):
            self.cache = cache
            return True

        def get_timing_cache(self):
            return self.cache

    class Shapes:
        def __init__(self):
            self.shapes = {}

        def set_shape(self, name, *shapes):
            self.shapes[name] = shapes

    class Builder:
        def __init__(self, log):
            pass

        def create_network(self, flags):
            return Network()

        def create_builder_config(self):
            return Config()

        def create_optimization_profile(self):
            return Shapes()

        def build_serialized_network(self, network, config):
            trt.built.append(types.SimpleNamespace(tf32=trt.BuilderFlag.TF32 in config.flags, shapes=config.shapes))
            return network.content

    trt.ILogger, trt.Runtime, trt.OnnxParser, trt.Builder, trt.on_host = ILogger, Runtime, Parser, Builder, ()
    return trt
