"""The latent DPM and the attribute classifier: their losses in closed form, what they learn, what users get."""

import copy
import dataclasses
import math
import sys

import numpy as np
import pytest
import torch
from torch import nn

from helpers import TINY, TINY_FULL, resumed_equals_whole, tiny_pdae
from pdae_fast import PDAE, LatentConfig, Pipeline, UserError
from pdae_fast.data import Labels
from pdae_fast.data.latents import Latents, statistics
from pdae_fast.schedule import build_schedule
from pdae_fast.training import Trainer, TrainSettings, codes
from pdae_fast.training.codes import class_labels, classifier_task, evaluate, latent_task, logits_of, summary
from pdae_fast.training.feed import BatchOrder
from pdae_fast.training.objective import classifier_loss, latent_loss

D = TINY.latent_dim


def make_latents(z, labels=None, names=None):
    names = names or [f"{i:02d}" for i in range(len(z))]
    return Latents(z, names, labels or [None] * len(z), *statistics(z), "encoder", "images", [])


def gaussian(count, seed=0):
    """Latents whose dimensions have means and widths of their own."""
    generator = torch.Generator().manual_seed(seed)
    mean, std = torch.randn(D, generator=generator) * 5, torch.rand(D, generator=generator) + 0.5
    return mean + std * torch.randn(count, D, generator=generator)


