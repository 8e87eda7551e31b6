"""What a run keeps: its checkpoint, one file, written whole or not at all, read without executing anything from it; and
log.jsonl, one line of JSON for each time its losses were read."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import config as configs
from ..checkpoints.directory import save_torch
from ..errors import UserError
from ..files import atomic_write

CHECKPOINT_NAME = "checkpoint.pt"
FORMAT = "pdae_fast-run-1"
RESTORE = "restore it from a copy, or start again without --resume in another --out"
_ENTRIES = {
    "step": int, "settings": dict, "config": dict, "images": int, "record": dict,
    "model": dict, "ema": dict, "optimizer": dict,
}  # fmt: skip


def save(path: Path, contents: dict[str, Any]) -> None:
    """Write the checkpoint, whole or not at all; UserError when the system refuses."""
    save_torch(path, {"format": FORMAT, **contents})


def load(path: Path) -> dict[str, Any]:
    """Read a run's checkpoint; UserError when there is none, or when it is damaged or something else."""
    if not path.is_file():
        raise UserError(
            f"{path}: nothing to resume; expected the checkpoint of an earlier run (drop --resume to start)"
        )
    try:
        # torch.load does not look at the checksums that it wrote.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"{damaged} fails its checksum")
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes make the readers of zip files and pickles raise almost anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise UserError(f"{path}: not a readable checkpoint ({reason}); {RESTORE}") from None
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise UserError(f"{path}: not the checkpoint of a training run of pdae_fast")
    for name, kind in _ENTRIES.items():
        if not isinstance(contents.get(name), kind) or isinstance(contents[name], bool):
            found = f"is {contents[name]!r:.40}" if name in contents else "is missing"
            raise UserError(f"{path}: damaged, its {name} {found}; {RESTORE}")
    return contents


def check_whole(
    path: Path, saved: dict[str, Any], model: nn.Module, ema: nn.Module, trained: Sequence[nn.Parameter]
) -> None:
    """UserError when the checkpoint ``saved`` of ``path`` does not hold finite values of exactly the tensors of
    ``model`` and ``ema``, and for every parameter in ``trained`` moments that Adam has after as many steps."""
    for name, module in (("model", model), ("ema", ema)):
        expected = module.state_dict()
        if saved[name].keys() != expected.keys():
            odd = sorted(map(str, saved[name].keys() ^ expected.keys()))
            raise UserError(f"{path}: damaged, its {name} lacks or has too many tensors ({odd[0]}); {RESTORE}")
        for key, tensor in expected.items():
            _check_tensor(path, f"{name} {key}", saved[name][key], tensor)
    optimizer, step = saved["optimizer"], saved["step"]
    try:
        places = [place for group in optimizer["param_groups"] for place in group["params"]]
        states = [optimizer["state"].get(place) for place in places]
        whole = all(isinstance(group, dict) for group in optimizer["param_groups"]) and len(places) == len(trained)
        whole = whole and set(optimizer["state"]) <= set(places)
        counts = {float(state["step"]) for state in states if state is not None}
        whole = whole and counts == ({float(step)} if step else set()) and step >= 0
        whole = whole and len({state is None for state in states}) == 1
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError):
        whole = False
    if not whole:
        raise UserError(f"{path}: damaged, its optimizer is not that of step {step!s:.40}; {RESTORE}")
    for state, parameter in zip(states, trained, strict=True):
        for key in ("exp_avg", "exp_avg_sq") if state is not None else ():
            _check_tensor(path, f"optimizer {key}", state.get(key), parameter)
        if state is not None and bool((state["exp_avg_sq"] < 0).any()):
            raise UserError(f"{path}: damaged, its optimizer exp_avg_sq has negative values; {RESTORE}")


def _check_tensor(path: Path, name: str, found: Any, expected: Tensor) -> None:
    if not isinstance(found, Tensor) or found.shape != expected.shape or found.dtype != expected.dtype:
        what = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else f"no tensor ({found!r:.40})"
        raise UserError(
            f"{path}: damaged, its {name} is {what}, expected {expected.dtype} {list(expected.shape)}; {RESTORE}"
        )
    if not bool(torch.isfinite(found).all()):
        raise UserError(f"{path}: damaged, its {name} holds NaN or infinite values; {RESTORE}")


def check_same_run(
    saved: dict[str, Any], out: Path, config: dict[str, Any], units: str, count: int, record: dict[str, Any]
) -> None:
    """UserError when the checkpoint ``saved`` of the run in ``out`` is of another model, of a data set of another size
    (``count``; ``units``: what to call it) or differs in something that the task records."""
    # Fields that did not exist when it was saved have their defaults.
    try:
        known = json.loads(configs.dumps(configs.from_dict(saved["config"], str(out))))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{out / CHECKPOINT_NAME}: damaged, its config is no configuration; {RESTORE}") from None
    difference = _difference(config, known)
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
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        kept = [line for line in text.splitlines() if _step_of(line) <= step]
        with atomic_write(path, "w") as file:
            file.write("".join(line + "\n" for line in kept))


def _step_of(line: str) -> float:
    """The step of a line; infinity for a line that was cut off or is none."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
    return step if isinstance(step, int) else math.inf
