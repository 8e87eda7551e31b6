"""The page with sliders: `python -m pdae_fast.demo`."""

import sys

from .. import cli
from .command import main

if __name__ == "__main__":
    sys.exit(cli.run(main))
