"""Train: `python -m pdae_fast.train prior | encoder | pdae | latent | classifier | student | recognise`; `train curves` plots."""

import sys

from . import cli
from .training.command import main

if __name__ == "__main__":
    sys.exit(cli.run(main))
