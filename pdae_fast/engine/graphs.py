"""Capturing a step as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

# They compile kernels, pick convolution algorithms and fill workspaces: none of it may happen in a capture.
WARM_UP_STEPS = 2


class Graph(Protocol):
    def replay(self) -> None: ...


class CaptureError(RuntimeError):
    """A step could not be captured; it can still run as it is."""


def capture(step: Callable[[], None], reset: Callable[[], object], device: torch.device, pool: object) -> Graph:
    """``step`` as a graph whose replay repeats its launches; before that it runs some times, each after ``reset()``.

    Graphs of one ``pool`` (torch.cuda.graph_pool_handle()) share memory and must not be replayed at the same time.
    Raises CaptureError; running out of memory stays what it is.
    """
    try:
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_STEPS):
                reset()
                step()
        torch.cuda.current_stream(device).wait_stream(stream)
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        # Other threads (a loader that pins memory) may go on calling CUDA meanwhile.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            step()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise CaptureError((str(error).strip() or type(error).__name__).splitlines()[0]) from error
    return graph
