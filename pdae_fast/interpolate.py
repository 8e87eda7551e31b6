"""Interpolate between images: `python -m pdae_fast.interpolate --input a.png b.png`."""

import sys

from . import cli
from .experiments.interpolate import main

if __name__ == "__main__":
    sys.exit(cli.run(main))
