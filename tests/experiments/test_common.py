"""Bundled data, pipelines that share a plan, cost."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from helpers import TINY_FULL, image_folder, images, tiny_pdae
from pdae_fast import Pipeline, Recipe, cli, reconstruct
from pdae_fast.data import FashionMNIST, bundled, open_dataset
from pdae_fast.engine.cost import network_costs
from pdae_fast.errors import UserError
from pdae_fast.experiments import common


def test_the_bundled_data_opens_by_its_word():
    for split in ("train", "test"):
        fashion = open_dataset("bundled:fashion", 32, 1, split=split)
        assert isinstance(fashion, FashionMNIST) and len(fashion) == 1000 and set(fashion.labels) == set(range(10))
    avatars = open_dataset("bundled:avatars", 64, 3)
    assert len(avatars) == 400 and avatars[0].image.shape == (3, 64, 64)
    with pytest.raises(UserError, match="no bundled data bundled:faces; there is bundled:avatars, bundled:fashion"):
        open_dataset("bundled:faces", 32)


def test_every_model_has_data():
    assert bundled.bundled_for("fashion32", 1) == "bundled:fashion"
    assert bundled.bundled_for("avatars64", 3) == "bundled:avatars"
    assert [bundled.bundled_for("/some/where", channels) for channels in (1, 3)] == [
        "bundled:fashion",
        "bundled:avatars",
    ]


@pytest.fixture(scope="module")
def pipe():
    return Pipeline(tiny_pdae(TINY_FULL), steps=3, device="cpu", plan="eager")


def test_a_pipeline_with_another_recipe(pipe):
    other = pipe.with_recipe(steps=2, spacing="quadratic")
    own = Pipeline(pipe.model, steps=2, spacing="quadratic", device="cpu", plan="eager")
    x0 = images(2)
    assert torch.equal(other.reconstruct(x0), own.reconstruct(x0))
    assert (pipe.recipe.steps, pipe.recipe.spacing) == (3, "uniform") and other.plan is pipe.plan
    with pytest.raises(TypeError, match="step"):
        pipe.with_recipe(step=2)
    with pytest.raises(UserError, match="steps must be between"):
        pipe.with_recipe(steps=0)


@pytest.mark.parametrize(
    "settings", [{}, {"iterations": 0}, {"iterations": 2}, {"solver": "belm"}, {"spacing": "quadratic", "steps": 7}]
)
@pytest.mark.parametrize("mode", list(common.MODES))
def test_the_cost_is_what_was_announced(pipe, mode, settings):
    own, cost = pipe.with_recipe(Recipe(**{"steps": 3, **settings})), common.Cost()
    with cost.of(own):
        common.autoencode(own, mode, images(2), [4, 9], seed=0)
    assert cost.report(2)["network_evaluations_per_image"]["trunk"] == common.evaluations(own, mode)
    again = common.Cost()
    again.add(cost.values())
    again.add(cost.values())
    assert again.evaluations["trunk"] == 2 * cost.evaluations["trunk"] and again.seconds == 2 * cost.seconds


def test_random_x_T_depends_on_the_image_not_on_its_batch(pipe):
    x0 = images(3)
    assert torch.equal(pipe.random_x_T(1, [0, 5, 6])[2:], pipe.random_x_T(1, [6]))
    together = common.autoencode(pipe, "random", x0, [0, 5, 6], seed=1)
    # The random network multiplies what the batch size rounds; another x_T would be off by about 1.
    assert torch.allclose(together[2:], common.autoencode(pipe, "random", x0[2:], [6], seed=1), atol=0.02)
    assert (together[1] - common.autoencode(pipe, "random", x0[1:2], [6], seed=1)).abs().mean() > 0.2


def test_a_fingerprint_sees_every_weight():
    model = tiny_pdae()
    before = common.fingerprint(model)
    assert before == common.fingerprint(tiny_pdae())
    with torch.no_grad():
        model.decoder.out[2].bias[0] += 1e-3
    assert common.fingerprint(model) != before


def test_parts_of_the_network_are_counted_as_parts(tmp_path, model_dir, capsys):
    """Without G a decoding costs trunk and eps-decoder: the network's multiplications less those of G."""
    folder = image_folder(tmp_path / "in", 2)
    words = ["--model", model_dir, "--input", folder, "--device", "cpu", "--steps", 3, "--modes", "random"]
    argv = [str(a) for a in [*words, "--reuse", "gradient:off", "--out", tmp_path / "out"]]
    assert cli.run(reconstruct.main, argv) == 0
    costs = network_costs(TINY_FULL)
    expected = 3 * (1 - sum(costs.gradient) / costs.full)
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())["modes"]["random"]
    assert found["whole_evaluations_per_image"] == pytest.approx(expected)
    assert found["network_evaluations_per_image"]["trunk"] == 3
    table = capsys.readouterr().out
    assert "reuse gradient:off" in table and f" {expected:.1f} " in table


def test_every_command_ends_alike(capsys):
    run = SimpleNamespace(args=SimpleNamespace(quiet=False), model=SimpleNamespace(notes=["1 head"]), out=Path("out"))
    said: dict[str, str] = {}
    run.pipe = SimpleNamespace(plan=SimpleNamespace(describe=lambda: said))
    files, broken = ["grid.png", "images", "metrics.json"], [("x", "cut off"), ("y", "empty"), ("x", "cut off")]
    common.say(run, ["table"], files, broken)
    wrote = f"wrote {Path('out/grid.png')}, {Path('out/images')} and {Path('out/metrics.json')}"
    lines = ["table", "2 broken images skipped: x, y", "assumed about the model: 1 head", wrote]
    assert capsys.readouterr().out.splitlines() == lines
    said["fp8"] = "emulated"
    common.say(run, ["table"], files, broken)
    assert capsys.readouterr().out.splitlines() == [*lines[:2], "approximate: fp8, emulated", *lines[2:]]
    run.args.quiet = True
    common.say(run, ["table"], files, broken)
    assert capsys.readouterr().out == ""


def test_codes_in_groups_share_their_images_noise():
    x_T = images(2)
    pipe = SimpleNamespace(decode=lambda codes, x_T: torch.cat([codes, x_T.flatten(1)[:, :1]], dim=1))
    found = common.decode_edits(pipe, torch.arange(6.0)[:, None], x_T)
    assert found.tolist() == [[float(k), float(x_T[k % 2, 0, 0, 0])] for k in range(6)]


def test_values_that_are_no_numbers_are_named():
    assert common.check_finite(images(1), "the image holds").shape == (1, 1, 32, 32)
    with pytest.raises(UserError, match="the image holds NaN or infinite values; try --dtype float32"):
        common.check_finite(torch.tensor([1.0, float("inf")]), "the image holds")
