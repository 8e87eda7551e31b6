"""Edit attributes of images: `python -m pdae_fast.manipulate --attribute smiling --scales -0.3 0.3`."""

import sys

from . import cli
from .experiments.manipulate import main

if __name__ == "__main__":
    sys.exit(cli.run(main))
