"""Parts and landmarks of avatars: the bundled ones against what draws them, and folders that hold something else."""

import csv
import hashlib
import json
import shutil
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

from pdae_fast.data import make_avatars, open_dataset
from pdae_fast.data.avatar_render import PARTS, Renderer
from pdae_fast.data.avatar_style import LANDMARKS, draw, landmarks
from pdae_fast.data.avatar_truth import read_landmarks, read_parts
from pdae_fast.data.bundled import bundled_path
from pdae_fast.errors import UserError

BUNDLED = "bundled:avatars"
needs_drawing = pytest.mark.skipif(find_spec("resvg_py") is None, reason="needs pip install 'pdae_fast[data]'")
# Of all bundled masks: what the tests of students and probes stand on.
DIGEST = "4ded50e95df392c4738ce9cdb8d47acb84be3bd255cd6a72d247ef3d31494eea"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A few of the bundled avatars."""
    source, folder = bundled_path("avatars"), tmp_path_factory.mktemp("few")
    for name in ("images", "masks"):
        (folder / name).mkdir()
        for k in range(4):
            shutil.copy(f"{source}/{name}/{k:06d}.png", folder / name)
    for name in ("manifest.json", "landmarks.csv"):
        shutil.copy(f"{source}/{name}", folder)
    return folder


def test_every_bundled_avatar_has_its_mask_and_landmarks():
    dataset = open_dataset(BUNDLED, 64, 3)
    parts, points = read_parts(BUNDLED, dataset.names), read_landmarks(BUNDLED, dataset.names)
    assert parts.values.shape == (400, 64, 64) and parts.names == PARTS and parts.size == 64
    assert points.values.shape == (400, 9, 2) and points.names == tuple(LANDMARKS) and points.size == 64
    assert hashlib.sha256(parts.values.tobytes()).hexdigest() == DIGEST
    assert set(np.unique(parts.values)) == set(range(len(PARTS)))
    # An image by an image: the rows are those of the names, in any order, and hold what the seed decides.
    for k in (0, 17, 399):
        expected = [*landmarks(draw(777, k).pose, 64).values()]
        assert read_landmarks(BUNDLED, [f"{k:06d}.png"]).values[0] == pytest.approx(np.array(expected), abs=1e-3)
    turned = read_parts(BUNDLED, dataset.names[:3][::-1]).values
    assert np.array_equal(turned, parts.values[:3][::-1])
    # A mask is of its image: where the background is, the image has its four corners' colour at the top.
    image = dataset[5].image.numpy()
    background = parts.values[5] == 0
    assert image[:, background].std(axis=1).max() < 0.1 < image[:, ~background].std(axis=1).max()


@needs_drawing
def test_the_same_seed_draws_the_bundled_masks_and_a_new_folder_is_read(tmp_path):
    renderer = Renderer()
    for k in (3, 250):
        drawn = np.asarray(renderer.mask(draw(777, k), 64))
        assert np.array_equal(read_parts(BUNDLED, [f"{k:06d}"]).values[0], drawn)
    make_avatars(tmp_path / "own", 2, size=32, seed=4)
    own = read_parts(tmp_path / "own", ["000001", "000000"])
    assert own.values.shape == (2, 32, 32) and own.size == 32
    assert np.array_equal(own.values[1], np.asarray(renderer.mask(draw(4, 0), 32)))
    expected = np.array([*landmarks(draw(4, 1).pose, 32).values()])
    assert read_landmarks(tmp_path / "own", ["000001"]).values[0] == pytest.approx(expected, abs=1e-3)


def test_what_cannot_be_used_is_one_line(folder, tmp_path):
    def refused(read, names, words, where=folder):
        with pytest.raises(UserError, match=words) as error:
            read(where, names)
        assert "\n" not in str(error.value)

    for read in (read_parts, read_landmarks):
        refused(read, ["a"], "not a folder of avatars", tmp_path)
    refused(read_parts, ["000000", "000009"], "no such mask, though 000009 is an image")
    refused(read_landmarks, ["000000", "other"], "no row for other .1 of 2 images")
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    Image.new("P", (32, 64)).save(broken / "masks" / "000000.png")
    Image.new("RGB", (64, 64)).save(broken / "masks" / "000001.png")
    Image.fromarray(np.full((64, 64), 11, np.uint8)).save(broken / "masks" / "000002.png")
    (broken / "masks" / "000003.png").write_bytes(b"\x89PNG\r\n")
    for k, words in enumerate(("32 x 64 pixels of mode P", "mode RGB", "part 11; manifest.json", "not a readable")):
        refused(read_parts, [f"{k:06d}"], words, broken)
    header = (broken / "landmarks.csv").read_text().splitlines()[0].split(",")
    for row, words in ((["000000.png", "x"], "landmarks.csv cannot be used"), (["000000.png"], "cannot be used")):
        with open(broken / "landmarks.csv", "w", newline="") as file:
            csv.writer(file).writerows([header, row])
        refused(read_landmarks, ["000000"], words, broken)
    manifest = json.loads((broken / "manifest.json").read_text())
    for change in ({"parts": 3}, {"size": 0}, {"landmarks": []}):
        (broken / "manifest.json").write_text(json.dumps(manifest | change))
        refused(read_parts, ["000000"], "names no parts, landmarks or size", broken)
