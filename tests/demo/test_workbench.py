"""What the page computes, against the pipeline, the experiments and the model itself."""

import dataclasses
import io
import time

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from golden_rule import fill, relative
from helpers import TINY, TINY_FULL, images, needs_sklearn, tiny_pdae, tiny_prior
from pdae_fast import DiffAE, DiffAEConfig, Pipeline, Recipe, UserError
from pdae_fast.data import load_image, to_png
from pdae_fast.demo import workbench
from pdae_fast.demo.workbench import PREVIEW, Workbench, recipe_of
from pdae_fast.experiments import manipulate
from pdae_fast.samplers import RECIPES

FAST = recipe_of("fast")


def png(size=(40, 30), colour=90):
    file = io.BytesIO()
    Image.new("RGB", size, (colour, 20, 200)).save(file, "PNG")
    return file.getvalue()


def spent(pipe, run):
    before = pipe.evaluations.get("trunk", 0)
    run()
    return pipe.evaluations["trunk"] - before


@pytest.mark.parametrize("recipe", [FAST, PREVIEW, recipe_of("reversible", steps=4)], ids=["fast", "preview", "belm"])
def test_an_edit_is_the_pipelines(bench, pipe, recipe):
    x0, own = bench.dataset[1].image[None], pipe.with_recipe(recipe)
    found = bench.edit("data-1", {"dark": 0.2}, recipe)
    torch.testing.assert_close(found["edit"], own.manipulate(x0, "dark", 0.2)[0])
    torch.testing.assert_close(found["reconstruction"], own.reconstruct(x0)[0])
    assert torch.equal(found["original"], x0[0])
    z = own.edit(own.edit(own.encode(x0), "dark", 0.2), "round", -0.1)
    both = bench.edit("data-1", {"round": -0.1, "dark": 0.2}, recipe)
    torch.testing.assert_close(both["edit"], own.decode(z, own.invert(x0, own.encode(x0)))[0], atol=1e-3, rtol=1e-3)
    assert not torch.allclose(both["edit"], found["edit"], atol=1e-2)


def test_what_arrives_is_what_manipulate_measures(bench, pipe):
    found = manipulate.manipulate(pipe, bench.dataset[2].image[None], ["dark"], [0.15])
    (row,) = manipulate.measure(pipe, found, ["dark"], [0.15])
    own = bench.edit("data-2", {"dark": 0.15, "round": 0}, FAST)["attributes"]
    assert list(own) == ["dark"]
    assert own["dark"]["asked"] == pytest.approx(row["target_asked"], rel=1e-4)
    assert own["dark"]["arrived"] == pytest.approx(row["target"], rel=1e-3, abs=1e-4)
    assert own["dark"]["after"] - own["dark"]["before"] == pytest.approx(row["target_probability"], abs=1e-4)


def test_x_T_is_inferred_once_for_an_image_and_recipe(bench, pipe):
    first = spent(pipe, lambda: bench.edit("data-0", {"dark": 0.1}, FAST))
    assert first == FAST.evaluations(pipe.schedule, inferred=True) + FAST.steps
    assert spent(pipe, lambda: bench.edit("data-0", {"dark": -0.1}, FAST)) == FAST.steps
    assert spent(pipe, lambda: bench.edit("data-0", {}, FAST)) == 0
    assert spent(pipe, lambda: bench.edit("data-0", {"dark": 0.1}, PREVIEW)) == 11 + 2 * PREVIEW.steps
    assert spent(pipe, lambda: bench.edit("data-3", {"dark": 0.1}, FAST)) == first


