import _thread
import itertools
import signal
import threading
import time

import pytest
import torch
from PIL import Image

from pdae_fast.data import BrokenImage, ImageFiles, Sample, stream
from pdae_fast.errors import UserError


class Numbers:
    """Image i is filled with i; the indices in `bad` are broken. Early images are the slowest."""

    def __init__(self, count, bad=(), slow=False):
        self.names = [f"n{i}" for i in range(count)]
        self.bad, self.slow = set(bad), slow
        self.started = 0
        self.lock = threading.Lock()

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        with self.lock:
            self.started += 1
        if self.slow:
            time.sleep(0.004 * (3 - i % 4))
        if i in self.bad:
            raise BrokenImage(f"/data/{i}.png", "truncated")
        return Sample(torch.full((1, 2, 2), float(i)), self.names[i], i)


def loaders():
    return [t for t in threading.enumerate() if t.name.startswith("pdae-data")]


@pytest.mark.parametrize("prefetch", [1, 2, 5])
@pytest.mark.parametrize(("count", "sizes"), [(10, [4, 4, 2]), (8, [4, 4]), (3, [3]), (0, [])])
def test_order_and_sizes(count, sizes, prefetch):
    batches = list(stream(Numbers(count, slow=True), 4, prefetch=prefetch))
    assert [len(batch.images) for batch in batches] == sizes
    assert [name for batch in batches for name in batch.names] == [f"n{i}" for i in range(count)]
    assert [label for batch in batches for label in batch.labels] == list(range(count))
    assert all((batch.images[:, 0, 0, 0] == torch.tensor(batch.labels)).all() for batch in batches)


def test_broken_images_are_skipped_recorded_and_made_up_for():
    broken = []
    batches = list(stream(Numbers(12, bad=(0, 5, 6)), 4, broken=broken))
    assert broken == [("n0", "truncated"), ("n5", "truncated"), ("n6", "truncated")]
    assert [batch.labels for batch in batches] == [[1, 2, 3, 4], [7, 8, 9, 10], [11]]


def test_skipping_without_a_list_warns():
    with pytest.warns(UserWarning, match="/data/1.png: truncated"):
        assert [batch.labels for batch in stream(Numbers(3, bad=(1,)), 4)] == [[0, 2]]


def test_fail_names_the_file_when_its_turn_comes():
    batches = stream(Numbers(12, bad=(6,)), 4, on_error="fail")
    assert next(batches).labels == [0, 1, 2, 3]
    with pytest.raises(BrokenImage, match="/data/6.png: truncated"):
        next(batches)
    assert not loaders()


def test_all_broken_gives_nothing():
    broken = []
    assert list(stream(Numbers(5, bad=range(5)), 2, broken=broken)) == [] and len(broken) == 5


def test_other_errors_are_never_skipped():
    class Faulty(Numbers):
        def __getitem__(self, i):
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        list(stream(Faulty(3), 2))
    assert not loaders()


def test_the_queue_is_bounded_and_fills_meanwhile():
    dataset = Numbers(1000)
    batches = stream(dataset, 4, prefetch=2)
    for taken in range(1, 6):
        next(batches)
        deadline = time.monotonic() + 2
        while dataset.started < taken * 4 + 4 and time.monotonic() < deadline:
            time.sleep(0.005)
        assert dataset.started >= taken * 4 + 4  # a batch is loaded while the caller works
    time.sleep(0.05)
    assert dataset.started <= (5 + 2) * 4
    batches.close()


def test_memory_is_constant():
    """How many samples of 400 are alive at any time, counted by a label that says when it is freed."""
    alive, most, lock = 0, 0, threading.Lock()

    class Label(int):
        def __del__(self):
            nonlocal alive
            with lock:
                alive -= 1

    class Counted(Numbers):
        def __getitem__(self, i):
            nonlocal alive, most
            with lock:
                alive += 1
                most = max(most, alive)
            return Sample(torch.zeros(1, 2, 2), self.names[i], Label(i))

    for _ in stream(Counted(400), 4, prefetch=2):
        pass
    # Two batches ahead, one being filled, and the one that the caller still holds.
    assert most <= (2 + 1 + 1) * 4


@pytest.mark.parametrize("how", ["close", "interrupt", "forget"])
def test_threads_end_with_the_generator(how):
    dataset = Numbers(10_000, slow=True)
    batches = stream(dataset, 4)
    next(batches)
    assert loaders()
    if how == "close":
        batches.close()
    elif how == "interrupt":
        with pytest.raises(KeyboardInterrupt):
            batches.throw(KeyboardInterrupt)
    else:
        del batches
    assert not loaders()
    started = dataset.started
    time.sleep(0.03)
    assert dataset.started == started < 100


def test_closing_does_not_load_what_was_queued():
    dataset = Numbers(1000, slow=True)
    batches = stream(dataset, 4, prefetch=50)
    next(batches)
    batches.close()
    assert dataset.started < 100


def test_an_interrupt_while_waiting_for_an_image_ends_the_threads():
    """Ctrl-C arrives in the main thread, inside the generator."""

    class Interrupting(Numbers):
        def __getitem__(self, i):
            if i == 3:
                _thread.interrupt_main()
                time.sleep(0.05)
            return super().__getitem__(i)

    # A job that a shell started in the background inherits a handler that ignores Ctrl-C.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            for _ in stream(Interrupting(1000), 4):
                pass
    finally:
        signal.signal(signal.SIGINT, handler)
    assert not loaders()


@pytest.mark.parametrize("arguments", [{"batch_size": 0}, {"batch_size": 4, "prefetch": 0},
                                       {"batch_size": 4, "on_error": "ignore"}])  # fmt: skip
def test_bad_arguments_at_the_call(arguments):
    with pytest.raises(UserError):
        stream(Numbers(3), **arguments)


def test_with_image_files(tmp_path):
    for i in range(7):
        Image.new("L", (4, 4), i).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes(b"broken")
    broken = []
    batches = list(stream(ImageFiles(tmp_path, 4, 1), 3, broken=broken))
    assert broken == [("3", "not an image in a known format")]
    assert list(itertools.chain(*(batch.names for batch in batches))) == ["0", "1", "2", "4", "5", "6"]
    assert batches[1].labels == [None] * 3
    torch.testing.assert_close((batches[1].images[:, 0, 0, 0] + 1) * 127.5, torch.tensor([4.0, 5.0, 6.0]))
