"""The model that the commands of a test file run: TINY_FULL, or what the file calls CONFIG."""

import csv

import numpy as np
import pytest
from PIL import Image

from helpers import TINY_FULL, tiny_pdae


@pytest.fixture(scope="module")
def model(request):
    return tiny_pdae(getattr(request.module, "CONFIG", TINY_FULL))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory, model):
    path = tmp_path_factory.mktemp("model") / "tiny"
    model.save_pretrained(path)
    return path


@pytest.fixture
def pairs():
    return _pairs


def _pairs(folder):
    """Three pairs: 0 gains "dark" in a square, 1 loses "round", 2 changes both, 3 neither."""
    (folder / "images").mkdir(parents=True)
    random = np.random.default_rng(2)
    rows, labels = [], {0: ((1, 0), (1, 1)), 1: ((1, 0), (0, 0)), 2: ((0, 0), (1, 1)), 3: ((1, 1), (1, 1))}
    for k, halves in labels.items():
        first = random.integers(0, 200, (32, 32), dtype=np.uint8)
        second = first.copy()
        second[4:12, 6:16] += 50
        for half, pixels, values in zip("ab", (first, second), halves, strict=True):
            Image.fromarray(pixels).save(folder / "images" / f"{k:06d}_{half}.png")
            rows.append([f"{k:06d}_{half}.png", *values, "word"])
    with open(folder / "attributes.csv", "w", newline="") as file:
        csv.writer(file).writerows([["image", "round", "dark", "colour"], *rows])
    with open(folder / "pairs.csv", "w", newline="") as file:
        names = [[f"{k:06d}_a.png", f"{k:06d}_b.png", "colour", "x", "y"] for k in labels]
        csv.writer(file).writerows([["first", "second", "attribute", "before", "after"], *names])
    return folder
