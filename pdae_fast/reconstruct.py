"""Reconstruct images: `python -m pdae_fast.reconstruct --steps 100`."""

import sys

from . import cli
from .experiments.reconstruct import main

if __name__ == "__main__":
    sys.exit(cli.run(main))
