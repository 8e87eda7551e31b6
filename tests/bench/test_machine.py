"""Ceilings, memory, and what a run says about its machine."""

import sys

import pytest
import torch

from bench import machine

CPU = torch.device("cpu")


def test_peaks_are_rates():
    assert 1e8 < machine.matmul_peak(CPU, "float32", 256, 3) < 1e14
    assert 1e7 < machine.copy_bandwidth(CPU, 1 << 20, 3) < 1e13


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="read from /proc")
def test_peak_memory_counts_what_is_gone_again():
    with machine.PeakMemory(CPU) as memory:
        torch.ones(64 << 20, dtype=torch.uint8)
    assert 60 << 20 < memory.bytes < 100 << 20
    with machine.PeakMemory(CPU) as memory:
        torch.ones(1 << 20, dtype=torch.uint8)
    assert memory.bytes < 16 << 20


def test_tf32_is_put_back():
    before = torch.backends.cudnn.allow_tf32
    with pytest.raises(RuntimeError), machine.tf32(not before):
        assert torch.backends.cudnn.allow_tf32 is not before
        raise RuntimeError
    assert torch.backends.cudnn.allow_tf32 is before


def test_a_run_describes_its_machine():
    facts = machine.describe(CPU)
    assert {"date", "commit", "device", "kind", "torch", "triton", "python"} <= facts.keys()
    assert facts["torch"] == torch.__version__ and facts["kind"] == "cpu"
