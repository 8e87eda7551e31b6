"""Capturing a step as a CUDA graph."""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Protocol

import torch

from .device import out_of_memory

# They compile kernels, pick convolution algorithms and fill workspaces: none of it may happen in a capture.
WARM_UP_STEPS = 2
STREAMS = 64  # draws of a stream; PyTorch hands out 32 in turn


class Graph(Protocol):
    def replay(self) -> None: ...


class CaptureError(RuntimeError):
    """A step could not be captured; it can still run as it is."""


class Pool:
    """Memory that graphs share which are never replayed at the same time, and the stream on which they are captured.

    Both belong together: graphs of one memory that were captured on several streams share nothing. And both belong to
    one owner: a graph that is destroyed takes the workspaces of its stream along, also from under the graphs of others.
    The memory is free again when the last graph of the pool is gone.
    """

    def __init__(self, device: torch.device) -> None:
        self.handle, self.stream = torch.cuda.graph_pool_handle(), new_stream(device)


_streams: weakref.WeakSet[torch.cuda.Stream] = weakref.WeakSet()


def new_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream that is neither the current one nor, while there are others, one that this function gave to somebody who
    still has it: the framework hands out the same few in turn."""
    taken = [torch.cuda.current_stream(device), *_streams]
    for _ in range(STREAMS):
        stream = torch.cuda.Stream(device)
        if stream not in taken:
            break
    _streams.add(stream)
    return stream


def capture(step: Callable[[], None], reset: Callable[[], object], device: torch.device, pool: Pool) -> Graph:
    """``step`` as a graph whose replay repeats its launches; before that it runs some times, each after ``reset()``.

    Graphs of one ``pool`` share memory and must not be replayed at the same time. Raises CaptureError with the first
    reason; running out of memory stays what it is. The thread's stream is afterwards what it was.
    """
    outside, current = sys.exc_info()[1], torch.cuda.current_stream(device)
    try:
        # A capture that fails leaves its own stream behind: this context, entered before, puts the thread's back.
        with torch.cuda.stream(pool.stream):
            pool.stream.wait_stream(current)
            for _ in range(WARM_UP_STEPS):
                reset()
                step()
            current.wait_stream(pool.stream)
            torch.cuda.synchronize(device)
            graph = torch.cuda.CUDAGraph()
            # Other threads (a loader that pins memory) may go on calling CUDA meanwhile.
            capturing = torch.cuda.graph(graph, pool=pool.handle, stream=pool.stream, capture_error_mode="thread_local")
            try:
                with capturing:
                    step()
            except BaseException:
                _abandon(device, pool)
                raise
    except RuntimeError as error:
        reasons = list(_reasons(error, outside))
        shortage = next((reason for reason in reasons if out_of_memory(reason)), None)
        if shortage is error:
            raise
        if shortage is not None:
            raise shortage from None
        raise CaptureError((str(reasons[-1]).strip() or type(reasons[-1]).__name__).splitlines()[0]) from error
    return graph


def _reasons(error: BaseException | None, outside: BaseException | None) -> Iterator[BaseException]:
    """``error`` and the runtime errors that led to it, the first one last; not what was being handled ``outside``.

    When a step fails in a capture, the capture cannot be ended either, and that is the error that comes out.
    """
    while error is not None and error is not outside:
        if isinstance(error, (RuntimeError, MemoryError)):
            yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _abandon(device: torch.device, pool: Pool) -> None:
    """Put right what a capture that did not come to its end leaves behind, as far as that goes: why it failed is more
    than what fails here."""
    _give_back(device, pool)
    with contextlib.suppress(RuntimeError):
        _free_generator(device, pool)


def _free_generator(device: torch.device, pool: Pool) -> None:
    """Let the device's random numbers be drawn again, and other graphs be replayed.

    PyTorch 2.11's default generator goes on taking the failed capture for underway, and raises "Offset increment
    outside graph capture encountered unexpectedly" at both (2.13's does not). The end of any capture sets it free: here
    of one operation, in memory of its own, as that of the pool may count as lent.
    """
    value = torch.zeros(1, device=device)
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=pool.stream, capture_error_mode="thread_local"):
        value.zero_()


def _give_back(device: torch.device, pool: Pool) -> None:
    """Tell the allocator that the capture is over.

    It would take it for underway for ever: then it refuses to free memory, and the pool never dies. Where it knows of
    none (the capture had not begun, or had ended), it says so, and there is nothing to give back.
    """
    end, release = (getattr(torch._C, f"_cuda_{name}", None) for name in ("endAllocateToPool", "releasePool"))
    if end is None or release is None:
        return
    try:
        end(device.index, pool.handle)
    except RuntimeError:
        return
    release(device.index, pool.handle)