def separable(count, attributes=2, gap=1.0, seed=0):
    """Latents and labels that as many hyperplanes part, with nothing within ``gap`` of them."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(count, D, generator=generator)
    w = torch.linalg.qr(torch.randn(D, attributes, generator=generator))[0]
    side = z @ w
    return z + gap * side.sign() @ w.T, (side > 0).to(torch.uint8)


def labelled(values, columns=None, indices=None):
    columns = columns or [f"a{i}" for i in range(values.shape[1])]
    return Labels(values, columns, list(range(len(values))) if indices is None else indices, [], [])


def trainer(task, dataset, out, save_every=1000, **changes):
    settings = {"steps": 6, "batch_size": 8, "lr": 1e-3, "seed": 3, "flip": False, **changes}
    settings = TrainSettings(task.name, "x", **settings)
    return Trainer(task, dataset, settings, out, log_every=1, save_every=save_every, quiet=True)


def tiny_task(name, count=40, pdae=None):
    if name == "latent":
        return latent_task(pdae or tiny_pdae(), make_latents(gaussian(count)), hidden=32, layers=3)
    z, values = separable(count)
    return classifier_task(pdae or tiny_pdae(), make_latents(z), labelled(values))[:2]


# -- the losses --------------------------------------------------------------------------------------------------------


def test_latent_loss_is_the_mean_absolute_error_of_eps():
    """Against a formula written out in float64: beta is 0.008 at every t, so alpha_bar_t = 0.992^(t + 1)."""
    schedule = build_schedule(LatentConfig(D, 32, 3).schedule)
    z, noise = gaussian(3, 1), gaussian(3, 2)
    t = torch.tensor([0, 250, 999])
    matrix = torch.randn(D, D, generator=torch.Generator().manual_seed(3)) / D
    seen = []

    def model(z_t, t):
        seen.append(z_t)
        return z_t @ matrix + t[:, None] / 1000

    found = latent_loss(model, schedule, z, t, noise)
    bar = np.array([0.992 ** (k + 1) for k in t.tolist()])[:, None]
    z_t = np.sqrt(bar) * z.double().numpy() + np.sqrt(1 - bar) * noise.double().numpy()
    np.testing.assert_allclose(seen[0], z_t, rtol=1e-5, atol=1e-5)
    eps = z_t @ matrix.double().numpy() + t.numpy()[:, None] / 1000
    assert float(found) == pytest.approx(np.abs(noise.double().numpy() - eps).mean(), rel=1e-6)


def test_the_optimal_eps_of_normal_latents_has_the_loss_that_theory_says():
    """For z ~ N(0, I) the best eps_hat is sqrt(1 - alpha_bar_t) z_t, whose error is N(0, alpha_bar_t): the expected
    L1 loss is sqrt(2 alpha_bar_t / pi). Any multiple of it is worse."""
    schedule = build_schedule(LatentConfig(D, 32, 3).schedule)
    generator = torch.Generator().manual_seed(0)
    z, noise = torch.randn(20_000, D, generator=generator), torch.randn(20_000, D, generator=generator)
    for step in (10, 100, 400):
        t = torch.full((len(z),), step)
        bar = schedule.alpha_bar[step]

        def loss(factor, t=t, bar=bar):
            return float(latent_loss(lambda z_t, t: factor * (1 - bar) ** 0.5 * z_t, schedule, z, t, noise))

        assert loss(1.0) == pytest.approx(math.sqrt(2 * bar / math.pi), rel=5e-3)
        assert loss(1.0) < min(loss(0.9), loss(1.1))


def test_classifier_loss_is_the_binary_cross_entropy():
    linear = nn.Linear(D, 2)
    z, y = gaussian(5), torch.tensor([[1, 0], [0, 0], [1, 1], [0, 1], [1, 0]], dtype=torch.uint8)
    logits = (z.double() @ linear.weight.double().T + linear.bias.double()).detach().numpy()
    p = 1 / (1 + np.exp(-logits))
    expected = -(y.numpy() * np.log(p) + (1 - y.numpy()) * np.log(1 - p)).mean()
    assert float(classifier_loss(linear, z, y).detach()) == pytest.approx(expected, rel=1e-5)


def test_the_classifiers_step_does_not_depend_on_how_a_batch_is_split(tmp_path):
    runs = []
    for batch_size, accumulate in ((8, 1), (4, 2), (1, 8)):
        task, dataset = tiny_task("classifier")
        run = trainer(task, dataset, tmp_path / f"{batch_size}", batch_size=batch_size, accumulate=accumulate, steps=4)
        batches = run._batches()
        losses = [float(run.train_step(batches)) for _ in range(4)]
        runs.append((losses, run.model.weight.detach()))
    for losses, weight in runs[1:]:
        assert losses == pytest.approx(runs[0][0], rel=1e-5)
        torch.testing.assert_close(weight, runs[0][1], rtol=1e-4, atol=1e-6)


# -- what is learnt ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_latent_dpm_learns_the_distribution(tmp_path):
    """Normal latents of other means and widths come out of the trained DPM with those means and widths."""
    z = gaussian(4000)
    task, dataset = latent_task(tiny_pdae(), make_latents(z), hidden=64, layers=3)
    run = trainer(task, dataset, tmp_path, steps=600, batch_size=256, lr=2e-3, ema_decay=0.99)
    run.run()
    schedule = build_schedule(task.config.latent.schedule)
    floor = np.sqrt(2 * schedule.alpha_bar / math.pi).mean()  # no network can do better on average over t
    normalised = (z - z.mean(0)) / z.std(0)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(9)
        t = torch.randint(0, 1000, (4000,), generator=generator)
        loss = float(latent_loss(run.ema, schedule, normalised, t, torch.randn(z.shape, generator=generator)))
    assert floor < loss < 1.25 * floor
    drawn = Pipeline(PDAE.from_pretrained(tmp_path), steps=50, device="cpu").sample_latents(2000, clamp=False)
    assert ((drawn.mean(0) - z.mean(0)).abs() / z.std(0)).max() < 0.25
    assert (drawn.std(0) / z.std(0)).min() > 0.75 and (drawn.std(0) / z.std(0)).max() < 1.25


def test_separable_latents_are_separated(tmp_path):
    pytest.importorskip("sklearn", reason="needs pip install 'pdae_fast[experiments]'")
    z, values = separable(400)
    z = z * 3 + 7  # the classifier sees them normalised
    task, dataset, held = classifier_task(tiny_pdae(), make_latents(z), labelled(values), holdout=0.25)
    run = trainer(task, dataset, tmp_path, steps=300, batch_size=64, lr=0.05, ema_decay=0.9)
    run.run()
    codes, labels = held.__getitems__(range(len(held)))
    report = evaluate(logits_of(PDAE.from_pretrained(tmp_path).classifier, codes), labels, ["a0", "a1"])
    assert report["images"] == 100
    assert report["mean_auroc"] == 1 and report["mean_accuracy"] == 1
    assert all(0.5 <= values["majority"] < 0.7 for values in report["attributes"].values())


# -- stopping and resuming ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["latent", "classifier"])
@pytest.mark.parametrize("amp", ["off", "bfloat16"])
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path, name, amp):
    resumed_equals_whole(tmp_path, lambda out: trainer(*tiny_task(name), out, amp=amp))


def test_saving_does_not_disturb_training(tmp_path):
    """The EMA goes into the model for users, not into the one that learns."""
    task, dataset = tiny_task("latent")
    run = trainer(task, dataset, tmp_path)
    run.train_step(run._batches())
    before = copy.deepcopy(run.model.state_dict())
    (tmp_path / "x").mkdir()
    run.save()
    assert all(torch.equal(v, run.model.state_dict()[k]) for k, v in before.items())
    saved = PDAE.from_pretrained(tmp_path).latent_denoiser.state_dict()
    assert all(torch.equal(v, run.ema.state_dict()[k]) for k, v in saved.items())
    assert any(not torch.equal(v, before[k]) for k, v in saved.items())


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("latent", {"hidden": 48}, "latent.hidden is 48, not 32"),
        ("latent", {"encoder": "another"}, "other encoder weights"),
        ("latent", {"images": "another"}, "other images"),
        ("classifier", {"columns": ["a0", "b"]}, "attributes"),
        ("classifier", {"holdout": 0.5}, "the data set has 20 latents but the saved run saw 36"),
        ("classifier", {"label": 1}, "other labels"),
        ("classifier", {"images": "another"}, "other images"),
    ],
)
def test_what_changed_is_named_on_resume(tmp_path, name, change, words):
    z, values = separable(40)
    values = values.clone()

    def make(hidden=32, encoder="encoder", images="images", columns=None, holdout=0.1, label=0):
        latents = make_latents(z)._replace(encoder=encoder, images=images)
        if name == "latent":
            return latent_task(tiny_pdae(), latents, hidden, 3)
        values[5, 0] ^= label
        return classifier_task(tiny_pdae(), latents, labelled(values, columns), holdout)[:2]

    run = trainer(*make(), tmp_path)
    run.save()
    trainer(*make(), tmp_path).resume()
    with pytest.raises(UserError, match=words):
        trainer(*make(**change), tmp_path).resume()


@pytest.mark.parametrize("name", ["latent", "classifier"])
def test_a_non_finite_loss_keeps_the_checkpoint(tmp_path, name):
    task, dataset = tiny_task(name)
    dataset.z[int(dataset.indices[list(BatchOrder(len(dataset), 8, seed=3, stop=3))[2][0]])] = float("nan")
    run = trainer(task, dataset, tmp_path, save_every=1)
    with pytest.raises(UserError, match="loss is nan at step 2; nothing was written after the last checkpoint"):
        run.run()
    again = trainer(*tiny_task(name), tmp_path)
    again.resume()
    assert again.step == 2
    PDAE.from_pretrained(tmp_path)


# -- what users get ----------------------------------------------------------------------------------------------------


def test_the_directory_holds_the_whole_autoencoder(tmp_path):
    """Prior, encoder and G as they were; first the DPM added, then the classifier, each keeping the other."""
    start = tiny_pdae()
    z = gaussian(30)
    trainer(*latent_task(start, make_latents(z), 32, 3), tmp_path / "latent").run()
    with_dpm = PDAE.from_pretrained(tmp_path / "latent")
    assert with_dpm.config == dataclasses.replace(TINY, latent=LatentConfig(D, 32, 3), latent_statistics=True)
    assert Pipeline(with_dpm, steps=2, device="cpu").sample(2).shape == (2, 1, 32, 32)
    # Other latents: the model keeps the statistics that its DPM was trained with.
    task, dataset, _ = classifier_task(with_dpm, make_latents(gaussian(30, 5)), labelled(separable(30)[1]))
    trainer(task, dataset, tmp_path / "full").run()
    full = PDAE.from_pretrained(tmp_path / "full")
    assert full.config.attributes == ("a0", "a1")
    for name, value in start.state_dict().items():
        assert torch.equal(full.state_dict()[name], value), name
    for name, value in with_dpm.state_dict().items():
        assert torch.equal(full.state_dict()[name], value), name
    torch.testing.assert_close(full.latent_mean, z.mean(0))
    torch.testing.assert_close(full.latent_std, z.std(0))
    images = torch.rand(1, 1, 32, 32) * 2 - 1
    pipe = Pipeline(full, steps=2, device="cpu")
    assert not torch.equal(pipe.manipulate(images, "a1", 1.0), pipe.manipulate(images, "a1", 0.0))


def test_a_classifier_means_the_same_under_new_statistics():
    start = tiny_pdae(TINY_FULL)
    z = gaussian(50)
    task, _ = latent_task(start, make_latents(z), 32, 3)
    after = task._whole[0]
    assert not torch.equal(after.latent_mean, start.latent_mean)
    old = start.classifier((z - start.latent_mean) / start.latent_std)
    new = after.classifier((z - after.latent_mean) / after.latent_std)
    torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-4)
    assert after.config.attributes == start.config.attributes


def test_weights_do_not_depend_on_what_was_drawn_before():
    torch.manual_seed(1)
    one = tiny_task("latent")[0].model.state_dict()
    torch.rand(5)
    two = tiny_task("latent")[0].model.state_dict()
    assert all(torch.equal(v, two[k]) for k, v in one.items())


# -- labels ------------------------------------------------------------------------------------------------------------


def test_labels_of_classes():
    latents = make_latents(gaussian(5), [2, None, 0, 2, 0])
    found = class_labels(latents, ["zero", "one", "two"])
    assert found.columns == ["zero", "two"] and found.indices == [0, 2, 3, 4] and found.missing == ["01"]
    assert found.values.tolist() == [[0, 1], [1, 0], [0, 1], [1, 0]]
    with pytest.raises(UserError, match="no classes: give --attributes FILE"):
        class_labels(make_latents(gaussian(3)), [])


def test_the_held_out_part_is_not_trained_on():
    z, values = separable(50)
    _, train, held = classifier_task(tiny_pdae(), make_latents(z), labelled(values, indices=list(range(50))), 0.2)
    assert len(train) == 40 and len(held) == 10 and not set(train.indices.tolist()) & set(held.indices.tolist())
    for part in (train, held):
        assert torch.equal(part.labels, values[part.indices])
    _, train, held = classifier_task(tiny_pdae(), make_latents(z), labelled(values), 0.0)
    assert held is train and len(train) == 50
    with pytest.raises(UserError, match="at least 2 images"):
        classifier_task(tiny_pdae(), make_latents(z), labelled(values[:1]))


# -- the report --------------------------------------------------------------------------------------------------------


def test_the_report_by_hand():
    pytest.importorskip("sklearn", reason="needs pip install 'pdae_fast[experiments]'")
    logits = torch.tensor([[2.0, -1.0], [1.0, 1.0], [-1.0, 3.0], [-2.0, -2.0]])
    labels = torch.tensor([[1, 0], [0, 0], [1, 0], [0, 0]])
    report = evaluate(logits, labels, ["a", "b"])
    a, b = report["attributes"].values()
    # Of the four pairs of a positive and a negative of a, three are in order.
    assert a == {"positives": 2, "accuracy": 0.5, "majority": 0.5, "auroc": 0.75}
    assert b == {"positives": 0, "accuracy": 0.5, "majority": 1.0, "auroc": None}
    assert report["mean_auroc"] == 0.75 and "class_accuracy" not in report
    # The largest logits are of a, a (the first of equals), b, b.
    logits[3] = torch.tensor([-3.0, -2.0])
    exclusive = evaluate(logits, torch.tensor([[1, 0], [0, 1], [0, 1], [0, 1]]), ["a", "b"], exclusive=True)
    assert exclusive["class_accuracy"] == 0.75
    text = summary(report)
    assert "AUROC" in text and "0.7500" in text and "-" in text.splitlines()[2]


def test_without_scikit_learn_accuracy_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    report = evaluate(torch.tensor([[1.0], [-1.0]]), torch.tensor([[1], [0]]), ["a"])
    assert report["auroc_available"] is False and report["mean_auroc"] is None and report["mean_accuracy"] == 1
    assert codes.INSTALL in summary(report)


def test_flips_are_for_images():
    with pytest.raises(UserError, match="flip mirrors images; latent is trained on latents"):
        TrainSettings("latent", "x")
