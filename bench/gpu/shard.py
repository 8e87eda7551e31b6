"""A pytest plugin: a share of the tests, and a line for every one that ended, so that a kill leaves what was found.

SHARD is "i/n", SHARD_LINES the file that lines of JSON are added to.
"""

from __future__ import annotations

import json
import os

from bench.gpu.watched import pytest_configure  # noqa: F401 - whoever started this is killed where it cannot end it


def pytest_collection_modifyitems(items: list) -> None:
    own, of = map(int, os.environ["SHARD"].split("/"))
    items[:] = items[own::of]


def pytest_runtest_logreport(report) -> None:
    if report.when != "call" and report.outcome == "passed":
        return
    line = {"test": report.nodeid, "outcome": report.outcome}
    if report.outcome == "failed":
        line["message"] = str(report.longrepr)[-4000:]
    with open(os.environ["SHARD_LINES"], "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
