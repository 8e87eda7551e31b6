"""`python -m pdae_fast.demo`: load a model and serve the page."""

from __future__ import annotations

import argparse
import errno
import ipaddress
import socket
from pathlib import Path
from typing import Any

from .. import cli
from ..data import open_dataset
from ..data.bundled import bundled_for
from ..data.spec import add_crop, crop_for
from ..engine.device import note_slow_dtype
from ..errors import UserError
from ..models import load_model
from ..pipeline import Pipeline

DEFAULT_MODEL = "avatars64"
OPENING = {"avatars64": (10, 15), "fashion32": (13, 2)}  # bundled images that show the first slider, and a path, well
MOST_CONNECTIONS = 64


def parser() -> argparse.ArgumentParser:
    p = cli.parser("demo", "A page with sliders, for a browser on this machine.")
    add = p.add_argument
    add("--model", default=DEFAULT_MODEL, help="bundled name, saved directory or foreign checkpoint")
    add("--input", nargs="+", metavar="PATH", help="images and folders on offer (default: the bundled images)")
    add_crop(p)
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets other machines in, without a password")
    add("--port", type=int, default=7860, help="0: any that is free")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    add("--dtype", default="auto", help="of the networks: auto, float32, bfloat16 or float16")
    add("--label", type=int, help="class of all images, for a class-conditional model")
    cli.add_foreign_options(p)
    return p


def workbench(args: argparse.Namespace) -> Any:
    """The Workbench that the command line asks for."""
    from .workbench import Workbench

    model = load_model(args.model, **cli.foreign_options(args))
    pipe = Pipeline(model, "fast", args.device, args.dtype, label=args.label, consume=True)
    channels, size, _ = model.image_shape
    spec = args.input or [bundled_for(str(args.model), channels)]
    dataset = open_dataset(spec, size, channels, split="test", crop=crop_for(args.crop, model.config))
    note_slow_dtype(pipe.dtype, pipe.device)
    opening = (0, 1) if args.input else OPENING.get(str(args.model), (0, 1))
    return Workbench(pipe, dataset, Path(str(args.model)).name or "model", opening)


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError:
        raise UserError("the page needs starlette and uvicorn: pip install 'pdae_fast[demo]'") from None
    from .app import application, warm_up
    from .turns import Turns

    def ready() -> Any:
        bench = workbench(args)
        warm_up(bench)
        return bench

    with listen(args.host, args.port) as listener:
        turns = Turns()
        bench = turns.first(ready)
        port = listener.getsockname()[1]
        host = f"[{args.host}]" if ":" in args.host else args.host
        alone = is_loopback(args.host)
        print(f"model {bench.name}; open http://{host}:{port} in a browser, end with Ctrl-C", flush=True)
        app = application(bench, [*LOOPBACK, host] if alone else ["*"], turns)
        bounds = {"limit_concurrency": MOST_CONNECTIONS, "timeout_graceful_shutdown": 2}
        config = uvicorn.Config(app, log_level="warning", server_header=False, **bounds)
        uvicorn.Server(config).run(sockets=[listener])


LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, before anything is loaded; UserError where the system refuses."""
    if not 0 <= port <= 65535:
        raise UserError(f"--port must be between 0 and 65535, not {port}")
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        why = "is in use; choose another with --port" if error.errno == errno.EADDRINUSE else f"({error.strerror})"
        raise UserError(f"cannot listen on {host}, port {port}: {why}") from None
