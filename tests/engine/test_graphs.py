"""Captures without a GPU: what a failed one leaves behind and says, and whose the memory and the streams are."""

import dataclasses
import gc
import weakref

import pytest
import torch

from fake_cuda import FakeCuda
from helpers import ON_DEVICE, tiny_pdae, tiny_prior
from pdae_fast.engine import graphs
from pdae_fast.engine.fused import KEPT_TRAJECTORIES, FusedPlan
from pdae_fast.errors import UserError
from pdae_fast.samplers import ddim
from pdae_fast.schedule import build_schedule

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def cuda(monkeypatch):
    monkeypatch.setattr(graphs, "_streams", weakref.WeakSet())
    return FakeCuda(monkeypatch)


def capture(cuda, step, pool=None, after=graphs.WARM_UP_STEPS):
    """Capture a step that runs through its warm-up and then does ``step``."""
    calls = []

    def run():
        calls.append(cuda.current)
        if len(calls) > after:
            step()

    pool = pool or graphs.Pool(GPU)
    return graphs.capture(run, lambda: None, GPU, pool), calls, pool


def test_a_capture_runs_and_ends_on_its_pools_stream(cuda):
    _, calls, pool = capture(cuda, lambda: None)
    assert calls == [pool.stream] * 3 and cuda.current is cuda.default
    assert cuda.captured == [(pool.handle, pool.stream)] and not cuda.underway


def test_a_failed_capture_names_the_first_reason_and_restores_the_stream(cuda):
    pool, reason = graphs.Pool(GPU), RuntimeError("operation not permitted when stream is capturing")
    try:
        raise RuntimeError("what the caller is handling meanwhile")
    except RuntimeError:
        with pytest.raises(graphs.CaptureError, match="^operation not permitted when stream is capturing$"):
            capture(cuda, lambda: cuda.break_capture(reason), pool)
    assert cuda.current is cuda.default
    # The allocator knows that it is over: it frees memory again, and the pool has no users.
    torch.cuda.empty_cache()
    assert cuda.users == {pool.handle: 0}
    capture(cuda, lambda: None, pool)
    assert len(cuda.captured) == 1


def test_a_failed_capture_leaves_the_pools_other_graphs_alone(cuda):
    first, _, pool = capture(cuda, lambda: None)
    with pytest.raises(graphs.CaptureError):
        capture(cuda, lambda: cuda.break_capture(RuntimeError("no")), pool)
    assert cuda.users == {pool.handle: 1} and first.complete
    first.replay()


@pytest.mark.parametrize(
    "error", [RuntimeError("no"), torch.OutOfMemoryError("CUDA out of memory"), KeyboardInterrupt()]
)
def test_random_numbers_are_drawn_after_a_failed_capture(cuda, error):
    with pytest.raises((graphs.CaptureError, type(error))):
        capture(cuda, lambda: cuda.break_capture(error))
    cuda.draw()
    assert not cuda.underway and cuda.current is cuda.default


def test_what_cannot_be_put_right_hides_no_reason(cuda, monkeypatch):
    """Not even memory for one number is left, or no other capture begins either."""
    monkeypatch.setattr(graphs, "_free_generator", lambda *_: cuda.break_capture(RuntimeError("nor this")))
    with pytest.raises(graphs.CaptureError, match="^the reason$") as failed:
        capture(cuda, lambda: cuda.break_capture(RuntimeError("the reason")))
    assert "nor this" not in map(str, graphs._reasons(failed.value, None))


def test_a_failure_to_begin_takes_nothing_from_the_pool(cuda, monkeypatch):
    first, _, pool = capture(cuda, lambda: None)

    def begin(self, *_, **__):
        raise RuntimeError("a stream may not begin")

    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", begin)
    with pytest.raises(graphs.CaptureError, match="may not begin"):
        capture(cuda, lambda: None, pool)
    assert cuda.users == {pool.handle: 1} and cuda.current is cuda.default and first.complete


@pytest.mark.parametrize("after", [0, graphs.WARM_UP_STEPS], ids=["warming up", "capturing"])
def test_running_out_of_memory_stays_that(cuda, after):
    shortage = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        capture(cuda, lambda: cuda.break_capture(shortage), after=after)
    assert cuda.current is cuda.default and not cuda.underway