def test_an_edit_says_what_it_took_and_not_what_others_did(bench, pipe):
    first = bench.edit("data-0", {"dark": 0.1}, FAST)
    assert first["evaluations"] == FAST.evaluations(pipe.schedule, inferred=True) + FAST.steps
    assert bench.edit("data-0", {"dark": 0.2}, FAST)["evaluations"] == FAST.steps
    assert bench.edit("data-0", {}, FAST)["evaluations"] == 0

    def others(count):
        if not inside:  # once: what goes first is computed between two evaluations of this
            inside.append(bench.edit("data-0", {"dark": -0.1}, PREVIEW))
            time.sleep(0.3)

    inside = []
    edit = bench.edit("data-0", {"dark": 0.3}, FAST, others)
    assert edit["evaluations"] == FAST.steps and inside[0]["evaluations"] == 11 + 2 * PREVIEW.steps
    torch.testing.assert_close(edit["edit"], bench.edit("data-0", {"dark": 0.3}, FAST)["edit"])
    torch.testing.assert_close(inside[0]["edit"], bench.edit("data-0", {"dark": -0.1}, PREVIEW)["edit"])
    inside.clear()
    path = bench.interpolate("data-0", "data-1", "latent", 3, PREVIEW, others)
    assert path["evaluations"] == 11 + PREVIEW.steps + 3 * PREVIEW.steps
    inside.clear()
    start = time.perf_counter()
    assert bench.reconstruct("data-0", PREVIEW, others)["seconds"] < time.perf_counter() - start - 0.29


def test_kept_images_and_latents_are_bounded(bench, monkeypatch):
    monkeypatch.setattr(workbench, "KEPT_IMAGES", 3)
    keys = [bench.keep(image, "x")["key"] for image in images(5)]
    assert len(set(keys)) == 5 and len(bench._pictures) == 3
    torch.testing.assert_close(bench.picture(keys[4]).image, images(5)[4:])
    with pytest.raises(UserError, match="no longer kept"):
        bench.picture(keys[0])
    picture = bench.picture("data-0")
    for steps in range(1, 8):
        bench.latent(picture, Recipe(steps=steps))
    assert len(picture.latents) == workbench.KEPT_LATENTS and len(bench._pictures) == 3


def test_uploads_are_read_like_files(bench, tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    found = bench.upload(png(), "C:\\photos\\a.png")
    assert found["name"] == "a.png"
    assert torch.equal(bench.picture(found["key"]).image[0], load_image(tmp_path / "a.png", 32, 1))


def test_an_image_of_the_models_size_is_not_cropped_again(bench):
    model = tiny_pdae(dataclasses.replace(TINY_FULL, crop="celeba"))
    own = Workbench(Pipeline(model, "fast", device="cpu"), bench.dataset)
    drawn = own.sample(1, 0, PREVIEW)["images"][0]["image"].clamp(-1, 1)
    again = own.upload(to_png(drawn), "drawn 0/0")
    torch.testing.assert_close(own.picture(again["key"]).image[0], drawn, atol=1 / 127, rtol=0)
    with pytest.raises(UserError, match="178 x 218"):
        own.upload(png(), "a.png")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "a.png: the file is empty"),
        (b"hello", "a.png: not an image in a known format"),
        (png()[:-30], "a.png: "),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image in a known format"),
        (png((8000, 7000)), "at most 16 MiB and 50 megapixels"),
        (b"x" * (2**24 + 1), "at most 16 MiB and 50 megapixels"),
    ],
    ids=["empty", "text", "truncated", "postscript", "pixels", "bytes"],
)
def test_bad_uploads_are_refused(bench, content, words):
    with pytest.raises(UserError) as found:
        bench.upload(content, "../../a.png")
    assert words in str(found.value) and ".." not in str(found.value) and not bench._pictures


@pytest.mark.parametrize("key", [None, 3, "", "data-", "data-6", "data--1", "data-1/..", "data-９", "kept-0", "x", {}])
def test_other_keys_are_refused(bench, key):
    with pytest.raises(UserError):
        bench.picture(key)


def test_a_broken_image_on_offer_is_named_without_its_place(bench, pipe, tmp_path):
    (tmp_path / "0.png").write_bytes(b"nothing")
    from pdae_fast.data import open_dataset

    with pytest.raises(UserError) as found:
        Workbench(pipe, open_dataset([tmp_path], 32, 1)).picture("data-0")
    assert "not an image" in str(found.value) and str(tmp_path) not in str(found.value)


@pytest.mark.parametrize(
    "scales", [{"bright": 0.1}, {"dark": "much"}, {"dark": 2}, {"dark": float("nan")}, [0.1], None]
)
def test_other_scales_are_refused(bench, pipe, scales):
    with pytest.raises(UserError):
        bench.edit("data-0", scales, FAST)


