"""Networks of other projects, read from their files: outputs within 1e-5 of what their own code gave."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import foreign_golden
from foreign_golden import about, numbers
from golden_rule import relative
from pdae_fast import Prior
from pdae_fast.schedule import build_schedule

FORWARD = 1e-5
DIFFUSERS = ("diffusers-celebahq", "diffusers-cifar10", "diffusers-vpred", "diffusers-class-resnet")


def write(name: str, folder: Path) -> tuple[Path, dict]:
    """The fixture as its family keeps it, and the options for what the files do not say."""
    state, said = foreign_golden.weights(name), about(name)
    if name in DIFFUSERS:
        for file, contents in said["files"].items():
            path = folder / "model" / file
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(contents))
        save_file(state, folder / "model" / "unet" / "diffusion_pytorch_model.safetensors")
        return folder / "model", {}
    torch.save(state, folder / "model.pt")
    if name == "ddim-celebahq":
        return folder / "model.pt", {"config": said["config"]}
    unet, schedule = said["unet"], said["schedule"]
    options = {"num_heads": unet["num_heads"], "num_head_channels": unet.get("num_head_channels")}
    if options["num_head_channels"] is not None:
        del options["num_heads"]
    options |= {name: schedule[name] for name in ("noise_schedule", "diffusion_steps", "rescale_timesteps")}
    options |= {"image_size": said["image_size"], "predict_xstart": schedule["predict_xstart"]}
    return folder / "model.pt", options | {"use_new_attention_order": unet.get("use_new_attention_order", False)}


def as_eps(output: torch.Tensor, x: torch.Tensor, t: torch.Tensor, alpha_bar: torch.Tensor, kind: str) -> torch.Tensor:
    a, b = (root[t].reshape(-1, 1, 1, 1).double() for root in (alpha_bar.sqrt(), (1 - alpha_bar).sqrt()))
    return {"epsilon": output, "v_prediction": a * output + b * x, "sample": (x - a * output) / b}[kind]


@pytest.mark.parametrize(
    "name", [*DIFFUSERS, "ddim-celebahq", "improved-plain", "improved-cosine4000", "guided-512", "guided-class"]
)
def test_forward(name, tmp_path):
    path, options = write(name, tmp_path)
    prior, g = Prior.from_pretrained(path, **options), numbers(name)
    alpha_bar = build_schedule(prior.config.schedule).alpha_bar
    # diffusers computes its schedules in float32.
    assert abs(alpha_bar - g["schedule.alphas_cumprod"].numpy()).max() < 1e-6
    x, t, y = g["forward.x"], g["forward.t"], g.get("forward.y")
    channels = x.shape[1]
    with torch.no_grad():
        raw, eps = prior.unet.decode(prior.unet.trunk(x, t, y)), prior(x, t, y)
    assert relative(raw, g["forward.out"][:, :channels]) < FORWARD
    expected = as_eps(
        g["forward.out"][:, :channels], x, t, g["schedule.alphas_cumprod"].double(), prior.config.prediction
    )
    assert relative(eps, expected) < FORWARD
    assert prior.config.image_size == 32
    assert prior.notes == ()
