"""Which device is meant, and how much memory it has left; with a runtime that has two GPUs, where there are none."""

import pytest
import torch

from fake_cuda import FakeCuda
from pdae_fast.engine.device import available_memory, resolve_device
from pdae_fast.errors import UserError


@pytest.fixture
def cuda(monkeypatch):
    return FakeCuda(monkeypatch)


def test_a_gpu_has_its_index(cuda):
    assert resolve_device("cuda") == resolve_device("auto") == torch.device("cuda", 0)
    torch.cuda.set_device(1)
    assert resolve_device("cuda") == resolve_device("auto") == resolve_device(torch.device("cuda:1"))
    assert resolve_device("cuda:0") == torch.device("cuda", 0)
    torch.cuda.set_device(resolve_device("cuda"))  # refuses a device without one
    with pytest.raises(ValueError, match="specified index"):
        torch.cuda.set_device(torch.device("cuda"))
    with pytest.raises(UserError, match="there are 2 CUDA devices"):
        resolve_device("cuda:2")


@pytest.mark.parametrize(
    "said, expected",
    [
        ("Cannot re-initialize CUDA in forked subprocess. To use", "cuda cannot be used in a forked process"),
        ("CUDA driver initialization failed\nmore", "device 'cuda' cannot be used: CUDA driver initialization failed$"),
    ],
)
def test_a_driver_that_refuses(cuda, monkeypatch, said, expected):
    def current_device():
        raise RuntimeError(said)

    monkeypatch.setattr(torch.cuda, "current_device", current_device)
    with pytest.raises(UserError, match=expected):
        resolve_device("auto")


def test_what_pytorch_holds_and_lends_to_nobody_is_free(cuda, monkeypatch):
    segments = [
        {"device": 0, "total_size": 500, "allocated_size": 200, "segment_pool_id": (0, 0)},
        {"device": 0, "total_size": 300, "allocated_size": 100, "segment_pool_id": (0, 7)},  # of a captured graph
        {"device": 1, "total_size": 900, "allocated_size": 0, "segment_pool_id": (0, 8)},
    ]
    for name, value in {"mem_get_info": (1000, 5000), "memory_reserved": 800, "memory_allocated": 300}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    assert available_memory(torch.device("cuda", 0)) == 1000 + 300
