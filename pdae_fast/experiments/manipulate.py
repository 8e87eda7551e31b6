"""Moving an attribute: many edits of many images in one batched run, and what they change and leave alone."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import metrics
from ..data import open_dataset
from ..data.attributes import read_attributes
from ..data.bundled import PREFIX, bundled_path
from ..errors import UserError
from ..pipeline import Pipeline
from . import common
from .timing import ROUNDS, alternate

SCALES = (-0.3, -0.15, 0.15, 0.3)
CHANGED = 8 / 255  # on [0, 1]: smaller differences of a pixel are not seen
# Shown when nothing was asked for, as far as a classifier has them (CelebA's and the avatars' names).
FAVOURITES = ("smiling", "eyeglasses", "beard", "male", "young", "blond_hair", "dark_skin", "hat")
DEFAULT_ATTRIBUTES = 4
COMPARED_STEPS = 4


def default_attributes(names: Sequence[str]) -> list[str]:
    """A few of a classifier's attributes, the ones that are easily seen first."""
    known = [name for word in FAVOURITES for name in names if name.lower() == word]
    return [*known, *(name for name in names if name not in known)][:DEFAULT_ATTRIBUTES]


@dataclass
class Manipulation:
    """x0 and ``reconstructions`` [B, C, H, W], ``edited`` [A, S, B, C, H, W] by attribute and scale; logits of the
    classifier, encoded again: [B, n] of the reconstructions, [A, S, B, n] of the edited images."""

    images: Tensor
    reconstructions: Tensor
    edited: Tensor
    logits: Tensor
    edited_logits: Tensor


