"""Quality against evaluations and seconds for many settings: `python -m pdae_fast.pareto`."""

import sys

from . import cli
from .experiments.pareto import main

if __name__ == "__main__":
    sys.exit(cli.run(main))
