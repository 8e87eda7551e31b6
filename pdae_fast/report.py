"""One page about a model: `python -m pdae_fast.report --model MODEL`."""

import sys

from . import cli
from .experiments.report import main

if __name__ == "__main__":
    sys.exit(cli.run(main))
