"""The few calls of the CUDA runtime that an engine needs, each with its return code checked."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from ...errors import UserError

INSTALL = 'pip install "cuda-bindings"'


def _binding() -> Any:
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise UserError(
            f"running TensorRT engines needs the CUDA bindings ({error}); install them: {INSTALL}"
        ) from error


class Cuda:
    """The first visible GPU and one stream of its own.

    Raises UserError where there is no driver, no GPU, or not enough of its memory; RuntimeError, naming the call, for
    anything else that CUDA reports, since that is no user's mistake.
    """

    def __init__(self) -> None:
        self._cuda = _binding()
        self._open = True
        try:
            count = self.call("cudaGetDeviceCount")
        except RuntimeError as error:
            raise UserError(f"no usable NVIDIA driver on this machine: {error}") from error
        if count < 1:
            raise UserError("no NVIDIA GPU is visible on this machine")
        self.call("cudaSetDevice", 0)
        attribute = self._cuda.cudaDeviceAttr
        major = self.call("cudaDeviceGetAttribute", attribute.cudaDevAttrComputeCapabilityMajor, 0)
        minor = self.call("cudaDeviceGetAttribute", attribute.cudaDevAttrComputeCapabilityMinor, 0)
        #: compute capability, such as "8.9"
        self.capability = f"{major}.{minor}"
        # Not the default stream: that one cannot be captured, and TensorRT would add synchronisations to it.
        self.stream = self.call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking)
        self._buffers: list[Any] = []

    def call(self, name: str, *arguments: Any) -> Any:
        """What the function returns beside its status; RuntimeError when the status is not success."""
        status, *values = getattr(self._cuda, name)(*arguments)
        if status != self._cuda.cudaError_t.cudaSuccess:
            raise RuntimeError(f"{name}: {self._describe(status)}")
        return values[0] if values else None

    def _describe(self, status: Any) -> str:
        failed, text = self._cuda.cudaGetErrorString(status)
        known = failed == self._cuda.cudaError_t.cudaSuccess and isinstance(text, bytes)
        return f"{text.decode()} ({int(status)})" if known else f"CUDA error {int(status)}"

    @property
    def stream_handle(self) -> int:
        return int(self.stream)

    def allocate(self, size: int) -> int:
        """Address of ``size`` bytes of device memory, kept until :meth:`close`."""
        status, address = self._cuda.cudaMalloc(size)
        if status == self._cuda.cudaError_t.cudaErrorMemoryAllocation:
            raise UserError(f"the GPU has no {size / 2**20:.0f} MiB left; use a smaller MAX in --profile")
        if status != self._cuda.cudaError_t.cudaSuccess:
            raise RuntimeError(f"cudaMalloc: {self._describe(status)}")
        self._buffers.append(address)
        return int(address)

    # Copies are ordered on the stream like everything else; only `download` waits.

    def upload(self, address: int, array: np.ndarray) -> None:
        """Queue a copy of a C-contiguous array to the device.

        From ordinary memory CUDA has taken the bytes when the call returns, so that the array may change after it.
        """
        self._copy(address, array.ctypes.data, array.nbytes, self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice)

    def copy(self, target: int, source: int, size: int) -> None:
        """Queue a copy within the device."""
        self._copy(target, source, size, self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice)

    def download(self, array: np.ndarray, address: int) -> None:
        """Fill a C-contiguous array from the device; returns when everything queued before has run."""
        self._copy(array.ctypes.data, address, array.nbytes, self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost)
        self.synchronize()

    def _copy(self, target: int, source: int, size: int, kind: Any) -> None:
        self.call("cudaMemcpyAsync", target, source, size, kind, self.stream)

    def synchronize(self) -> None:
        self.call("cudaStreamSynchronize", self.stream)

    # -- graphs ----------------------------------------------------------------------------------------------------

    def begin_capture(self) -> None:
        # Thread-local: allocations of other threads of the process do not spoil the capture.
        self.call(
            "cudaStreamBeginCapture", self.stream, self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        )

    def end_capture(self) -> Any:
        """An executable graph of what was queued since :meth:`begin_capture`."""
        graph = self.call("cudaStreamEndCapture", self.stream)
        try:
            return self.call("cudaGraphInstantiate", graph, 0)
        finally:
            self.call("cudaGraphDestroy", graph)

    def abort_capture(self) -> None:
        """Bring the stream back to normal after a failed capture; whatever was captured is dropped."""
        status, graph = self._cuda.cudaStreamEndCapture(self.stream)
        if status == self._cuda.cudaError_t.cudaSuccess:
            self.call("cudaGraphDestroy", graph)

    def launch(self, executable: Any) -> None:
        self.call("cudaGraphLaunch", executable, self.stream)

    def destroy(self, executable: Any) -> None:
        self.call("cudaGraphExecDestroy", executable)

    def close(self) -> None:
        """Give the memory and the stream back; nothing may be used after it."""
        if not self._open:
            return
        self._open = False
        self.synchronize()
        for address in self._buffers:
            self.call("cudaFree", address)
        self.call("cudaStreamDestroy", self.stream)


def present_capability() -> tuple[str | None, str]:
    """Compute capability of this machine's GPU, or None and why there is none."""
    try:
        cuda = Cuda()
    except UserError as error:
        return None, str(error)
    cuda.close()
    return cuda.capability, ""
