"""Evaluate an autoencoder: `python -m pdae_fast.evaluate --steps 10 100`."""

import sys

from . import cli
from .experiments.evaluate import main

if __name__ == "__main__":
    sys.exit(cli.run(main))
