"""What all experiments share: options, the model with its pipeline and data, labels, cost, the report."""

from __future__ import annotations

import argparse
import copy
import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .. import cli
from .. import config as configs
from ..data import Batch, collate, open_dataset
from ..data.bundled import bundled_for
from ..engine.cost import equivalents
from ..engine.device import describe_device
from ..errors import UserError
from ..models import PDAE
from ..pipeline import PRESETS, Pipeline

MODES = {
    "inferred": "inferred x_T",
    "random": "random x_T",
    "prior": "random x_T without G",
}
Broken = Sequence[tuple[str, str]]  # names of images that could not be read, with the reasons

# -- options -------------------------------------------------------------------------------------------------------


def add_options(p: argparse.ArgumentParser, out: str, labels: bool = False) -> None:
    """Every option of a command that runs a model on images; ``labels``: those that say what is in the images too."""
    cli.add_run_options(p, out)
    p.add_argument(
        "--iterations",
        type=int,
        default=0,
        help="evaluations that solve each step of the decoder when x_T is inferred; 0: DDIM upward, as published",
    )
    p.add_argument(
        "--preset",
        choices=list(PRESETS),
        help="values for --steps, --spacing, --iterations and --solver; an option given beside it overrides its value",
    )
    p.add_argument("--on-error", choices=("skip", "fail"), default="skip", help="what a broken image does")
    p.add_argument("--background", default="255,255,255", help="R,G,B that shows behind transparent images")
    p.add_argument("--limit", type=int, help="use only the first N images")
    if labels:
        p.add_argument("--attributes", metavar="FILE", help="CelebA's attribute list, or a CSV file (see docs/data.md)")
        p.add_argument("--columns", nargs="+", metavar="NAME", help="attributes to use (default: all of them)")


