"""Against diffusers itself: what it saves is read with its outputs, and what is written it loads with ours."""

import json
import shutil

import pytest
import torch
from checkpoints import fabricate

from golden_rule import fill, relative
from helpers import Later, needs_diffusers
from pdae_fast import Prior, PriorConfig, ScheduleConfig, UserError, checkpoints
from pdae_fast.convert import main
from pdae_fast.schedule import build_schedule

pytestmark = needs_diffusers
diffusers = Later("diffusers")

# Small enough that a case takes a second.
BASE = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
}
RESNET = {
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
    "up_block_types": ("ResnetUpsampleBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "block_out_channels": (32, 64, 64),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
}
MODELS = {
    "defaults": {},
    "google": {
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
        "attention_head_dim": None,
    },
    "resnet-scale-shift": {**RESNET, "resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 32},
    "middle-without-norm": {**RESNET, "resnet_time_scale_shift": "scale_shift", "attention_head_dim": 16},
    "resnet-down-conv-up": {
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "attention_head_dim": 32,
    },
    "attention-resamples-by-blocks": {
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
        "downsample_type": "resnet",
    },
    "attention-everywhere": {
        "down_block_types": ("AttnDownBlock2D",) * 2,
        "up_block_types": ("AttnUpBlock2D",) * 2,
        "downsample_type": "resnet",
        "upsample_type": "resnet",
    },
    "classes-centred-one-channel": {
        "num_class_embeds": 5,
        "center_input_sample": True,
        "in_channels": 1,
        "out_channels": 1,
    },
    "learned-sigma": {"out_channels": 6, "time_embedding_dim": 96},
    "groups-and-blocks": {"norm_num_groups": 8, "layers_per_block": 3, "block_out_channels": (24, 40)},
    "middle-scaled": {"mid_block_scale_factor": 1.4142},
    "middle-plain": {"add_attention": False, "sample_size": (16, 16)},
    "middle-none": {"mid_block_type": None},
    "one-level": {
        "block_out_channels": (32,),
        "down_block_types": ("AttnDownBlock2D",),
        "up_block_types": ("AttnUpBlock2D",),
    },
    "third-wider": {"block_out_channels": (96, 160), "norm_num_groups": 32},
}
SCHEDULES = {
    "linear": {},
    "other-ends": {"beta_start": 0.001, "beta_end": 0.01, "num_train_timesteps": 500},
    "scaled": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine-v": {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
    "sigmoid-sample": {"beta_schedule": "sigmoid", "prediction_type": "sample"},
    "trained": {"trained_betas": [0.01 + 0.001 * i for i in range(20)]},
    "zero-snr": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
}


def model(name: str) -> "diffusers.UNet2DModel":
    return fill(diffusers.UNet2DModel(**BASE | MODELS[name]))


def output(network, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
    with torch.no_grad():
        return network(x, t, class_labels=y).sample[:, : x.shape[1]]


def inputs(network) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    g, classes = torch.Generator().manual_seed(3), network.config.num_class_embeds
    x = torch.randn(3, network.config.in_channels, 16, 16, generator=g)
    return x, torch.tensor([0, 17, 999]), None if classes is None else torch.tensor([0, 3, 4])


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name, tmp_path):
    theirs = model(name)
    theirs.save_pretrained(tmp_path / "theirs")
    x, t, y = inputs(theirs)
    expected = output(theirs, x, t, y)
    prior = Prior.from_pretrained(tmp_path / "theirs")
    assert prior.config.image_size == 16
    with torch.no_grad():
        assert relative(prior(x, t, y), expected) < 1e-5
    prior.save_pretrained(tmp_path / "ours")

    assert main([str(tmp_path / "ours"), "--to", "diffusers", "--out", str(tmp_path / "back"), "--quiet"]) == 0
    again = diffusers.UNet2DModel.from_pretrained(tmp_path / "back" / "unet")
    before, after = theirs.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(output(again, x, t, y), expected)
    assert Prior.from_pretrained(tmp_path / "back").config == prior.config


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name, tmp_path):
    scheduler = diffusers.DDPMScheduler(**SCHEDULES[name])
    pipeline = diffusers.DDPMPipeline(model("defaults"), scheduler)
    pipeline.save_pretrained(tmp_path / "p")
    loaded = checkpoints.load(tmp_path / "p")
    assert loaded.notes == []
    assert loaded.config.prediction == scheduler.config.prediction_type
    ours = build_schedule(loaded.config.schedule).alpha_bar
    assert abs(ours - scheduler.alphas_cumprod.double().numpy()).max() < 1e-6
    assert main([str(tmp_path / "p"), "--to", "diffusers", "--out", str(tmp_path / "back"), "--quiet"]) == 0
    again = diffusers.DDPMPipeline.from_pretrained(tmp_path / "back")
    assert torch.equal(again.scheduler.alphas_cumprod, scheduler.alphas_cumprod)
    assert again.scheduler.config.prediction_type == scheduler.config.prediction_type
    assert checkpoints.load(tmp_path / "back").config == loaded.config


@pytest.mark.parametrize(
    "name",
    [
        "DDIM",
        "PNDM",
        "DPMSolverMultistep",
        "UniPCMultistep",
        "EulerDiscrete",
        "HeunDiscrete",
        "KDPM2Discrete",
        "DEISMultistep",
    ],
)
def test_other_schedulers_train_the_same_way(name, tmp_path):
    """Their own defaults included, also where the file leaves them out."""
    scheduler = getattr(diffusers, f"{name}Scheduler")()
    model("defaults").save_pretrained(tmp_path)
    scheduler.save_pretrained(tmp_path)
    for kept in (None, ("_class_name",)):
        path = tmp_path / "scheduler_config.json"
        if kept:
            path.write_text(json.dumps({key: json.loads(path.read_text())[key] for key in kept}))
        ours = build_schedule(checkpoints.load(tmp_path).config.schedule).alpha_bar
        assert abs(ours - scheduler.alphas_cumprod.double().numpy()).max() < 1e-6


def test_an_adm_prior_goes_there(tmp_path):
    """A guided-diffusion network with classes, in the new attention order, runs in diffusers."""
    unet = fabricate.unet(head_channel=16, use_new_attention_order=True, num_classes=4, learn_sigma=True)
    schedule = ScheduleConfig("cosine", 400)
    prior = fabricate.prior(PriorConfig(16, unet, schedule))
    prior.save_pretrained(tmp_path / "ours")
    assert main([str(tmp_path / "ours"), "--to", "diffusers", "--out", str(tmp_path / "p"), "--quiet"]) == 0
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "p")
    x, t, y = inputs(pipeline.unet)
    with torch.no_grad():
        assert relative(prior(x, t.clamp(max=399), y[:3] % 4), output(pipeline.unet, x, t.clamp(max=399), y % 4)) < 1e-5
    assert pipeline.scheduler.config.variance_type == "learned_range"


