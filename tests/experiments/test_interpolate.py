"""`interpolate` against single calls and closed forms; films; mistakes."""

import builtins
import json

import numpy as np
import pytest
import torch
from PIL import Image

from golden_rule import relative
from helpers import image_folder, images
from pdae_fast import Pipeline, UserError, cli
from pdae_fast.data import Sample
from pdae_fast.experiments import animation
from pdae_fast.experiments import interpolate as experiment


@pytest.fixture
def base(tmp_path, model_dir):
    folder = image_folder(tmp_path / "in", 4)
    return [
        "--model",
        model_dir,
        "--input",
        folder,
        "--device",
        "cpu",
        "--batch-size",
        4,
        "--steps",
        2,
        "--iterations",
        0,
    ]


def run(*argv):
    return cli.run(experiment.main, [str(a) for a in argv])


class Images:
    """A data set of images that are there already."""

    def __init__(self, x):
        self.x, self.names = x, [f"{i}" for i in range(len(x))]

    def __getitem__(self, index):
        return Sample(self.x[index], self.names[index], None)


@pytest.mark.parametrize("solver", ["ddim", "belm"])
def test_all_pairs_at_once_equal_one_frame_at_a_time(model, solver):
    pipe = Pipeline(model, "published", steps=3, device="cpu", batch_size=4, solver=solver)
    x0, weights, pairs = images(3), torch.tensor([0.0, 0.3, 1.0]), [(0, 1), (2, 1)]
    before = pipe.evaluations
    found = experiment.interpolate(pipe, Images(x0), pairs, weights, ["latent", "trajectory"])
    assert pipe.evaluations["encoder"] - before.get("encoder", 0) == 3  # an image of two pairs is encoded once
    for kind, frames in found.frames.items():
        assert frames.shape == (2, 3, 1, 32, 32)
        for pair, (a, b) in enumerate(pairs):
            one = torch.cat([pipe.interpolate(x0[a], x0[b], [float(w)], kind) for w in weights])
            assert relative(frames[pair], one) < 1e-3
    # The ends are the reconstructions, and the kinds differ between them.
    rows = experiment.measure(found, weights)
    assert max(row["ends_differ"] for row in rows) < 1e-3
    assert relative(found.frames["latent"][:, 1], found.frames["trajectory"][:, 1]) > 1e-3
    torch.testing.assert_close(found.ends[:, 1], x0[[2, 1]])


def test_smoothness_of_known_paths():
    a, b = images(2)
    fade = torch.stack([(1 - w) * a + w * b for w in torch.linspace(0, 1, 5)])
    even = experiment.smoothness(fade)
    apart = float((a - b).double().square().mean().sqrt()) / 2
    assert even["distance"] == pytest.approx(apart, rel=1e-5)
    assert even["length"] == pytest.approx(1, rel=1e-5) and even["largest_step"] == pytest.approx(1, rel=1e-5)
    assert even["steps"] == pytest.approx([apart / 4] * 4, rel=1e-5)
    jump = experiment.smoothness(torch.stack([a, a, a, b]))
    assert jump["length"] == pytest.approx(1) and jump["largest_step"] == pytest.approx(3)
    # There and back over the straight line: 1 to b, 1 back, 1 to b again.
    detour = experiment.smoothness(torch.stack([a, b, a, b]))
    assert detour["length"] == pytest.approx(3) and detour["largest_step"] == pytest.approx(3)
    still = experiment.smoothness(torch.stack([a, b, a]))
    assert still["length"] is None and still["largest_step"] is None


def test_pairs_by_name_and_number():
    names = ["x", "y", "z", "7"]
    assert experiment.find_pairs(names, None) == [(0, 1), (2, 3)]
    assert experiment.find_pairs(names[:3], None) == [(0, 1)]
    assert experiment.find_pairs(names, [("z", "0"), ("7", "1")]) == [(2, 0), (3, 1)]
    for given, words in (([("x", "4")], "numbers 0 to 3"), ([("x", "q")], "x, y, z, 7"), ([("y", "1")], "y twice")):
        with pytest.raises(UserError, match=words):
            experiment.find_pairs(names, given)


