"""One engine on the device: its buffers, its shapes, and a step of it as a CUDA graph."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError
from .. import manifest as manifests
from .cuda import Cuda
from .tensorrt_flavor import create_context, dtype_name, make_log


class Engine:
    """A deserialized engine, its execution context, and device buffers for the largest batch of its profile.

    Everything is queued on the stream of ``cuda``; :meth:`download` waits. Not for use by several threads at once.

    Args:
        path: the file; entry: what the manifest says of the graph (``inputs`` and ``outputs`` are checked).
        profile: fewest and most images of a batch.
    """

    def __init__(self, trt: Any, cuda: Cuda, path: Path, entry: dict[str, Any], profile: tuple[int, int]) -> None:
        self.cuda, self.path, self.profile = cuda, path, profile
        self.inputs = {tensor["name"]: tensor for tensor in entry["inputs"]}
        self.outputs = {tensor["name"]: tensor for tensor in entry["outputs"]}
        # The log and the runtime must outlive the engine, and the engine its context.
        self._log = make_log(trt)
        self._runtime = trt.Runtime(self._log)
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise UserError(f"{path}: cannot be opened here: {self._log.said()}")
        self._check(trt)
        self._context = create_context(trt, self._engine)
        if self._context is None:
            raise UserError(f"{path}: no room to run it: {self._log.said()}")
        self.count = self.batch = 0  # images that are asked for, and that are computed
        self._graph: Any = None
        self._warm = False  # has it run since the shapes were set
        self._capturable = True
        self.address = {
            name: cuda.allocate(self._bytes(tensor, profile[1]))
            for name, tensor in (self.inputs | self.outputs).items()
        }
        for name, address in self.address.items():
            self._must(self._context.set_tensor_address(name, address), f"refuses the address of {name}")

    def _check(self, trt: Any) -> None:
        """The engine has the tensors that the manifest says, all of them in device memory."""
        engine, expected = self._engine, self.inputs | self.outputs
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        if sorted(names) != sorted(expected):
            raise UserError(f"{self.path}: has {', '.join(names)}; the manifest says {', '.join(expected)}")
        for name, tensor in expected.items():
            mode = "INPUT" if name in self.inputs else "OUTPUT"
            found = (dtype_name(engine.get_tensor_dtype(name)), list(engine.get_tensor_shape(name)))
            wanted = (tensor["dtype"], manifests.dims(tensor["shape"]))
            if engine.get_tensor_mode(name).name != mode or found != wanted:
                raise UserError(
                    f"{self.path}: {name} is {found[0]} {found[1]}; the manifest says {wanted[0]} {wanted[1]}"
                )
            if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
                raise UserError(f"{self.path}: {name} would be read on the host, so that steps cannot be queued")

    def _must(self, succeeded: bool, what: str) -> None:
        if not succeeded:
            raise RuntimeError(f"{self.path}: TensorRT {what}: {self._log.said()}")

    def _bytes(self, tensor: dict[str, Any], batch: int) -> int:
        shape = self.shape(tensor, batch)
        return math.prod(shape) * np.dtype(tensor["dtype"]).itemsize

    @staticmethod
    def shape(tensor: dict[str, Any], batch: int) -> tuple[int, ...]:
        return tuple(v if isinstance(v, int) else batch for v in tensor["shape"])

    def set_batch(self, count: int) -> None:
        """Make the next executions work on ``count`` images, or the fewest that the profile allows if that is more."""
        fewest, most = self.profile
        if not 1 <= count <= most:
            raise UserError(f"a batch of {count} images; the profile of these engines takes 1 to {most}")
        self.count, batch = count, max(count, fewest)
        if batch == self.batch:
            return
        # A captured step is bound to the shapes it was captured with.
        self._forget_graph()
        for name, tensor in self.inputs.items():
            self._must(self._context.set_input_shape(name, self.shape(tensor, batch)), f"refuses {batch} images")
        missing = self._context.infer_shapes()
        self._must(not missing, f"lacks the shapes of {missing}")
        for name, tensor in self.outputs.items():
            found = tuple(self._context.get_tensor_shape(name))
            self._must(found == self.shape(tensor, batch), f"gives {name} the shape {found}")
        self.batch = batch

    def upload(self, name: str, array: np.ndarray) -> None:
        """Queue ``array`` into an input; rows that only fill up the profile's minimum keep what they hold."""
        tensor = self.inputs[name]
        shape = self.shape(tensor, self.count)
        array = np.ascontiguousarray(array)
        if array.dtype != tensor["dtype"] or array.shape != shape:
            raise UserError(f"{name} is {array.dtype} {list(array.shape)}; expected {tensor['dtype']} {list(shape)}")
        self.cuda.upload(self.address[name], array)

    def download(self, name: str) -> np.ndarray:
        """A tensor, without the rows that only filled up, when everything queued so far has run."""
        tensor = (self.inputs | self.outputs)[name]
        array = np.empty(self.shape(tensor, self.count), tensor["dtype"])
        self.cuda.download(array, self.address[name])
        return array

    def execute(self) -> None:
        """Queue one evaluation."""
        self._must(self._context.execute_async_v3(self.cuda.stream_handle), "could not run it")
        self._warm = True

    def advance(self) -> None:
        """Queue one evaluation and the copy of x_next to x: as one captured graph once it has run with these shapes.

        The first run after a change of shapes compiles and allocates, which a capture must not contain.
        """
        if self._graph is None and self._warm and self._capturable:
            self._capture()
        if self._graph is None:
            self._execute_and_copy()
        else:
            self.cuda.launch(self._graph)

    def _execute_and_copy(self) -> None:
        self.execute()
        self.cuda.copy(self.address["x"], self.address["x_next"], self._bytes(self.outputs["x_next"], self.batch))

    def _capture(self) -> None:
        self.cuda.synchronize()
        # Only TensorRT for RTX can tell beforehand.
        ask = getattr(self._context, "is_stream_capturable", None)
        if ask is not None and not ask(self.cuda.stream_handle):
            self._give_up_capture("TensorRT says that it cannot be captured")
            return
        self.cuda.begin_capture()
        try:
            self._execute_and_copy()
            self._graph = self.cuda.end_capture()
        except RuntimeError as error:
            self.cuda.abort_capture()
            self._give_up_capture(str(error))

    def _give_up_capture(self, reason: str) -> None:
        self._capturable = False
        warnings.warn(f"{self.path}: runs without a CUDA graph, so slower: {reason}", RuntimeWarning, stacklevel=2)

    def _forget_graph(self) -> None:
        self._warm = False
        if self._graph is not None:
            self.cuda.synchronize()
            self.cuda.destroy(self._graph)
            self._graph = None

    def close(self) -> None:
        self._forget_graph()
        self._context = self._engine = self._runtime = None
