"""Every op of `kernels/` against the framework's sequence of operators: on a GPU its Triton kernel, on the CPU the
implementation the op has there."""

from __future__ import annotations

import pytest
import torch

from bench.operations import operations, prepare, row
from bench.tables import RUN
from bench.timing import pedantic

# The images a batch that the largest map makes memory-bound work of, on either kind of device.
BATCH = 16 if torch.cuda.is_available() else 1
CASES = {f"{o.name} {o.shape}".replace(", ", "-").replace(" ", "-"): o for o in operations(BATCH)}


@pytest.mark.parametrize("operation", CASES.values(), ids=CASES)
def test_operation(benchmark, device, bandwidth, operation):
    alternation, calls, *errors = prepare(operation, device)
    if pedantic(benchmark, alternation, rounds=9):
        found = row(operation, alternation, calls, tuple(errors), bandwidth)
        RUN.add("kernel", **found)
        benchmark.extra_info.update(found)
