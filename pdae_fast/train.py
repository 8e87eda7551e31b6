"""Train: `python -m pdae_fast.train TASK`, from prior to student (--help lists them); `train curves` plots the runs."""

import sys

from . import cli
from .training.command import main

if __name__ == "__main__":
    sys.exit(cli.run(main))
