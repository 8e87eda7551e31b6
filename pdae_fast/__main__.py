"""`python -m pdae_fast`: what the commands are."""

from __future__ import annotations

import sys

from . import cli
from .errors import UserError

COMMANDS = {
    "reconstruct": "encode images and decode them again; report how close they come",
    "encode": "write the latents of images to one file",
    "interpolate": "make images between images",
    "manipulate": "edit attributes of images",
    "demo": "serve a page with sliders for a browser",
    "sample": "sample new images",
    "few_shot": "sample a class of which only a few images are labelled",
    "evaluate": "measure reconstructions for several numbers of steps",
    "pareto": "compare quality with cost for many settings",
    "probe": "find out what the latents know: linear probes and nearest neighbours",
    "students": "find out what a small network gains from a model's features",
    "analyze": "repeat the paper's analyses of one model",
    "report": "run all experiments on a model and write one HTML page",
    "train": "train every part of a model",
    "calibrate": "find the scales of fp8, an approximation, for one model",
    "convert": "convert checkpoints of other projects",
    "data": "make a data set of avatars",
    "export": "export a model to ONNX, TensorRT or an inference server",
    "info": "show what this machine can run, and why not",
}


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    words = [word for word in argv if word not in ("-h", "--help")]
    if words and words[0] in COMMANDS:
        raise UserError(f"commands are modules: python -m pdae_fast.{words[0]}")
    if words:
        raise UserError(f"unknown command {words[0]!r}; there are {', '.join(COMMANDS)}")
    print("Commands, each with --help: python -m pdae_fast.COMMAND\n")
    print("\n".join(f"  {name:12} {what}" for name, what in COMMANDS.items()))


if __name__ == "__main__":
    sys.exit(cli.run(main))
