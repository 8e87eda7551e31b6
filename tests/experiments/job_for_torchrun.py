"""What test_journal runs under torchrun as SCRIPT OUT RUN: a job of eleven images; process 1 dies at its second block
while OUT/kill is there."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

from pdae_fast import cli
from pdae_fast.data import Sample
from pdae_fast.experiments.journal import Journal
from pdae_fast.processes import processes


class Images:
    names = [f"image-{i}" for i in range(11)]

    def __len__(self):
        return 11

    def __getitem__(self, i):
        return Sample(torch.full((1, 2, 2), float(i)), self.names[i], None)


def main(argv):
    out = Path(sys.argv[1])
    with processes() as group:
        job = Journal(out, {}, 11, 2, group)
        own = job.missing()

        def work(block):
            if group.rank == 1 and block.number != own[0] and (out / "kill").exists():
                (out / "kill").unlink()
                os.kill(os.getpid(), signal.SIGKILL)
            while group.rank == 0 and (out / "kill").exists() and block.number != own[0]:
                time.sleep(0.02)  # so that this process has work left, and waits for none, when the other dies
            return {"sums": block.images.sum(dim=(1, 2, 3)).tolist(), "run": sys.argv[2]}, {}

        job.run(Images(), work)
        if group.first:
            entries = list(job.entries())
            result = {"indices": [i for e in entries for i in e.indices]}
            result["sums"] = [s for e in entries for s in e.values["sums"]]
            result["runs"] = [e.values["run"] for e in entries]
            (out / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    sys.exit(cli.run(main))
