"""python -m pdae_fast.export {onnx,tensorrt,serving}: see `python -m pdae_fast.export onnx --help`."""

from __future__ import annotations

import importlib
import sys

from .. import cli

# Each module has DESCRIPTION, add_arguments(parser) and main(args), and is imported when it is chosen.
COMMANDS = {
    "onnx": (".onnx", "ONNX graphs of a model, checked against it"),
    "tensorrt": (".tensorrt.command", "TensorRT engines from exported ONNX graphs"),
    "serving": (".serving.command", "a model repository for an inference server from exported graphs"),
}


def _usage() -> str:
    lines = ["usage: python -m pdae_fast.export COMMAND [options]", ""]
    lines += [f"  {name:10} {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join([*lines, "", "python -m pdae_fast.export COMMAND --help lists the options of one."])


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in ("-h", "--help"):
        print(_usage())
        return
    if not argv or argv[0] not in COMMANDS:
        given = f"unknown command {argv[0]!r}" if argv else "no command"
        cli.parser("export", "").error(f"{given}; expected {', '.join(COMMANDS)}")
    command = importlib.import_module(COMMANDS[argv[0]][0], __package__)
    parser = cli.parser(f"export {argv[0]}", command.DESCRIPTION)
    command.add_arguments(parser)
    command.main(parser.parse_args(argv[1:]))


if __name__ == "__main__":
    sys.exit(cli.run(main))
