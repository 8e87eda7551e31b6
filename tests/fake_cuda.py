"""What PyTorch's CUDA runtime does about devices, streams, captures and the memory of graphs, without a GPU.

Streams and graphs are objects that remember; ``torch.cuda.graph`` itself is PyTorch's own. As strict as the real one
where that is unforgiving: a capture that was broken cannot be ended, and leaves its stream current, its memory lent
and the default generator in it (as in PyTorch 2.11); streams come from a few in turn; devices without an index are
refused where they are. What is made on a device is on the CPU.
"""

import contextlib
import itertools

import torch


class Stream:
    def __init__(self, device, number):
        self.device, self.number, self.waited = device, number, []

    def __eq__(self, other):
        return isinstance(other, Stream) and self.number == other.number

    def __hash__(self):
        return hash(self.number)

    def wait_stream(self, other):
        self.waited.append(other)


class FakeCuda:
    def __init__(self, monkeypatch, devices=2, streams=32):
        self.default = Stream(torch.device("cuda", 0), -1)
        self.current, self.device, self.broken = self.default, 0, None
        self.underway, self.users, self.captured, self.drawn = [], {}, [], itertools.count()
        self.generator_captures = False
        cuda, fake = torch.cuda, self

        class Graph:
            def capture_begin(self, pool=None, capture_error_mode="global", **_):
                fake.generator_captures, self.alone = True, pool is None
                pool = next(handles) if self.alone else pool
                assert pool not in fake.underway, "beginAllocateToPool: already recording to mempool_id"
                self.pool, self.stream, self.complete = pool, fake.current, False
                fake.underway.append(pool)
                if not self.alone:
                    fake.users[pool] = fake.users.get(pool, 0) + 1
                fake.broken = None

            def capture_end(self):
                if fake.broken:
                    raise RuntimeError("CUDA error: operation failed due to a previous error during capture\nmore")
                fake.underway.remove(self.pool)
                self.complete, fake.generator_captures = True, False
                if not self.alone:
                    fake.captured.append((self.pool, self.stream))

            def __del__(self):
                if getattr(self, "complete", False) and not self.alone:
                    fake.users[self.pool] -= 1

            def replay(self):
                fake.draw()

        def end(device, pool):
            assert isinstance(device, int)
            if pool not in fake.underway:
                raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
            fake.underway.remove(pool)

        def release(device, pool):
            fake.users[pool] -= 1

        class StreamContext:
            def __init__(self, wanted):
                self.wanted = wanted

            def __enter__(self):
                self.before, fake.current = fake.current, self.wanted

            def __exit__(self, *exception):
                fake.current = self.before

        def set_device(device):
            if isinstance(device, torch.device) and device.index is None:
                raise ValueError(f"Expected a torch.device with a specified index or an integer, but got: {device}")
            fake.device = device if isinstance(device, int) else device.index

        zeros = torch.zeros

        def zeros_anywhere(*shape, device=None, **options):
            there = device is not None and torch.device(device).type == "cuda"
            return zeros(*shape, device="cpu" if there else device, **options)

        monkeypatch.setattr(torch, "zeros", zeros_anywhere)
        handles = ((0, n) for n in itertools.count(1))
        for name, value in {
            "is_available": lambda: True,
            "device_count": lambda: devices,
            "current_device": lambda: fake.device,
            "set_device": set_device,
            "device": lambda device: contextlib.nullcontext(),
            "Stream": lambda device: Stream(device, next(fake.drawn) % streams),
            "stream": StreamContext,
            "current_stream": lambda device=None: fake.current,
            "synchronize": lambda device=None: None,
            "empty_cache": self._empty_cache,
            "CUDAGraph": Graph,
            "graph_pool_handle": lambda: next(handles),
        }.items():
            monkeypatch.setattr(cuda, name, value)
        for name, value in {
            "_host_emptyCache": lambda: None, "_cuda_endAllocateToPool": end, "_cuda_releasePool": release,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch._C, name, value, raising=False)

    def _empty_cache(self):
        if self.underway:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    def draw(self):
        """What drawing random numbers on the device does, and a replay, which may."""
        if self.generator_captures:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")

    def break_capture(self, error):
        """What an operation does that a capture does not allow."""
        self.broken = error
        raise error
