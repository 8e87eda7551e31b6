"""The ways to run a step: what they may change and what they may not, and that nothing waits for the device."""

import dataclasses
import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import TINY, images, tiny_pdae, tiny_prior
from pdae_fast import PDAE, UserError
from pdae_fast.data import Sample
from pdae_fast.schedule import Tables
from pdae_fast.training import Trainer, TrainSettings, command
from pdae_fast.training import step as steps
from pdae_fast.training.feed import Prefetcher, Prepared
from pdae_fast.training.losses import Losses
from pdae_fast.training.objective import pdae_loss
from pdae_fast.training.state import CHECKPOINT_NAME
from pdae_fast.training.step import GraphedStep, StepOptions
from pdae_fast.training.tasks import TASKS

CPU = torch.device("cpu")
NO_DROPOUT = dataclasses.replace(TINY, unet=dataclasses.replace(TINY.unet, dropout=0.0))


def trainer(out, task="pdae", dataset=None, model=None, config=TINY, save_every=1000, **changes):
    """Options of the step and settings of the run, by name."""
    options = {name: changes.pop(name) for name in steps.STEP_HELP if name in changes}
    values = {"steps": 4, "batch_size": 4, "lr": 1e-3, "seed": 3, **changes}
    dataset = dataset or [Sample(image, f"{i}", None) for i, image in enumerate(images(10))]
    model = model or (tiny_pdae(config) if task == "pdae" else tiny_prior(config))
    return Trainer(
        TASKS[task](model), dataset, TrainSettings(task, "x", **values), out, log_every=2, save_every=save_every,
        quiet=True, options=StepOptions(**options),
    )  # fmt: skip


def losses_of(run, count=4):
    batches = run._batches()
    return [float(run.train_step(batches)) for _ in range(count)]


def weights(run):
    return torch.cat([p.detach().flatten() for p in run.parameters])


def gradients(run):
    """Loss and gradients of the first batch."""
    batch = run._prepare(next(run._batches()), 0)
    run._build()
    run.task.train()
    torch.manual_seed(5)
    loss = run._loss(steps.move(batch, run.device, run.options))
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in run.parameters])


# -- every option ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "tolerance"),
    [
        ("fused_adam", 1e-5),
        ("channels_last", 1e-5),
        ("fused_norms", 1e-5),
        ("checkpointing", 0),
        ("frozen_bfloat16", 0.02),
    ],
)
def test_losses_of_a_run_with_an_option_follow_those_without(tmp_path, option, tolerance):
    # Dropout draws in the order in which images lie in memory: without it channels-last computes the same.
    config = NO_DROPOUT if option == "channels_last" else TINY
    plain, run = trainer(tmp_path, config=config), trainer(tmp_path, config=config, **{option: True})
    expected, found = losses_of(plain), losses_of(run)
    assert found == pytest.approx(expected, rel=tolerance, abs=0)
    if tolerance:
        assert not torch.equal(weights(run), weights(plain)), "the option changed nothing"
    else:
        assert torch.equal(weights(run), weights(plain))


@pytest.mark.parametrize("options", [{"fused_adam": True}, {"channels_last": True, "frozen_bfloat16": True}])
def test_resuming_with_the_same_options_is_bit_for_bit(tmp_path, options):
    whole = trainer(tmp_path / "whole", **options)
    whole.run()
    parted = trainer(tmp_path / "parted", **options)
    losses_of(parted, 2)
    (tmp_path / "parted").mkdir()
    parted.save()
    resumed = trainer(tmp_path / "parted", **options)
    resumed.resume()
    resumed.run()
    assert torch.equal(weights(whole), weights(resumed))


