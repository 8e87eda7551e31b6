"""What a run keeps: its checkpoint, one file, written whole or not at all, read without executing anything from it; and
log.jsonl, one line of JSON for each time its losses were read."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import torch

from .. import config as configs
from ..checkpoints.directory import save_torch
from ..errors import UserError
from ..files import atomic_write

CHECKPOINT_NAME = "checkpoint.pt"
FORMAT = "pdae_fast-run-1"


def save(path: Path, contents: dict[str, Any]) -> None:
    """Write the checkpoint, whole or not at all; UserError when the system refuses."""
    save_torch(path, {"format": FORMAT, **contents})


def load(path: Path) -> dict[str, Any]:
    """Read a run's checkpoint; UserError when there is none, or when it is something else."""
    if not path.is_file():
        raise UserError(
            f"{path}: nothing to resume; expected the checkpoint of an earlier run (drop --resume to start)"
        )
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: not a readable checkpoint ({str(error).splitlines()[0]})") from None
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise UserError(f"{path}: not the checkpoint of a training run of pdae_fast")
    return contents


def check_same_run(
    saved: dict[str, Any], out: Path, config: dict[str, Any], units: str, count: int, record: dict[str, Any]
) -> None:
    """UserError when the checkpoint ``saved`` of the run in ``out`` is of another model, of a data set of another size
    (``count``; ``units``: what to call it) or differs in something that the task records."""
    # Fields that did not exist when it was saved have their defaults.
    difference = _difference(config, json.loads(configs.dumps(configs.from_dict(saved["config"], str(out)))))
    if difference:
        raise UserError(
            f"cannot resume: the model in {out} has another configuration than was asked for ({difference})"
        )
    if saved["images"] != count:
        raise UserError(f"cannot resume: the data set has {count} {units} but the saved run saw {saved['images']}")
    for what in {**saved["record"], **record}:
        own, other = record.get(what), saved["record"].get(what)
        if own != other:
            raise UserError(
                f"cannot resume: other {what} than those of the saved run ({own}, not {other}); "
                "give what it was started with, or a new --out"
            )


def _difference(asked: Any, saved: Any, name: str = "") -> str | None:
    """The first field in which two configurations differ, in words; None where they agree."""
    if isinstance(asked, dict) and isinstance(saved, dict):
        fields = [*asked, *(key for key in saved if key not in asked)]
        found = (_difference(asked.get(key), saved.get(key), f"{name}.{key}".lstrip(".")) for key in fields)
        return next((words for words in found if words), None)
    return None if asked == saved else f"{name} is {asked}, not {saved}"


def append_log(path: Path, step: int, values: dict[str, float]) -> None:
    """Add the line of ``step``; UserError when the system refuses."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def trim_log(path: Path, step: int) -> None:
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
