"""One page about a model: `python -m pdae_fast.report --model MODEL`."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from . import cli
from .engine import resolve_device, resolve_dtype
from .engine.device import describe_device
from .errors import UserError
from .experiments import common
from .experiments.report import environment, run, sections, write_page
from .experiments.report_experiments import EXPERIMENTS, choose
from .files import make_folder
from .models import PDAE

PAGE = "index.html"
# What every command takes, and which of them only those that read labels.
PASSED = ("model", "device", "dtype", "batch_size", "seed", "on_error", "limit")
LABELS = ("attributes", "columns")


def _parser() -> argparse.ArgumentParser:
    p = cli.parser("report", "Run the experiments on a model and write one self-contained HTML page.")
    add = p.add_argument
    add("--model", default=cli.DEFAULT_MODEL, help="bundled name, saved directory or foreign checkpoint")
    add("--input", nargs="+", metavar="PATH", help="images and folders (default: the model's bundled data)")
    add("--out", default="report", help=f"folder for {PAGE} and the results of every experiment")
    add(
        "--only",
        nargs="+",
        metavar="NAME",
        help=f"of {', '.join(e.name for e in EXPERIMENTS)} (default: all but pareto)",
    )
    add("--quick", action="store_true", help="few images and few steps: to see that everything runs")
    add("--again", action="store_true", help="run experiments again that are finished")
    add("--limit", type=int, help="use only the first N images in every experiment (default: each command's own)")
    add("--attributes", metavar="FILE", help="labels: CelebA's attribute list, or a CSV file (see docs/data.md)")
    add("--columns", nargs="+", metavar="NAME", help="attributes to use (default: all of them)")
    add("--batch-size", type=int, help="images per network evaluation (default: chosen for the device)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    add("--dtype", default="auto", help="of the networks: auto, float32, bfloat16, float16")
    add("--seed", type=int, default=0, help="seed of everything random")
    add("--on-error", choices=("skip", "fail"), default="skip", help="what a broken image does")
    add("--background", default="255,255,255", help="R,G,B that shows behind transparent images")
    add("--quiet", action="store_true", help="no progress bar, no table")
    cli.add_foreign_options(p)
    return p


def main(argv: list[str] | None = None) -> None:
    p = _parser()
    args = p.parse_args(argv)
    chosen = choose(args.only)
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit must be at least 1, not {args.limit}")
    environment()
    # All mistakes that concern every experiment show here, before any of them runs.
    model = PDAE.from_pretrained(args.model, **cli.foreign_options(args))
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device, sum(q.numel() for q in model.parameters()))
    spec = common.data_spec(args, model)
    dataset = common.open_data(args, model, spec, "test")
    out = Path(args.out)
    make_folder(out)
    job = {
        "weights": common.fingerprint(model),
        "names": common.names_digest(dataset),
        "versions": cli.versions(),
        "device": describe_device(device),
    }
    results = []
    with tqdm(chosen, desc="report", unit="experiment", disable=args.quiet or None) as bar:
        for experiment in bar:
            bar.set_postfix_str(experiment.name)
            shared = _shared(p, args, experiment.labels)
            results.append(run(experiment, shared, out, job, args.quick, args.again))
            # The page grows with every experiment, so that a report that is interrupted shows what there is.
            summary = _summary(args, model, spec, len(dataset), device, dtype, job)
            write_page(out / PAGE, f"pdae_fast report: {args.model}", summary, sections(results, out))
    if not args.quiet:
        rows = [[r.experiment.name, r.status + (", found finished" if not r.fresh else ""), r.reason] for r in results]
        print(cli.table(["experiment", "status", "reason"], rows, left=3))
        print(f"wrote {out / PAGE}")
    failed = [f"{r.experiment.name} ({r.reason})" for r in results if r.status == "failed"]
    if failed:
        raise UserError(f"failed, and shown so on the page: {', '.join(failed)}")


def _shared(p: argparse.ArgumentParser, args: argparse.Namespace, labels: bool) -> list[str]:
    """The options of ``args`` that were given, as a command takes them."""
    given: dict[str, Any] = {}
    for name in (*PASSED, "background", "input", *(LABELS if labels else ())):
        value = getattr(args, name)
        if name == "model" or value != p.get_default(name):
            given[name] = value
    given |= cli.foreign_options(args)
    words: list[str] = []
    for name, value in given.items():
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words += map(str, value) if isinstance(value, list) else [str(value)]
    return words


def _summary(
    args: argparse.Namespace, model: PDAE, spec: list[str], images: int, device: Any, dtype: Any, job: dict[str, Any]
) -> dict[str, str]:
    config = model.config
    channels, size, _ = model.image_shape
    on_z = [
        text
        for has, text in (
            (config.latent is not None, "a latent DPM"),
            (bool(config.attributes), f"a classifier of {len(config.attributes)} attributes"),
            (config.latent_statistics, "the latents' statistics"),
        )
        if has
    ]
    parameters = sum(q.numel() for q in model.parameters()) / 1e6
    summary = {
        "model": f"{args.model} (weights {job['weights']})",
        "networks": f"{parameters:.1f} M parameters, images {channels} x {size} x {size}, z of {config.latent_dim}",
        "on z": " and ".join(on_z) or "nothing: experiments that need a latent DPM or a classifier are skipped",
        "data": f"{' '.join(spec)}, {images} images" + (f", the first {args.limit} used" if args.limit else ""),
        "device": f"{job['device']}, {str(dtype).removeprefix('torch.')}",
        "versions": ", ".join(f"{name} {value}" for name, value in job["versions"].items()),
        "extent": "quick: few images and few steps" if args.quick else "each command's own defaults",
        "command": _command(args),
    }
    if model.notes:
        summary["assumed"] = "; ".join(model.notes)
    return summary


def _command(args: argparse.Namespace) -> str:
    shared = _shared(_parser(), args, labels=True)
    flags = [f"--{name}" for name in ("quick",) if getattr(args, name)]
    only = ["--only", *args.only] if args.only else []
    return "python -m pdae_fast.report " + shlex.join([*shared, *flags, *only, "--out", args.out])


if __name__ == "__main__":
    sys.exit(cli.run(main))