def manipulate(
    pipe: Pipeline, x0: Tensor, attributes: Sequence[str], scales: Sequence[float], encode_steps: int | None = None
) -> Manipulation:
    """Every image of x0 [B, C, H, W] with every attribute moved by every scale, decoded from its inferred x_T.

    x_T is inferred once an image, and everything is decoded in one batched run. The trunk is not shared: the edits of
    an image start from one x_T, but after the first step each has an x of its own.
    """
    for name in attributes:
        pipe.direction(name)  # a mistake shows before the work
    z = pipe.encode(x0)
    x_T = pipe.invert(x0, z, encode_steps)
    codes = torch.cat([z, *(pipe.edit(z, name, scale) for name in attributes for scale in scales)])
    x = pipe.decode(codes, x_T.repeat(len(codes) // len(z), *[1] * (x_T.ndim - 1)))
    if not bool(torch.isfinite(x).all()):
        raise UserError("the edited images hold NaN or infinite values; try --dtype float32")
    logits = pipe.logits(pipe.encode(x))
    B, shape = len(z), (len(attributes), len(scales), len(z))
    return Manipulation(x0, x[:B], x[B:].unflatten(0, shape), logits[:B], logits[B:].unflatten(0, shape))


# -- what changed --------------------------------------------------------------------------------------------------


def asked(pipe: Pipeline, attribute: str, scale: float) -> Tensor:
    """How far z + edit moves every logit [n] before it is decoded: scale sqrt(latent_dim) (w_j . w) / ||w||."""
    return scale * pipe.model.classifier.weight.detach().cpu().float() @ pipe.direction(attribute)


def measure(pipe: Pipeline, found: Manipulation, attributes: Sequence[str], scales: Sequence[float]) -> list[dict]:
    """A row for each attribute and scale, everything against the reconstruction of the same image, mean over images.

    "target", "others": change of the attribute's own logit, and mean absolute change of all other attributes' logits;
    "target_probability", "others_probability": the same of the probabilities; "positive": the share of images that the
    classifier finds positive, "positive_before" of the reconstructions. "target_asked", "others_asked": what the edit
    of z alone would do to the logits, before decoding and encoding again. "changed_pixels": the share of pixels that
    move by more than CHANGED in any channel; "mean_change": mean absolute difference on [0, 1].
    """
    names = list(pipe.model.config.attributes)
    rows = []
    before = found.logits
    for a, name in enumerate(attributes):
        own = names.index(name)
        rest = [j for j in range(len(names)) if j != own]
        for s, scale in enumerate(scales):
            after, wanted = found.edited_logits[a, s], asked(pipe, name, scale)
            change, shift = after - before, after.sigmoid() - before.sigmoid()
            difference = (found.edited[a, s] - found.reconstructions).abs() / 2
            rows.append(
                {
                    "attribute": name,
                    "scale": float(scale),
                    "target": float(change[:, own].mean()),
                    "others": _mean_absolute(change[:, rest]),
                    "target_probability": float(shift[:, own].mean()),
                    "others_probability": _mean_absolute(shift[:, rest]),
                    "target_asked": float(wanted[own]),
                    "others_asked": _mean_absolute(wanted[rest]),
                    "positive_before": float((before[:, own] > 0).float().mean()),
                    "positive": float((after[:, own] > 0).float().mean()),
                    "changed_pixels": float((difference.amax(dim=1) > CHANGED).float().mean()),
                    "mean_change": float(difference.mean()),
                }
            )
    return rows


def average(parts: Sequence[tuple[int, list[dict]]]) -> list[dict]:
    """Rows of `measure` for all images together: ``parts`` are numbers of images with the rows found for them."""
    images = sum(count for count, _ in parts)
    rows = []
    for same in zip(*(rows for _, rows in parts), strict=True):
        row = dict(same[0])
        for key, value in row.items():
            if isinstance(value, float) and key != "scale":
                row[key] = sum(count * part[key] for (count, _), part in zip(parts, same, strict=True)) / images
        rows.append(row)
    return rows


def stands_out(rows: Sequence[dict]) -> dict[str, tuple[int, int]]:
    """In how many of how many rows of `measure` the target's logit moves the way it was asked to, and by more than
    the others do: "raised" of those with a positive scale, "lowered" of those with a negative one."""
    found = {}
    for name, sign in (("raised", 1), ("lowered", -1)):
        some = [row for row in rows if sign * row["scale"] > 0]
        found[name] = (sum(sign * row["target"] > (row["others"] or 0) for row in some), len(some))
    return found


def _mean_absolute(values: Tensor) -> float | None:
    return float(values.abs().mean()) if values.numel() else None


def compare(
    pipe: Pipeline, x0: Tensor, attributes: Sequence[str], scales: Sequence[float], rounds: int = ROUNDS
) -> dict[str, Any]:
    """Time all edits of x0 in one run against one call of `Pipeline.manipulate` for each (see `alternate`), with
    COMPARED_STEPS steps up and down, encoding and inference of x_T included."""
    short = common.variant(pipe, steps=min(COMPARED_STEPS, pipe.steps), progress=None)
    ways = {
        "one by one": lambda: torch.cat(
            [
                short.manipulate(x0[i : i + 1], name, scale)
                for name in attributes
                for scale in scales
                for i in range(len(x0))
            ]
        ),
        "one run": lambda: _edited(short, x0, attributes, scales),
    }
    return {"edits": len(attributes) * len(scales) * len(x0), "steps": short.steps, **alternate(ways, rounds)}


def _edited(pipe: Pipeline, x0: Tensor, attributes: Sequence[str], scales: Sequence[float]) -> Tensor:
    z = pipe.encode(x0)
    x_T = pipe.invert(x0, z)
    codes = torch.cat([pipe.edit(z, name, scale) for name in attributes for scale in scales])
    return pipe.decode(codes, x_T.repeat(len(codes) // len(z), *[1] * (x_T.ndim - 1)))


# -- pairs with the true edit --------------------------------------------------------------------------------------


class Edit(NamedTuple):
    """A pair of images that differ in one attribute of the classifier: names, and +1 when the second has it."""

    first: str
    second: str
    attribute: str
    sign: int


def pairs_folder(given: str | None, spec: Sequence[str]) -> Path | None:
    """The folder of pairs that was asked for ("none": none), else the one inside the folder of avatars ``spec``."""
    if given == "none":
        return None
    folder = _path(given) if given else (_path(spec[0]) / "pairs" if len(spec) == 1 else None)
    if folder is None or not (folder / "pairs.csv").is_file():
        if given:
            raise UserError(
                f"--pairs {given}: no pairs.csv in it; expected the pairs of a folder of avatars, or 'none'"
            )
        return None
    return folder


def _path(word: str) -> Path:
    if not word.startswith(PREFIX):
        return Path(word)
    name, _, below = word.removeprefix(PREFIX).partition("/")
    return Path(bundled_path(name)) / below


def find_edits(folder: Path, names: Sequence[str]) -> list[Edit]:
    """The pairs of ``folder`` whose images differ in exactly one of the attributes ``names``."""
    table = read_attributes(folder / "attributes.csv")
    known = [name for name in names if name in table.columns]
    if not known:
        raise UserError(
            f"{folder}: its attributes ({', '.join(table.columns)}) are none of the classifier's ({', '.join(names)})"
        )
    values = table.values[:, [table.columns.index(name) for name in known]].astype(int)
    row = {image: values[i] for i, image in enumerate(table.images)}
    edits = []
    try:
        with open(folder / "pairs.csv", encoding="utf-8", newline="") as file:
            for line in csv.DictReader(file):
                first, second = (Path(line[key]).stem for key in ("first", "second"))
                change = row[second] - row[first]
                (places,) = np.nonzero(change)
                if len(places) == 1:
                    edits.append(Edit(first, second, known[places[0]], int(change[places[0]])))
    except (OSError, KeyError, TypeError) as error:
        raise UserError(f"{folder / 'pairs.csv'} cannot be used: {error!r}") from None
    if not edits:
        raise UserError(f"{folder}: no pair differs in exactly one of {', '.join(known)}")
    return edits


def load_pairs(folder: Path, edits: Sequence[Edit], shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The first and the second images [B, C, H, W] of ``edits``."""
    channels, size, _ = shape
    dataset = open_dataset([folder / "images"], size, channels)
    place = {name: i for i, name in enumerate(dataset.names)}
    missing = [name for edit in edits for name in edit[:2] if name not in place]
    if missing:
        raise UserError(f"{folder}: no image {missing[0]} in its folder images")
    first, second = (common.load(dataset, [place[edit[side]] for edit in edits]).images for side in (0, 1))
    return first, second


@dataclass
class Truth:
    """``images``: first, second, reconstruction of the first, its edits [S, B, ...] by scale, and "swapped": the second
    image's z with the first one's x_T. ``rows``: one for each of those, ``per_pair``: one for each pair."""

    images: dict[str, Tensor]
    rows: list[dict[str, Any]]
    per_pair: list[dict[str, Any]]


def against_truth(
    pipe: Pipeline,
    first: Tensor,
    second: Tensor,
    edits: Sequence[Edit],
    scales: Sequence[float],
    encode_steps: int | None = None,
) -> Truth:
    """Edit the first image of each pair toward the second, by each of ``scales`` (positive), and compare with it.

    The region that truly changes is where the two differ by more than CHANGED in any channel; MSE inside and outside
    it is that of its pixels alone, on [0, 1]. Rows: "no edit" (the reconstruction), one for each scale, and "z of the
    true image": what an edit of z that found the right one would give, with x_T of the first image.
    """
    z = pipe.encode(torch.cat([first, second]))
    z, z_second = z[: len(first)], z[len(first) :]
    x_T = pipe.invert(first, z, encode_steps)
    moved = [
        torch.cat([pipe.edit(z[i : i + 1], edit.attribute, edit.sign * scale) for i, edit in enumerate(edits)])
        for scale in scales
    ]
    codes = torch.cat([z, *moved, z_second])
    x = pipe.decode(codes, x_T.repeat(len(codes) // len(z), *[1] * (x_T.ndim - 1))).unflatten(0, (-1, len(z)))
    names = ["no edit", *(f"scale {scale:g}" for scale in scales), "z of the true image"]
    region = changed_region(first, second)
    found = {name: compare_with(image, second, region) for name, image in zip(names, x, strict=True)}
    rows = [
        {"name": name, "scale": scale, **{key: float(v.nanmean()) for key, v in values.items()}}
        for (name, values), scale in zip(found.items(), [0.0, *scales, None], strict=True)
    ]
    for row in rows:
        better = found[row["name"]]["mse_inside"] < found["no edit"]["mse_inside"]
        row["closer_inside"] = float(better.double().mean())
    per_pair = [
        {
            **edit._asdict(),
            "region": float(region[i].float().mean()),
            **{name: {key: float(v[i]) for key, v in values.items()} for name, values in found.items()},
        }
        for i, edit in enumerate(edits)
    ]
    images = {"first": first, "second": second, "reconstruction": x[0], "edited": x[1:-1], "swapped": x[-1]}
    return Truth(images, rows, per_pair)


def changed_region(first: Tensor, second: Tensor) -> Tensor:
    """bool [B, H, W]: where two images [B, C, H, W] differ by more than CHANGED in any channel."""
    return ((first - second).abs() / 2).amax(dim=1) > CHANGED


def compare_with(x: Tensor, truth: Tensor, region: Tensor) -> dict[str, Tensor]:
    """ssim, mse, mse_inside and mse_outside ``region`` [B, H, W], float64 [B] each; NaN where a part has no pixels."""
    error = ((x.double() - truth.double()) / 2).square().mean(dim=1)
    inside = region.double()

    def mean(weight: Tensor) -> Tensor:
        return (error * weight).sum(dim=(1, 2)) / weight.sum(dim=(1, 2))

    return {
        "ssim": metrics.ssim(x, truth),
        "mse": metrics.mse(x, truth),
        "mse_inside": mean(inside),
        "mse_outside": mean(1 - inside),
    }