def test_running_out_of_memory_in_the_forked_branch(cuda):
    """The side stream's context fails on its way out, then the capture does: two errors after the first."""

    def step():
        try:
            cuda.break_capture(torch.OutOfMemoryError("CUDA out of memory"))
        finally:
            raise RuntimeError("capturing stream has unjoined work")

    with pytest.raises(torch.OutOfMemoryError):
        capture(cuda, step)


def test_a_reason_that_was_put_aside_is_not_named(cuda):
    def step():
        try:
            raise RuntimeError("harmless")
        except RuntimeError:
            cuda.broken = True
            raise RuntimeError("the reason") from None

    with pytest.raises(graphs.CaptureError, match="^the reason$"):
        capture(cuda, step)


def test_streams_in_use_are_not_drawn_again(cuda):
    """PyTorch has 32 and hands them out in turn: destroying one graph would clear the workspace of another's stream."""
    pools = [graphs.Pool(GPU) for _ in range(20)]
    for _ in range(27):  # somebody else's
        torch.cuda.Stream(GPU)
    side = graphs.new_stream(GPU)
    pools += [graphs.Pool(GPU) for _ in range(11)]
    assert len({pool.stream for pool in pools} | {side}) == 32
    extra = graphs.Pool(GPU)  # there is no other one: it shares
    assert extra.stream in {pool.stream for pool in pools} | {side}


def captured_plan(cuda, monkeypatch, model):
    """A plan on the CPU that captures with the fake runtime; its graphs run the step when they are replayed."""
    plan = FusedPlan(model, CPU, torch.float32, ON_DEVICE)
    plan.options = dataclasses.replace(plan.options, graphs=True)
    true = graphs.capture

    def run(step, reset, device, pool):
        graph = true(step, reset, GPU, pool)
        graph.replay = step
        return graph

    monkeypatch.setattr(graphs, "capture", run)
    return plan


def test_pool_and_stream_belong_to_one_trajectory_and_die_with_it(cuda, monkeypatch):
    plan = captured_plan(cuda, monkeypatch, tiny_pdae())
    schedule = build_schedule(plan.model.config.schedule)
    z, x_T = torch.randn(1, 16), torch.randn(1, 1, 32, 32)
    for _ in range(2):
        ddim.ddim(plan.field(z), x_T, schedule, 4, stop_percent=0.5)
    assert len(cuda.captured) == 2 and len(set(cuda.captured)) == 1  # with G and without: one memory, one stream
    for steps in range(5, 5 + KEPT_TRAJECTORIES):
        pool = weakref.ref(next(reversed(plan._trajectories.values())).pool)
        ddim.ddim(plan.field(z), x_T, schedule, steps)
    assert len({stream for _, stream in cuda.captured}) == KEPT_TRAJECTORIES + 1
    assert len({handle for handle, _ in cuda.captured}) == KEPT_TRAJECTORIES + 1
    gc.collect()
    assert pool() is not None
    # The first one was evicted: nothing uses its memory any more. All others live.
    first = cuda.captured[0][0]
    assert cuda.users.pop(first) == 0 and set(cuda.users.values()) == {1}
    plan._trajectories.clear()
    pool = pool()
    gc.collect()
    assert set(cuda.users.values()) == {0}


def test_memory_of_idle_trajectories_gives_way(cuda, monkeypatch):
    plan = captured_plan(cuda, monkeypatch, tiny_prior())
    schedule = build_schedule(plan.model.config.schedule)
    ddim.ddim(plan.field(), torch.randn(1, 1, 32, 32), schedule, 4)
    free = iter([0, 1 << 40, 0])
    monkeypatch.setattr(plan, "free_bytes", lambda: next(free))
    plan.check_memory(1)
    gc.collect()  # the fake graph's replay holds its trajectory
    assert not plan._trajectories and set(cuda.users.values()) == {0}
    with pytest.raises(UserError, match="1 images at once need about"):
        plan.check_memory(1)