@pytest.mark.parametrize("kind", ["latent", "trajectory"])
def test_a_path_is_the_pipelines(bench, pipe, kind):
    a, b = (bench.dataset[i].image for i in (0, 4))
    found = bench.interpolate("data-0", "data-4", kind, 5, PREVIEW)
    expected = pipe.with_recipe(PREVIEW).interpolate(a, b, [0, 0.25, 0.5, 0.75, 1], kind)
    frames = torch.stack(found["frames"])
    assert relative(frames, expected) < 1e-3  # of batches of other sizes
    assert float((frames[1:] - frames[:-1]).abs().amax((1, 2, 3)).min()) > 0.05
    film = Image.open(io.BytesIO(found["gif"]))
    assert film.format == "GIF" and film.info["loop"] == 0
    assert found["evaluations"] == 2 * PREVIEW.evaluations(pipe.schedule, inferred=True) + 5 * PREVIEW.steps


def test_samples_are_the_pipelines_and_can_be_edited(bench, pipe):
    found = bench.sample(3, 7, FAST)
    expected = pipe.sample(3, seed=7, latent_steps=20)
    torch.testing.assert_close(torch.stack([one["image"] for one in found["images"]]), expected)
    edited = bench.edit(found["images"][1]["key"], {"dark": 0.1}, PREVIEW)
    torch.testing.assert_close(edited["original"], expected[1].clamp(-1, 1))
    assert found["rate"] is None


@pytest.mark.parametrize("without", [False, True])
def test_samples_of_an_attribute_are_draws_that_have_it(bench, pipe, without):
    found = bench.sample(2, 0, PREVIEW, "dark", without)
    z = pipe.sample_latents(256, 20)
    place = pipe.model.config.attributes.index("dark")
    x = pipe.with_recipe(PREVIEW).decode(z[:24], None, 0.3, seed=0, indices=range(24))  # they are among the first
    for one in found["images"]:
        near = (x - one["image"]).abs().amax((1, 2, 3))
        assert float(near.min()) < 1e-2
        assert (float(pipe.logits(z[near.argmin()][None])[0, place]) > 0) != without
    assert 0 < found["rate"] <= 1


def test_what_is_hardly_ever_drawn_is_said(bench, monkeypatch):
    monkeypatch.setattr(bench, "_attribute", lambda *arguments: lambda z: np.zeros(len(z)))
    with pytest.raises(UserError, match="only 0 of 2048 draws") as found:
        bench.sample(1, 0, PREVIEW, "dark")
    assert "--" not in str(found.value)


@needs_sklearn
def test_samples_like_a_few_images_are_the_draws_nearest_to_them(bench, pipe):
    found = bench.sample(2, 0, PREVIEW, like=["data-0", "data-1"])
    assert found["best_of"] == 1024 and found["rate"] is None
    # So strong a penalty leaves the direction from the mean of the others to that of the positives.
    mean, std = (v.detach() for v in (pipe.model.latent_mean, pipe.model.latent_std))
    z = (pipe.encode(torch.stack([bench.dataset[i].image for i in range(6)])) - mean) / std
    draws = pipe.sample_latents(1024, 20)
    score = (draws - mean) / std @ (z[:2].mean(0) - z[2:].mean(0))
    best = score.topk(8).indices
    x = pipe.with_recipe(PREVIEW).decode(draws[best], None, 0.3, seed=0, indices=best.tolist())
    for one in found["images"]:
        assert float((x - one["image"]).abs().amax((1, 2, 3)).min()) < 1e-2
    for like in (["data-99"], "data-0", [f"data-{i}" for i in range(6)], ["data-0"] * 99):
        with pytest.raises(UserError):
            bench.sample(2, 0, PREVIEW, like=like)


def test_the_latents_file_holds_what_decodes_to_the_edit(bench, pipe):
    found = safetensors.torch.load(bench.latents("data-1", {"dark": 0.2}, FAST))
    torch.testing.assert_close(found["z"], pipe.encode(bench.dataset[1].image[None]))
    x = pipe.decode(found["z_edited"], found["x_T"])
    torch.testing.assert_close(x[0], bench.edit("data-1", {"dark": 0.2}, FAST)["edit"])