def test_a_run_goes_on_with_other_options(tmp_path):
    """A plain checkpoint under fused Adam and channels-last weights: the moments follow the weights' layout."""
    run = trainer(tmp_path / "run", config=NO_DROPOUT)
    expected = losses_of(trainer(tmp_path / "straight", config=NO_DROPOUT), 4)
    losses_of(run, 2)
    (tmp_path / "run").mkdir()
    run.save()
    other = trainer(tmp_path / "run", config=NO_DROPOUT, fused_adam=True, channels_last=True)
    other.resume()
    assert other.optimizer.param_groups[0]["fused"] is True
    for parameter, state in other.optimizer.state.items():
        assert state["exp_avg"].stride() == parameter.stride() and state["step"] == 2
    assert losses_of(other, 2) == pytest.approx(expected[2:], rel=1e-5)
    other.save()
    back = trainer(tmp_path / "run", config=NO_DROPOUT, steps=5)
    back.resume()
    assert not back.optimizer.param_groups[0]["fused"] and isinstance(back.optimizer.param_groups[0]["lr"], float)
    losses_of(back, 1)


@pytest.mark.parametrize("task", ["prior", "pdae"])
def test_checkpointing_gives_the_same_loss_and_gradients_from_less_memory(tmp_path, task):
    found = []
    for checkpointing in (False, True):
        run, kept = trainer(tmp_path, task, checkpointing=checkpointing), {}

        def pack(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        batch = steps.move(run._prepare(next(run._batches()), 0), CPU, run.options)
        run._build()
        own = {p.untyped_storage().data_ptr() for p in run.model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run._loss(batch)
        found.append((gradients(run), sum(size for place, size in kept.items() if place not in own)))
    ((loss, gradient), size), ((other, again), less) = found
    assert torch.equal(loss, other) and torch.equal(gradient, again) and gradient.abs().max() > 0
    assert less < 0.6 * size


def test_fused_norms_give_the_same_gradients(tmp_path):
    (loss, gradient), (other, fused) = (
        gradients(trainer(tmp_path, config=NO_DROPOUT, fused_norms=on)) for on in (False, True)
    )
    torch.testing.assert_close(other, loss, rtol=1e-5, atol=0)
    assert float((fused - gradient).norm() / gradient.norm()) < 1e-5
    run = trainer(tmp_path, fused_norms=True)
    run._build()
    kinds = [type(m).__name__ for m in run.model.modules() if isinstance(m, steps.ResBlock)]
    assert set(kinds) == {"FusedResBlock"}
    assert not any(isinstance(m, steps.FusedResBlock) for m in run.ema.modules())


@pytest.mark.parametrize("amp", ["off", "bfloat16"])
def test_the_frozen_half_in_bfloat16(tmp_path, amp):
    """Its results are those of the frozen half to bfloat16's accuracy, and no gradient reaches it."""
    model = tiny_pdae().eval()
    half = steps.FrozenHalf(model.decoder)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16} and not any(
        p.requires_grad for p in half.parameters()
    )
    x, t = images(2), torch.tensor([3, 700])
    with torch.autocast("cpu", torch.bfloat16, enabled=amp == "bfloat16"):
        features, eps = half(x, t)
    with torch.no_grad():
        wanted = model.decoder.trunk(x, t)
        wanted_eps = model.decoder.decode_eps(wanted)
    assert features.h.dtype == (torch.float32 if amp == "off" else torch.bfloat16) and eps.dtype == torch.float32
    for got, expected in (
        (features.h, wanted.h),
        (features.skips[0], wanted.skips[0]),
        (eps, wanted_eps),
    ):
        assert 1e-6 < float((got.float() - expected).norm() / expected.norm()) < 0.03
    task = TASKS["pdae"](model)
    task.frozen = half
    pdae_loss(model, Tables(task.schedule), x, t, images(2, seed=1), task.frozen).backward()
    trained = {id(p) for p in [*model.encoder.parameters(), *model.decoder.trained_parameters()]}
    assert all((p.grad is not None) == (id(p) in trained) for p in model.parameters())
    assert not any(module.training for module in task.train().frozen.modules())


def test_the_frozen_copy_is_made_of_the_resumed_weights(tmp_path):
    run = trainer(tmp_path / "run", frozen_bfloat16=True)
    (tmp_path / "run").mkdir()
    run.save()
    torch.manual_seed(1)
    other = trainer(tmp_path / "run", model=PDAE(TINY), frozen_bfloat16=True)
    other.resume()
    losses_of(other, 1)
    name = "input_blocks.0.0.weight"
    expected = run.model.decoder.state_dict()[name].bfloat16()
    assert torch.equal(other.task.frozen.unet.state_dict()[name], expected)
    assert not any(
        "frozen" in key for key in torch.load(tmp_path / "run" / CHECKPOINT_NAME, weights_only=True)["model"]
    )


@pytest.mark.slow
def test_compiling_takes_the_step_whole(tmp_path, monkeypatch):
    """One graph without breaks, by the compiler's front end alone (its back end takes minutes)."""
    calls, compile_ = [], torch.compile

    def front_end(module, **options):
        calls.append(options)
        return compile_(module, backend="aot_eager", fullgraph=True, **options)

    monkeypatch.setattr(torch, "compile", front_end)
    options = {"amp": "bfloat16", "frozen_bfloat16": True, "config": NO_DROPOUT}
    expected = losses_of(trainer(tmp_path, **options), 2)
    assert losses_of(trainer(tmp_path, compile=True, **options), 2) == pytest.approx(expected, rel=5e-3)
    assert calls == [{"dynamic": False}]
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("task", "options", "words"),
    [
        ("pdae", {"cuda_graph": True}, "--cuda-graph needs a CUDA device, not cpu"),
        ("prior", {"frozen_bfloat16": True}, "--frozen-bfloat16 needs a frozen half, which train prior does not have"),
        ("latent", {"channels_last": True}, "--channels-last is for the U-Net, which train latent does not train"),
        ("encoder", {"fused_norms": True}, "--fused-norms is for the U-Net, which train encoder does not train"),
        ("classifier", {"checkpointing": True}, "--checkpointing is for the U-Net"),
    ],
)
def test_options_that_cannot_be(task, options, words):
    with pytest.raises(UserError, match=words):
        StepOptions(**options).check(task, CPU)


