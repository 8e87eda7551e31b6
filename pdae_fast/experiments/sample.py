"""New images from a latent DPM, and figures of their quality that need nothing downloaded."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import cli
from ..data import save_grid, save_images, stream
from ..errors import UserError
from ..files import claim_folder
from ..pipeline import Pipeline
from . import common, frechet
from .common import Cost
from .frechet import FeatureNetwork, FrechetDistance

REFERENCE_IMAGES = 2000
_PAIRS = 2**24  # distances at a time


class Samples(NamedTuple):
    """``images`` [B, C, H, W]: numbers ``first`` ... ``first + B - 1``."""

    first: int
    images: Tensor


def sample(
    pipe: Pipeline,
    count: int,
    *,
    stop_percent: float = 0.3,
    latent_steps: int | None = None,
    latent_clamp: bool | None = None,
    seed: int = 0,
) -> Iterator[Samples]:
    """``count`` images by `Pipeline.sample` in blocks; the same images however large the blocks are."""
    options = {"stop_percent": stop_percent, "latent_steps": latent_steps, "latent_clamp": latent_clamp, "seed": seed}
    return _blocks(pipe, count, lambda first, n: pipe.sample(n, first=first, **options))


def sample_prior(pipe: Pipeline, count: int, seed: int = 0) -> Iterator[Samples]:
    """The same by the prior alone, from the same x_T: no z, and G is not run."""
    return _blocks(pipe, count, lambda first, n: pipe.decode(count=n, seed=seed, indices=range(first, first + n)))


def _blocks(pipe: Pipeline, count: int, draw: Callable[[int, int], Tensor]) -> Iterator[Samples]:
    for first in range(0, count, pipe.batch_size):
        x = draw(first, min(pipe.batch_size, count - first))
        yield Samples(first, common.check_finite(x, "the sampled images hold"))


# -- the data they are compared with -------------------------------------------------------------------------------


class Reference(NamedTuple):
    """Images [M, C, H, W] that samples are compared with, and others [K, C, H, W] of the same data that are not among
    them: how far real images are from real images. ``how``: where they come from, in words."""

    images: Tensor
    control: Tensor
    how: str


def find_reference(run: common.Run, limit: int = REFERENCE_IMAGES) -> Reference:
    """Training images of the data of ``run`` against its test images; of data without a split every second image
    against the others. At most ``limit`` of each, spread over the data."""
    training = common.open_data(run.args, run.model, run.spec, "train")
    if training.names[:1] != run.dataset.names[:1]:
        images, control = (
            _spread(training, range(len(training)), limit),
            _spread(run.dataset, range(len(run.dataset)), limit),
        )
        return Reference(images, control, "training images, against the data's test images")
    count = len(run.dataset)
    if count < 4:
        raise UserError(f"samples are compared with at least 4 images; the input has {count}")
    images = _spread(run.dataset, range(0, count, 2), limit)
    control = _spread(run.dataset, range(1, count, 2), limit)
    return Reference(images, control, "every second image, against the others")


def _spread(dataset: Any, places: Sequence[int], limit: int) -> Tensor:
    if len(places) > limit:
        places = [places[i * len(places) // limit] for i in range(limit)]
    return common.load(dataset, places).images


# -- figures -------------------------------------------------------------------------------------------------------


def nearest(x: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Distance float64 [N] of each image of x [N, C, H, W] from the nearest of ``reference`` [M, C, H, W], and its
    place: root mean square difference of pixels on [0, 1], x clamped."""
    flat = reference.flatten(1).double() / 2
    found = [
        torch.cdist(part.clamp(-1, 1).flatten(1).double() / 2, flat).min(dim=1)
        for part in x.split(max(1, _PAIRS // max(1, len(flat))))
    ]
    distance = torch.cat([f.values for f in found]) / flat.shape[1] ** 0.5
    return distance, torch.cat([f.indices for f in found])


def diversity(x: Tensor) -> float | None:
    """Mean root mean square distance of two different images of x [N, C, H, W] (clamped), on [0, 1]; None for one."""
    flat = x.clamp(-1, 1).flatten(1).double() / 2
    return float(torch.pdist(flat).mean()) / flat.shape[1] ** 0.5 if len(x) > 1 else None


def figures(x: Tensor, reference: Reference, logits: tuple[Tensor, Tensor] | None = None) -> dict[str, Any]:
    """What is known about x [N, C, H, W] (samples, or ``reference.control``).

    "nearest": median distance from the nearest reference image; "nearest_smallest": the smallest, 0 for a copy;
    "diversity". With ``logits`` of a classifier for (x encoded again [N, n], the control images [K, n]): "entropy",
    mean entropy in bits of the n yes-or-no answers (low: the classifier is sure), and "rates_differ", the mean absolute
    difference of the shares of images that have each attribute.
    """
    distance, _ = nearest(x, reference.images)
    values: dict[str, Any] = {
        "nearest": float(distance.median()),
        "nearest_smallest": float(distance.min()),
        "diversity": diversity(x),
    }
    if logits is not None:
        own, control = logits
        values["entropy"] = float(entropy(own).mean())
        values["rates_differ"] = float(((own > 0).double().mean(0) - (control > 0).double().mean(0)).abs().mean())
    return values


def entropy(logits: Tensor) -> Tensor:
    """Entropy in bits of a yes-or-no answer with these logits, elementwise, float64."""
    p = logits.double().sigmoid()
    bits = torch.special.entr(p) + torch.special.entr(1 - p)
    return bits / torch.log(torch.tensor(2.0, dtype=torch.float64))


# -- the command ---------------------------------------------------------------------------------------------------

COLUMNS = 10  # of the grid
SHOWN = 40
KEPT = 1000  # samples that the figures are computed from
LABELS = {"latent": "latent DPM", "prior": "prior alone"}


def add_drawing_options(p: argparse.ArgumentParser) -> None:
    """How z is drawn from the latent DPM and decoded."""
    add = p.add_argument
    add("--stop-percent", type=float, default=0.3, help="last part of the trajectory that G is left out of, 0 to 1")
    add("--latent-steps", type=int, help="steps of the latent DPM (default: --steps; 200 for a Diff-AE)")
    add(
        "--latent-clamp",
        action=argparse.BooleanOptionalAction,
        help="clamp z_T and every estimate of z_0 to +-1 (default: for a PDAE, not for a Diff-AE)",
    )


def check_drawing(pipe: Pipeline, args: argparse.Namespace) -> dict[str, Any]:
    """The values of `add_drawing_options` for a report; UserError where they, or the model, cannot be used."""
    trajectory, clamp = pipe.latent_settings(args.latent_steps, args.latent_clamp)
    pipe.recipe.down(pipe.schedule, args.stop_percent)
    return {"stop_percent": args.stop_percent, "latent_steps": len(trajectory), "latent_clamp": clamp}


def _parser() -> argparse.ArgumentParser:
    p = cli.parser(
        "sample", "New images: z from the latent DPM, decoded from random x_T; --input is what they are compared with."
    )
    common.add_options(p, out="samples")
    add = p.add_argument
    add("--count", type=int, default=40, help="images to sample")
    add_drawing_options(p)
    add("--prior-only", action="store_true", help="also sample the prior alone from the same x_T, for comparison")
    frechet.add_options(p)
    return p


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    if args.count < 1:
        raise UserError(f"--count must be at least 1, not {args.count}")
    frechet.check_options(args)
    run = common.open_run(args, infers=False)
    pipe = run.pipe
    drawing = check_drawing(pipe, args)
    if args.prior_only:
        common.check_g(run.model, "--prior-only")
    reference = find_reference(run)
    features = _fid(run) if args.fid else None
    claim_folder(run.out)
    ways: dict[str, Callable[[], Iterator[Samples]]] = {
        "latent": lambda: sample(pipe, args.count, seed=args.seed, **drawing)
    }
    if args.prior_only:
        ways["prior"] = lambda: sample_prior(pipe, args.count, args.seed)
    total = len(ways) * args.count * common.evaluations(pipe, "random")
    rows: list[dict[str, Any]] = []
    shown: dict[str, Tensor] = {}
    classifier = run.model.classifier is not None and run.model.config.latent_statistics
    control = pipe.logits(pipe.encode(reference.control)) if classifier else None
    with common.progress(pipe, total, "sample", args.quiet):
        for name, way in ways.items():
            images, cost, pieces = _draw(run, name, way, features)
            logits = (pipe.logits(pipe.encode(images)), control) if classifier else None
            row = {"name": name, "images": args.count, **figures(images, reference, logits), **cost.report(args.count)}
            if features:
                row["fid"] = features[1](iter(pieces))
            rows.append(row)
            shown[name] = images
    data = figures(reference.control, reference, (control, control) if classifier else None)
    rows.append({"name": "data", "images": len(reference.control), **data})
    report = common.report(
        run,
        images=args.count,
        **drawing,
        reference={"images": len(reference.images), "control": len(reference.control), "how": reference.how},
        rows=rows,
    )
    if features:
        report["fid"] = {"reference": args.fid, "network": args.fid_network, "images": features[1].images}
        report["fid"]["network_digest"] = common.file_digest(args.fid_network)
    _grid(run.out / "grid.png", shown, reference)
    cli.write_json(run.out / "metrics.json", report)
    common.say(run, _summary(report), ["grid.png", "images", "metrics.json"])


def _fid(run: common.Run) -> tuple[FeatureNetwork, FrechetDistance]:
    """The network of --fid-network, and the distance from the images of --fid."""
    network = FeatureNetwork(run.args.fid_network, run.pipe.device)
    images = common.open_data(run.args, run.model, [run.args.fid], "test")
    batches = stream(images, run.pipe.batch_size, run.args.on_error, [])
    return network, FrechetDistance(network(batch.images).numpy() for batch in batches)


def _draw(
    run: common.Run, name: str, way: Callable[[], Iterator[Samples]], features: tuple | None
) -> tuple[Tensor, Cost, list[np.ndarray]]:
    """Every image written to OUT/images/NAME; the first KEPT of them, the cost, and all features."""
    kept, cost, pieces = [], Cost(), []
    with cost.of(run.pipe):
        for block in way():
            numbers = range(block.first, block.first + len(block.images))
            save_images(block.images, run.out / "images" / name, [f"{i:06d}" for i in numbers])
            if block.first < KEPT:
                kept.append(block.images)
            if features:
                pieces.append(features[0](block.images).numpy())
    return torch.cat(kept)[:KEPT], cost, pieces


def _grid(path: Path, shown: dict[str, Tensor], reference: Reference) -> None:
    rows, labels = [], []
    for name, images in shown.items():
        parts = images[:SHOWN].split(COLUMNS)
        rows += parts
        labels += [LABELS[name], *[""] * (len(parts) - 1)]
    first = shown["latent"][:COLUMNS]
    rows.append(reference.images[nearest(first, reference.images)[1]])
    labels.append("nearest data to the first row")
    save_grid(rows, path, labels)


def _summary(report: dict[str, Any]) -> list[str]:
    fields = {"nearest": ".4f", "nearest_smallest": ".4f", "diversity": ".4f"}
    titles = ["nearest data", "smallest", "diversity"]
    if "entropy" in report["rows"][0]:
        fields |= {"entropy": ".4f", "rates_differ": ".4f"}
        titles += ["entropy", "rates differ"]
    if "fid" in report:
        fields["fid"] = ".3f"
        titles.append("FID")

    lines = []
    for row in report["rows"]:
        cost = row.get("network_evaluations_per_image", {})
        passes = [f"{cost[k]:g}" if k in cost else "-" for k in ("trunk", "gradient")]
        label = LABELS.get(row["name"], f"data ({row['images']})")
        lines.append([label, *(common.cell(row.get(k), form) for k, form in fields.items()), *passes])
    used = report["reference"]
    return [
        cli.table(["images", *titles, "evaluations", "of G"], lines),
        "distances: root mean square of pixels on [0, 1], to the nearest of "
        f"{used['images']} {used['how'].split(',')[0]} and between samples"
        + ("; entropy in bits of the classifier's answers" if "entropy" in fields else ""),
        f"{report['images']} samples, {report['steps']} steps, no G in the last {100 * report['stop_percent']:g}%, "
        f"{report['latent_steps']} latent steps {'with' if report['latent_clamp'] else 'without'} the clamp, "
        f"{common.where(report)}",
    ]