def test_the_compared_ways_give_the_same_frames(model):
    pipe = Pipeline(model, "published", steps=3, device="cpu", batch_size=4)
    weights = torch.linspace(0, 1, 3)
    found = experiment.interpolate(pipe, Images(images(2)), [(0, 1)], weights, ["trajectory"])
    before = pipe.evaluations
    compared = experiment.compare(pipe, found, weights, rounds=1)
    assert compared["largest_difference"] < 1e-2 and compared["frames"] == 3 and compared["steps"] == 3
    assert [way["speedup"] > 0 for way in compared["ways"].values()] == [True] * 3
    assert compared["ways"]["one by one, two passes"]["speedup"] == 1
    # Warm-up and one round of three ways: two of them share the trunk, one passes it twice.
    after = {k: pipe.evaluations[k] - before[k] for k in ("trunk", "eps", "gradient")}
    assert after == {"trunk": 2 * 9 * (2 + 1 + 1), "eps": 2 * 9 * (2 + 1 + 1), "gradient": 2 * 9 * (2 + 2 + 2)}


def test_the_command(tmp_path, base, capsys):
    out = tmp_path / "out"
    assert run(*base, "--out", out, "--points", 4, "--pair", "00", 3, "--animate", "gif", "--compare") == 0
    report = json.loads((out / "metrics.json").read_text())
    assert report["pairs"] == [["00", "03"]] and report["frames"] == 8 and len(report["rows"]) == 2
    # Two images up and down, and eight frames down, by two steps: of 8 frames.
    assert report["network_evaluations_per_image"]["trunk"] == pytest.approx((2 * 4 + 8 * 2) / 8)
    assert all(row["ends_differ"] < 1e-3 for row in report["rows"])
    printed = capsys.readouterr().out
    assert "1: 00 - 03" in printed and "one batch, shared trunk" in printed
    assert len(list((out / "images" / "001-latent").glob("*.png"))) == 4
    with Image.open(out / "grid.png") as grid:
        assert grid.size[1] == 2 * 64 + 2
    with Image.open(out / "trajectory.gif") as film:
        # There and back, the ends held for three frames: 3 + 2 + 3 + 2, of which equal neighbours may be one.
        assert film.size == (128, 128) and 4 <= film.n_frames <= 10 and film.info["loop"] == 0
        length = 0
        for k in range(film.n_frames):
            film.seek(k)
            length += film.info["duration"]
        assert length == 10 * 500
        film.seek(0)
        first = np.asarray(film.convert("L"), dtype=np.float64)[::4, ::4]
    with Image.open(out / "images" / "001-trajectory" / "000.png") as picture:
        expected = np.asarray(picture, dtype=np.float64)
    assert np.abs(first - expected).mean() < 3  # 256 colours


def test_mp4_where_it_can_be_written(tmp_path):
    pytest.importorskip("imageio_ffmpeg")
    import imageio.v3

    frames = torch.linspace(-1, 1, 6).view(1, 6, 1, 1, 1).expand(2, 6, 1, 32, 32)
    animation.write(tmp_path / "a.mp4", frames)
    film = imageio.v3.imread(tmp_path / "a.mp4", plugin="FFMPEG")
    assert film.shape[1:] == (128, 256, 3) and film[0].mean() < 10 and film.max() > 240


BAD = [
    (["--points", 1], "at least 2"),
    (["--pair", "00", "nobody"], "called 00, 01"),
    (["--pair", "00", 0], "twice"),
    (["--limit", 1], "needs two images; the input has 1 (00)"),
    (["--animate", "avi"], "gif or mp4"),
    (["--model", "nobody"], "neither a bundled model"),
]


@pytest.mark.parametrize(("argv", "words"), BAD)
def test_a_mistake_is_one_line(tmp_path, base, capsys, argv, words):
    out = tmp_path / "out"
    assert run(*base, "--out", out, *argv) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.splitlines()) == 1 and not out.exists()


def test_mp4_without_imageio_says_how_to_get_it(monkeypatch):
    real = builtins.__import__

    def absent(name, *args, **options):
        if name.startswith("imageio"):
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UserError, match=r"pip install 'imageio\[ffmpeg\]'"):
        animation.check_format("mp4")


def test_a_gif_in_memory_is_the_file(tmp_path):
    frames = images(10).unflatten(0, (2, 5))
    animation.write(tmp_path / "a.gif", frames, seconds=1.0)
    assert animation.gif(frames, seconds=1.0) == (tmp_path / "a.gif").read_bytes()
    assert animation.gif(frames) != animation.gif(frames, seconds=1.0)
