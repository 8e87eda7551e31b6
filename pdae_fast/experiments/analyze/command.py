"""`python -m pdae_fast.analyze KIND`: the analyses by name."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NamedTuple

from ... import cli
from .. import common
from . import critical_stage, inversion, shift


class _Kind(NamedTuple):
    about: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    command: Callable[[argparse.Namespace], None]
    labels: bool = False


KINDS = {
    "gap": _Kind("Posterior-mean gap at every t, with and without the shift.", shift.add_times, shift.gap_command),
    "one-step": _Kind(
        "x0 estimated from x_t in one step, with and without G.", shift.add_pictures, shift.one_step_command
    ),
    "shift": _Kind("G along t: pictures, its size, its direction.", shift.add_pictures, shift.shift_command),
    "loss": _Kind(
        "Loss of the predicted noise at every t, unconditional and conditional.", shift.add_times, shift.loss_command
    ),
    "critical-stage": _Kind(
        "Where in t guidance decides what the image shows.", critical_stage.add_arguments, critical_stage.command, True
    ),
    "inversion": _Kind(
        "Whether an inferred x_T is still noise, and still interpolates.",
        inversion.add_arguments,
        inversion.command,
    ),
}


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
    kind.add_arguments(p)
    kind.command(p.parse_args(argv[1:]))
