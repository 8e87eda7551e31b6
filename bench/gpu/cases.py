"""What a visit finds, written line by line, so that a process that dies takes nothing with it.

Every case leaves a line when it starts and at least one when it ends, in ``DIR/rows.jsonl``; tracebacks go to
``DIR/failures.txt``. Statuses: PASS and FAIL for a check, INFO for a measurement, SKIP for what could not run.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pdae_fast import cli

STATUSES = ("PASS", "FAIL", "INFO", "SKIP")
AGAIN = "AGAIN"  # of a line that takes back those of its case before it
DEVICE_BROKEN = 3  # exit status: a CUDA error that stays with the process; the remaining cases need a new one


class NotHere(Exception):
    """Raised by a case that cannot run here; the text says why."""


@dataclass(frozen=True)
class Context:
    """What every phase is told."""

    out: Path
    device: torch.device
    quick: bool
    deadline: float  # time.time() by which the phase must have ended
    networks: tuple[str, ...]
    batches: tuple[int, ...]

    def left(self) -> float:
        return self.deadline - time.time()

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"


Result = dict[str, Any] | list[dict[str, Any]] | None
Cases = Iterable[tuple[str, Callable[[], Result]]]


class CaseLog:
    def __init__(self, out: Path) -> None:
        self.path, self.failures, self._size = out / "rows.jsonl", out / "failures.txt", 0

    def write(self, phase: str, case: str, status: str, **values: Any) -> None:
        line = json.dumps(cli.finite({"phase": phase, "case": case, "status": status, **values}), default=str)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def grown(self) -> bool:
        """Whether there are lines that were not there when this was asked last."""
        size = self.path.stat().st_size if self.path.exists() else 0
        before, self._size = self._size, size
        return size > before

    def rows(self, phase: str | None = None) -> list[dict[str, Any]]:
        """All finished rows, of one phase or of all."""
        return [r for r in self._lines() if r["status"] in STATUSES and phase in (None, r["phase"])]

    def _lines(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        lines = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # cut off by a process that was killed while it wrote
                continue
            if row["status"] == AGAIN:
                lines = [r for r in lines if (r["phase"], r["case"]) != (row["phase"], row["case"])]
            else:
                lines.append(row)
        return lines

    def again(self, phase: str) -> None:
        """Forget what could not run of ``phase``, so that it is tried once more."""
        statuses: dict[str, set[str]] = {}
        for row in self.rows(phase):
            statuses.setdefault(row["case"], set()).add(row["status"])
        for case, found in statuses.items():
            if found == {"SKIP"}:
                self.write(phase, case, AGAIN)

    def started(self, phase: str) -> set[str]:
        return {r["case"] for r in self._lines() if r["phase"] == phase}

    def unfinished(self, phase: str) -> list[str]:
        """Cases that began and left nothing: the process died in them."""
        lines = [r for r in self._lines() if r["phase"] == phase]
        ended = {r["case"] for r in lines if r["status"] in STATUSES}
        return list(dict.fromkeys(r["case"] for r in lines if r["case"] not in ended))

    def fail(self, phase: str, case: str, reason: str, details: str = "") -> None:
        reason = " ".join(reason.split())
        self.write(phase, case, "FAIL", reason=reason[:300])
        with open(self.failures, "a", encoding="utf-8") as file:
            file.write(f"=== {phase}: {case}\n{details or reason}\n\n")


def run_cases(phase: str, cases: Cases, context: Context) -> int:
    """Run what is not in the journal yet; 0, or DEVICE_BROKEN when this process cannot go on."""
    journal = CaseLog(context.out)
    seen = journal.started(phase)
    for name, function in cases:
        if name in seen:
            continue
        if context.left() <= 0:
            journal.write(phase, name, "SKIP", reason="the phase's time was up")
            continue
        journal.write(phase, name, "START")
        start = time.time()
        try:
            found = function()
        except NotHere as reason:
            journal.write(phase, name, "SKIP", reason=str(reason))
        except Exception as error:  # noqa: BLE001 - whatever it is, the other cases still count
            journal.fail(phase, name, f"{type(error).__name__}: {error}", traceback.format_exc())
            if _device_broken(context.device):
                return DEVICE_BROKEN
        else:
            for row in found if isinstance(found, list) else [found or {}]:
                row = {"seconds": round(time.time() - start, 3), **row}
                journal.write(phase, name, row.pop("status", "PASS"), **row)
    return 0


def _device_broken(device: torch.device) -> bool:
    """Whether even an innocent operation fails now, as after an illegal memory access."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
        torch.zeros(8, device=device).add_(1).sum().item()
        torch.cuda.empty_cache()
    except Exception:  # noqa: BLE001
        return True
    return False
