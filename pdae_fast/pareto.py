"""Quality against evaluations and seconds for many settings: `python -m pdae_fast.pareto`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import cli
from .errors import UserError
from .experiments import common, pareto
from .experiments.pareto_plot import draw
from .experiments.pareto_settings import SETS, Setting, select, settings
from .files import make_folder

DEFAULT_LIMIT = 64
# Options of add_run_options that a setting of the table decides.
DECIDED = ("steps", "encode_steps", "spacing", "iterations", "solver", "reuse", "preset")


def main(argv: list[str] | None = None) -> None:
    p = cli.parser(
        "pareto",
        "Compare settings by the error they leave and by what they cost. The same command continues a run that was "
        "stopped. --steps, --encode-steps, --spacing, --iterations, --solver and --reuse, where given, add a setting "
        "of your own to the table.",
    )
    common.add_options(p, out="pareto")
    p.add_argument("--set", dest="which", choices=SETS, default="quick", help="how many settings")
    p.add_argument("--only", metavar="PATTERN", help="settings of this family, or whose name holds or fits PATTERN")
    p.add_argument("--list", action="store_true", help="print the settings and what they would evaluate, run nothing")
    p.add_argument("--no-plot", action="store_true", help="draw nothing")
    args = common.parse(p, argv)
    table = select(settings(args.which), args.only) + _own(p, args)
    run = common.open_run(args, default_limit=DEFAULT_LIMIT)
    if args.list:
        print(_listing(run, table))
        return
    if not args.no_plot:
        _needs_matplotlib()
    make_folder(run.out)
    todo = pareto.remaining(run, table)
    each = [setting.evaluations(run.pipe, mode) + pareto.REFERENCE_STEPS for setting, mode in todo]
    broken: list[tuple[str, str]] = []
    with common.progress(run.pipe, sum(each) * len(run.dataset), "pareto", args.quiet):
        rows = pareto.sweep(run, table, broken=broken)
    if not args.no_plot:
        draw(run.out / "pareto.png", rows, _title(run, rows))
    if not args.quiet:
        print(_summary(run, rows, len(todo), broken, args.no_plot))


def _own(p: argparse.ArgumentParser, args: argparse.Namespace) -> list[Setting]:
    """The setting that the command line describes, if it says anything of one."""
    if all(getattr(args, name) == p.get_default(name) for name in DECIDED if name != "preset") and not args.preset:
        return []
    modes = ("inferred", "random")
    values = (args.steps, args.encode_steps, args.spacing, args.iterations, args.solver, args.reuse)
    return [Setting("yours", "preset", *values, modes=modes)]


def _needs_matplotlib() -> None:
    """Said before the work, not after it."""
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("the plot needs matplotlib: pip install 'pdae_fast[plot]' (or --no-plot)")


def _listing(run: common.Run, table: list[Setting]) -> str:
    rows, total = [], 0
    for setting, mode in pareto.wanted(table):
        evaluations = setting.evaluations(run.pipe, mode)
        total += evaluations
        rows.append([mode, setting.name, setting.family, str(evaluations)])
    head = cli.table(["x_T", "setting", "family", "evaluations"], rows, left=3)
    return f"{head}\n{len(rows)} rows, {total} evaluations an image, {total * len(run.dataset)} in all"


def _title(run: common.Run, rows: list[pareto.Row]) -> str:
    name = Path(str(run.args.model)).name
    dtype = str(run.pipe.dtype).removeprefix("torch.")
    return f"{name}, {rows[0]['images']} images, {dtype}, {run.pipe.plan.name} plan"


def _summary(run: common.Run, rows: list[pareto.Row], new: int, broken: list[tuple[str, str]], no_plot: bool) -> str:
    lines = [
        pareto.text(rows),
        f"* nothing is as cheap and better; {len(rows)} rows, {new} of them new, {rows[0]['images']} images; the unit "
        "of time is one plain evaluation of the whole network in the same batch",
    ]
    if broken:
        names = list(dict(broken))
        lines.append(f"{len(names)} broken images skipped: {', '.join(names[:5])}")
    files = ["pareto.csv", "metrics.json", *([] if no_plot else ["pareto.png"])]
    lines.append("wrote " + ", ".join(str(run.out / name) for name in files))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(cli.run(main))
