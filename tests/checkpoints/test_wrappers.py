"""What trainers wrap around a state dict, in any nesting: the same network comes out, the average preferred."""

import dataclasses

import pytest
import torch
from checkpoints import fabricate
from checkpoints.test_load import assert_same_pdae
from safetensors.torch import save_file

from pdae_fast import PDAE, LatentConfig, Prior, ScheduleConfig, UserError, checkpoints
from pdae_fast.config import to_dict

SOURCE = fabricate.prior(fabricate.config().prior)
EMA = SOURCE.unet.state_dict()
RAW = fabricate.raw(EMA)


def under(prefix: str, state: dict) -> dict:
    return {prefix + name: tensor for name, tensor in state.items()}


def averaged(state: dict) -> dict:
    """As torch.optim.swa_utils.AveragedModel saves."""
    return {"n_averaged": torch.tensor(7)} | under("module.", state)


ONE = {
    "model": lambda s: {"model": s, "optimizer": {"state": {}, "param_groups": []}},
    "model_state_dict": lambda s: {"epoch": 3, "model_state_dict": under("module.", s)},
    "state_dict": lambda s: {"state_dict": under("net.", s), "loss": torch.zeros(1)},
    "nested": lambda s: {"state_dict": {"model": under("_orig_mod.module.model.", s)}},
    "prefixes": lambda s: under("module._orig_mod.model.", s),
    "prefixes-other-order": lambda s: under("_orig_mod.model.module.", s),
    "own-prior": lambda s: under("unet.", s),
    "own-prior-compiled": lambda s: {"model": under("_orig_mod.unet.", s)},
    "list": lambda s: [under("module.", s), {"state": {}, "param_groups": []}, 1, 2],
}
BOTH = {
    "model-ema": lambda r, e: {"model": r, "ema": e, "step": 3},
    "state_dicts": lambda r, e: {"model_state_dict": r, "ema_state_dict": e},
    "list": lambda r, e: [under("module.", r), {"state": {}, "param_groups": []}, 1, 2, e],
    "averaged": lambda r, e: {"model": under("module.", r), "ema_model": averaged(e)},
    "prefixes": lambda r, e: under("module.", r) | under("ema_model.module.", e),
    "prefixes-with-buffers": lambda r, e: under("online_model.", r) | under("ema_model.", e) | {"betas": torch.ones(9)},
    "lucidrains-way": lambda r, e: {
        "step": 3,
        "model": r,
        "ema": {"step": torch.tensor(1), "initted": torch.tensor(True)}
        | under("online_model.", r)
        | under("ema_model.", e),
    },
    "lightning": lambda r, e: {"state_dict": under("net.", r) | under("ema.module.", e), "hyper_parameters": {"lr": 1}},
}


@pytest.mark.parametrize("name", ONE)
def test_one_copy(name, tmp_path):
    loaded = checkpoints.load(fabricate.save(tmp_path / "p.pt", ONE[name](EMA)))
    assert all(torch.equal(loaded.state[f"unet.{key}"], tensor) for key, tensor in EMA.items())
    assert loaded.weights == "as stored"


@pytest.mark.parametrize("name", BOTH)
def test_both_copies(name, tmp_path):
    path = fabricate.save(tmp_path / "p.pt", BOTH[name](RAW, EMA))
    for weights, expected, words in (("ema", EMA, "EMA"), ("raw", RAW, "raw")):
        loaded = checkpoints.load(path, weights=weights)
        assert loaded.state.keys() == under("unet.", expected).keys()
        assert all(torch.equal(loaded.state[f"unet.{key}"], tensor) for key, tensor in expected.items())
        assert loaded.weights == words


@pytest.mark.parametrize("contents", [averaged(EMA), {"ema": EMA}, under("ema_model.module.", EMA)], ids="abc")
def test_the_average_alone(contents, tmp_path):
    path = fabricate.save(tmp_path / "p.pt", contents)
    assert checkpoints.load(path).weights == "EMA"
    with pytest.raises(UserError, match="only the EMA weights"):
        checkpoints.load(path, weights="raw")


FLAVOURED = {
    "channel_multiplier": (1, 1.5),
    "norm_groups": 16,
    "num_classes": 3,
    "downsample": "conv_asymmetric",
    "upsample": "conv",
    "use_scale_shift_norm": False,
    "middle": "plain",
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "time_scale": 0.5,
}


@pytest.mark.parametrize("changes", [{}, FLAVOURED], ids=["adm", "flavoured"])
@pytest.mark.parametrize("form", ["pt", "wrapped", "safetensors"])
def test_this_projects_own_state_dicts(form, changes, tmp_path):
    """Of a PDAE, with its config.json for what the weights do not say."""
    schedule = ScheduleConfig("stored", 3, betas=(0.1, 0.2, 0.3)) if changes else ScheduleConfig("cosine", 800)
    c = dataclasses.replace(fabricate.config(**changes), schedule=schedule, prediction="sample", crop="celeba")
    c = dataclasses.replace(c, latent=LatentConfig(12, 16, 3), attributes=("a", "b"), latent_statistics=True)
    source, path = fabricate.pdae(c), tmp_path / "model.pt"
    state = source.state_dict()
    if form == "safetensors":
        path = tmp_path / "model-of-mine.safetensors"
        save_file(state, path)
    else:
        torch.save({"model": under("module.", state)} if form == "wrapped" else state, path)
    found = PDAE.from_pretrained(path, config=to_dict(c))
    assert found.config == c
    assert found.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.state_dict().items())
    if not changes:
        assert_same_pdae(found, source)


def test_a_class_conditional_prior_of_this_project(tmp_path):
    prior = fabricate.prior(fabricate.config(num_classes=3).prior)
    torch.save(prior.state_dict(), tmp_path / "p.pt")
    found = Prior.from_pretrained(tmp_path / "p.pt")
    assert torch.equal(found.unet.class_emb.weight, prior.unet.class_emb.weight)