REFUSED = {
    "narrow-stem": ({"channel_multiplier": (0.5, 1), "norm_groups": 16}, "its first level is as wide as"),
    "pooled": ({"downsample": "pool", "upsample": "nearest"}, "no down-sampling by pooling alone"),
    "time-scaled": ({"time_scale": 0.25}, "never scaled"),
    "heads-that-widen": ({"num_heads": 4, "attention_resolutions": (1, 2)}, "equally wide in all attention layers"),
    "heads-on-the-way-up": ({"num_heads_upsample": 2}, "as many heads on the way up"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_express(name, tmp_path, capsys):
    changes, words = REFUSED[name]
    fabricate.prior(PriorConfig(16, fabricate.unet(**changes))).save_pretrained(tmp_path / "ours")
    assert main([str(tmp_path / "ours"), "--to", "diffusers", "--out", str(tmp_path / "p")]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "p").exists()


def test_half_precision_and_shards(tmp_path):
    theirs = model("google")
    theirs.save_pretrained(tmp_path / "whole")
    expected = checkpoints.load(tmp_path / "whole").state
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="300KB")
    assert not (tmp_path / "shards" / "diffusion_pytorch_model.safetensors").exists()
    found = checkpoints.load(tmp_path / "shards").state
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    shard = sorted((tmp_path / "shards").glob("*-00002-of-*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name}: missing"):
        checkpoints.load(tmp_path / "shards")

    theirs.half().save_pretrained(tmp_path / "half", variant="fp16")
    loaded = checkpoints.load(tmp_path / "half")
    assert any("half precision" in note for note in loaded.notes)
    key = "unet.out.2.weight"
    assert torch.equal(loaded.state[key], expected[key].half().float())
    # Whole precision is preferred, and .safetensors over a pickle.
    shutil.copy(tmp_path / "whole" / "diffusion_pytorch_model.safetensors", tmp_path / "half")
    torch.save({"conv_in.weight": torch.zeros(3)}, tmp_path / "half" / "diffusion_pytorch_model.bin")
    assert torch.equal(checkpoints.load(tmp_path / "half").state[key], expected[key])


def test_a_pipeline_that_was_trained_with_an_average(tmp_path):
    raw, ema = model("defaults"), model("defaults")
    with torch.no_grad():
        ema.conv_out.bias += 1
    folder = tmp_path / "checkpoint-500"
    raw.save_pretrained(folder / "unet", safe_serialization=False)
    ema.save_pretrained(folder / "unet_ema")
    loaded = checkpoints.load(folder)
    assert loaded.weights == "EMA"
    assert torch.equal(loaded.state["unet.out.2.bias"], ema.conv_out.bias)
    assert any("unet_ema is used" in note for note in loaded.notes)
    assert any("no scheduler_config.json" in note for note in loaded.notes)
    loaded = checkpoints.load(folder, weights="raw")
    assert torch.equal(loaded.state["unet.out.2.bias"], raw.conv_out.bias)
    for inside in ("unet", "unet/config.json", "unet/diffusion_pytorch_model.bin"):
        assert torch.equal(checkpoints.load(folder / inside).state["unet.out.2.bias"], raw.conv_out.bias)
    # A pipeline's scheduler counts for the model inside too.
    diffusers.DDPMScheduler(num_train_timesteps=300).save_pretrained(folder / "scheduler")
    for inside in ("", "unet_ema"):
        assert checkpoints.load(folder / inside).config.schedule.timesteps == 300
    shutil.rmtree(folder / "unet")
    with pytest.raises(UserError, match="EMA weights alone"):
        checkpoints.load(folder, weights="raw")


def test_settings_at_the_top_level_and_defaults_left_out(tmp_path):
    theirs = model("defaults")
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    kept = ("_class_name", "sample_size", *BASE)
    path.write_text(json.dumps({key: config[key] for key in kept}))
    diffusers.DDIMScheduler(num_train_timesteps=200).save_pretrained(tmp_path)
    loaded = checkpoints.load(tmp_path)
    assert (loaded.config.schedule.timesteps, loaded.config.unet.head_channel, loaded.notes) == (200, 8, [])
    x, t, y = inputs(theirs)
    with torch.no_grad():
        assert relative(Prior.from_pretrained(tmp_path)(x, t % 200, y), output(theirs, x, t % 200, y)) < 1e-5
