"""Collects the ratios of a run and prints them as one table at its end."""

from __future__ import annotations

import platform

import torch

from pdae_fast import cli
from pdae_fast.engine.device import describe_device

ROWS: list[list[str]] = []


def pytest_terminal_summary(terminalreporter) -> None:
    if not ROWS:
        return
    terminalreporter.section("one DDIM step, baseline and contender run alternately")
    terminalreporter.line(
        f"{describe_device(torch.device('cpu'))}, torch {torch.__version__}, Python {platform.python_version()}"
    )
    header = ["network", "batch", "contender", "baseline ms", "ms", "p20-p80 ms", "ratio", "of matmul peak", "error"]
    terminalreporter.line(cli.table(header, ROWS))
