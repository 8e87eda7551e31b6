"""Statistics of x_T against scipy, numpy and true noise; interpolations; the command over ways to infer x_T."""

import csv
import json

import numpy as np
import pytest
import scipy.stats
import torch

from helpers import TINY, TINY_FULL, image_folder, images, tiny_pdae
from pdae_fast import Pipeline, UserError, analyze, cli
from pdae_fast.experiments.analyze import inversion, latents
from pdae_fast.samplers import RECIPES, Recipe

CONFIG = TINY


def draw(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_statistics_are_those_of_scipy_and_numpy():
    x = draw((3, 2, 8, 8)) ** 3 + 0.3
    found, flat = latents.noise_statistics(x), x.double().numpy()
    assert found["mean"] == pytest.approx(flat.mean())
    assert found["std"] == pytest.approx(flat.std())
    assert found["excess_kurtosis"] == pytest.approx(scipy.stats.kurtosis(flat.ravel()))
    assert found["norm"] == pytest.approx(np.linalg.norm(flat.reshape(3, -1), axis=1).mean() / 128**0.5)
    assert found["beyond_3_sigma"] == (abs(flat) > 3).mean() > 0
    correlation = np.corrcoef(flat.reshape(3, -1))
    assert found["shared"] == pytest.approx(correlation[np.triu_indices(3, 1)].mean())
    assert np.isnan(latents.noise_statistics(x[:1])["shared"])


def test_neighbours_that_are_alike_are_found():
    noise = draw((1, 1, 400, 400))
    across = (noise[..., :, 1:] + noise[..., :, :-1]) / 2**0.5  # correlation one half across, none down
    assert latents.noise_statistics(across)["autocorrelation"] == pytest.approx(0.25, abs=0.01)
    assert latents.noise_statistics(across.mT)["autocorrelation"] == pytest.approx(0.25, abs=0.01)
    assert latents.noise_statistics(noise)["autocorrelation"] == pytest.approx(0, abs=0.01)
    same = draw((1, 1, 8, 8)).expand(4, 1, 8, 8)
    assert latents.noise_statistics(same)["shared"] == pytest.approx(1)


def test_the_reference_is_that_of_normal_noise():
    shape = (4, 1, 16, 16)
    n = 1024
    found = latents.noise_reference(shape, draws=400, seed=3)
    assert found.keys() == latents.STATISTICS.keys()
    expected = {"mean": (0, 1 / n**0.5), "std": (1, 1 / (2 * n) ** 0.5), "excess_kurtosis": (0, (24 / n) ** 0.5),
                "beyond_3_sigma": (0.0027, (0.0027 / n) ** 0.5), "norm": (1, 1 / (2 * n) ** 0.5)}  # fmt: skip
    for name, (mean, deviation) in expected.items():
        assert found[name]["standard_deviation"] == pytest.approx(deviation, rel=0.25), name
        assert found[name]["mean"] == pytest.approx(mean, abs=4 * deviation / 400**0.5 + 0.01), name


def test_interpolations_join_what_is_decoded(model):
    pipe = Pipeline(model, "published", steps=3, device="cpu", plan="eager")
    x0 = images(5)
    z, x_T = pipe.encode(x0), draw(x0.shape)
    found = latents.interpolations(pipe, z, x_T, 4)
    assert found.shape == (2, 4, 1, 32, 32)  # the fifth image has no partner
    ends = found[:, [0, -1]].flatten(0, 1)
    torch.testing.assert_close(ends, pipe.decode(z[:4], x_T[:4]), rtol=1e-4, atol=1e-4)


def test_smoothness_of_a_cross_fade_and_of_noise(model):
    pipe = Pipeline(model, "published", steps=3, device="cpu", plan="eager")
    x0 = images(4)
    z = pipe.encode(x0)
    ends = x0.unflatten(0, (2, 2))
    w = torch.linspace(0, 1, 5).view(1, 5, 1, 1, 1)
    fade = (1 - w) * ends[:, :1] + w * ends[:, 1:]
    found = latents.smoothness(pipe, z, fade)
    for name in ("length", "largest_step"):
        torch.testing.assert_close(found[name], torch.ones(2).to(found[name]), rtol=1e-5, atol=1e-5)
    assert bool((found["roughness"] < 0.7).all())  # two independent images averaged: one half
    middle = pipe.encode(fade[:, 2]).double()
    a, b = z.double().unflatten(0, (2, 2)).unbind(1)
    torch.testing.assert_close(found["code"], (middle - (a + b) / 2).norm(dim=1) / (a - b).norm(dim=1))
    noisy = fade.clone()
    noisy[:, 2] += draw(noisy[:, 2].shape)
    worse = latents.smoothness(pipe, z, noisy)
    assert bool((worse["roughness"] > 1).all()) and bool((worse["length"] > 1.3).all())


def test_the_ways_hold_every_preset():
    known = inversion.ways()
    assert set(RECIPES) <= known.keys() and known["random"].mode == "random"
    assert known["reversible"].recipe.solver == "belm"
    assert known["published-1000"].recipe.encode_steps == 1000
    assert "published-1000" not in inversion.choose(None)
    assert list(inversion.choose(["reversible", "fast", "reversible"])) == ["reversible", "fast"]
    with pytest.raises(UserError, match="'best' is not known; expected some of random, "):
        inversion.choose(["best"])


def test_a_random_x_T_is_noise_and_counts_are_exact(model):
    pipe = Pipeline(model, "published", steps=3, device="cpu", plan="eager")
    small = {
        "random": inversion.Case("random", Recipe(3)),
        "solved": inversion.Case("inferred", Recipe(3)),
    }
    for name, setting in small.items():
        before = pipe.evaluations.get("trunk", 0)
        row, x, paths = inversion.compare(pipe, setting, images(4), 3, seed=1)
        assert pipe.evaluations["trunk"] - before == inversion.evaluations(pipe, setting, 4, 3)
        assert x.shape == (4, 1, 32, 32) and paths.shape == (2, 3, 1, 32, 32)
        if name == "random":
            assert row["noise"]["std"] == pytest.approx(1, abs=0.05)
            assert row["noise"]["correlation_with_image"] == pytest.approx(0, abs=0.06)


# -- the command ---------------------------------------------------------------------------------------------------


def command(model_dir, folder, out, *more):
    arguments = ["inversion", "--model", model_dir, "--input", folder, "--out", out, "--device", "cpu", *more]
    return cli.run(analyze.main, [str(a) for a in arguments])


def test_inversion_as_a_command(model_dir, tmp_path, capsys, monkeypatch):
    short = {
        "random": inversion.Case("random", Recipe(2)),
        "plain": inversion.Case("inferred", Recipe(2, 3)),
        "belm": inversion.Case("inferred", Recipe(3, solver="belm")),
    }
    monkeypatch.setattr(inversion, "ways", lambda: short)
    out = tmp_path / "out"
    assert command(model_dir, image_folder(tmp_path / "in", 3), out, "--points", 3) == 0
    report = json.loads((out / "metrics.json").read_text())
    assert report["images"] == 3 and list(report["ways"]) == list(short)
    assert report["ways"]["plain"]["evaluations"] == 5 and report["ways"]["random"]["evaluations"] == 2
    assert report["ways"]["belm"]["settings"]["solver"] == "belm"
    assert report["ways"]["belm"]["quality"]["mse"] < 1e-6
    with open(out / "inversion.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["way"] for row in rows] == list(short)
    assert float(rows[0]["std"]) == pytest.approx(report["ways"]["random"]["noise"]["std"])
    assert {p.name for p in out.iterdir()} >= {"grid.png", "interpolations.png", "inversion.csv", "inversion.png"}
    assert "true noise" in capsys.readouterr().out


@pytest.mark.parametrize(
    "more, line",
    [
        (["--ways", "best"], "expected some of random"),
        (["--points", 2], "--points must be at least 3"),
        (["--limit", 1], "at least two images"),
    ],
)
def test_mistakes_are_one_line(more, line, model_dir, tmp_path, capsys):
    assert command(model_dir, image_folder(tmp_path / "in", 2), tmp_path / "out", *more) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


# -- edits against the truth ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def avatars(tmp_path_factory):
    """A folder laid out as the avatars': four images, and two pairs that differ in what the classifier knows."""
    folder = tmp_path_factory.mktemp("avatars")
    image_folder(folder / "images", 4)
    image_folder(folder / "pairs" / "images", 4)
    header = "image,round,dark\n"
    (folder / "attributes.csv").write_text(header + "".join(f"{i:02d}.png,0,1\n" for i in range(4)))
    rows = ["00.png,0,1", "01.png,1,1", "02.png,1,1", "03.png,1,0"]
    (folder / "pairs" / "attributes.csv").write_text(header + "\n".join(rows) + "\n")
    (folder / "pairs" / "pairs.csv").write_text(
        "first,second,attribute,before,after\n00.png,01.png,a,b,c\n02.png,03.png,d,e,f\n"
    )
    return folder


def test_edits_are_compared_with_the_truth(avatars, tmp_path, monkeypatch, capsys):
    tiny_pdae(TINY_FULL).save_pretrained(tmp_path / "full")
    short = {
        "random": inversion.Case("random", Recipe(2)),
        "solved": inversion.Case("inferred", Recipe(3, iterations=2)),
    }
    monkeypatch.setattr(inversion, "ways", lambda: short)
    out = tmp_path / "out"
    pairs = ("--pairs", avatars / "pairs", "--points", 3)
    assert command(tmp_path / "full", avatars / "images", out, *pairs) == 0
    report = json.loads((out / "metrics.json").read_text())
    assert report["edits"] == "2 pairs, edited by 0.3" and "edit" not in report["ways"]["random"]
    found = report["ways"]["solved"]["edit"]
    # Noise images differ nearly everywhere: that is where the edit is compared with the truth.
    assert found["edit_inside"] > 0 and 0 <= found["edit_closer"] <= 1 and found["swap"] != found["edit_inside"]
    assert "edits by x_T" in capsys.readouterr().out
    with open(out / "inversion.csv") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["swap"] == "" and float(rows[1]["swap"]) == pytest.approx(found["swap"])


def test_why_there_are_no_edits(avatars, model_dir, tmp_path, monkeypatch, capsys):
    short = {"random": inversion.Case("random", Recipe(2))}
    monkeypatch.setattr(inversion, "ways", lambda: short)
    folder = avatars / "images"
    assert command(model_dir, folder, tmp_path / "out", "--points", 3) == 0
    assert "edits: no pairs of images that differ in one attribute" in capsys.readouterr().out
    assert command(model_dir, folder, tmp_path / "no", "--points", 3, "--pairs", avatars / "pairs") == 2
    assert "--pairs needs an attribute classifier" in capsys.readouterr().err
    assert command(model_dir, folder, tmp_path / "no", "--points", 3, "--pairs", folder) == 2
    assert "no pairs.csv in it" in capsys.readouterr().err
