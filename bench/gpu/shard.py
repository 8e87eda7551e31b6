"""A pytest plugin: a share of the tests, and a line for every one that ended, so that a kill leaves what was found.

SHARD is "i/n", SHARD_LINES the file that lines of JSON are added to.
"""

from __future__ import annotations

import json
import os

from bench.machine import end_with_parent


def pytest_configure() -> None:
    end_with_parent()  # which is killed where it cannot end what it started


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