def test_the_graph_is_refused_for_several_processes_and_with_checkpointing():
    gpu = torch.device("cuda", 0)
    StepOptions(cuda_graph=True).check("pdae", gpu)
    with pytest.raises(UserError, match="for one process, not 2"):
        StepOptions(cuda_graph=True).check("pdae", gpu, 2)
    with pytest.raises(UserError, match="cannot be combined with --checkpointing"):
        StepOptions(cuda_graph=True, checkpointing=True).check("pdae", gpu)


def test_the_command_passes_the_options_on(tmp_path, monkeypatch):
    seen = []

    class Stop(Exception):
        pass

    def stop(*arguments, options, **more):
        seen.append(options)
        raise Stop

    monkeypatch.setattr(command, "Trainer", stop)
    monkeypatch.setattr(command, "_image_task", lambda *a: (None, None, None))
    arguments = ["pdae", "--data", "x", "--out", str(tmp_path / "o"), "--init-from", "fashion32", "--device", "cpu"]
    for more in ([], ["--fused-adam", "--channels-last"]):
        with pytest.raises(Stop):
            command.main([*arguments, *more])
    assert seen == [StepOptions(), StepOptions(fused_adam=True, channels_last=True)]
    with pytest.raises(UserError, match="--cuda-graph needs a CUDA device"):
        command.main([*arguments, "--cuda-graph"])


# -- a captured step, with a capture that repeats the calls instead ----------------------------------------------------


def repeat(step, reset, device, pool):
    """Stands for `engine.graphs.capture`: warms up as it does, and records by keeping the function."""
    for _ in range(2):
        reset()
        step()
    return types.SimpleNamespace(replay=step)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("resumed", [False, True])
def test_a_captured_step_is_the_plain_step(tmp_path, accumulate, resumed):
    """Bit for bit: the warm-up leaves no trace, inputs and rates reach the captured buffers.

    With dropout for one batch a step; a graph has one seed, so the second batch's masks are its own.
    """
    config = TINY if accumulate == 1 else NO_DROPOUT
    plain, run = (trainer(tmp_path, config=config, fused_adam=True, accumulate=accumulate, warmup=3) for _ in range(2))
    if resumed:
        for one in (plain, run):
            losses_of(one, 1)
    rate = torch.tensor(1.0, dtype=torch.float64)  # as exact as the plain run's rate
    run.optimizer.param_groups[0]["lr"] = rate
    run._graphed = GraphedStep(run._passes, run.optimizer, CPU, repeat)
    run.options = dataclasses.replace(run.options, cuda_graph=True)
    assert losses_of(run, 3) == losses_of(plain, 3)
    assert torch.equal(weights(run), weights(plain)) and rate == plain.optimizer.param_groups[0]["lr"]
    assert run.optimizer.state[run.parameters[0]]["step"] == 3 + resumed


