"""Diff-AE's networks against the numbers of its own code."""

import dataclasses

import pytest
import torch
from diffae_golden import NAMES, model

from foreign_golden import numbers
from pdae_fast import DiffAE, DiffAEConfig, UNetConfig, UserError
from pdae_fast.config import from_dict, to_dict
from pdae_fast.models.layers import ResBlock

TINY = DiffAEConfig(
    image_size=32,
    latent_dim=16,
    unet=UNetConfig(base_channel=32, channel_multiplier=(1, 1), num_residual_blocks_of_a_block=1),
    encoder_multiplier=(1, 1, 2),
)


@pytest.fixture(params=NAMES)
def case(request):
    return model(request.param), numbers(request.param)


@torch.no_grad()
def test_forward(case):
    own, g = case
    torch.testing.assert_close(own.encode(g["encode.x_0"]), g["encode.z"], atol=1e-6, rtol=0)
    eps = own(g["forward.x"], g["forward.t"], g["forward.z"])
    torch.testing.assert_close(eps, g["forward.out"], atol=1e-5, rtol=0)
    if own.latent_denoiser is not None:
        found = own.latent_denoiser(g["latent.z_t"], g["latent.t"])
        torch.testing.assert_close(found, g["latent.out"], atol=1e-5, rtol=0)


@torch.no_grad()
def test_every_block_reads_z_as_a_scale(case):
    own, g = case
    blocks = [m for m in own.unet.modules() if isinstance(m, ResBlock)]
    found = torch.cat([block.emb_z_layers(g["encode.z"]) for block in blocks], dim=1)
    torch.testing.assert_close(found, g["stylespace"], atol=1e-5, rtol=0)


def test_a_fresh_model_has_gradients_everywhere_and_saves_itself(tmp_path):
    own = DiffAE(TINY)
    own.unet.out[2].weight.data.fill_(0.1)  # it starts at zero
    for block in (m for m in own.modules() if isinstance(m, ResBlock)):
        block.out_layers[3].weight.data.normal_(std=0.1)
    x0 = torch.randn(2, 3, 32, 32)
    own(x0, torch.tensor([3, 700]), own.encode(x0)).square().sum().backward()
    without = [k for k, p in own.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not [k for k in without if "qkv" not in k and "attention" not in k and ".norm." not in k]
    own.save_pretrained(tmp_path)
    found = DiffAE.from_pretrained(tmp_path)
    assert found.config == TINY and found.image_shape == (3, 32, 32)
    assert all(torch.equal(v, found.state_dict()[k]) for k, v in own.state_dict().items())


def test_configuration():
    assert from_dict(to_dict(TINY)) == TINY
    assert DiffAEConfig().encoder.widths == (128, 128, 256, 384, 512, 512)
    for changes, words in (
        ({"image_size": 30}, "cannot be halved"),
        ({"image_size": 34}, "cannot be halved 2 times"),  # by the encoder, which is deeper
        ({"encoder_multiplier": ()}, "encoder_multiplier: channel_multiplier must be"),
        ({"latent_dim": 0}, "latent_dim must be a positive integer"),
        ({"crop": "left"}, "crop 'left' is not known"),
    ):
        with pytest.raises(UserError, match=words):
            dataclasses.replace(TINY, **changes)
