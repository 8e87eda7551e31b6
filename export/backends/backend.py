"""What every backend offers to `pdae_fast.export.runtime.Session`."""

from __future__ import annotations

from typing import Protocol

import numpy as np

PROVIDERS = ("auto", "cpu", "cuda", "tensorrt", "directml", "coreml", "openvino", "rocm", "migraphx")


class Backend(Protocol):
    """Runs the graphs of one exported directory.

    Subclasses implement :meth:`run`; :meth:`loop` may be overridden by one that keeps x on the device. Attributes:
    ``name`` (for reports) and ``provider`` (what the graphs really run on, known once one has been loaded).
    """

    name: str
    provider: str

    def run(self, graph: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One evaluation; names, dtypes and shapes as the manifest lists them, N at most its max_batch."""
        ...

    def loop(self, graph: str, x: np.ndarray, conditioning: np.ndarray | None, steps: int) -> np.ndarray:
        """x after ``graph`` (decode_step or invert_step) has run with step = 0 ... steps - 1.

        x [N, C, H, W] float32, not changed; conditioning [N, 2, M] float32, None for a prior.
        """
        fixed = {} if conditioning is None else {"conditioning": conditioning}
        for i in range(steps):
            x = self.run(graph, {"x": x, **fixed, "step": np.array([i], np.int64)})["x_next"]
        return x
