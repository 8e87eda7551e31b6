"""OpenVINO as an optional backend of `runtime.Session`, on the same .onnx files."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError
from .. import manifest as manifests
from .backend import Backend


class OpenVINOBackend(Backend):
    """Runs the .onnx files of ``directory`` on OpenVINO's CPU device (or the one that ``provider`` names).

    Computes in float32, for bfloat16 exports in bfloat16: left alone, OpenVINO would choose bfloat16 for all of them.
    """

    name = "openvino"

    def __init__(
        self, directory: str | Path, manifest: dict[str, Any], provider: str = "auto", threads: int | None = None
    ) -> None:
        try:
            import openvino
        except ImportError as error:
            raise UserError(f"openvino cannot be imported ({error}); pip install 'pdae_fast[openvino]'") from None
        self._core, self._directory, self._manifest = openvino.Core(), directory, manifest
        device = "CPU" if provider in ("auto", "cpu") else provider.upper()
        if device not in self._core.available_devices:
            raise UserError(
                f"OpenVINO has no device {device} here; it has {', '.join(self._core.available_devices) or 'none'}"
            )
        self.provider = f"OpenVINO {device}"
        # A request runs one evaluation at a time, on all threads that it may use.
        self._device, self._requests, self._running = device, {}, threading.Lock()
        # Asked for f16 on a processor without it, 2026.4 computed in bfloat16: a hundred times the error of float16.
        precision = "bf16" if manifest["dtype"] == "bfloat16" else "f32"
        self._settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
        if threads is not None:
            self._settings["INFERENCE_NUM_THREADS"] = threads

    def _request(self, graph: str) -> Any:
        if graph not in self._requests:
            path = manifests.graph_path(self._directory, self._manifest, graph)
            try:
                compiled = self._core.compile_model(str(path), self._device, self._settings)
            except RuntimeError as error:
                reason = (str(error).strip().splitlines() or ["no reason given"])[-1]
                raise UserError(f"{path}: OpenVINO cannot compile it: {reason}") from None
            self._requests[graph] = compiled.create_infer_request()
        return self._requests[graph]

    def run(self, graph: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """As :meth:`Backend.run`."""
        names = [output["name"] for output in self._manifest["graphs"][graph]["outputs"]]
        with self._running:
            results = self._request(graph).infer(inputs)
            # By position: a compiled output keeps only some of its names. The request writes the same memory again at
            # its next call, hence the copies.
            return {name: np.array(results[i]) for i, name in enumerate(names)}
