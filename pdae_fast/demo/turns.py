"""One computation at a time, off the event loop: who waits, who is overtaken, and who has left."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from ..errors import UserError

R = TypeVar("R")


class Stopped(Exception):
    """The visitor asked for something newer in the same place, or has left."""


class Busy(UserError):
    """As many computations wait as may."""


class Turns:
    """A thread that computes, and at most ``most`` requests that wait for it, in their order.

    A request is of a visitor and of a lane. A newer one of the same two stops the older, whether that waits or runs, so
    that a visitor has at most one in each lane, and the latest wins. Used from one event loop.
    """

    def __init__(self, most: int = 12) -> None:
        self.most, self._waiting = most, 0
        self._newest: dict[tuple[str, str], threading.Event] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="demo")

    def first(self, job: Callable[[], R]) -> R:
        """job() in the thread, for what comes before there is an event loop.

        Whatever computes belongs there: OpenMP (libgomp) keeps workers for every thread that has computed, and where
        those are more than cores, each of its many waits goes to sleep. Ten steps took 1.9 times as long.
        """
        return self._thread.submit(job).result()

    async def run(
        self, visitor: str, lane: str, job: Callable[[Callable[[int], None]], R], left: Callable[[], Any] | None = None
    ) -> R:
        """job(stop) in the thread; ``stop(n)`` raises Stopped where the request was overtaken.

        left: an awaitable function that returns when the visitor has left, which stops the request too. Raises Stopped,
        Busy, and whatever the job does.
        """
        over = threading.Event()

        def stop(count: int) -> None:
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
        work = asyncio.get_running_loop().run_in_executor(self._thread, turn)
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

    def _done(self, work: asyncio.Future) -> None:
        self._waiting -= 1
        if not work.cancelled():
            work.exception()  # of one that nobody waits for any more

    def close(self) -> None:
        """Stop whatever waits or runs."""
        for over in self._newest.values():
            over.set()
        self._thread.shutdown(wait=True, cancel_futures=True)
