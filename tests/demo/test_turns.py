"""Who waits, who is overtaken, and who has left."""

import asyncio
import threading
import time

import pytest

from pdae_fast.demo.turns import Busy, Stopped, Turns


def play(script, most=12):
    """Run script(turns) to its end."""

    async def whole():
        turns = Turns(most)
        try:
            return await asyncio.wait_for(script(turns), 10)
        finally:
            turns.close()

    return asyncio.run(whole())


class Job:
    """Work that goes on until it is stopped or may end."""

    running = most = 0

    def __init__(self, value=None):
        self.value, self.started, self.end, self.stopped = value, threading.Event(), threading.Event(), False

    def __call__(self, stop):
        Job.running += 1
        Job.most = max(Job.most, Job.running)
        self.started.set()
        try:
            while not self.end.is_set():
                stop(1)
                time.sleep(0.001)
        except Stopped:
            self.stopped = True
            raise
        finally:
            Job.running -= 1
        return self.value

    async def begun(self):
        await asyncio.to_thread(self.started.wait, 5)


@pytest.fixture(autouse=True)
def idle():
    Job.running = Job.most = 0


def test_results_come_back_and_one_computes_at_a_time():
    async def script(turns):
        jobs = [Job(k) for k in range(5)]
        for job in jobs:
            job.end.set()
        return await asyncio.gather(*(turns.run(f"v{k}", "edit", job) for k, job in enumerate(jobs)))

    assert play(script) == [0, 1, 2, 3, 4] and Job.most == 1


def test_the_latest_of_a_visitor_wins_over_what_runs_and_what_waits():
    async def script(turns):
        jobs = [Job(k) for k in range(4)]
        first = asyncio.ensure_future(turns.run("a", "edit", jobs[0]))
        await jobs[0].begun()
        others = [asyncio.ensure_future(turns.run("a", "edit", job)) for job in jobs[1:]]
        jobs[3].end.set()
        found = await asyncio.gather(first, *others, return_exceptions=True)
        assert [type(f) for f in found[:3]] == [Stopped] * 3 and found[3] == 3
        assert jobs[0].stopped and not jobs[1].started.is_set() and not jobs[2].started.is_set()

    play(script)


def test_other_visitors_and_other_lanes_are_left_alone():
    async def script(turns):
        jobs = [Job(k) for k in range(3)]
        runs = [asyncio.ensure_future(turns.run(*who, job))
                for who, job in zip((("a", "edit"), ("b", "edit"), ("a", "sample")), jobs, strict=True)]  # fmt: skip
        await asyncio.sleep(0.05)
        for job in jobs:
            job.end.set()
        return await asyncio.gather(*runs)

    assert play(script) == [0, 1, 2]


def test_so_many_may_wait():
    async def script(turns):
        jobs = [Job(k) for k in range(3)]
        runs = [asyncio.ensure_future(turns.run(f"v{k}", "edit", job)) for k, job in enumerate(jobs[:2])]
        await jobs[0].begun()
        with pytest.raises(Busy, match="try again"):
            await turns.run("late", "edit", jobs[2])
        jobs[0].end.set(), jobs[1].end.set()
        assert await asyncio.gather(*runs) == [0, 1]
        jobs[2].end.set()
        return await turns.run("late", "edit", jobs[2])

    assert play(script, most=2) == 2


def test_who_leaves_is_stopped():
    async def script(turns):
        job, after, gone = Job(), Job("next"), asyncio.Event()
        run = asyncio.ensure_future(turns.run("a", "edit", job, gone.wait))
        await job.begun()
        gone.set()
        with pytest.raises(Stopped):
            await run
        after.end.set()
        assert await turns.run("b", "edit", after) == "next"
        assert job.stopped

    play(script)


def test_a_failure_is_the_requests_own():
    async def script(turns):
        def fail(stop):
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await turns.run("a", "edit", fail)
        return await turns.run("a", "edit", lambda stop: "next")

    assert play(script, most=1) == "next"


def test_the_loop_is_free_while_it_computes():
    async def script(turns):
        job = Job()
        run = asyncio.ensure_future(turns.run("a", "edit", job))
        await job.begun()
        start = time.perf_counter()
        await asyncio.sleep(0.01)
        assert time.perf_counter() - start < 1
        job.end.set()
        await run

    play(script)


@pytest.mark.parametrize("rank", [0, 1], ids=["first", "in its order"])
def test_what_goes_first_need_not_wait_for_the_end_of_what_runs(rank):
    async def script(turns):
        long, edit = Job("long"), Job("edit")
        slow = asyncio.ensure_future(turns.run("a", "interpolate", long, rank=1))
        await long.begun()
        edit.end.set()
        quick = asyncio.ensure_future(turns.run("b", "edit", edit, rank=rank))
        await asyncio.wait({quick}, timeout=0.3 if rank else 5)
        assert quick.done() is not bool(rank) and not slow.done()
        long.end.set()
        assert await slow == "long" and await quick == "edit"

    play(script)


def test_what_waits_runs_by_rank_and_a_failure_inside_is_not_that_of_the_outer():
    async def script(turns):
        outer, order = Job("outer"), []

        def note(name):
            def job(stop):
                order.append((name, threading.get_ident()))
                raise ZeroDivisionError

            return job

        run = asyncio.ensure_future(turns.run("a", "interpolate", outer, rank=2))
        await outer.begun()
        others = {"last": 3, "refined": 1, "preview": 0}
        found = [asyncio.ensure_future(turns.run(k, "edit", note(k), rank=r)) for k, r in others.items()]
        while len(order) < 2:
            await asyncio.sleep(0.005)
        outer.end.set()
        assert await run == "outer"
        assert [type(f) for f in await asyncio.gather(*found, return_exceptions=True)] == [ZeroDivisionError] * 3
        assert [name for name, _ in order][-1] == "last" and len({thread for _, thread in order}) == 1

    play(script)


def test_closing_ends_what_runs_and_what_waits():
    async def script(turns):
        jobs = [Job(), Job()]
        runs = [asyncio.ensure_future(turns.run(f"v{k}", "edit", job)) for k, job in enumerate(jobs)]
        await jobs[0].begun()
        await asyncio.to_thread(turns.close)
        found = await asyncio.wait_for(asyncio.gather(*runs, return_exceptions=True), 5)
        assert isinstance(found[0], Stopped) and not jobs[1].started.is_set()
        assert isinstance(found[1], (Stopped, asyncio.CancelledError))

    play(script)
