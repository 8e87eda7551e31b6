"""The networks against formulas written out in float64, and the shapes of every configuration family."""

import dataclasses

import numpy as np
import pytest
import torch

from golden_rule import fill, relative
from helpers import TINY_UNET
from pdae_fast import PDAE, PDAEConfig, ScheduleConfig, UNetConfig, presets
from pdae_fast.models import Encoder, PDAEDecoder, UNet
from pdae_fast.models.layers import AttentionBlock, ResBlock, group_norm, timestep_embedding
from pdae_fast.schedule import build_schedule


def group_norm_float64(x, weight, bias, groups=32):
    B, C = x.shape[:2]
    grouped = x.reshape(B, groups, -1)
    mean, var = grouped.mean(2, keepdims=True), grouped.var(2, keepdims=True)
    normal = ((grouped - mean) / np.sqrt(var + 1e-5)).reshape(x.shape)
    shape = (1, C) + (1,) * (x.ndim - 2)
    return normal * weight.reshape(shape) + bias.reshape(shape)


def numpy64(module):
    return {k: v.double().numpy() for k, v in module.state_dict().items()}


@pytest.mark.parametrize("new_order", [False, True])
@pytest.mark.parametrize("heads", [1, 4])
def test_attention_layouts_against_float64(heads, new_order):
    C, side = 64, 3
    block = fill(AttentionBlock(C, heads, group_norm(C), new_order))
    x = torch.randn(2, C, side, side, generator=torch.Generator().manual_seed(1))
    w, tokens = numpy64(block), side * side
    h = group_norm_float64(x.double().numpy(), w["norm.weight"], w["norm.bias"]).reshape(2, C, tokens)
    rows = np.einsum("oc,bct->bot", w["qkv.weight"][:, :, 0], h) + w["qkv.bias"][None, :, None]
    d, out = C // heads, np.zeros((2, C, tokens))
    for head in range(heads):
        if new_order:  # all q rows, all k rows, all v rows
            q, k, v = (rows[:, part * C + head * d : part * C + (head + 1) * d] for part in range(3))
        else:  # q, k, v of head 0, then of head 1, ...
            q, k, v = (rows[:, (3 * head + part) * d : (3 * head + part + 1) * d] for part in range(3))
        logits = np.einsum("bct,bcs->bts", q * d**-0.25, k * d**-0.25)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out[:, head * d : (head + 1) * d] = np.einsum("bts,bcs->bct", weights, v)
    expected = np.einsum("oc,bct->bot", w["proj_out.weight"][:, :, 0], out) + w["proj_out.bias"][None, :, None]
    found = block(x).detach().double().numpy() - x.double().numpy()
    np.testing.assert_allclose(found.reshape(2, C, tokens), expected, atol=1e-5)


@pytest.mark.parametrize("resample", [None, "down", "up"])
def test_resblock_applies_time_before_z(resample):
    block = fill(ResBlock(UNetConfig(time_channel=16), 32, 32, resample=resample, z_width=16)).double()
    g = torch.Generator().manual_seed(2)
    x = torch.randn(2, 32, 4, 4, generator=g, dtype=torch.float64)
    emb, emb_z = (torch.randn(2, 16, generator=g, dtype=torch.float64) for _ in range(2))
    silu, conv = torch.nn.functional.silu, torch.nn.functional.conv2d
    p = block.state_dict()

    def norm(v, name):
        w, b = p[f"{name}.weight"].numpy(), p[f"{name}.bias"].numpy()
        return torch.from_numpy(group_norm_float64(v.numpy(), w, b))

    def resampled(v):
        if resample == "down":
            return v.reshape(2, 32, 2, 2, 2, 2).mean((3, 5))
        return v.repeat_interleave(2, 2).repeat_interleave(2, 3) if resample == "up" else v

    def affine(e, name):
        rows = silu(e) @ p[f"{name}.1.weight"].T + p[f"{name}.1.bias"]
        return rows[:, :32, None, None], rows[:, 32:, None, None]

    h = conv(resampled(silu(norm(x, "in_layers.0"))), p["in_layers.2.weight"], p["in_layers.2.bias"], padding=1)
    (s_t, b_t), (s_z, b_z) = affine(emb, "emb_layers"), affine(emb_z, "emb_z_layers")
    h = (1 + s_z) * (norm(h, "out_layers.0") * (1 + s_t) + b_t) + b_z
    expected = resampled(x) + conv(silu(h), p["out_layers.3.weight"], p["out_layers.3.bias"], padding=1)
    torch.testing.assert_close(block(x, emb, emb_z), expected, rtol=1e-9, atol=1e-9)


