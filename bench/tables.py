"""What a bench run finds: rows in named tables, printed at its end and kept as JSON.

A test adds a row with

    from bench.tables import RUN
    RUN.add("step", network="celeba64", batch=8, contender="fused-bfloat16", median_s=0.9, ratio=2.4)

Columns appear in the order they are first named; rows may lack some. How a value is printed follows from its column's
name: ``*_s`` is seconds (printed as ms), ``*_bytes`` bytes, ``*_fraction`` a percentage, ``ratio*`` a factor,
``error*`` scientific; a list of two is a range; anything else is printed as it is. A table that is not in TITLES is
headed by its own name.
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from pdae_fast import cli
from pdae_fast.errors import UserError
from pdae_fast.files import make_folder

RESULTS = Path(__file__).resolve().parent / "results"
TITLES = {
    "step": "one DDIM step conditioned on z (trunk, both decoders, update); contenders and baseline took turns; "
    "ratio: baseline over contender",
    "kernel": "one operation against the framework's sequence of operators, on data larger than the caches; ratio: "
    "framework over ours; of copy: bytes that must move, over time, as a fraction of a large copy's rate",
    "native": "the CPU's native code by shape, against oneDNN's convolution or the framework's attention; GFLOP of the "
    "direct method a second; errors against float64; ratio: framework over ours",
    "modules": "one eps of another family's network (random weights), or one z; all took turns; ratio: modules over "
    "contender",
    "rewrite": "switches of the fused plan turned around, beside the default; ratio: default over changed, so that "
    "below 1 the default is the faster one",
    "features": "maps of the middle block and of so many output blocks, an image's processor time; all took turns; "
    "ratio: features over one evaluation of eps",
    "wall_clock": "images encoded and decoded against the published 999+100 steps, extrapolated; ratio: published over "
    "engine",
    "peak": "what the machine reaches: a large matrix product, a large copy (read plus written)",
    "quality": "the bundled model on the bundled images, encoded and decoded",
    "demo": "from a slider's move to its picture on the page, without drawing it; ms a picture",
    "startup": "from the start of a new process to the end of its first step; memory: the process's peak",
    "training": "one step of mean-shift training with all around it (loading, draws, Adam, EMA); contenders and the "
    "published loop took turns; ratio: published loop over contender; memory: building the side and its first steps; "
    "error: largest relative difference of the losses of those steps",
    "deploy": "one DDIM step by exported graphs, beside the engine; all took turns; ratio: baseline over contender",
}
HEADERS = {
    "median_s": "ms",
    "spread_s": "p20-p80 ms",
    "baseline_s": "baseline ms",
    "framework_s": "framework ms",
    "ratio_spread": "p20-p80",
    "images_per_s": "images/s",
    "peak_fraction": "of matmul peak",
    "copy_fraction": "of copy",
    "memory_bytes": "memory",
    "moved_bytes": "moves",
    "error_framework": "framework's error",
    "error_losses": "losses differ",
}


def _one(column: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if column.endswith("_s") and not column.endswith("_per_s"):
        return f"{value * 1e3:.4g}"
    if column.endswith("_bytes"):
        return f"{value / 2**20:.1f} MiB" if value < 10 * 2**30 else f"{value / 2**30:.1f} GiB"
    if column.endswith("_fraction"):
        return f"{value:.0%}"
    if column.startswith("ratio"):
        return f"{value:.2f}x"
    if column.startswith("error"):
        return f"{value:.1e}"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def show(column: str, value: Any) -> str:
    """A value as text."""
    if isinstance(value, (list, tuple)):
        return "-".join(_one(column, v) for v in value)
    return _one(column, value)


def columns(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(column for row in rows for column in row))


def text(rows: list[dict[str, Any]]) -> str:
    names = columns(rows)
    left = sum(1 for n in names if all(isinstance(row.get(n, ""), str) for row in rows)) or 1
    ordered = sorted(names, key=lambda n: not all(isinstance(row.get(n, ""), str) for row in rows))
    header = [HEADERS.get(n, n.removesuffix("_s") + " ms" if n.endswith("_s") else n) for n in ordered]
    return cli.table(header, [[show(n, row.get(n)) for n in ordered] for row in rows], left=left)


class ResultTables:
    """The tables of one run."""

    def __init__(self) -> None:
        self.tables: dict[str, list[dict[str, Any]]] = {}

    def add(self, table: str, /, **values: Any) -> None:
        """Append a row; values are strings, numbers, None, or lists of two numbers."""
        self.tables.setdefault(table, []).append(values)

    def sections(self) -> list[tuple[str, str]]:
        """(title, text) of every table."""
        return [(TITLES.get(name, name), text(rows)) for name, rows in self.tables.items()]

    def save(self, path: Path, machine: dict[str, str]) -> None:
        make_folder(path.parent)
        cli.write_json(path, {"machine": machine, "tables": self.tables})


RUN = ResultTables()


def default_path() -> Path:
    """bench/results/DATE-TIME.json, which git ignores."""
    return RESULTS / f"{datetime.datetime.now():%Y%m%d-%H%M%S}.json"


def load(path: Path) -> tuple[dict[str, str], dict[str, list[dict[str, Any]]]]:
    """(machine, tables) of a saved run; UserError when the file is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        machine, tables = values["machine"], values["tables"]
        if not all(isinstance(row, dict) for rows in tables.values() for row in rows):
            raise TypeError
        return dict(machine), dict(tables)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; expected the JSON file of a bench run") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is not the JSON file of a bench run (machine, tables)") from None
