"""What distillation buys: `python -m pdae_fast.students --task points parts classes --seeds 5`."""

import sys

from . import cli
from .experiments.students import main

if __name__ == "__main__":
    sys.exit(cli.run(main))
