"""Pairs of images that differ in one attribute, and edits of the first compared with the second."""

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

CHANGED = 8 / 255  # on [0, 1]: smaller differences of a pixel are not seen


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
) -> Truth:
    """Edit the first image of each pair toward the second, by each of ``scales`` (positive), and compare with it.

    The region that truly changes is where the two differ by more than CHANGED in any channel; MSE inside and outside
    it is that of its pixels alone, on [0, 1]. Rows: "no edit" (the reconstruction), one for each scale, and "z of the
    true image": what an edit of z that found the right one would give, with x_T of the first image.
    """
    z = pipe.encode(torch.cat([first, second]))
    z, z_second = z[: len(first)], z[len(first) :]
    x_T = pipe.invert(first, z)
    moved = [
        torch.cat([pipe.edit(z[i : i + 1], edit.attribute, edit.sign * scale) for i, edit in enumerate(edits)])
        for scale in scales
    ]
    codes = torch.cat([z, *moved, z_second])
    x = common.decode_edits(pipe, codes, x_T).unflatten(0, (-1, len(z)))
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