def test_inside_is_what_the_model_says(bench, pipe):
    rows = bench.inside("data-1", 3)["rows"]
    assert [row["t"] for row in rows] == [0, 500, 999]
    x0, row, ab = bench.dataset[1].image[None], rows[1], float(pipe.schedule.alpha_bar[500])
    with torch.no_grad():
        eps, G = pipe.model(row["x_t"][None], torch.tensor([500]), pipe.model.encode(x0))
    scale = (1 - ab) ** 0.5
    for name, noise in (("without", eps), ("with", eps - scale * G)):
        x = ((row["x_t"] - scale * noise) / ab**0.5).clamp(-1, 1)[0]
        torch.testing.assert_close(row[name], x, atol=1e-3, rtol=1e-3)
        assert row[f"{name}_mse"] == pytest.approx(float((x - x0[0]).square().mean()) / 4, rel=1e-2)


def test_a_recipe_is_measured_anew(bench, pipe):
    recipe = recipe_of("published", steps=4)
    for _ in range(2):
        before = pipe.evaluations["trunk"]
        found = bench.reconstruct("data-0", recipe)
        assert pipe.evaluations["trunk"] - before == found["evaluations"] == 8
    error = pipe.with_recipe(recipe).reconstruct(bench.dataset[0].image[None]).clamp(-1, 1) - bench.dataset[0].image
    assert found["mse"] == pytest.approx(float(error.square().mean()) / 4, rel=1e-3) and found["seconds"] > 0


def test_recipes_by_name_solver_and_steps():
    assert recipe_of() == RECIPES["fast"] and recipe_of("preview") == PREVIEW
    assert recipe_of("balanced", "ddim") == RECIPES["balanced"]
    belm = recipe_of("balanced", "belm", 9)
    assert (belm.solver, belm.steps, belm.iterations, belm.spacing) == ("belm", 9, 0, "quadratic")
    for values in (("best",), (["fast"],), ("fast", "euler"), ("fast", {}), ("fast", None, 500), ("fast", None, "9")):
        with pytest.raises(UserError):
            recipe_of(*values)


def test_the_menus_hold_the_pairs_of_recipe_and_solver_that_run(bench, pipe):
    found = bench.describe()
    pairs = {(row["name"], solver): way for row in found["recipes"] for solver, way in row["ways"].items()}
    assert {"ddim", "dpm++3m", "belm"} <= {solver for name, solver in pairs if name == "fast"} <= set(found["solvers"])
    assert [solver for name, solver in pairs if name == "diffae"] == ["ddim"]  # nothing else reaches alpha_bar 1
    assert [solver for name, solver in pairs if name == "reversible"] == ["belm"]  # or it is not
    for (name, solver), way in pairs.items():
        recipe = recipe_of(name, solver)
        assert way["text"] == str(recipe)
        if recipe.steps < 100:
            assert bench.reconstruct("data-0", recipe)["evaluations"] == way["evaluations"], (name, solver)
    for name, solver in {(row["name"], solver) for row in found["recipes"] for solver in found["solvers"]} - set(pairs):
        with pytest.raises(UserError, match=solver.replace("+", r"\+")):
            recipe_of(name, solver)


def test_sliders_end_where_edits_do(bench, pipe):
    assert bench.reach == 1.0  # of random weights, whose logits hardly move
    model = tiny_pdae(TINY_FULL)
    model.classifier.weight.data *= 20
    found = Workbench(Pipeline(model, "fast", device="cpu"))
    names = enumerate(("round", "dark"))
    wanted = np.median([float(manipulate.asked(found.pipe, name, found.reach)[i]) for i, name in names])
    assert found.reach == 0.3 and wanted * 0.2 / 0.3 < workbench.REACH_LOGITS <= wanted
    assert Workbench(Pipeline(tiny_pdae(TINY), "fast", device="cpu")).describe()["reach"] == 1.0


