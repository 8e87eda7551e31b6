"""Reconstruct images: `python -m pdae_fast.reconstruct --steps 100`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from . import cli, metrics
from .data import open_dataset, save_grid, save_images, stream
from .engine.device import describe_device
from .errors import UserError
from .files import make_folder
from .models import PDAE
from .pipeline import PRESETS, Pipeline

MODES = {
    "inferred": "inferred x_T",
    "random": "random x_T",
    "prior": "random x_T without G",
}
METRICS = {"ssim": metrics.ssim, "psnr": metrics.psnr, "mse": metrics.mse}
GRID_IMAGES = 16
SAMPLES = Path(__file__).resolve().parent / "pretrained" / "samples"


class _Record:
    """Per-image quality and the cost of one mode."""

    def __init__(self) -> None:
        self.quality: dict[str, list[float]] = {name: [] for name in METRICS}
        self.seconds = 0.0
        self.evaluations: dict[str, int] = {}

    def add(self, x0: Tensor, x: Tensor) -> None:
        for name, function in METRICS.items():
            self.quality[name] += function(x0, x).tolist()

    def report(self, count: int) -> dict[str, Any]:
        return {
            "mean": {name: fmean(values) for name, values in self.quality.items()},
            "network_evaluations_per_image": {k: round(n / count, 6) for k, n in self.evaluations.items()},
            "seconds": self.seconds,
            "images_per_second": count / self.seconds,
        }


def _run_mode(pipe: Pipeline, mode: str, x0: Tensor, first: int, encode_steps: int, seed: int) -> Tensor:
    if mode == "inferred":
        return pipe.reconstruct(x0, encode_steps)
    z = pipe.encode(x0) if mode == "random" else None
    return pipe.decode(z, count=len(x0), seed=seed, first=first)


def reconstruct(
    pipe: Pipeline,
    batches: Iterable,
    modes: list[str],
    out: Path,
    encode_steps: int,
    seed: int = 0,
) -> tuple[dict[str, _Record], list[str]]:
    """Run ``modes`` over ``batches``, write images as they come, and at the end the grid; memory stays constant."""
    records = {mode: _Record() for mode in modes}
    names: list[str] = []
    shown: dict[str, list[Tensor]] = {key: [] for key in ("input", *modes)}
    for batch in batches:
        first = len(names)
        wanted = max(0, GRID_IMAGES - first)
        shown["input"].append(batch.images[:wanted])
        for mode in modes:
            record, before, start = records[mode], pipe.evaluations, time.perf_counter()
            x = _run_mode(pipe, mode, batch.images, first, encode_steps, seed)
            record.seconds += time.perf_counter() - start
            for key, n in pipe.evaluations.items():
                record.evaluations[key] = record.evaluations.get(key, 0) + n - before.get(key, 0)
            if not bool(torch.isfinite(x).all()):
                raise UserError(f"the {MODES[mode]} reconstruction holds NaN or infinite values; try --dtype float32")
            record.add(batch.images, x)
            save_images(x, out / "images" / mode, batch.names)
            shown[mode].append(x[:wanted])
        names += batch.names
    if names:
        rows = [torch.cat(shown[key]) for key in ("input", *modes)]
        save_grid(rows, out / "grid.png", ["input", *(MODES[mode] for mode in modes)])
    return records, names


def main(argv: list[str] | None = None) -> None:
    p = cli.parser("reconstruct", "Encode images to (z, x_T) and decode them again; report how close they come.")
    cli.add_run_options(p, out="reconstruction")
    p.add_argument(
        "--modes", nargs="+", choices=list(MODES), default=["inferred", "random"], help="what to decode from"
    )
    p.add_argument(
        "--iterations",
        type=int,
        default=0,
        help="evaluations that solve each step of the decoder when x_T is inferred; 0: DDIM upward, as published",
    )
    p.add_argument("--on-error", choices=("skip", "fail"), default="skip", help="what a broken image does")
    p.add_argument("--background", default="255,255,255", help="R,G,B that shows behind transparent images")
    p.add_argument("--limit", type=int, help="use only the first N images")
    p.add_argument(
        "--preset",
        choices=list(PRESETS),
        help="values for --steps, --spacing and --iterations; an option given beside it overrides its value",
    )
    args = p.parse_args(argv)
    if args.preset:
        p.set_defaults(**PRESETS[args.preset])
        args = p.parse_args(argv)
    model = PDAE.from_pretrained(args.model, **cli.foreign_options(args))
    out, modes = Path(args.out), list(dict.fromkeys(args.modes))
    pipe = Pipeline(
        model,
        args.steps,
        args.device,
        args.dtype,
        args.batch_size,
        plan=args.plan,
        attention=args.attention,
        spacing=args.spacing,
        iterations=args.iterations,
    )
    encode_steps = args.steps if args.encode_steps is None else args.encode_steps
    if args.iterations and encode_steps != args.steps:
        raise UserError("--iterations solves the steps that decode; leave out --encode-steps")
    points = {steps: len(pipe.schedule.timesteps(steps, args.spacing)) - 1 for steps in (args.steps, encode_steps)}
    up = 1 + args.iterations * points[args.steps] if args.iterations else points[encode_steps]
    channels, size, _ = model.image_shape
    dataset = open_dataset(args.input or [SAMPLES], size, channels, split="test", background=_colour(args.background))
    if args.limit is not None:
        if args.limit < 1:
            raise UserError(f"--limit must be at least 1, not {args.limit}")
        dataset = _Head(dataset, args.limit)
    make_folder(out)
    cost = sum(points[args.steps] + (up if mode == "inferred" else 0) for mode in modes)
    broken: list[tuple[str, str]] = []
    with tqdm(
        total=len(dataset) * cost, unit="eval", unit_scale=True, desc="reconstruct", disable=args.quiet or None
    ) as bar:
        pipe.progress = bar.update
        batches = stream(dataset, pipe.batch_size, args.on_error, broken)
        records, names = reconstruct(pipe, batches, modes, out, encode_steps, args.seed)
    if not names:
        raise UserError(f"none of the {len(broken)} images could be read; the first: {': '.join(broken[0])}")
    report = {
        "model": str(args.model),
        "assumed": list(model.notes),
        "images": len(names),
        "broken": [{"name": name, "reason": reason} for name, reason in broken],
        "steps": args.steps,
        "encode_steps": encode_steps,
        "preset": args.preset,
        "spacing": args.spacing,
        "iterations": args.iterations,
        "seed": args.seed,
        "batch_size": pipe.batch_size,
        **pipe.plan.describe(),
        "device": describe_device(pipe.device),
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "versions": cli.versions(),
        "modes": {mode: record.report(len(names)) for mode, record in records.items()},
        "per_image": [
            {"name": name, **{m: {k: v[i] for k, v in r.quality.items()} for m, r in records.items()}}
            for i, name in enumerate(names)
        ],
    }
    cli.write_json(out / "metrics.json", report)
    if not args.quiet:
        print(_summary(report, out))


def _trajectory(report: dict[str, Any]) -> str:
    if report["iterations"]:
        up = f"{report['steps']} steps solved by {report['iterations']} evaluations each"
    else:
        up = f"{report['encode_steps']} steps up"
    return f"{up} and {report['steps']} down, {report['spacing']} spacing"


def _summary(report: dict[str, Any], out: Path) -> str:
    rows = []
    for mode, values in report["modes"].items():
        mean = values["mean"]
        rows.append(
            [
                MODES[mode],
                f"{mean['ssim']:.4f}",
                f"{mean['psnr']:.2f}",
                f"{mean['mse']:.3e}",
                f"{values['network_evaluations_per_image']['trunk']:g}",
                f"{values['seconds']:.1f}",
                f"{values['images_per_second']:.3g}",
            ]
        )
    lines = [
        cli.table(["decoded from", "SSIM", "PSNR", "MSE", "evaluations", "seconds", "images/s"], rows),
        f"{report['images']} images, model {report['model']}, {_trajectory(report)}, {report['plan']} plan, "
        f"{report['dtype']}, {report['device']}",
    ]
    if report["broken"]:
        lines.append(
            f"{len(report['broken'])} broken images skipped: " + ", ".join(b["name"] for b in report["broken"][:5])
        )
    lines += [f"assumed about the model: {note}" for note in report["assumed"]]
    lines.append(f"wrote {out / 'grid.png'}, {out / 'images'} and {out / 'metrics.json'}")
    return "\n".join(lines)


def _colour(text: str) -> tuple[int, ...]:
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != 3 or not all(0 <= v <= 255 for v in values):
        raise UserError(f"--background {text!r} is not a colour; expected R,G,B with values 0 to 255")
    return values


class _Head:
    """The first ``count`` images of a data set."""

    def __init__(self, dataset: Any, count: int) -> None:
        self.dataset, self.names = dataset, dataset.names[:count]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]


if __name__ == "__main__":
    sys.exit(cli.run(main))
