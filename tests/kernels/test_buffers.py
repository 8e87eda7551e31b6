"""Memory that maps are lent from: never lent twice, had again, bounded, and gone with its owner."""

import gc
import random
import threading
import weakref

import torch

from pdae_fast.kernels import Buffers, buffers, empty_map

MAP = (2, 64, 64, 300)  # B, C, H, W: 9 MiB of float32


def address(tensor):
    return tensor.untyped_storage().data_ptr()


def test_a_map_is_as_the_framework_makes_it():
    pool = Buffers()
    for shape in (MAP, (1, 1, 2000, 2000), (3, 64, 1, 40000), (1, 4, 4, 4)):
        for dtype in (torch.float32, torch.bfloat16):
            plain = torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
            with pool.used():
                found = empty_map(*shape, dtype)
            assert found.shape == plain.shape and found.stride() == plain.stride() and found.dtype == dtype
            assert found.is_contiguous(memory_format=torch.channels_last) and address(found) % 64 == 0
    assert pool.held() > 0 == Buffers().held()


def test_memory_is_had_again_when_the_last_view_is_gone():
    pool = Buffers()
    with pool.used():
        first = empty_map(*MAP, torch.float32)
        where, view = address(first), first[1:].mT
        del first
        second = empty_map(*MAP, torch.float32)
        assert address(second) != where  # the view still stands on it
        del view
        assert address(empty_map(*MAP, torch.float32)) == where
    held = pool.held()
    assert held == 2 * 4 * torch.Size(MAP).numel() and pool.idle() == held // 2


def test_small_maps_and_other_threads_do_not_use_it():
    pool, found = Buffers(), []
    with pool.used():
        empty_map(1, 16, 8, 8, torch.float32)
        thread = threading.Thread(target=lambda: found.append(empty_map(*MAP, torch.float32)))
        thread.start()
        thread.join()
    empty_map(*MAP, torch.float32)
    assert found and pool.held() == 0


def test_what_is_held_is_bounded():
    """Sizes that never come again are given up."""
    pool, most = Buffers(), 0
    for count in range(2 << 20, 14 << 20, 1 << 20):
        lent = pool.take(count, torch.float32)
        most = max(most, 4 * count)
        assert 4 * count <= pool.held() <= buffers.SPARE * most + 4 * count
        del lent
    assert pool.held() <= buffers.SPARE * most


def test_it_goes_with_its_owner_but_not_before_the_last_map():
    pool = Buffers()
    lent = pool.take(2 << 20, torch.float32).fill_(7)
    memory = weakref.ref(pool)
    del pool
    gc.collect()
    assert memory() is None and bool((lent == 7).all())


def test_threads_never_share_a_map():
    """Every map keeps the value that its thread wrote, whatever the others take and drop meanwhile."""
    pool, wrong = Buffers(), []

    def work(seed):
        rng, kept = random.Random(seed), []
        with pool.used():
            for i in range(200):
                value = 1000 * seed + i
                kept.append((empty_map(1, 16, 256, rng.choice((256, 300, 400)), torch.float32)[0, :, 0], value))
                kept[-1][0].fill_(value)
                if len(kept) > 3:
                    tensor, expected = kept.pop(rng.randrange(4))
                    if not bool((tensor == expected).all()):
                        wrong.append(expected)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
