"""The paper's analyses: `python -m pdae_fast.analyze gap | one-step | shift | loss | critical-stage | inversion`."""

import sys

from . import cli
from .experiments.analyze.command import main

if __name__ == "__main__":
    sys.exit(cli.run(main))
