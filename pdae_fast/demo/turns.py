"""One computation at a time, off the event loop: who waits, who goes first, who is overtaken, and who has left."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from ..errors import UserError

R = TypeVar("R")
LAST = 99  # a rank behind all others


class Stopped(Exception):
    """The visitor asked for something newer in the same place, or has left."""


class Busy(UserError):
    """As many computations wait as may."""


class Turns:
    """A thread that computes, and at most ``most`` requests that wait for it, by rank and then in their order.

    A request is of a visitor and of a lane. A newer one of the same two stops the older, whether that waits or runs, so
    that a visitor has at most one in each lane, and the latest wins. A request of a lower ``rank`` is not kept waiting
    by one that runs: it is computed inside of that one's ``stop``, between two network evaluations. Used from one event
    loop.
    """

    def __init__(self, most: int = 12) -> None:
        self.most, self._waiting = most, 0
        self._newest: dict[tuple[str, str], threading.Event] = {}
        self._queue: list[tuple[int, int, Future, Callable[[], Any]]] = []  # a heap, by rank and number
        self._lock, self._numbers = threading.Lock(), itertools.count()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="demo")

    def first(self, job: Callable[[], R]) -> R:
        """job() in the thread, for what comes before there is an event loop.

        Whatever computes belongs there: OpenMP (libgomp) keeps workers for every thread that has computed, and where
        those are more than cores, each of its many waits goes to sleep. Ten steps took 1.9 times as long.
        """
        return self._thread.submit(job).result()

    async def run(
        self,
        visitor: str,
        lane: str,
        job: Callable[[Callable[[int], None]], R],
        left: Callable[[], Any] | None = None,
        rank: int = 0,
    ) -> R:
        """job(stop) in the thread; ``stop(n)`` raises Stopped where the request was overtaken.

        left: an awaitable function that returns when the visitor has left, which stops the request too. Raises Stopped,
        Busy, and whatever the job does.
        """
        over = threading.Event()

        def stop(count: int) -> None:
            if not over.is_set():
                self._next(rank)  # one at a time, so that the work goes on while others drag
            if over.is_set():
                raise Stopped

        def turn() -> R:
            stop(0)  # it may have been overtaken while it waited
            return job(stop)

        older = self._newest.pop((visitor, lane), None)
        if older is not None:
            older.set()
        if self._waiting >= self.most:
            raise Busy("too many requests are waiting; try again in a moment")
        self._waiting += 1
        self._newest[visitor, lane] = over
        work = self._submit(rank, turn)
        work.add_done_callback(self._done)
        gone = asyncio.ensure_future(left()) if left else None
        try:
            await asyncio.wait({work, gone} if gone else {work}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise Stopped
            return work.result()
        finally:
            over.set()
            if gone:
                gone.cancel()
            if self._newest.get((visitor, lane)) is over:
                del self._newest[visitor, lane]

    def _submit(self, rank: int, turn: Callable[[], Any]) -> asyncio.Future:
        found: Future = Future()
        with self._lock:
            heapq.heappush(self._queue, (rank, next(self._numbers), found, turn))
        self._thread.submit(self._next, LAST)
        return asyncio.wrap_future(found)

    def _next(self, rank: int) -> None:
        """Compute the first that waits, if it goes before ``rank``."""
        with self._lock:
            if not self._queue or self._queue[0][0] >= rank:
                return
            _, _, found, turn = heapq.heappop(self._queue)
        if found.set_running_or_notify_cancel():
            try:
                found.set_result(turn())
            except BaseException as error:  # the request's own, whatever it is
                found.set_exception(error)

    def _done(self, work: asyncio.Future) -> None:
        self._waiting -= 1
        if not work.cancelled():
            work.exception()  # of one that nobody waits for any more

    def close(self) -> None:
        """Stop whatever waits or runs."""
        for over in self._newest.values():
            over.set()
        with self._lock:
            for _, _, found, _ in self._queue:
                found.cancel()
            self._queue.clear()
        self._thread.shutdown(wait=True, cancel_futures=True)
