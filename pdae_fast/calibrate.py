"""Find the scales of fp8: `python -m pdae_fast.calibrate --model MODEL --input photos/ --out calibration`."""

import sys

from . import cli
from .experiments.calibrate import main

if __name__ == "__main__":
    sys.exit(cli.run(main))