def test_stop_ends_the_work_between_evaluations(bench, pipe):
    class Enough(Exception):
        pass

    def stop(count):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Enough

    requests = [
        lambda: bench.edit("data-2", {"dark": 0.1}, FAST, stop),
        lambda: bench.reconstruct("data-2", FAST, stop),
        lambda: bench.interpolate("data-2", "data-3", "latent", 3, FAST, stop),
        lambda: bench.sample(1, 0, FAST, stop=stop),
        lambda: bench.latents("data-2", {}, FAST, stop),
        lambda: bench.inside("data-2", 8, stop),
    ]
    for request in requests:
        calls, before = 0, pipe.evaluations["trunk"]
        with pytest.raises(Enough):
            request()
        assert pipe.evaluations["trunk"] - before <= 4
    bench.edit("data-2", {"dark": 0.1}, FAST)  # and nothing half done was kept


@pytest.mark.parametrize(
    "request_",
    [lambda b: b.sample(99, 0, FAST), lambda b: b.sample(1, -1, FAST), lambda b: b.sample(1, 2**40, FAST),
     lambda b: b.sample(1, 0, FAST, "bright"), lambda b: b.interpolate("data-0", "data-1", "latent", 99, FAST),
     lambda b: b.interpolate("data-0", "data-1", "spline", 3, FAST), lambda b: b.inside("data-0", 999)],
)  # fmt: skip
def test_too_much_is_refused_before_the_work(bench, pipe, request_):
    before = pipe.evaluations.get("latent", 0)
    with pytest.raises(UserError):
        request_(bench)
    assert pipe.evaluations.get("latent", 0) == before


# -- other models ------------------------------------------------------------------------------------------------------


def test_everything_is_there():
    found = Workbench(Pipeline(tiny_pdae(TINY_FULL), "fast", device="cpu")).describe()
    assert found["missing"] == ["No images on offer: upload one, or start with --input FOLDER."]
    assert sorted(found["attributes"]) == ["dark", "round"] and found["kinds"] == ["latent", "trajectory"]
    assert {row["name"]: row["ways"][row["solver"]] for row in found["recipes"]}["published"]["evaluations"] == 200
    assert "ddpm" not in found["solvers"] and not found["few_shot"]


def test_without_classifier_and_latent_dpm(bench):
    bare = Workbench(Pipeline(tiny_pdae(TINY), "fast", device="cpu"), bench.dataset)
    found = bare.describe()
    assert found["attributes"] == [] and not found["samples"] and found["autoencoder"]
    assert [text.split(",")[0] for text in found["missing"]] == ["No attribute classifier", "No latent DPM"]
    assert bare.edit("data-0", {}, PREVIEW)["attributes"] == {}
    with pytest.raises(UserError, match="not known"):
        bare.edit("data-0", {"dark": 0.1}, PREVIEW)
    with pytest.raises(UserError, match="latent DPM"):
        bare.sample(1, 0, PREVIEW)


def test_a_prior_can_only_be_sampled():
    prior = Workbench(Pipeline(tiny_prior(), "fast", device="cpu"))
    found = prior.describe()
    assert found["samples"] and not found["autoencoder"] and len(found["missing"]) == 1
    assert "prior alone" in found["missing"][0]
    assert len(prior.sample(2, 0, PREVIEW)["images"]) == 2
    with pytest.raises(UserError, match="autoencoder"):
        prior.edit(prior.keep(images(1)[0], "x")["key"], {}, PREVIEW)


def test_a_diffae_has_no_G(bench):
    config = dataclasses.asdict(TINY_FULL)
    fields = {f.name for f in dataclasses.fields(DiffAEConfig)}
    config = DiffAEConfig(**{k: getattr(TINY_FULL, k) for k in config if k in fields})
    model = fill(DiffAE(config))
    own = Workbench(Pipeline(model, "fast", device="cpu"), bench.dataset)
    found = own.describe()
    assert found["kinds"] == ["latent"] and any("no G" in text for text in found["missing"])
    row = own.inside("data-0", 2)["rows"][1]
    assert "without" not in row and "G" not in row and np.isfinite(row["with_mse"])
    assert len(own.interpolate("data-0", "data-1", "latent", 3, PREVIEW)["frames"]) == 3