# -- nothing is read in between ----------------------------------------------------------------------------------------


class NoReading(TorchDispatchMode):
    """Fails where a tensor's value is read by Python, which on a GPU would be waiting for it."""

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(function) and "nonzero" not in str(function), function
        return function(*args, **(kwargs or {}))


def test_a_step_reads_nothing_from_the_device(tmp_path):
    run = trainer(tmp_path, fused_adam=True, accumulate=2)
    run.losses.deferred = True
    batches = run._batches()
    losses_of(run, 1)
    with NoReading():
        loss = run.train_step(batches)
    assert isinstance(loss, torch.Tensor)
    with pytest.raises(AssertionError), NoReading():
        float(loss)


def test_a_deferred_non_finite_loss_is_found_before_anything_is_written(tmp_path):
    """The fifth batch is NaN; the log is due after the sixth step, checkpoints after the third and the sixth."""
    run = trainer(tmp_path / "run", save_every=3, steps=20)
    run.losses.deferred = True
    good = list(trainer(tmp_path, steps=6)._batches())
    run._batches = lambda: iter([*good[:4], torch.full_like(good[4], float("nan")), good[5]])
    with pytest.raises(UserError, match="loss is nan at step 4; nothing was written.*lower --lr"):
        run.run()
    saved = torch.load(tmp_path / "run" / CHECKPOINT_NAME, weights_only=True)
    assert saved["step"] == 3 and all(torch.isfinite(v).all() for v in saved["model"].values())
    assert run.step == 6  # it was not looked at before
    with pytest.raises(UserError, match="loss is nan at step 4"):
        run.save()
    assert torch.load(tmp_path / "run" / CHECKPOINT_NAME, weights_only=True)["step"] == 3


def test_the_first_bad_loss_of_any_process_is_the_one_that_is_named():
    def process(bad, gather):
        losses = Losses(CPU, True, gather)
        for step, value in enumerate([1.0, 2.0, 3.0]):
            losses.add(torch.tensor(bad.get(step, value)), step)
            losses.steps += 1
        return losses

    def keep(values):
        rows.append(values)
        return torch.ones(1, 3).neg()

    rows = []
    for bad in ({}, {2: float("nan")}, {1: float("inf"), 2: float("nan")}):
        process(bad, keep).check()
    with pytest.raises(UserError, match="the loss is inf at step 1"):
        process({}, lambda values: torch.stack(rows)).mean()
    sound = process({}, lambda values: torch.stack([values, values + 3]))  # a sum of 6 here and of 9 there
    sound.bad_step -= 9  # so that the other's is no step either
    assert sound.mean() == 2.5 and sound.steps == 0 and sound.total == 0


# -- prefetching -------------------------------------------------------------------------------------------------------


def test_prefetched_batches_are_the_same_batches(tmp_path):
    plain, run = (trainer(tmp_path, accumulate=2) for _ in range(2))
    expected = losses_of(plain)
    feed = Prefetcher(run._batches(), run._prepare, 0, CPU)
    assert [run.train_step(feed) for _ in range(4)] == expected
    assert torch.equal(weights(plain), weights(run))
    assert next(feed, None) is None and next(feed, None) is None
    feed.close()


def test_a_broken_batch_is_reported_when_its_turn_comes():
    def batches():
        yield torch.zeros(1)
        raise UserError("broken")

    feed = Prefetcher(batches(), lambda batch, n: (batch + n,), 5, CPU)
    first = next(feed)
    assert isinstance(first, Prepared) and first[0] == 5
    with pytest.raises(UserError, match="broken"):
        next(feed)
    feed.close()
