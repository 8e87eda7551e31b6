"""ONNX Runtime as a backend of `runtime.Session`."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError
from .. import manifest as manifests
from .backend import PROVIDERS, Backend

INSTALL = "pip install 'pdae_fast[onnx]' (on a GPU machine: pip install onnxruntime-gpu)"
_FULL_NAMES = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "directml": "DmlExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "rocm": "ROCMExecutionProvider",
    "migraphx": "MIGraphXExecutionProvider",
}
CPU, CUDA = _FULL_NAMES["cpu"], _FULL_NAMES["cuda"]


class OnnxRuntimeBackend(Backend):
    """Runs the .onnx files of ``directory``; each is loaded when it is first needed. Several threads may use it.

    provider, threads, allow_fallback: as in :class:`pdae_fast.export.runtime.Session`.
    """

    name = "onnxruntime"

    def __init__(
        self,
        directory: str | Path,
        manifest: dict[str, Any],
        provider: str = "auto",
        threads: int | None = None,
        allow_fallback: bool = False,
    ) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise UserError(f"onnxruntime cannot be imported ({error}); {INSTALL}") from None
        self._ort, self._directory, self._manifest = onnxruntime, directory, manifest
        self._threads, self._sessions, self._loading = threads, {}, threading.Lock()
        self._wanted, self._strict = self._choose(provider)
        self._strict = self._strict and not allow_fallback
        if self._wanted == CPU and manifest["dtype"] == "bfloat16":
            raise UserError(
                f"{directory}: ONNX Runtime has no bfloat16 convolution on the CPU; use provider cuda, build TensorRT "
                "engines, or export with --dtype float16 or float32"
            )
        self.provider = self._wanted

    def _choose(self, provider: str) -> tuple[str, bool]:
        """The provider to ask for, and whether getting another one is an error."""
        available = self._ort.get_available_providers()
        if provider == "auto":
            return (CUDA if CUDA in available else CPU), False
        full = _FULL_NAMES.get(provider, provider)
        if full in available:
            return full, True
        if provider not in PROVIDERS and full not in self._ort.get_all_providers():
            raise UserError(f"provider {provider!r} is not known; expected one of {', '.join(PROVIDERS)}")
        raise UserError(
            f"provider {provider!r} is not part of this onnxruntime {self._ort.__version__}, which has "
            f"{', '.join(available)}"
        )

    def _session(self, graph: str) -> Any:
        with self._loading:
            if graph not in self._sessions:
                self._sessions[graph] = self._load(graph)
            return self._sessions[graph]

    def _load(self, graph: str) -> Any:
        path = manifests.graph_path(self._directory, self._manifest, graph)
        options = self._ort.SessionOptions()
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        # Problems come back as exceptions; the library would print its warnings to the terminal as well.
        options.log_severity_level = 3
        # float32 means float32: convolutions on CUDA would otherwise round to TF32.
        settings = {"use_tf32": "0"} if self._wanted == CUDA and self._manifest["dtype"] == "float32" else {}
        providers = [(self._wanted, settings), *([] if self._wanted == CPU else [(CPU, {})])]
        try:
            session = self._ort.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # the library's exceptions share no base class
            raise UserError(f"{path}: ONNX Runtime cannot load it: {_first_line(error)}") from None
        # A provider whose libraries are missing is dropped without an exception.
        self.provider = session.get_providers()[0]
        if self.provider != self._wanted and self._strict:
            raise UserError(
                f"asked for {self._wanted}, but ONNX Runtime runs {graph} on {self.provider} (are its driver and "
                "libraries installed?); allow the fallback or ask for provider cpu"
            )
        return session

    def run(self, graph: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """As :meth:`Backend.run`."""
        session = self._session(graph)
        names = [output.name for output in session.get_outputs()]
        try:
            return dict(zip(names, session.run(names, inputs), strict=True))
        except Exception as error:  # as above: out of memory, a kernel that is missing
            raise UserError(f"ONNX Runtime failed in {graph}: {_first_line(error)}") from None

    def loop(self, graph: str, x: np.ndarray, conditioning: np.ndarray | None, steps: int) -> np.ndarray:
        """As :meth:`Backend.loop`; x stays on the device, two buffers taking turns."""
        session = self._session(graph)
        device = "cuda" if self.provider == CUDA else "cpu"
        value = self._ort.OrtValue.ortvalue_from_numpy
        # ortvalue_from_numpy shares memory with the array on the CPU: a copy keeps the caller's x as it was.
        buffers = [value(x.copy(), device, 0), value(np.empty_like(x), device, 0)]
        indices = [value(np.array([i], np.int64), device, 0) for i in range(steps)]
        binding = session.io_binding()
        # A binding keeps nothing alive itself: `fixed` has to last as long as the loop.
        fixed = None if conditioning is None else value(conditioning, device, 0)
        if fixed is not None:
            binding.bind_ortvalue_input("conditioning", fixed)
        try:
            for index in indices:
                binding.bind_ortvalue_input("x", buffers[0])
                binding.bind_ortvalue_input("step", index)
                binding.bind_ortvalue_output("x_next", buffers[1])
                session.run_with_iobinding(binding)
                buffers.reverse()
        except Exception as error:
            raise UserError(f"ONNX Runtime failed in {graph}: {_first_line(error)}") from None
        # On the CPU this is a view of the buffer, which ends with this function.
        return np.array(buffers[0].numpy())


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