def test_timestep_embedding_is_cosine_first():
    t = torch.tensor([0, 7])
    f = 10000.0 ** (-np.arange(4) / 4)
    expected = np.concatenate([np.cos(7 * f), np.sin(7 * f)])
    found = timestep_embedding(t, 8)
    assert found[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    np.testing.assert_allclose(found[1].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize(("name", "millions"), [("celeba64", 116), ("ffhq128", 177)])
def test_parameter_counts_of_the_paper(name, millions):
    with torch.device("meta"):
        decoder = PDAEDecoder(presets[name].unet, 512)
    assert round(sum(p.numel() for p in decoder.parameters()) / 1e6) == millions


VARIANTS = {
    "grey": {"input_channel": 1},
    "three-blocks": {"num_residual_blocks_of_a_block": 3},
    "two-blocks-two-attentions": {"num_residual_blocks_of_a_block": 2, "attention_resolutions": (1, 2)},
    "no-attention": {"attention_resolutions": ()},
    "head-channel": {"head_channel": 16, "use_new_attention_order": True},
    "learned-sigma": {"learn_sigma": True},
    "wide-time": {"time_channel": 512},
    "one-level": {"channel_multiplier": (2,)},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_variants_run_and_start_at_G_equal_zero(changes):
    unet = UNetConfig(
        **{"base_channel": 32, "channel_multiplier": (1, 2), "num_residual_blocks_of_a_block": 1, **changes}
    )
    model = PDAE(PDAEConfig(image_size=32, latent_dim=8, encoder_channel=32, unet=unet)).eval()
    x = torch.randn(2, unet.input_channel, 32, 32)
    with torch.no_grad():
        eps, gradient = model(x, torch.tensor([3, 900]), model.encode(x))
    assert eps.shape == gradient.shape == x.shape
    assert float(gradient.abs().max()) == 0  # G's output convolution starts at zero
    fill(model.decoder)
    with torch.no_grad():
        assert float(model(x, torch.tensor([3, 900]), model.encode(x))[1].abs().max()) > 0


def test_learned_variance_is_dropped():
    unet = fill(UNet(dataclasses.replace(TINY_UNET, learn_sigma=True)))
    plain = UNet(TINY_UNET).eval()
    state = {k: v[: plain.state_dict()[k].shape[0]] for k, v in unet.state_dict().items()}
    plain.load_state_dict(state)
    x, t = torch.randn(1, 1, 32, 32), torch.tensor([5])
    with torch.no_grad():
        torch.testing.assert_close(unet(x, t), plain(x, t))


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@torch.no_grad()
def test_eps_of_a_bfloat16_network_is_made_in_float32(prediction):
    """Its output is rounded; rounding x_t and the factors, which are about 100 at t = 0, would come on top."""
    to_eps = build_schedule(ScheduleConfig()).to_eps(prediction)
    unet = fill(UNet(TINY_UNET, to_eps)).bfloat16()
    x, t = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 900])
    features = unet.trunk(x, t)
    factors = torch.from_numpy(to_eps[t])[..., None, None, None]
    expected = factors[:, 0] * x.double() + factors[:, 1] * unet.decode(features).double()
    eps = unet.decode_eps(features)
    assert eps.dtype == torch.float32 and relative(eps, expected) < 1e-6


def test_a_batch_of_different_times_equals_single_images():
    decoder = fill(PDAEDecoder(TINY_UNET, 8))
    g = torch.Generator().manual_seed(0)
    x, z, t = torch.randn(3, 1, 32, 32, generator=g), torch.randn(3, 8, generator=g), torch.tensor([0, 500, 999])
    with torch.no_grad():
        together = decoder(x, t, z)
        for i in range(3):
            alone = decoder(x[i : i + 1], t[i : i + 1], z[i : i + 1])
            assert all(relative(a[i : i + 1], b) < 1e-5 for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize(
    ("size", "channels", "width", "flat"),
    [(32, 1, 64, 1024), (64, 3, 64, 2048), (128, 3, 64, 4096), (256, 1, 32, 4096)],
)
def test_encoder_sizes(size, channels, width, flat):
    encoder = Encoder(size, channels, 24, width)
    assert encoder.encoder[-1].weight.shape == (24, flat)
    assert [m.heads for m in encoder.encoder if isinstance(m, AttentionBlock)] == [4]
    assert encoder(torch.zeros(1, channels, size, size)).shape == (1, 24)
