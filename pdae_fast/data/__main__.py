"""Data that is made rather than found: `python -m pdae_fast.data avatars --out DIR --count N --size 64`."""

from __future__ import annotations

import argparse
import os
import sys

from pdae_fast import cli
from pdae_fast.arguments import seed_option
from pdae_fast.data.avatars import make_avatars
from pdae_fast.files import claim_folder


def main(argv: list[str] | None = None) -> None:
    p = cli.parser("data", "Make data sets.")
    commands = p.add_subparsers(dest="command", required=True, metavar="avatars")
    text = "Draw avatars with exact attributes, part masks, landmarks and pairs. They are drawings, not photographs."
    add = commands.add_parser(
        "avatars", help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    ).add_argument
    add(
        "--out",
        required=True,
        metavar="DIR",
        default=argparse.SUPPRESS,
        help="folder for the data set; drawn images in it are kept",
    )
    add("--count", required=True, type=int, metavar="N", default=argparse.SUPPRESS, help="images")
    add("--size", type=int, default=64, help="pixels, both ways")
    add("--seed", type=seed_option, default=0, help="seed of everything random")
    add("--pairs", type=int, default=0, metavar="M", help="pairs of images that differ in one attribute")
    add("--workers", type=int, default=_processors(), help="processes that draw; the result is the same")
    add("--quiet", action="store_true", help="no progress bar, no summary")
    args = p.parse_args(argv)
    claim_folder(args.out)
    report = make_avatars(args.out, args.count, args.size, args.seed, args.pairs, args.workers, args.quiet)
    if not args.quiet:
        print(f"{args.out}: {report.drawn} images drawn, {report.kept} were there")


def _processors() -> int:
    """Processors this process may use; more than 8 only wait for the disk."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, usable)


if __name__ == "__main__":
    sys.exit(cli.run(main))
