"""Probe what is in z: `python -m pdae_fast.probe`."""

import sys

from . import cli
from .experiments.probe import main

if __name__ == "__main__":
    sys.exit(cli.run(main))
