"""One HTML page about a model: the experiments' commands run one after another, and what they left, in one file."""

from __future__ import annotations

import base64
import csv
import importlib.util
import io
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__, cli
from ..errors import UserError
from ..files import atomic_write, make_folder
from .report_experiments import Experiment

STATE = "report.json"  # in an experiment's folder, beside what the command left there
TEMPLATE = Path(__file__).with_name("report.html")
LONG_TABLE = 11  # rows; longer ones are folded
MOST_ROWS = 300


# -- running -------------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """What became of an experiment. ``status``: "done", "skipped" (the command's own reason), or "failed"."""

    experiment: Experiment
    command: str
    status: str
    reason: str = ""
    printed: str = ""
    seconds: float = 0.0
    fresh: bool = True  # False: found finished


def run(
    experiment: Experiment, shared: Sequence[str], out: Path, job: dict[str, Any], quick: bool, again: bool
) -> Result:
    """Run an experiment into OUT/NAME, or find it finished there.

    shared: options that all commands take. job: what decides the results besides the command (weights, data); a
    finished experiment of another job or command is run again. A mistake that the command reports makes it skipped,
    anything else failed. An interruption is passed on.
    """
    folder = out / experiment.name
    module, *rest = experiment.module.split()
    # The user's own options come last and win.
    arguments = [*rest, *(experiment.quick if quick else experiment.arguments), *shared]
    argv = [f"pdae_fast.{module}", *arguments, "--out", str(folder)]
    command = "python -m " + shlex.join(argv)
    # Where the folder lies is no part of what was done: a report that was moved is still finished.
    job = {**job, "command": [module, *arguments]}
    found = None if again else _finished(folder, job)
    if found:
        return Result(experiment, command, "done", "", found["printed"], found["seconds"], fresh=False)
    if importlib.util.find_spec(f"pdae_fast.{module}") is None:
        return Result(experiment, command, "skipped", f"this version has no pdae_fast.{module}")
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", *argv], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    if done.returncode == 130:
        raise KeyboardInterrupt
    if done.returncode:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()] or ["no reason given"]
        reason = lines[-1].removeprefix("error: ").removesuffix(" (see --help)")
        return Result(experiment, command, "skipped" if done.returncode == 2 else "failed", reason, seconds=seconds)
    cli.write_json(folder / STATE, {"job": job, "printed": done.stdout.strip(), "seconds": seconds})
    return Result(experiment, command, "done", "", done.stdout.strip(), seconds)


def _finished(folder: Path, job: dict[str, Any]) -> dict[str, Any] | None:
    try:
        found = json.loads((folder / STATE).read_text(encoding="utf-8"))
        return found if found["job"] == json.loads(json.dumps(job)) and isinstance(found["printed"], str) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


# -- what is shown -------------------------------------------------------------------------------------------------


@dataclass
class Picture:
    """A PNG as a data URL."""

    url: str
    text: str
    width: int
    height: int


@dataclass
class Table:
    """Rows of text under ``header``; ``numeric`` says which columns are numbers. ``left_out``: rows not shown."""

    title: str
    header: list[str]
    rows: list[list[str]]
    numeric: list[bool]
    left_out: int = 0

    @property
    def folded(self) -> bool:
        return len(self.rows) > LONG_TABLE


def pictures(experiment: Experiment, folder: Path) -> list[Picture]:
    """The experiment's pictures that are in ``folder``."""
    from PIL import Image

    found = []
    for name, text in experiment.pictures.items():
        if (folder / name).is_file():
            content = (folder / name).read_bytes()
            with Image.open(io.BytesIO(content)) as image:
                width, height = image.size
            url = "data:image/png;base64," + base64.b64encode(content).decode("ascii")
            found.append(Picture(url, text, width, height))
    return found


def tables(experiment: Experiment, folder: Path) -> list[Table]:
    """The experiment's tables that are in ``folder``."""
    found = []
    for source, title in experiment.tables.items():
        name, _, key = source.partition(":")
        if not (folder / name).is_file():
            continue
        rows: Any
        if name.endswith(".csv"):
            with open(folder / name, encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file))
        else:
            rows = json.loads((folder / name).read_text(encoding="utf-8"))
            for part in key.split("."):
                rows = rows.get(part, []) if isinstance(rows, dict) else []
        if rows:
            found.append(make_table(title, [flatten(row) for row in rows]))
    return found


def flatten(row: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``row`` with nested dictionaries as "outer inner" and without lists, which are no cells."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        name = f"{prefix} {key}".strip().replace("_", " ")
        if isinstance(value, dict):
            flat |= flatten(value, name)
        elif not isinstance(value, list):
            flat[name] = value
    return flat


def make_table(title: str, rows: list[dict[str, Any]]) -> Table:
    """Rows with any keys as a Table; columns that are empty in every row are left out."""
    header = [n for n in dict.fromkeys(k for row in rows for k in row) if any(r.get(n) not in (None, "") for r in rows)]
    cells = [[_cell(row.get(name)) for name in header] for row in rows[:MOST_ROWS]]
    numeric = [all(_number(row[i]) for row in cells if row[i]) for i in range(len(header))]
    return Table(title, header, cells, numeric, max(0, len(rows) - MOST_ROWS))


def _number(text: str) -> bool:
    try:
        float(text.replace("\u2212", "-"))
    except ValueError:
        return False
    return True


def _cell(value: Any) -> str:
    """Four significant digits are what a reader wants; files have the rest."""
    if value is None or value == "":
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        if value.lstrip("-").isdigit() or not _number(value):
            return value
        value = float(value)
    if isinstance(value, int):
        return str(value)
    text = f"{value:.4g}"
    return text.replace("-", "\u2212")


@dataclass
class Section:
    result: Result
    pictures: list[Picture]
    tables: list[Table]


def sections(results: Iterable[Result], out: Path) -> list[Section]:
    """What there is to show of each result."""
    found = []
    for result in results:
        folder, done = out / result.experiment.name, result.status == "done"
        shown = (pictures(result.experiment, folder), tables(result.experiment, folder)) if done else ([], [])
        found.append(Section(result, *shown))
    return found


def environment() -> Any:
    """Jinja2 with everything escaped; UserError when it is not installed (torch brings it along)."""
    try:
        import jinja2
    except ImportError:
        raise UserError("the report's page needs Jinja2: pip install 'pdae_fast[experiments]'") from None
    return jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def write_page(path: Path, title: str, summary: dict[str, str], found: list[Section]) -> None:
    """The page, whole or not at all: one file that asks for no other. ``summary``: what stands on top, by name."""
    template = environment().from_string(TEMPLATE.read_text(encoding="utf-8"))
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    page = template.render(title=title, summary=summary, sections=found, version=__version__, written=written)
    make_folder(path.parent)
    with atomic_write(path, "w") as file:
        file.write(page)
