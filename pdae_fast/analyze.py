"""The paper's analyses: `python -m pdae_fast.analyze gap | one-step | shift | loss | critical-stage | inversion`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NamedTuple

from . import cli
from .experiments import common
from .experiments.analyze import critical_stage_command as critical_stage
from .experiments.analyze import inversion_command
from .experiments.analyze import over_time_command as over_time


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    about = "\n".join(f"  {name:15} {kind.about}" for name, kind in KINDS.items())
    p = cli.parser("analyze", f"The paper's analyses; each has its own --help.\n\n{about}")
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("kind", choices=list(KINDS), metavar="KIND", help=f"one of {', '.join(KINDS)}")
    name = p.parse_args(argv[:1]).kind
    kind = KINDS[name]
    p = cli.parser(f"analyze {name}", kind.about)
    common.add_options(p, out=f"analysis/{name}", labels=kind.labels)
    kind.options(p)
    kind.run(common.parse(p, argv[1:]))


class _Kind(NamedTuple):
    about: str
    options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]
    labels: bool = False


KINDS = {
    "gap": _Kind("Posterior-mean gap at every t, with and without the shift.", over_time.time_options, over_time.gap),
    "one-step": _Kind(
        "x0 estimated from x_t in one step, with and without G.", over_time.picture_options, over_time.one_step
    ),
    "shift": _Kind("G along t: pictures, its size, its direction.", over_time.picture_options, over_time.shift_along_t),
    "loss": _Kind(
        "Loss of the predicted noise at every t, unconditional and conditional.", over_time.time_options, over_time.loss
    ),
    "critical-stage": _Kind(
        "Where in t guidance decides what the image shows.", critical_stage.options, critical_stage.run_command, True
    ),
    "inversion": _Kind(
        "Whether an inferred x_T is still noise, and still interpolates.",
        inversion_command.options,
        inversion_command.run_command,
    ),
}

if __name__ == "__main__":
    sys.exit(cli.run(main))
