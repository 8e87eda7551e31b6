"""Sample a class from a few labels: `python -m pdae_fast.few_shot --name Bag --positives 50`."""

import sys

from . import cli
from .experiments.few_shot import main

if __name__ == "__main__":
    sys.exit(cli.run(main))
