"""What all experiments share: options, the model with its pipeline and data, labels, cost, the report."""

from __future__ import annotations

import argparse
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
from ..data import Batch, Subset, collate, open_dataset
from ..data.bundled import bundled_for
from ..data.spec import add_crop, crop_for
from ..engine.cost import equivalents
from ..engine.device import describe_device, note_slow_dtype
from ..errors import UserError
from ..models import PDAE, Autoencoder, Prior, load_model
from ..pipeline import Pipeline
from ..samplers import Recipe

MODES = {
    "inferred": "inferred x_T",
    "random": "random x_T",
    "prior": "random x_T without G",
}
NEED_G = ("prior", "trajectory")  # of the modes, and of the kinds of interpolation
Broken = Sequence[tuple[str, str]]  # names of images that could not be read, with the reasons

# -- options -------------------------------------------------------------------------------------------------------


def add_options(p: argparse.ArgumentParser, out: str, labels: bool = False) -> None:
    """Every option of a command that runs a model on images; ``labels``: those that say what is in the images too."""
    cli.add_run_options(p, out)
    Recipe.add_options(p)
    p.add_argument("--on-error", choices=("skip", "fail"), default="skip", help="what a broken image does")
    p.add_argument("--background", default="255,255,255", help="R,G,B that shows behind transparent images")
    add_crop(p)
    p.add_argument("--limit", type=int, help="use only the first N images")
    if labels:
        p.add_argument("--attributes", metavar="FILE", help="CelebA's attribute list, or a CSV file (see docs/data.md)")
        p.add_argument("--columns", nargs="+", metavar="NAME", help="attributes to use (default: all of them)")


# -- one run -------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What a command works with. ``weights``: fingerprint of the model, whose weights the pipeline takes; ``spec``: the
    data as it was named."""

    args: argparse.Namespace
    model: Autoencoder | Prior
    weights: str
    pipe: Pipeline
    dataset: Any
    spec: list[str]

    @property
    def out(self) -> Path:
        return Path(self.args.out)


def open_run(
    args: argparse.Namespace,
    *,
    default_input: Sequence[str | os.PathLike] | None = None,
    default_limit: int | None = None,
    split: str = "test",
    recipe: Recipe | None = None,
    infers: bool = True,
    prior: bool = False,
) -> Run:
    """Load the model, build its pipeline and open the data that ``args`` (of `add_options`) name.

    Without --input the bundled data of the model is used, at most ``default_limit`` images of it, or
    ``default_input``. ``recipe``: in place of the one that ``args`` name. ``infers``: whether x_T will be inferred,
    which not every recipe can. ``prior``: whether a prior alone will do. Nothing is written. Raises UserError for
    everything a user can get wrong.
    """
    recipe = Recipe.from_args(args) if recipe is None else recipe
    load = load_model if prior else Autoencoder.from_pretrained
    model = load(args.model, **cli.foreign_options(args))
    weights = fingerprint(model)
    options = {name: getattr(args, name) for name in ("plan", "attention", "large_tiles", "fp8", "label")}
    pipe = Pipeline(model, recipe, args.device, args.dtype, args.batch_size, consume=True, **options)
    if infers:
        recipe.up(pipe.schedule)
    spec = data_spec(args, model, default_input)
    dataset = open_data(args, model, spec, split)
    limit = args.limit
    if limit is None and not args.input and default_limit is not None and len(dataset) > default_limit:
        limit = default_limit
    if limit is not None and limit < 1:
        raise UserError(f"--limit must be at least 1, not {limit}")
    return Run(args, model, weights, pipe, limited(dataset, limit), spec)


def data_spec(
    args: argparse.Namespace, model: Autoencoder, default: Sequence[str | os.PathLike] | None = None
) -> list[str]:
    chosen = args.input or default or [bundled_for(str(args.model), model.image_shape[0])]
    return [os.fspath(path) for path in chosen]


def open_data(args: argparse.Namespace, model: Autoencoder, spec: Sequence[str], split: str) -> Any:
    """The images of ``spec`` in the shape that ``model`` takes, unlimited, but for those under --out."""
    channels, size, _ = model.image_shape
    crop = crop_for(args.crop, model.config)
    return open_dataset(
        spec, size, channels, split=split, background=_colour(args.background), crop=crop, without=args.out
    )


def check_g(model: Autoencoder, what: str) -> None:
    """UserError where ``what`` needs a prior and its G, and ``model`` has none."""
    if not isinstance(model, PDAE):
        raise UserError(f"{what} needs a prior and its G; expected a PDAE, not a Diff-AE, whose every block reads z")


def possible(model: Autoencoder, option: str, given: Sequence[str] | None, default: Sequence[str]) -> list[str]:
    """The different values of ``option`` that were given, or those of ``default`` that ``model`` can do."""
    if given is None:
        return [name for name in default if isinstance(model, PDAE) or name not in NEED_G]
    for name in given:
        if name in NEED_G:
            check_g(model, f"{option} {name}")
    return list(dict.fromkeys(given))


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


def load(dataset: Any, indices: Sequence[int]) -> Batch:
    """These images as one Batch; a broken one raises BrokenImage."""
    return collate([dataset[int(i)] for i in indices])


# -- running -------------------------------------------------------------------------------------------------------


def autoencode(pipe: Pipeline, mode: str, x0: Tensor, indices: Sequence[int], seed: int) -> Tensor:
    """x0 [B, C, H, W] decoded again [B, C, H, W] in one of MODES; UserError when NaN or infinite values come out.

    ``indices``: the images' places in the data set, which choose what is drawn for them.
    """
    if mode == "inferred":
        x = pipe.reconstruct(x0)
    else:
        z = pipe.encode(x0) if mode == "random" else None
        x = pipe.decode(z, seed=seed, indices=indices)
    return check_finite(x, f"the {MODES[mode]} reconstruction holds")


@dataclass(frozen=True)
class Case:
    """A row of a table: what is decoded, one of MODES, and by which recipe; ``preset``: the recipe's name, if any."""

    mode: str
    recipe: Recipe
    preset: str | None = None

    @property
    def label(self) -> str:
        recipe, steps = self.recipe, f"{self.recipe.steps}"
        if self.mode == "inferred":
            solved = f"x{recipe.iterations}" if recipe.iterations else ""
            steps = f"{recipe.steps_up}{solved}+{recipe.steps}"
        return f"{MODES[self.mode]}, {self.preset or steps}"

    def pipeline(self, pipe: Pipeline) -> Pipeline:
        """``pipe`` with this recipe, except for the kind of noise, which stays."""
        return pipe.with_recipe(self.recipe, noise=pipe.recipe.noise)

    def describe(self) -> dict[str, Any]:
        """For reports and journals; ``encode_steps`` is None where x_T is not inferred."""
        values = {"mode": self.mode, "preset": self.preset, **self.recipe.describe()}
        return values if self.mode == "inferred" else {**values, "encode_steps": None}


