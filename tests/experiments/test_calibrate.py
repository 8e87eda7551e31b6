"""Scales of fp8 as a user finds and uses them, and what says that they were used."""

import json

import pytest
import torch

from helpers import image_folder, tiny_prior
from pdae_fast import PDAE, Pipeline, calibrate, cli, encode, evaluate, pareto, reconstruct
from pdae_fast.engine import float8
from pdae_fast.experiments import calibrate as experiment
from pdae_fast.experiments import common


def run(main, *argv):
    return cli.run(main, [str(a) for a in argv])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("in") / "images", 3)


@pytest.fixture(scope="module")
def scales(tmp_path_factory, model_dir, folder):
    out = tmp_path_factory.mktemp("scales")
    assert run(calibrate.main, "--model", model_dir, "--input", folder, "--out", out, "--device", "cpu",
               "--batch-size", 2, "--quiet") == 0  # fmt: skip
    return out / "fp8.json"


def test_the_file(model_dir, folder, scales, tmp_path, capsys):
    values, model = json.loads(scales.read_text()), PDAE.from_pretrained(model_dir)
    assert values["largest"].keys() == float8.float8_layers(model.decoder).keys()
    about = values["calibrated"]
    assert about["images"] == 3 and about["steps"] == 10 and about["plan"] == "eager" and about["broken"] == []
    # What one batch reads at most is what two read, and more steps than these are asked for by name.
    arguments = ("--model", model_dir, "--input", folder, "--device", "cpu")
    assert run(calibrate.main, *arguments, "--out", tmp_path / "a") == 0
    again = json.loads((tmp_path / "a" / "fp8.json").read_text())
    assert again["largest"] == pytest.approx(values["largest"], rel=1e-2) and again["weights"] == values["weights"]
    assert "34 convolutions read up to" in capsys.readouterr().out
    for words, steps in ((("--preset", "balanced"), 13), (("--steps", 3), 3)):
        assert run(calibrate.main, *arguments, "--out", tmp_path / "b", "--quiet", *words) == 0
        assert json.loads((tmp_path / "b" / "fp8.json").read_text())["calibrated"]["steps"] == steps


def test_it_is_the_largest_of_all_images_and_both_x_T(model_dir, folder, scales):
    """By convolutions that note what they are given."""
    model, found = PDAE.from_pretrained(model_dir), {}
    pipe = Pipeline(model, experiment.RECIPE, device="cpu", plan="eager")
    x0 = torch.stack([common.open_dataset([folder], 32, 1)[i].image for i in range(3)])
    names = {id(layer): name for name, layer in float8.float8_layers(pipe.plan.unet).items()}
    plain = torch.nn.Conv2d.forward

    def noting(self, x):
        if id(self) in names:
            found.setdefault(names[id(self)], []).append(float(x.abs().max()))
        return plain(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Conv2d, "forward", noting)
        z = pipe.encode(x0)
        pipe.decode(z, pipe.invert(x0, z)), pipe.decode(z, seed=0)
    largest = json.loads(scales.read_text())["largest"]
    assert largest == pytest.approx({name: max(values) for name, values in found.items()}, rel=1e-2)
    before = pipe.evaluations["trunk"]
    assert experiment.calibrate(pipe, x0, range(3)) == {name: max(values) for name, values in found.items()}
    assert pipe.evaluations["trunk"] == 2 * before == 2 * 3 * (21 + 10 + 10)


def test_everything_that_ran_it_says_so(model_dir, folder, scales, tmp_path, capsys):
    base = ("--model", model_dir, "--input", folder, "--device", "cpu", "--steps", 2, "--fp8", scales)
    for name, main, *words in (
        ("reconstruct", reconstruct.main),
        ("encode", encode.main, "--with-x-T"),
        ("evaluate", evaluate.main, "--modes", "random"),
    ):
        out = tmp_path / name
        assert run(main, *base, *words, "--out", out) == 0
        report = json.loads((out / "metrics.json").read_text())
        assert report["fp8"] == "34 convolutions of rounded values, emulated"
        assert "approximate: fp8, 34 convolutions of rounded values, emulated" in capsys.readouterr().out
        assert run(main, *base[:-2], *words, "--out", tmp_path / f"{name} without") == 0
        assert "fp8" not in (tmp_path / f"{name} without" / "metrics.json").read_text()
        assert "fp8" not in capsys.readouterr().out


def test_rows_of_other_scales_are_not_continued(model_dir, folder, scales, tmp_path, capsys):
    base = ("--model", model_dir, "--input", folder, "--device", "cpu", "--out", tmp_path, "--quiet",
            "--only", "published 5+5", "--no-plot")  # fmt: skip
    other = tmp_path / "other.json"
    other.write_text(scales.read_text() + " ")
    assert run(pareto.main, *base, "--fp8", scales) == 0 == run(pareto.main, *base, "--fp8", scales)
    for words in ((), ("--fp8", other)):
        capsys.readouterr()
        assert run(pareto.main, *base, *words) == 2 and "choose another --out" in capsys.readouterr().err


def test_a_prior(tmp_path, folder):
    tiny_prior().save_pretrained(tmp_path / "prior")
    words = ("--model", tmp_path / "prior", "--input", folder, "--device", "cpu", "--steps", 2, "--quiet")
    assert run(calibrate.main, *words, "--out", tmp_path / "out") == 0
    prior = common.load_model(tmp_path / "prior")
    assert "fp8" in Pipeline(prior, device="cpu", fp8=tmp_path / "out" / "fp8.json").plan.describe()


MISTAKES = [
    (calibrate.main, ["--fp8", "{scales}"], "leave out --plan and --fp8"),
    (calibrate.main, ["--plan", "fused"], "leave out --plan and --fp8"),
    (calibrate.main, ["--large-tiles"], "large tiles need --plan fused"),
    (calibrate.main, ["--solver", "ddpm"], "x_T cannot be inferred"),
    (reconstruct.main, ["--fp8", "none.json"], "none.json: cannot be read"),
    (reconstruct.main, ["--fp8", "{scales}", "--model", "fashion32"], "scales of other weights; calibrate this model"),
]


@pytest.mark.parametrize(("main", "words", "expected"), MISTAKES, ids=[" ".join(m[1][:2]) for m in MISTAKES])
def test_a_mistake_is_one_line(model_dir, folder, scales, tmp_path, capsys, main, words, expected):
    words = [word.format(scales=scales) for word in words]
    out = tmp_path / "out"
    assert run(main, "--model", model_dir, "--input", folder, "--device", "cpu", "--out", out, *words) == 2
    printed = capsys.readouterr()
    assert expected in printed.err and len(printed.err.splitlines()) == 1 and not printed.out
    assert not out.exists()


def test_images_that_cannot_be_read(model_dir, tmp_path, capsys):
    folder = image_folder(tmp_path / "in", 2)
    (folder / "00.png").write_bytes(b"no image")
    words = ("--model", model_dir, "--input", folder, "--device", "cpu", "--steps", 2, "--out", tmp_path / "out")
    assert run(calibrate.main, *words) == 0
    assert "1 broken images skipped: 00" in capsys.readouterr().out
    assert [b["name"] for b in json.loads((tmp_path / "out" / "fp8.json").read_text())["calibrated"]["broken"]] == [
        "00"
    ]
    (folder / "01.png").write_bytes(b"no image")
    assert run(calibrate.main, *words) == 2
