"""One HTML page about a model: the experiments' commands run one after another, and what they left, in one file."""

from __future__ import annotations

import argparse
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

from tqdm import tqdm

from .. import __version__, cli
from ..arguments import seed_option
from ..data.spec import add_crop
from ..engine import resolve_device, resolve_dtype
from ..engine.device import describe_device
from ..errors import UserError
from ..files import atomic_write, claim_folder, make_folder
from ..models import PDAE
from . import common
from .report_experiments import EXPERIMENTS, Experiment, choose

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
    if done.returncode in (130, 143):
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


# -- the command ---------------------------------------------------------------------------------------------------

PAGE = "index.html"
# What every command takes, and which of them only those that read labels.
PASSED = ("model", "device", "dtype", "batch_size", "seed", "on_error", "limit", "crop")
LABELS = ("attributes", "columns")


def _parser() -> argparse.ArgumentParser:
    p = cli.parser("report", "Run the experiments on a model and write one self-contained HTML page.")
    add = p.add_argument
    add("--model", default=cli.DEFAULT_MODEL, help="bundled name, saved directory or foreign checkpoint")
    add("--input", nargs="+", metavar="PATH", help="images and folders (default: the model's bundled data)")
    add("--out", default="report", help=f"folder for {PAGE} and the results of every experiment")
    add(
        "--only",
        nargs="+",
        metavar="NAME",
        help=f"of {', '.join(e.name for e in EXPERIMENTS)} (default: all but pareto)",
    )
    add("--quick", action="store_true", help="few images and few steps: to see that everything runs")
    add("--again", action="store_true", help="run experiments again that are finished")
    add("--limit", type=int, help="use only the first N images in every experiment (default: each command's own)")
    add("--attributes", metavar="FILE", help="labels: CelebA's attribute list, or a CSV file (see docs/data.md)")
    add("--columns", nargs="+", metavar="NAME", help="attributes to use (default: all of them)")
    add("--batch-size", type=int, help="images per network evaluation (default: chosen for the device)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    add("--dtype", default="auto", help="of the networks: auto, float32, bfloat16, float16")
    add("--seed", type=seed_option, default=0, help="seed of everything random")
    add("--on-error", choices=("skip", "fail"), default="skip", help="what a broken image does")
    add("--background", default="255,255,255", help="R,G,B that shows behind transparent images")
    add_crop(p)
    add("--quiet", action="store_true", help="no progress bar, no table")
    cli.add_foreign_options(p)
    return p


def main(argv: list[str] | None = None) -> None:
    p = _parser()
    args = p.parse_args(argv)
    chosen = choose(args.only)
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit must be at least 1, not {args.limit}")
    environment()
    # All mistakes that concern every experiment show here, before any of them runs.
    model = PDAE.from_pretrained(args.model, **cli.foreign_options(args))
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device, sum(q.numel() for q in model.parameters()))
    spec = common.data_spec(args, model)
    dataset = common.open_data(args, model, spec, "test")
    out = Path(args.out)
    if any(out.resolve().is_relative_to(Path(path).resolve()) for path in args.input or () if Path(path).is_dir()):
        raise UserError(f"--out {out} lies in --input, whose images every experiment reads; choose another --out")
    claim_folder(out)
    job = {
        "weights": common.fingerprint(model),
        "names": common.names_digest(dataset),
        "versions": cli.versions(),
        "device": describe_device(device),
    }
    results = []
    with tqdm(chosen, desc="report", unit="experiment", disable=args.quiet or None) as bar:
        for experiment in bar:
            bar.set_postfix_str(experiment.name)
            shared = _shared(p, args, experiment.labels)
            results.append(run(experiment, shared, out, job, args.quick, args.again))
            # The page grows with every experiment, so that a report that is interrupted shows what there is.
            summary = _about(args, model, spec, len(dataset), device, dtype, job)
            write_page(out / PAGE, f"pdae_fast report: {args.model}", summary, sections(results, out))
    if not args.quiet:
        rows = [[r.experiment.name, r.status + (", found finished" if not r.fresh else ""), r.reason] for r in results]
        print(cli.table(["experiment", "status", "reason"], rows, left=3))
        print(f"wrote {out / PAGE}")
    failed = [f"{r.experiment.name} ({r.reason})" for r in results if r.status == "failed"]
    if failed:
        raise UserError(f"failed, and shown so on the page: {', '.join(failed)}")


def _shared(p: argparse.ArgumentParser, args: argparse.Namespace, labels: bool) -> list[str]:
    """The options of ``args`` that were given, as a command takes them."""
    given: dict[str, Any] = {}
    for name in (*PASSED, "background", "input", *(LABELS if labels else ())):
        value = getattr(args, name)
        if name == "model" or value != p.get_default(name):
            given[name] = value
    given |= cli.foreign_options(args)
    words: list[str] = []
    for name, value in given.items():
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words += map(str, value) if isinstance(value, list) else [str(value)]
    return words


def _about(
    args: argparse.Namespace, model: PDAE, spec: list[str], images: int, device: Any, dtype: Any, job: dict[str, Any]
) -> dict[str, str]:
    config = model.config
    channels, size, _ = model.image_shape
    on_z = [
        text
        for has, text in (
            (config.latent is not None, "a latent DPM"),
            (bool(config.attributes), f"a classifier of {len(config.attributes)} attributes"),
            (config.latent_statistics, "the latents' statistics"),
        )
        if has
    ]
    parameters = sum(q.numel() for q in model.parameters()) / 1e6
    summary = {
        "model": f"{args.model} (weights {job['weights']})",
        "networks": f"{parameters:.1f} M parameters, images {channels} x {size} x {size}, z of {config.latent_dim}",
        "on z": " and ".join(on_z) or "nothing: experiments that need a latent DPM or a classifier are skipped",
        "data": f"{' '.join(spec)}, {images} images" + (f", the first {args.limit} used" if args.limit else ""),
        "device": f"{job['device']}, {str(dtype).removeprefix('torch.')}",
        "versions": ", ".join(f"{name} {value}" for name, value in job["versions"].items()),
        "extent": "quick: few images and few steps" if args.quick else "each command's own defaults",
        "command": _command(args),
    }
    if model.notes:
        summary["assumed"] = "; ".join(model.notes)
    return summary


def _command(args: argparse.Namespace) -> str:
    shared = _shared(_parser(), args, labels=True)
    flags = [f"--{name}" for name in ("quick",) if getattr(args, name)]
    only = ["--only", *args.only] if args.only else []
    return "python -m pdae_fast.report " + shlex.join([*shared, *flags, *only, "--out", args.out])
