"""Prints what the benches of a run found and keeps it as JSON. A bench adds rows by `bench.tables.RUN.add(...)`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.machine import copy_bandwidth, describe, matmul_peak, worth_timing
from bench.tables import RUN, default_path
from pdae_fast.engine import resolve_device


def pytest_addoption(parser) -> None:
    group = parser.getgroup("pdae_fast bench")
    group.addoption("--json", metavar="FILE", help="where the results go (default: a new file in bench/results)")
    group.addoption(
        "--compile", action="store_true", help="also time torch.compile of the baseline, which compiles for minutes"
    )
    group.addoption("--bench-device", default="auto", metavar="DEVICE", help="auto, cpu, cuda ... (default: auto)")


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    """CUDA when there is one, unless --bench-device says otherwise."""
    return resolve_device(request.config.getoption("--bench-device"))


@pytest.fixture(autouse=True)
def only_what_is_worth_timing(request, device) -> None:
    dtype = request.node.callspec.params.get("dtype") if hasattr(request.node, "callspec") else None
    if dtype is not None and not worth_timing([dtype], device):
        pytest.skip(f"no instructions for {dtype} here")


class _Peaks(dict):
    """Matrix-product peaks of a device by kind, each measured once, when first asked for."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __contains__(self, kind: object) -> bool:
        return True

    def __missing__(self, kind: str) -> float:
        self[kind] = matmul_peak(self.device, kind)
        RUN.add("peak", what=f"matrix product, {kind}", rate=self[kind], unit="FLOP/s")
        return self[kind]


@pytest.fixture(scope="session")
def peaks(device) -> dict[str, float]:
    return _Peaks(device)


@pytest.fixture(scope="session")
def bandwidth(device) -> float:
    """Bytes/s of a large copy, read plus written."""
    rate = copy_bandwidth(device)
    RUN.add("peak", what="copy", rate=rate, unit="B/s")
    return rate


def pytest_terminal_summary(terminalreporter, config) -> None:
    if not RUN.tables:
        return
    facts = describe(resolve_device(config.getoption("--bench-device")))
    terminalreporter.section("pdae_fast bench")
    terminalreporter.line(", ".join(f"{k} {v}" for k, v in facts.items()))
    for title, text in RUN.sections():
        terminalreporter.line("")
        terminalreporter.line(title)
        terminalreporter.line(text)
    path = Path(config.getoption("--json") or default_path())
    RUN.save(path, facts)
    terminalreporter.line("")
    terminalreporter.line(f"results: {path}; python -m bench.report turns them into the README's table and plot")
