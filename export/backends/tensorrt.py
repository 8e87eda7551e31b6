"""Run a directory of TensorRT engines: the backend behind `pdae_fast.export.runtime.Session` for it.

Everything of a loop stays on the device: x and the conditioning go up once, the steps are queued on one stream (each a
replay of one captured CUDA graph, its step number copied from a table that was uploaded once), and x comes down.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError
from ...limits import brief
from .. import manifest as manifests
from .cuda import Cuda
from .tensorrt_engine import Engine
from .tensorrt_flavor import FLAVORS


def check_engines(directory: Path, manifest: dict[str, Any], capability: str) -> dict[str, Any]:
    """The manifest's entries of the engines for ``capability``, by graph; UserError unless the files are those."""
    entries = manifest["engines"][capability]
    for graph in dict.fromkeys([*manifests.GRAPHS[manifest["kind"]], *(entries if isinstance(entries, dict) else ())]):
        entry = entries.get(graph) if isinstance(entries, dict) else None
        if not manifests.names_file(entry):
            raise UserError(
                f"{directory / manifests.NAME}: no engine for {brief(graph)[1:-1]} on {capability}; build once more"
            )
    manifests.check_files(directory, {"graphs": entries, "files": {}})
    return entries


class TensorRTBackend:
    """The graphs of ``directory`` (see `pdae_fast.export.manifest`) on the first visible GPU.

    Engines are opened when they are first used. Several threads may use them, one at a time: all work is on one stream.
    close() gives the memory back.

    Raises UserError, one line, when the package is missing or of another version than the one that built the engines,
    when there is no driver, when no engine was built for this GPU, or when a file is not the one that was built.
    """

    def __init__(self, directory: str | Path, manifest: dict[str, Any]) -> None:
        self.directory, self.manifest = Path(directory), manifest
        path = self.directory / manifests.NAME
        flavor = FLAVORS[manifest["backend"]]
        built_with, engines, profile = (manifest.get(name) for name in ("tensorrt_version", "engines", "profile"))
        if not isinstance(built_with, str) or not isinstance(engines, dict) or not isinstance(profile, list):
            raise UserError(f"{path}: states no engines, version or profile; edited after the build? build once more")
        self._trt = flavor.load()
        if self._trt.__version__ != built_with:
            raise UserError(
                f"{directory}: built with {flavor.title} {built_with}, and this machine has {self._trt.__version__}; "
                "an engine runs only with the version that built it: install that one or build once more"
            )
        self._cuda = Cuda()
        capability = self._cuda.capability
        try:
            if capability not in engines:
                raise UserError(
                    f"{directory}: engines for compute capability {', '.join(engines)}; this GPU has {capability}: "
                    f"build with --capability {capability}"
                )
            self._files = check_engines(self.directory, manifest, capability)
            # Step numbers, so that a loop needs no copy from the host.
            table = np.arange(max(manifest["steps"], manifest["encode_steps"]), dtype=np.int64)
            self._steps = len(table)
            self._step_table = self._cuda.allocate(table.nbytes)
            self._cuda.upload(self._step_table, table)
        except BaseException:
            self._cuda.close()
            raise
        self._engines: dict[str, Engine] = {}
        self._running = threading.Lock()
        self.name = flavor.name
        self.provider = f"GPU of compute capability {capability}"

    def _engine(self, graph: str) -> Engine:
        if graph not in self._engines:
            if graph not in self._files:
                raise UserError(f"{self.directory}: no engine for {graph}; it has {', '.join(self._files)}")
            fewest, _, most = self.manifest["profile"]
            self._engines[graph] = Engine(
                self._trt,
                self._cuda,
                self.directory / self._files[graph]["file"],
                self.manifest["graphs"][graph],
                (fewest, most),
            )
        return self._engines[graph]

    def run(self, graph: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One evaluation; names, dtypes and shapes as the manifest lists them."""
        with self._running:
            engine = self._engine(graph)
            if sorted(inputs) != sorted(engine.inputs):
                raise UserError(f"{graph} takes {', '.join(engine.inputs)}, not {', '.join(inputs)}")
            count = next(len(inputs[name]) for name, t in engine.inputs.items() if not isinstance(t["shape"][0], int))
            engine.set_batch(count)
            for name, array in inputs.items():
                engine.upload(name, array)
            engine.execute()
            return {name: engine.download(name) for name in engine.outputs}

    def loop(self, graph: str, x: np.ndarray, conditioning: np.ndarray | None, steps: int) -> np.ndarray:
        """x [N, C, H, W] after ``graph`` has run with step = 0 ... steps - 1; conditioning [N, 2, M] or None."""
        if not 0 <= steps <= self._steps:
            raise UserError(f"{steps} steps; these engines were built for {self._steps}")
        with self._running:
            engine = self._engine(graph)
            engine.set_batch(len(x))
            engine.upload("x", x)
            if conditioning is not None:
                engine.upload("conditioning", conditioning)
            size = np.dtype(np.int64).itemsize
            for i in range(steps):
                self._cuda.copy(engine.address["step"], self._step_table + i * size, size)
                engine.advance()
            return engine.download("x")

    def close(self) -> None:
        with self._running:
            for engine in self._engines.values():
                engine.close()
            self._engines.clear()
            self._cuda.close()

    def __enter__(self) -> TensorRTBackend:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
