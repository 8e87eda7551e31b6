"""Priors of every flavour, trained further and adapted, with every option of a step."""

import dataclasses

import pytest
import torch

from flavours import BASE, FLAVOURS
from golden_rule import fill
from helpers import TINY, images, resumed_equals_whole
from pdae_fast import PDAE, Prior, ScheduleConfig, UNetConfig
from pdae_fast.data import Sample
from pdae_fast.training import Trainer, TrainSettings
from pdae_fast.training.step import StepOptions
from pdae_fast.training.tasks import TASKS, ImagesWithRows

ZERO_SNR = ScheduleConfig("scaled_linear", 200, 1e-3, 0.02, zero_terminal_snr=True)
# Of the table: with what else of the U-Net, and around it.
CASES = {
    "google": ({}, {}),
    "course": ({}, {"prediction": "v_prediction", "schedule": ZERO_SNR}),
    "improved": ({}, {"schedule": ScheduleConfig("cosine", 4000)}),
    "narrow": ({}, {"schedule": ScheduleConfig("linear", 1000, 1e-4, 0.03)}),
    "pooled": ({"num_classes": 3}, {"prediction": "sample", "schedule": ScheduleConfig("sigmoid", 100)}),
    "middle-none": (
        {"num_classes": 3, "learn_sigma": True, "center_input_sample": True},
        {"schedule": ScheduleConfig("stored", 4, betas=(0.1, 0.2, 0.3, 0.4))},
    ),
    "middle-scaled-add": ({"num_heads_upsample": 4, "num_heads": 1}, {}),
}
LABELS = torch.arange(10) % 3


def trainer(name, task, out="out", dropout=0.0, **options):
    more, rest = CASES[name]
    unet = UNetConfig(**BASE | FLAVOURS[name] | more | {"input_channel": 1, "dropout": dropout})
    config = dataclasses.replace(TINY, unet=unet, **rest)
    model = fill(Prior(config.prior) if task == "prior" else PDAE(config))
    data = [Sample(image, f"{i}", None) for i, image in enumerate(images(10))]
    if config.unet.num_classes:
        data = ImagesWithRows(data, LABELS, range(10))
    settings = TrainSettings(task, "x", steps=6, batch_size=2, lr=1e-3, seed=3)
    return Trainer(TASKS[task](model), data, settings, out, quiet=True, options=StepOptions(**options), save_every=100)


def losses_of(run, count=3):
    batches = run._batches()
    return [float(run.train_step(batches)) for _ in range(count)]


@pytest.mark.parametrize("task", ["prior", "pdae"])
@pytest.mark.parametrize("name", CASES)
def test_options_of_a_step_change_its_rounding_alone(name, task):
    plain = losses_of(trainer(name, task))
    every = {"fused_adam": True, "channels_last": True, "checkpointing": True, "fused_norms": True}
    assert losses_of(trainer(name, task, **every)) == pytest.approx(plain, rel=2e-4)
    if task == "pdae":
        assert losses_of(trainer(name, task, frozen_bfloat16=True)) == pytest.approx(plain, rel=0.03)


@pytest.mark.parametrize("name", CASES)
def test_only_encoder_and_g_of_an_adapted_prior_change(name):
    run = trainer(name, "pdae")
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    assert losses_of(run)[2] > 0
    trained = ("encoder.", *(f"decoder.{part}." for part in run.model.decoder.TRAINED))
    changed = {k for k, v in run.model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and all(k.startswith(trained) for k in changed)
    assert {k.split(".")[0] for k in changed} == {"encoder", "decoder"}


@pytest.mark.parametrize("name", ["improved", "middle-none"])
def test_a_learned_variance_is_left_alone(name):
    """Bit for bit: its rows get no gradient, and Adam without a gradient does not move."""
    run = trainer(name, "prior")
    before = {k: v.clone() for k, v in run.model.unet.out[2].state_dict().items()}
    losses_of(run)
    for model in (run.model, run.ema):
        for key, value in model.unet.out[2].state_dict().items():
            assert value.shape[0] == 2 and torch.equal(value[1:], before[key][1:])
            assert not torch.equal(value[:1], before[key][:1])


@pytest.mark.parametrize("task", ["prior", "pdae"])
def test_a_run_with_labels_resumes_bit_for_bit(tmp_path, task):
    resumed_equals_whole(tmp_path, lambda out: trainer("pooled", task, out, dropout=0.1))


def test_labels_go_with_their_images():
    """Whatever the order of the images and their flips."""
    run = trainer("pooled", "prior")
    sums = torch.stack([image.image.sum() for image in run.dataset.dataset])
    seen = []
    for n, batch in enumerate(run._batches()):
        x0, _, _, y = run._prepare(batch, n)
        places = (x0.sum((1, 2, 3))[:, None] - sums).abs().argmin(1)
        assert torch.equal(y, LABELS[places])
        seen += y.tolist()
    assert len(seen) == 12 and set(seen) == {0, 1, 2}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["course", "pooled"])
def test_compiling_takes_the_step_whole(monkeypatch, name):
    """One graph without breaks, by the compiler's front end alone, as in test_step."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda task, **o: compile_(task, backend="aot_eager", fullgraph=True, **o))
    for task in ("prior", "pdae"):
        options = {"frozen_bfloat16": task == "pdae"}
        expected = losses_of(trainer(name, task, **options))
        assert losses_of(trainer(name, task, compile=True, **options)) == pytest.approx(expected, rel=5e-3)
    torch._dynamo.reset()
