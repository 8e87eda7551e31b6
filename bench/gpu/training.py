"""Phase "training": the trainer's ways to run a step against the published training loop."""

from __future__ import annotations

import traceback
from typing import Any

from bench.training import USUAL, measure

from .cases import CaseLog, Cases, Context

BATCHES = {"celeba64": 128, "ffhq128": 64}  # the paper's, and what fits the time
SECONDS = 10.0


def cases(context: Context) -> Cases:
    for network in context.networks:
        batch = 2 if context.quick else BATCHES.get(network, 16)
        yield f"{network} batch {batch}", lambda network=network, batch=batch: _train(network, batch, context)


def _train(network: str, batch: int, context: Context) -> list[dict[str, Any]]:
    failures: dict[str, Exception] = {}
    names = [*USUAL, *(["bfloat16 fast cuda-graph"] if context.cuda else [])]
    rows = measure(
        network, batch, context.device, names, rounds=3 if context.quick else 15, seconds=SECONDS,
        compared=4 if context.quick else 20, failures=failures,
    )  # fmt: skip
    for name, error in failures.items():
        details = "".join(traceback.format_exception(error))
        where = f"{network} batch {batch}: {name}"
        CaseLog(context.out).fail("training", where, f"{type(error).__name__}: {error}", details)
    return [{"status": "INFO", "table": "training", **row} for row in rows]
