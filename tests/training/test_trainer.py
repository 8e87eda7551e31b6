"""The trainer: what it optimises, and that stopping and resuming changes nothing."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from helpers import TINY, image_folder, images, tiny_pdae, tiny_prior
from pdae_fast import PDAE, Prior, UserError, config
from pdae_fast.data import open_dataset
from pdae_fast.schedule import build_schedule
from pdae_fast.training import Trainer, TrainSettings
from pdae_fast.training.feed import BatchOrder, step_generator
from pdae_fast.training.objective import pdae_loss, simple_loss
from pdae_fast.training.state import CHECKPOINT_NAME
from pdae_fast.training.tasks import TASKS

SETTINGS = TrainSettings("prior", "x", steps=6, batch_size=4, lr=1e-3, seed=3)


@pytest.fixture
def dataset(tmp_path):
    return open_dataset(image_folder(tmp_path / "images", 10), 32, 1)


def trainer(out, dataset, model=None, **changes):
    torch.manual_seed(0)
    settings = dataclasses.replace(SETTINGS, **changes)
    model = model or (
        Prior(TINY.prior)
        if settings.task == "prior"
        else PDAE.from_prior(tiny_prior(), latent_dim=16, encoder_channel=32)
    )
    return Trainer(TASKS[settings.task](model), dataset, settings, out, log_every=1, save_every=2, quiet=True)


def test_every_epoch_sees_every_image_once_in_a_new_order():
    batches = list(BatchOrder(10, 4, seed=1, stop=10))
    flat = [i for batch in batches for i in batch]
    epochs = [flat[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert list(BatchOrder(10, 4, seed=1, start=7, stop=10)) == batches[7:]
    assert list(BatchOrder(10, 4, seed=2, stop=3)) != batches[:3]


def test_draws_of_a_step_depend_on_seed_and_step_alone():
    draws = {(s, n): torch.randn(4, generator=step_generator(s, n)) for s in (0, 1) for n in (0, 1)}
    assert torch.equal(draws[0, 1], torch.randn(4, generator=step_generator(0, 1)))
    assert len({tuple(v.tolist()) for v in draws.values()}) == 4


def test_prior_loss_is_the_mean_squared_error_of_eps():
    model, x0, noise = tiny_prior(), images(2), images(2, seed=1)
    schedule, t = build_schedule(TINY.schedule), torch.tensor([3, 700])
    a = torch.tensor(schedule.alpha_bar[[3, 700]]).float()[:, None, None, None]
    with torch.no_grad():
        expected = ((model(a.sqrt() * x0 + (1 - a).sqrt() * noise, t) - noise) ** 2).mean()
        assert float(simple_loss(model, schedule, x0, t, noise)) == pytest.approx(float(expected), rel=1e-5)


def test_the_velocity_is_added_to_either_loss():
    """v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0, of the truth and of what eps' says x0 is; where its error is
    more than a hundred times that of eps (t = 900), a hundred times."""
    model, x0, noise, K = tiny_pdae(), images(3), images(3, seed=1), 0.3
    schedule, t = build_schedule(TINY.schedule), torch.tensor([3, 600, 900])
    a, c, weight = (
        torch.tensor(table[t])[:, None, None, None]
        for table in (schedule.alpha_bar, schedule.shift_coef, schedule.loss_weight)
    )
    x_t = a.sqrt() * x0 + (1 - a).sqrt() * noise

    def expected(eps, weight):
        start = (x_t - (1 - a).sqrt() * eps) / a.sqrt()
        v, guess = (a.sqrt() * e - (1 - a).sqrt() * x for e, x in ((noise, x0), (eps, start)))
        error = (guess - v) ** 2
        error[2] = 100 * (eps[2] - noise[2]) ** 2
        return float((weight * (eps - noise) ** 2 + K * error).mean())

    with torch.no_grad():
        eps, gradient = (part.double() for part in model(x_t.float(), t, model.encode(x0)))
        found = simple_loss(model.prior(), schedule, x0, t, noise, K), pdae_loss(model, schedule, x0, t, noise, None, K)
        assert float(found[0]) == pytest.approx(expected(eps, 1), rel=1e-4)
        assert float(found[1]) == pytest.approx(expected(eps + c * gradient, weight), rel=1e-4)


@pytest.mark.parametrize("task", ["prior", "pdae"])
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path, dataset, task):
    whole = trainer(tmp_path / "whole", dataset, task=task)
    assert whole.run() is None
    parted = trainer(tmp_path / "parted", dataset, task=task)
    batches = parted._batches()
    for _ in range(4):  # stops in the middle of the second epoch
        parted.train_step(batches)
    (tmp_path / "parted").mkdir()
    parted.save()
    resumed = trainer(tmp_path / "parted", dataset, task=task)
    resumed.resume()
    assert resumed.step == 4
    resumed.run()
    for a, b in ((whole.model, resumed.model), (whole.ema, resumed.ema)):
        assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    one, two = (load_file(tmp_path / d / "model.safetensors") for d in ("whole", "parted"))
    assert all(torch.equal(v, two[k]) for k, v in one.items())


def test_pdae_training_leaves_the_prior_alone(tmp_path, dataset):
    run = trainer(tmp_path / "run", dataset, task="pdae", lr=0.01)
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    run.run()
    trained = ("encoder.", *(f"decoder.{name}." for name in run.model.decoder.TRAINED))
    changed = {k for k, v in run.model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and all(k.startswith(trained) for k in changed)
    assert {k.split(".")[0] for k in changed} == {"encoder", "decoder"}
    # The EMA trails behind the weights; the frozen part of it is the prior itself.
    ema = run.ema.state_dict()
    assert all(torch.equal(ema[k], before[k]) for k in before if not k.startswith(trained))
    assert all(not torch.equal(ema[k], run.model.state_dict()[k]) for k in changed)


def test_accumulation_equals_the_larger_batch(tmp_path, dataset):
    """Same images, noise and t: two half batches must give the gradient of the whole one."""
    run = trainer(
        tmp_path / "a",
        dataset,
        model=Prior(dataclasses.replace(TINY, unet=dataclasses.replace(TINY.unet, dropout=0.0)).prior),
        accumulate=2,
        flip=False,
    )
    start = {k: v.clone() for k, v in run.model.state_dict().items()}
    halves = [dataset[i].image[None].expand(4, -1, -1, -1) for i in (0, 1)]
    x0 = torch.cat(halves)
    draws = []
    for micro_step in (0, 1):
        generator = step_generator(run.settings.seed, micro_step)
        draws.append(
            (torch.randint(0, 1000, (4,), generator=generator), torch.randn(halves[0].shape, generator=generator))
        )
    t, noise = (torch.cat(v) for v in zip(*draws, strict=True))
    run.train_step(iter(halves))
    model = Prior(run.model.config)
    model.load_state_dict(start)
    optimizer = torch.optim.Adam(model.parameters(), lr=run.settings.lr)
    simple_loss(model, run.task.schedule, x0, t, noise).backward()
    optimizer.step()
    for name, value in model.state_dict().items():
        # Adam's first step is lr * sign(gradient): a gradient of rounding size may come out either way.
        different = (value - run.model.state_dict()[name]).abs() > 1e-5
        assert different.float().mean() < 0.02, name


def test_ema_by_hand(tmp_path, dataset):
    run = trainer(tmp_path / "run", dataset, ema_decay=0.5)
    name = "unet.out.2.bias"
    expected = run.model.state_dict()[name].clone()
    batches = run._batches()
    for step in range(4):
        run.train_step(batches)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * run.model.state_dict()[name]
    torch.testing.assert_close(run.ema.state_dict()[name], expected)


def test_learning_rates():
    warm = TrainSettings("prior", "x", steps=100, lr=1.0, warmup=3)
    assert [warm.learning_rate(n) for n in (0, 1, 3, 50)] == [0.25, 0.5, 1.0, 1.0]
    cosine = dataclasses.replace(warm, warmup=0, lr_schedule="cosine")
    assert cosine.learning_rate(0) == 1 and cosine.learning_rate(50) == pytest.approx(0.5)
    assert cosine.learning_rate(100) == pytest.approx(0)


def test_bfloat16_losses_follow_float32(tmp_path, dataset):
    full, low = (trainer(tmp_path / amp, dataset, amp=amp) for amp in ("off", "bfloat16"))
    for run in (full, low):
        run.losses = [run.train_step(b) for b in [run._batches()] for _ in range(4)]
    assert low.losses != full.losses
    assert low.losses == pytest.approx(full.losses, rel=0.02)


def test_a_non_finite_loss_stops_with_the_step_and_keeps_the_checkpoint(tmp_path, dataset):
    run = trainer(tmp_path / "run", dataset)
    batches = run._batches()
    run.train_step(batches)
    (tmp_path / "run").mkdir()
    run.save()
    saved = (tmp_path / "run" / CHECKPOINT_NAME).read_bytes()
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    with pytest.raises(UserError, match="loss is nan at step 1.*lower --lr"):
        run.train_step(iter([torch.full((4, 1, 32, 32), float("nan"))]))
    assert (tmp_path / "run" / CHECKPOINT_NAME).read_bytes() == saved
    assert all(torch.equal(v, before[k]) for k, v in run.model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 5}, "batch_size is 5 but the saved run used 4"),
        ({"lr": 0.5}, "lr is 0.5"),
        ({"seed": 4}, "seed is 4"),
        ({"lr_schedule": "cosine"}, "lr_schedule"),
    ],
)
def test_a_changed_setting_is_refused_on_resume(tmp_path, dataset, changes, words):
    run = trainer(tmp_path / "run", dataset)
    (tmp_path / "run").mkdir()
    run.save()
    with pytest.raises(UserError, match=words):
        trainer(tmp_path / "run", dataset, **changes).resume()
    trainer(tmp_path / "run", dataset, steps=99).resume()  # more steps are fine under a constant rate


def test_other_mismatches_on_resume(tmp_path, dataset):
    with pytest.raises(UserError, match="nothing to resume"):
        trainer(tmp_path / "none", dataset).resume()
    run = trainer(tmp_path / "run", dataset)
    (tmp_path / "run").mkdir()
    run.save()
    fewer = open_dataset(image_folder(tmp_path / "few", 5), 32, 1)
    with pytest.raises(UserError, match="5 images but the saved run saw 10"):
        trainer(tmp_path / "run", fewer).resume()
    wider = dataclasses.replace(TINY, unet=dataclasses.replace(TINY.unet, base_channel=64))
    with pytest.raises(UserError, match="another configuration"):
        trainer(tmp_path / "run", dataset, model=Prior(wider.prior)).resume()
    saved = torch.load(tmp_path / "run" / CHECKPOINT_NAME, weights_only=True)
    del saved["config"]["noise"]  # as before there was such a field
    torch.save(saved, tmp_path / "run" / CHECKPOINT_NAME)
    trainer(tmp_path / "run", dataset).resume()
    heavier = TASKS["prior"](tiny_prior(), velocity=0.5)
    with pytest.raises(UserError, match="other --velocity than those of the saved run \\(0.5, not None\\)"):
        Trainer(heavier, dataset, SETTINGS, tmp_path / "run", quiet=True).resume()
    Trainer(heavier, dataset, SETTINGS, tmp_path / "run", quiet=True).save()
    with pytest.raises(UserError, match="other --velocity than those of the saved run \\(None, not 0.5\\)"):
        trainer(tmp_path / "run", dataset).resume()
    path = tmp_path / "run" / CHECKPOINT_NAME
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="not a readable checkpoint"):
        trainer(tmp_path / "run", dataset).resume()


# -- the command, killed -----------------------------------------------------------------------------------------------


def command(tmp_path, out, *more):
    return [
        *(sys.executable, "-m", "pdae_fast.train", "prior", "--data", str(tmp_path / "images"), "--out", str(out)),
        *("--architecture", str(tmp_path / "config.json"), "--steps", "400", "--batch-size", "4", "--device", "cpu"),
        *("--log-every", "1", "--save-every", "3", "--quiet", *more),
    ]


def wait_for_step(out, step, process):
    log = out / "log.jsonl"
    for _ in range(1200):
        if log.exists() and len(log.read_text().splitlines()) >= step:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("no progress")


@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_run_resumes_bit_for_bit(tmp_path, dataset, signal_number):
    (tmp_path / "config.json").write_text(config.dumps(TINY))
    out = tmp_path / "run"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command(tmp_path, out), env=environment, stderr=subprocess.PIPE, text=True)
    wait_for_step(out, 5, process)
    process.send_signal(signal_number)
    _, stderr = process.communicate(timeout=60)
    saved = torch.load(out / CHECKPOINT_NAME, weights_only=True)
    if signal_number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL and saved["step"] % 3 == 0
    else:
        assert process.returncode == 128 + signal_number
        assert f"saved step {saved['step']}" in stderr and len(stderr.splitlines()) == 1
    stop = saved["step"] + 5
    finish = [a if a != "400" else str(stop) for a in command(tmp_path, out, "--resume")]
    subprocess.run(finish, env=environment, check=True)
    straight = [a if a != "400" else str(stop) for a in command(tmp_path, tmp_path / "straight")]
    subprocess.run(straight, env=environment, check=True)
    one, two = (torch.load(d / CHECKPOINT_NAME, weights_only=True) for d in (out, tmp_path / "straight"))
    assert one["step"] == two["step"] == stop
    for part in ("model", "ema"):
        assert all(torch.equal(v, two[part][k]) for k, v in one[part].items())
    for k, state in one["optimizer"]["state"].items():
        assert all(torch.equal(v, two["optimizer"]["state"][k][name]) for name, v in state.items())
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, stop + 1))
    losses = [
        [json.loads(line)["loss"] for line in (d / "log.jsonl").read_text().splitlines()]
        for d in (out, tmp_path / "straight")
    ]
    assert losses[0] == losses[1]


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, dataset, monkeypatch):
    run = trainer(tmp_path / "run", dataset)
    (tmp_path / "run").mkdir()
    run.save()
    saved = (tmp_path / "run" / CHECKPOINT_NAME).read_bytes()

    def save(contents, file):  # what PyTorch's archive writer does when the disk is full
        file.write(b"part")
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 1 vs 2")  # noqa: B904

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(UserError, match="cannot write .*No space left on device"):
        run.save()
    assert (tmp_path / "run" / CHECKPOINT_NAME).read_bytes() == saved
    assert not list((tmp_path / "run").glob(".*"))


def test_a_model_of_the_wrong_task(tmp_path, dataset):
    with pytest.raises(ValueError, match="for task prior, not pdae"):
        Trainer(TASKS["pdae"](tiny_pdae()), dataset, SETTINGS, tmp_path)