def evaluations(pipe: Pipeline, mode: str) -> int:
    """Network evaluations (passes of the trunk) of one image in one of MODES."""
    return pipe.recipe.evaluations(pipe.schedule, inferred=mode == "inferred")


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
    """A bar over ``total`` network evaluations (in images) of ``pipe``; `Pipeline.with_recipe` inside shares it. First
    a line where its dtype is slow."""
    if not quiet:
        note_slow_dtype(pipe.dtype, pipe.device)
    with tqdm(total=total, unit="eval", unit_scale=True, desc=name, disable=quiet or None) as bar:
        previous, pipe.progress = pipe.progress, bar.update
        try:
            yield bar.update
        finally:
            pipe.progress = previous


def fingerprint(model: Autoencoder | Prior) -> str:
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


def approximations(args: argparse.Namespace) -> dict[str, Any]:
    """Those that decide results beside the recipe's, for a journal; empty where there are none."""
    tiles = {"large_tiles": True} if args.large_tiles else {}
    return tiles if args.fp8 is None else {**tiles, "fp8": file_digest(args.fp8)}


def job_settings(run: Run, **values: Any) -> dict[str, Any]:
    """What decides the results of ``run``, for a journal; ``values``: what else the command does."""
    args = run.args
    return {
        "model": str(args.model),
        "weights": run.weights,
        "input": run.spec,
        "names": names_digest(run.dataset),
        **run.pipe.recipe.describe(),
        "noise": run.pipe.noise,
        "seed": args.seed,
        "dtype": str(run.pipe.dtype).removeprefix("torch."),
        "plan": run.pipe.plan.name,
        "background": args.background,
        "crop": args.crop or run.model.config.crop,
        **approximations(args),
        **values,
    }


def report(run: Run, broken: Broken | None = None, recipe: bool = True, **values: Any) -> dict[str, Any]:
    """What every metrics.json starts with, then ``values``; ``broken``: the images that could not be read; ``recipe``:
    whether it is what decided the results."""
    args, pipe = run.args, run.pipe
    return {
        "model": str(args.model),
        "assumed": list(run.model.notes),
        "input": run.spec,
        "crop": args.crop or run.model.config.crop,
        "images": len(run.dataset),
        **({"preset": args.preset, **pipe.recipe.describe()} if recipe else {}),
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
    """The end of every command, unless --quiet: ``summary``, the images left out, that fp8 ran, what was assumed, and
    ``files``."""
    if run.args.quiet:
        return
    lines, names = list(summary), list(dict(broken))
    if names:
        lines.append(f"{len(names)} broken images skipped: {', '.join(names[:5])}")
    if fp8 := run.pipe.plan.describe().get("fp8"):
        lines.append(f"approximate: fp8, {fp8}")
    lines += [f"assumed about the model: {note}" for note in run.model.notes]
    *first, last = (str(run.out / name) for name in files)
    print("\n".join([*lines, f"wrote {', '.join(first)} and {last}" if first else f"wrote {last}"]))


def where(report: dict[str, Any]) -> str:
    """What computed the numbers of a `report`, in words."""
    return f"model {report['model']}, {report['plan']} plan, {report['dtype']}, {report['device']}"


def cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
