"""What tests of the visit to a GPU share."""

import importlib.util
import time
from pathlib import Path

import pytest
import torch

from bench.gpu.cases import Context

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def context(out, seconds=60.0):
    return Context(out, CPU, True, time.time() + seconds, ("tiny",), (1, 2))


def statuses(journal, phase):
    return [(r["case"], r["status"]) for r in journal.rows(phase)]
