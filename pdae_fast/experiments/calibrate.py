"""What the convolutions of a model read while images are encoded and decoded: the scales of fp8."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import cli
from ..data import none_read, stream
from ..engine.float8 import calibration, watched
from ..errors import UserError
from ..files import claim_folder
from ..models import Autoencoder
from ..pipeline import Pipeline
from ..samplers import Recipe
from . import common

NAME = "fp8.json"
# Largest magnitudes: those of more images and steps exceed these by a few percent, and scales leave more room.
IMAGES, RECIPE = 8, "fast"


def calibrate(pipe: Pipeline, x0: Tensor, indices: Sequence[int], seed: int = 0) -> dict[str, float]:
    """The largest magnitude that each of `float8_layers` reads while x0 [B, C, H, W] is decoded from the inferred and
    from a random x_T; ``pipe`` runs the eager plan. UserError where one is NaN or infinite."""
    with watched(pipe.plan.unet) as largest:
        z = pipe.encode(x0) if isinstance(pipe.model, Autoencoder) else None
        pipe.decode(z, pipe.invert(x0, z))
        if z is not None:
            pipe.decode(z, seed=seed, indices=indices)
    common.check_finite(torch.tensor(list(largest.values())), "what the convolutions read holds")
    return largest


# -- the command ---------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    p = cli.parser("calibrate", "The scales of fp8, an approximation, for one model: what --fp8 takes.")
    common.add_options(p, out="calibration")
    p.set_defaults(plan="eager")
    return p


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    if args.plan != "eager" or args.fp8 is not None:
        raise UserError("calibrate watches the modules as they are; leave out --plan and --fp8")
    recipe = Recipe.of(args.preset or (None if Recipe.given(args) else RECIPE), **Recipe.given(args))
    run = common.open_run(args, default_limit=IMAGES, recipe=recipe, prior=True)
    claim_folder(run.out)
    pipe, broken, largest, done = run.pipe, [], {}, 0
    modes = ("inferred", "random") if isinstance(run.model, Autoencoder) else ("inferred",)
    total = len(run.dataset) * sum(common.evaluations(pipe, mode) for mode in modes)
    with common.progress(pipe, total, "calibrate", args.quiet):
        for batch in stream(run.dataset, pipe.batch_size, args.on_error, broken):
            indices = range(done, done + len(batch.images))
            for name, value in calibrate(pipe, batch.images, indices, args.seed).items():
                largest[name] = max(largest.get(name, 0.0), value)
            done += len(batch.images)
    if not done:
        raise none_read(broken)
    values = {**calibration(run.model, largest), "calibrated": common.report(run, broken, images=done)}
    cli.write_json(run.out / NAME, values)
    common.say(run, _summary(values), [NAME], broken)


def _summary(values: dict[str, Any]) -> list[str]:
    largest, about = values["largest"], values["calibrated"]
    first, last = (pick(largest, key=largest.get) for pick in (min, max))
    return [
        f"{len(largest)} convolutions read up to {largest[first]:.3g} ({first}) ... {largest[last]:.3g} ({last})",
        f"{about['images']} images of {' '.join(about['input'])}, {common.where(about)}",
    ]
