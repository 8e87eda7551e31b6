"""Encode images to latents in a file: `python -m pdae_fast.encode --input photos/ --out latents`."""

import sys

from . import cli
from .experiments.encode import main

if __name__ == "__main__":
    sys.exit(cli.run(main))