def parse(p: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The arguments, with the values of --preset where nothing else was given."""
    args = p.parse_args(argv)
    if args.preset:
        p.set_defaults(**PRESETS[args.preset])
        args = p.parse_args(argv)
    return args


# -- one run -------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What a command works with. ``spec`` is the data as it was named; ``encode_steps`` go up to infer x_T."""

    args: argparse.Namespace
    model: PDAE
    pipe: Pipeline
    dataset: Any
    spec: list[str]
    encode_steps: int

    @property
    def out(self) -> Path:
        return Path(self.args.out)


def open_run(
    args: argparse.Namespace,
    *,
    default_input: Sequence[str | os.PathLike] | None = None,
    default_limit: int | None = None,
    split: str = "test",
) -> Run:
    """Load the model, build its pipeline and open the data that ``args`` (of `add_options`) name.

    Without --input the bundled data of the model is used, at most ``default_limit`` images of it, or
    ``default_input``. Nothing is written. Raises UserError for everything a user can get wrong.
    """
    model = PDAE.from_pretrained(args.model, **cli.foreign_options(args))
    pipe = build_pipeline(model, args)
    encode_steps = args.steps if args.encode_steps is None else args.encode_steps
    if (args.iterations or args.solver == "belm") and encode_steps != args.steps:
        raise UserError("--iterations and --solver belm infer x_T by the steps that decode; leave out --encode-steps")
    pipe.schedule.timesteps(encode_steps, args.spacing)
    spec = data_spec(args, model, default_input)
    dataset = open_data(args, model, spec, split)
    limit = args.limit
    if limit is None and not args.input and default_limit is not None and len(dataset) > default_limit:
        limit = default_limit
    if limit is not None and limit < 1:
        raise UserError(f"--limit must be at least 1, not {limit}")
    return Run(args, model, pipe, limited(dataset, limit), spec, encode_steps)


def build_pipeline(model: PDAE, args: argparse.Namespace) -> Pipeline:
    """The one place where command-line options become arguments of Pipeline."""
    return Pipeline(
        model,
        args.steps,
        args.device,
        args.dtype,
        args.batch_size,
        plan=args.plan,
        attention=args.attention,
        spacing=args.spacing,
        iterations=args.iterations,
        solver=args.solver,
        reuse=args.reuse,
        noise=args.noise,
    )


def variant(pipe: Pipeline, **settings: Any) -> Pipeline:
    """``pipe`` with other ``settings`` (steps, spacing, solver ...), sharing its plan, progress and counters.

    Building a pipeline anew would copy and rewrite the weights for every row of a table.
    """
    other = copy.copy(pipe)
    for name, value in settings.items():
        if not hasattr(pipe, name):
            raise ValueError(f"a Pipeline has no setting {name!r}")
        setattr(other, name, value)
    other.check_settings()
    return other


def data_spec(args: argparse.Namespace, model: PDAE, default: Sequence[str | os.PathLike] | None = None) -> list[str]:
    chosen = args.input or default or [bundled_for(str(args.model), model.image_shape[0])]
    return [os.fspath(path) for path in chosen]


def open_data(args: argparse.Namespace, model: PDAE, spec: Sequence[str], split: str) -> Any:
    """The images of ``spec`` in the shape that ``model`` takes, unlimited."""
    channels, size, _ = model.image_shape
    return open_dataset(spec, size, channels, split=split, background=_colour(args.background))


def limited(dataset: Any, limit: int | None) -> Any:
    """The first ``limit`` images of ``dataset``; None: all."""
    return dataset if limit is None else Subset(dataset, range(min(limit, len(dataset))))


def _colour(text: str) -> tuple[int, ...]:
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != 3 or not all(0 <= v <= 255 for v in values):
        raise UserError(f"--background {text!r} is not a colour; expected R,G,B with values 0 to 255")
    return values


class Subset:
    """Some images of a data set, in the order of ``indices``; itself a data set."""

    def __init__(self, dataset: Any, indices: Sequence[int]) -> None:
        self.dataset, self.indices = dataset, indices
        self.names = [dataset.names[i] for i in indices]
        labels = getattr(dataset, "labels", None)
        self.labels = None if labels is None else labels[list(indices)]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[self.indices[index]]


def load(dataset: Any, indices: Sequence[int]) -> Batch:
    """These images as one Batch; a broken one raises BrokenImage."""
    return collate([dataset[int(i)] for i in indices])


# -- running -------------------------------------------------------------------------------------------------------


def autoencode(
    pipe: Pipeline, mode: str, x0: Tensor, indices: Sequence[int], encode_steps: int | None, seed: int
) -> Tensor:
    """x0 [B, C, H, W] decoded again [B, C, H, W] in one of MODES; UserError when NaN or infinite values come out.

    ``indices``: the images' places in the data set, which choose their random x_T.
    """
    if mode == "inferred":
        x = pipe.reconstruct(x0, encode_steps)
    else:
        z = pipe.encode(x0) if mode == "random" else None
        x = pipe.decode(z, pipe.random_x_T(seed, indices))
    if not bool(torch.isfinite(x).all()):
        raise UserError(f"the {MODES[mode]} reconstruction holds NaN or infinite values; try --dtype float32")
    return x


def evaluations(pipe: Pipeline, mode: str, encode_steps: int | None) -> int:
    """Network evaluations (passes of the trunk) of one image in one of MODES."""
    down = len(pipe.schedule.timesteps(pipe.steps, pipe.spacing)) - 1
    if mode != "inferred":
        return down
    if pipe.solver == "belm":
        return (down + 2) + (down - 1)  # three find the first state above the image; a pair of states saves one
    if pipe.iterations:
        return down + 1 + pipe.iterations * down
    return down + len(pipe.schedule.timesteps(encode_steps or pipe.steps, pipe.spacing)) - 1


def check_finite(x: Tensor, subject: str) -> Tensor:
    """``x``; UserError when it holds NaN or infinite values. ``subject`` goes with "hold" or "holds"."""
    if not bool(torch.isfinite(x).all()):
        raise UserError(f"{subject} NaN or infinite values; try --dtype float32")
    return x


def decode_edits(pipe: Pipeline, codes: Tensor, x_T: Tensor) -> Tensor:
    """``codes`` [K B, D], K for each of B images (the first for all, then the next), decoded from x_T [B, ...]."""
    return pipe.decode(codes, x_T.repeat(len(codes) // len(x_T), *[1] * (x_T.ndim - 1)))


def whole_evaluations(pipe: Pipeline, evaluations: Mapping[str, int], images: int) -> float:
    """``evaluations`` of ``images`` images for one of them, in whole networks: ``reuse`` runs parts of it."""
    return equivalents(pipe.model, evaluations, pipe.plan.outer) / images


class Cost:
    """Network evaluations and seconds of everything that ran inside ``with cost.of(pipe):``."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.evaluations: Counter[str] = Counter()

    @contextmanager
    def of(self, pipe: Pipeline) -> Iterator[None]:
        before, start = pipe.evaluations, time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start
        for key, n in pipe.evaluations.items():
            self.evaluations[key] += n - before.get(key, 0)

    def values(self) -> dict[str, Any]:
        """For a journal; `add` takes it back."""
        return {"seconds": self.seconds, "evaluations": dict(self.evaluations)}

    def add(self, values: dict[str, Any]) -> None:
        self.seconds += values["seconds"]
        self.evaluations.update(values["evaluations"])

    def report(self, images: int) -> dict[str, Any]:
        """``seconds`` are those of all processes together, images per second those of one."""
        return {
            "network_evaluations_per_image": {k: round(n / images, 6) for k, n in self.evaluations.items()},
            "seconds": self.seconds,
            "images_per_second": images / self.seconds if self.seconds else None,
        }


@contextmanager
def progress(pipe: Pipeline, total: float, name: str, quiet: bool) -> Iterator[Callable[[int], Any]]:
    """A bar over ``total`` network evaluations (in images) of ``pipe``; `variant` pipelines made inside share it."""
    with tqdm(total=total, unit="eval", unit_scale=True, desc=name, disable=quiet or None) as bar:
        previous, pipe.progress = pipe.progress, bar.update
        try:
            yield bar.update
        finally:
            pipe.progress = previous


def fingerprint(model: PDAE) -> str:
    """16 hexadecimal digits of the configuration and every weight."""
    digest = hashlib.sha256(configs.dumps(model.config).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def names_digest(dataset: Any) -> str:
    """16 hexadecimal digits of the images' names and order."""
    return hashlib.sha256("\n".join(dataset.names).encode("utf-8", "replace")).hexdigest()[:16]


def file_digest(path: str | os.PathLike) -> str:
    """16 hexadecimal digits of a file's content."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return digest.hexdigest()[:16]


def job_settings(run: Run, **values: Any) -> dict[str, Any]:
    """What decides the results of ``run``, for a journal; ``values``: what else the command does."""
    args = run.args
    return {
        "model": str(args.model),
        "weights": fingerprint(run.model),
        "input": run.spec,
        "names": names_digest(run.dataset),
        "steps": args.steps,
        "encode_steps": run.encode_steps,
        "spacing": args.spacing,
        "iterations": args.iterations,
        "solver": args.solver,
        "reuse": str(run.pipe.reuse),
        "noise": run.pipe.noise,
        "seed": args.seed,
        "dtype": str(run.pipe.dtype).removeprefix("torch."),
        "plan": run.pipe.plan.name,
        "background": args.background,
        **values,
    }


def report(run: Run, broken: Broken | None = None, **values: Any) -> dict[str, Any]:
    """What every metrics.json starts with, then ``values``; ``broken``: the images that could not be read."""
    args, pipe = run.args, run.pipe
    return {
        "model": str(args.model),
        "assumed": list(run.model.notes),
        "input": run.spec,
        "images": len(run.dataset),
        "steps": args.steps,
        "encode_steps": run.encode_steps,
        "preset": args.preset,
        "spacing": args.spacing,
        "iterations": args.iterations,
        "solver": args.solver,
        "noise": pipe.noise,
        "seed": args.seed,
        "batch_size": pipe.batch_size,
        **pipe.plan.describe(),
        "device": describe_device(pipe.device),
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "versions": cli.versions(),
        **({} if broken is None else {"broken": named(broken)}),
        **values,
    }


def named(broken: Broken) -> list[dict[str, str]]:
    return [{"name": name, "reason": reason} for name, reason in broken]


# -- what commands print -------------------------------------------------------------------------------------------


def say(run: Run, summary: Sequence[str], files: Sequence[str], broken: Broken = ()) -> None:
    """The end of every command, unless --quiet: ``summary``, the images left out, what was assumed, and ``files``."""
    if run.args.quiet:
        return
    lines, names = list(summary), list(dict(broken))
    if names:
        lines.append(f"{len(names)} broken images skipped: {', '.join(names[:5])}")
    lines += [f"assumed about the model: {note}" for note in run.model.notes]
    *first, last = (str(run.out / name) for name in files)
    print("\n".join([*lines, f"wrote {', '.join(first)} and {last}" if first else f"wrote {last}"]))


def where(report: dict[str, Any]) -> str:
    """What computed the numbers of a `report`, in words."""
    return f"model {report['model']}, {report['plan']} plan, {report['dtype']}, {report['device']}"


def cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
