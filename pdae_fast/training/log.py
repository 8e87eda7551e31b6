"""log.jsonl of a run: one line of JSON for each time its losses were read."""

from __future__ import annotations

import json
import math
from pathlib import Path

from ..errors import UserError
from ..files import atomic_write


def append(path: Path, step: int, values: dict[str, float]) -> None:
    """Add the line of ``step``; UserError when the system refuses."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def trim(path: Path, step: int) -> None:
    """Drop lines that a killed run wrote after the checkpoint of ``step``, the last maybe only in part."""
    if path.exists():
        kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
        with atomic_write(path, "w") as file:
            file.write("".join(line + "\n" for line in kept))


def _step_of(line: str) -> float:
    """The step of a line; infinity for a line that was cut off."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf
