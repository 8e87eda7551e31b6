"""What every command shares: options, one-line errors with exit status 2, reports."""

from __future__ import annotations

import argparse
import errno
import json
import math
import os
import platform
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .arguments import ImageRangeWarning, seed_option
from .errors import UserError
from .files import atomic_write, claims

DEFAULT_MODEL = "fashion32"
# What a user's machine may say to any write; the rest of OSError would be a defect here and keeps its traceback.
SYSTEM_REFUSES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # argparse prints its whole usage first; users asked for one line
        print(f"error: {message} (see --help)", file=sys.stderr)
        raise SystemExit(2)


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default where there is one that the help does not state itself."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        stated = action.default in (None, False) or "(default:" in (action.help or "")
        return action.help if stated else super()._get_help_string(action)


def parser(module: str, description: str, **options: Any) -> argparse.ArgumentParser:
    """``options``: as of ArgumentParser; ``conflict_handler="resolve"`` lets a command give a shared option anew."""
    return _Parser(
        prog=f"python -m pdae_fast.{module}",
        description=description,
        formatter_class=_Help,
        **options,
    )


def add_foreign_options(p: argparse.ArgumentParser) -> None:
    """Settings that a foreign checkpoint does not carry."""
    group = p.add_argument_group(
        "foreign checkpoints", "what the weights do not tell; for a saved model they must agree with its config.json"
    )
    add = group.add_argument
    add("--config", metavar="YAML", default=argparse.SUPPRESS, help="the configuration the checkpoint came with")
    add("--encoder", metavar="FILE", default=argparse.SUPPRESS, help="a second file that holds the encoder")
    add(
        "--image-size",
        type=int,
        default=argparse.SUPPRESS,
        help="side of a prior's images (else from --config, else deduced)",
    )
    add("--num-heads", type=int, default=argparse.SUPPRESS, help="attention heads (else 1)")
    add(
        "--head-channel", "--num-head-channels", type=int, default=argparse.SUPPRESS, help="channels per attention head"
    )
    add(
        "--num-heads-upsample",
        type=int,
        default=argparse.SUPPRESS,
        help="heads on the way up (else as on the way down)",
    )
    switches = {
        "--use-new-attention-order": "qkv rows are ordered q, k, v first, then heads",
        "--rescale-timesteps": "the network is given t * 1000 / T",
        "--predict-xstart": "the network's output is x_0, not eps",
    }
    for name, meaning in switches.items():
        add(name, action="store_true", default=argparse.SUPPRESS, help=meaning)
    add(
        "--schedule",
        "--noise-schedule",
        choices=("linear", "cosine", "scaled_linear", "sigmoid"),
        default=argparse.SUPPRESS,
        help="noise schedule (else from --config, else linear)",
    )
    add(
        "--timesteps",
        "--diffusion-steps",
        type=int,
        default=argparse.SUPPRESS,
        help="length of the noise schedule (else from --config, else 1000)",
    )


FOREIGN = (
    "config",
    "encoder",
    "image_size",
    "num_heads",
    "head_channel",
    "num_heads_upsample",
    "use_new_attention_order",
    "rescale_timesteps",
    "predict_xstart",
    "schedule",
    "timesteps",
)


def foreign_options(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in FOREIGN if hasattr(args, name)}


def add_run_options(p: argparse.ArgumentParser, out: str) -> None:
    """The options that all commands which run a model have."""
    p.add_argument("--model", default=DEFAULT_MODEL, help="bundled name, saved directory or foreign checkpoint")
    p.add_argument("--input", nargs="+", metavar="PATH", help="images and folders (default: the bundled images)")
    p.add_argument("--out", default=out, help="directory for the results")
    p.add_argument("--batch-size", type=int, help="images per network evaluation (default: chosen for the device)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    p.add_argument(
        "--dtype",
        default="auto",
        help="of the networks: float32, bfloat16, float16; auto is bfloat16 for large ones where the device has it",
    )
    p.add_argument("--plan", default="auto", help="how the networks run: auto, fused or eager")
    p.add_argument("--attention", default="auto", help="auto, sdpa or xformers")
    p.add_argument("--large-tiles", action="store_true", help="approximate bfloat16 convolutions on the CPU: faster")
    p.add_argument("--fp8", metavar="FILE", help="round convolutions to fp8, by the scales of calibrate: emulated")
    p.add_argument("--label", type=int, help="class of all images, for a class-conditional model")
    p.add_argument("--seed", type=seed_option, default=0, help="seed of everything random")
    p.add_argument("--quiet", action="store_true", help="no progress bar, no table")
    add_foreign_options(p)


class _Terminated(KeyboardInterrupt):
    """SIGTERM; who cleans up after an interruption cleans up after it too."""


def run(main: Callable[[list[str] | None], None], argv: list[str] | None = None) -> int:
    """Call ``main``; a user's mistake becomes one line and status 2, and what ends it from outside what shells expect:
    130 for an interruption, 143 for SIGTERM, 141 where nobody reads what is printed."""

    def terminate(number: int, frame: object) -> None:
        raise _Terminated

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        try:
            with claims(), warnings.catch_warnings():
                # Commands read their images from files, and know their range.
                warnings.simplefilter("ignore", ImageRangeWarning)
                # A broken image is counted and named; what libraries think of the others, a user can do nothing about.
                for library in ("PIL", r"torch\.distributed", r"torch\.nn\.parallel", r"torch\.autograd\.graph"):
                    warnings.filterwarnings("ignore", module=library)
                main(argv)
            sys.stdout.flush()
        finally:
            # How it ended is told whole: torchrun ends every process of a job when one has failed.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes once more when it ends
        return 141
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in SYSTEM_REFUSES:
            raise
        print(f"error: {error.filename or 'standard output'}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as reason:
        print("interrupted; files written so far are complete", file=sys.stderr)
        return 143 if isinstance(reason, _Terminated) else 130
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0


def versions() -> dict[str, str]:
    import numpy
    import torch

    from . import __version__

    return {
        "pdae_fast": __version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }


def finite(value: Any) -> Any:
    """``value`` with every NaN or infinity replaced by None, which is what JSON can hold."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, values: dict[str, Any]) -> None:
    with atomic_write(path, "w") as file:
        file.write(json.dumps(finite(values), indent=2, allow_nan=False) + "\n")


def table(header: list[str], rows: list[list[str]], left: int = 1) -> str:
    """Plain text columns: the first ``left`` of them flush left, the others flush right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in [header, *rows]
    ]
    return "\n".join(line.rstrip() for line in lines)
