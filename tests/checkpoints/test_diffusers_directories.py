"""diffusers directories with something wrong in them, or of something else: one line that says what."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import fabricate
from safetensors.torch import load_file, save_file

from pdae_fast import Prior, PriorConfig, UserError, checkpoints
from pdae_fast.checkpoints.exports import save_diffusers
from pdae_fast.convert import main

UNET, SCHEDULER = "unet/config.json", "scheduler/scheduler_config.json"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
SOURCE = fabricate.prior(
    PriorConfig(32, fabricate.unet(downsample="conv", upsample="conv", use_scale_shift_norm=False))
)


@pytest.fixture
def pipeline(tmp_path) -> Path:
    folder = tmp_path / "pipeline"
    save_diffusers(folder, SOURCE.config, SOURCE.state_dict())
    return folder


def change(path: Path, **values) -> None:
    """Write ``values`` over those of a JSON file; ... removes one."""
    contents = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in contents.items() if value is not ...}))


# name: (file, values, words of the one line)
CONFIGURATIONS = {
    "wider": (UNET, {"block_out_channels": [64, 128]}, "base_channel 64 but the weights say 32"),
    "deeper": (UNET, {"layers_per_block": 2}, "but the weights say 1"),
    "attention": (
        UNET,
        {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2},
        "attention_resolutions [] but the weights say [2]",
    ),
    "uneven-attention": (UNET, {"up_block_types": ["UpBlock2D"] * 2}, "AttnDownBlock2D and UpBlock2D at one level"),
    "classes": (UNET, {"num_class_embeds": 10}, "num_classes 10 but the weights say None"),
    "scale-shift": (UNET, {"resnet_time_scale_shift": "scale_shift"}, "use_scale_shift_norm True but the weights"),
    "channels": (UNET, {"in_channels": 1, "out_channels": 1}, "input_channel 1 but the weights say 3"),
    "middle": (UNET, {"mid_block_type": None}, "middle none but the weights say attention"),
    "resampling": (
        UNET,
        {"down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"]},
        "downsample residual but the weights say conv",
    ),
    "mixed-resampling": (
        UNET,
        {
            "down_block_types": ["ResnetDownsampleBlock2D", "DownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D"] * 3,
            "block_out_channels": [32] * 3,
        },
        "resample partly by convolution, partly by residual blocks",
    ),
    "heads": (UNET, {"attention_head_dim": 24}, "attention layers of 64 channels cannot be split by head_channel=24"),
    "no-heads": (UNET, {"attention_head_dim": 0}, "cannot be split by head_channel=0"),
    "no-width": (UNET, {"block_out_channels": [0, 64]}, "block_out_channels is [0, 64]; expected positive"),
    "no-groups": (UNET, {"norm_num_groups": 0}, "norm_groups must be a positive integer"),
    "no-image": (UNET, {"sample_size": 0}, "image_size must be a positive integer"),
    "no-blocks": (UNET, {"layers_per_block": 0}, "_blocks_of_a_block 0 but the weights say 1"),
    "levels": (UNET, {"block_out_channels": [32]}, "2 down blocks, 2 up blocks and 1 widths"),
    "words": (UNET, {"layers_per_block": "two"}, "layers_per_block is 'two'; expected a number"),
    "image": (UNET, {"sample_size": [32, 64]}, "expected the side of a square image"),
    "skip-blocks": (UNET, {"down_block_types": ["SkipDownBlock2D"] * 2}, "a network with SkipDownBlock2D"),
    "fourier": (UNET, {"time_embedding_type": "fourier"}, "time_embedding_type is 'fourier'"),
    "fork": (UNET, {"attention_legacy_order": True}, "made for a fork of diffusers (attention_legacy_order)"),
    "fork-time": (UNET, {"time_embedding_type": "adm"}, "made for a fork of diffusers (time_embedding_type 'adm')"),
    "class-timestep": (UNET, {"class_embed_type": "timestep"}, "class_embed_type is 'timestep'; only null"),
    "class-identity": (UNET, {"class_embed_type": "identity"}, "class_embed_type is 'identity'; only null"),
    "activation": (UNET, {"act_fn": "gelu"}, "act_fn is 'gelu'; only silu or swish"),
    "conditional": (UNET, {"_class_name": "UNet2DConditionModel"}, "a UNet2DConditionModel (conditional on text"),
    "nameless": (UNET, {"_class_name": ...}, "configuration without _class_name"),
    "scheduler-of-another-process": (
        SCHEDULER,
        {"_class_name": "CMStochasticIterativeScheduler"},
        "CMStochasticIterativeScheduler; expected the scheduler of a DDPM",
    ),
    "variance-exploding": (SCHEDULER, {"_class_name": "ScoreSdeVeScheduler"}, "ScoreSdeVeScheduler; expected"),
    "scheduler-of-nothing": (SCHEDULER, {"_class_name": ...}, "no _class_name; expected the scheduler"),
    "betas": (SCHEDULER, {"beta_schedule": "laplace"}, "beta_schedule is 'laplace'; expected one of linear"),
    "betas-list": (SCHEDULER, {"beta_schedule": ["linear"]}, "beta_schedule is ['linear']"),
    "beta": (SCHEDULER, {"beta_end": "high"}, "beta_end is 'high'; expected a number"),
    "trained-betas": (SCHEDULER, {"trained_betas": [0.1, "x"]}, "expected a list of numbers"),
    "flow": (SCHEDULER, {"prediction_type": "flow_prediction"}, "prediction_type is 'flow_prediction'"),
    "terminal": (SCHEDULER, {"rescale_betas_zero_snr": True}, "a network that predicts eps says nothing"),
    "steps": (SCHEDULER, {"num_train_timesteps": 1.5}, "timesteps is 1.5; expected int"),
    "latents": ("model_index.json", {"vqvae": ["diffusers", "VQModel"]}, "a diffusion of latents or from text"),
    "consistency": ("model_index.json", {"_class_name": "ConsistencyModelPipeline"}, "another process than DDPM's"),
}


def one_line(folder: Path, capsys, *options: object) -> str:
    out = folder.parent / "out"
    assert main([str(folder), "--out", str(out), *map(str, options)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and not out.exists()
    return captured.err


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_configurations(name, pipeline, capsys):
    file, values, words = CONFIGURATIONS[name]
    change(pipeline / file, **values)
    assert words in one_line(pipeline, capsys)


def remove(name: str):
    return lambda folder: (folder / name).unlink()


def other_family(folder: Path) -> None:
    save_file({k: v.clone() for k, v in SOURCE.unet.state_dict().items()}, folder / WEIGHTS)


def one_tensor_less(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    state.pop("up_blocks.0.resnets.0.conv1.weight")
    save_file(state, folder / WEIGHTS)


def one_tensor_more(folder: Path) -> None:
    save_file(load_file(folder / WEIGHTS) | {"mid_block.extra.weight": torch.zeros(1)}, folder / WEIGHTS)


def index_of_nothing(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "unet" / "other.safetensors")
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"conv_in.weight": "gone.safetensors"}}))


def only_flax(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "unet" / "diffusion_pytorch_model.msgpack")


# name: (what is done to the folder, words)
FILES = {
    "no-config": (remove(UNET), "no config.json in it; expected that of the UNet2DModel"),
    "no-weights": (remove(WEIGHTS), "no weights in it; expected diffusion_pytorch_model.safetensors"),
    "only-flax": (only_flax, "no weights in it, only diffusion_pytorch_model.msgpack"),
    "other-family": (other_family, "a guided-diffusion U-Net; "),
    "tensor-less": (one_tensor_less, "missing 1"),
    "tensor-more": (one_tensor_more, "no place for the tensor mid_block.extra.weight"),
    "missing-shard": (index_of_nothing, "gone.safetensors: missing; "),
    "config-is-a-list": (lambda folder: (folder / SCHEDULER).write_text("[1]"), "holds one list; expected a JSON"),
    "config-is-cut": (lambda folder: (folder / SCHEDULER).write_text('{"a":'), "not a JSON file"),
    "no-unet": (lambda folder: shutil.rmtree(folder / "unet"), "no config.json in it, and no unet"),
}


@pytest.mark.parametrize("name", FILES)
def test_files(name, pipeline, capsys):
    damage, words = FILES[name]
    damage(pipeline)
    assert words in one_line(pipeline, capsys)


def test_options_may_only_repeat(pipeline, capsys):
    assert "says head_channel 8 but" in one_line(pipeline, capsys, "--head-channel", 8)
    assert "says use_new_attention_order True but" in one_line(pipeline, capsys, "--use-new-attention-order")
    assert "says schedule cosine but" in one_line(pipeline, capsys, "--schedule", "cosine")
    assert "says image_size 64 but" in one_line(pipeline, capsys, "--image-size", 64)
    assert checkpoints.load(pipeline, num_heads=1, image_size=32, schedule="linear").config == SOURCE.config
    assert checkpoints.load(pipeline, dropout=0.3).config.unet.dropout == 0.3


def test_paths_inside(pipeline):
    for inside in ("", "unet", UNET, WEIGHTS, "model_index.json", SCHEDULER):
        assert checkpoints.load(pipeline / inside).config == SOURCE.config


def test_a_bare_weights_file_needs_its_configuration(pipeline, tmp_path):
    shutil.copy(pipeline / WEIGHTS, tmp_path / "bare.safetensors")
    with pytest.raises(UserError, match="a diffusers UNet2DModel; expected its config.json beside it"):
        checkpoints.load(tmp_path / "bare.safetensors")


def test_written_over_only_when_told(pipeline, tmp_path, capsys):
    SOURCE.save_pretrained(tmp_path / "ours")
    arguments = [str(tmp_path / "ours"), "--to", "diffusers", "--out", str(pipeline)]
    assert main(arguments) == 2
    assert "exists" in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "--dtype", "float16"]) == 0
    assert {t.dtype for t in load_file(pipeline / WEIGHTS).values()} == {torch.float16}
    assert Prior.from_pretrained(pipeline).config == SOURCE.config
    assert main([*arguments[:-1], str(pipeline / UNET)]) == 2
    assert "a file; expected a directory" in capsys.readouterr().err
