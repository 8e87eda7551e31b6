"""Sample new images: `python -m pdae_fast.sample --count 64`."""

import sys

from . import cli
from .experiments.sample import main

if __name__ == "__main__":
    sys.exit(cli.run(main))
