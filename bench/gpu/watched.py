"""A pytest plugin: the tests end with whoever started them, also under a tool that runs them."""

from __future__ import annotations

from bench.machine import end_with_parent


def pytest_configure() -> None:
    end_with_parent()
