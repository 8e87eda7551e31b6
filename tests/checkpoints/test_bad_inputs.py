"""Every wrong file ends the command with status 2 and one line that says what it is and what was expected."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import fabricate
from safetensors.torch import save_file

from pdae_fast import PDAE
from pdae_fast.convert import main

# Small enough that a file is written in a millisecond.
CONFIG = fabricate.config(32, 12, attention_resolutions=(2,))


@pytest.fixture(scope="module")
def source() -> PDAE:
    return fabricate.pdae(CONFIG)


class Payload:
    """Unpickling this would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def _changed(state: dict, **changes: object) -> dict:
    """``state`` with tensors replaced, by names that have ``__`` for a dot; None removes one."""
    new = dict(state)
    for name, value in changes.items():
        new[name.replace("__", ".")] = value
    return {name: value for name, value in new.items() if value is not None}


def _unet(source: PDAE, **changes: object) -> dict:
    return _changed(source.prior().unet.state_dict(), **changes)


def _autoencoder(source: PDAE, **changes: object) -> dict:
    contents = fabricate.autoencoder(source)
    return contents | {"ema_decoder": _changed(contents["ema_decoder"], **changes)}


def _truncated(source: PDAE, folder: Path, legacy: bool) -> Path:
    torch.save(fabricate.autoencoder(source), folder / "whole.pt", _use_new_zipfile_serialization=not legacy)
    return _write(folder / "a.pt", (folder / "whole.pt").read_bytes()[:-5000])


def _cut_safetensors(source: PDAE, folder: Path) -> Path:
    save_file(source.prior().unet.state_dict(), folder / "whole.safetensors")
    return _write(folder / "a.safetensors", (folder / "whole.safetensors").read_bytes()[:-100])


def _renamed(state: dict, old: str, new: str) -> dict:
    return {name.replace(old, new): tensor for name, tensor in state.items()}


def _zip(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    return folder / "a.zip"


def _npz(folder: Path) -> Path:
    np.savez(folder / "a.npz", mean=np.zeros(3))
    return folder / "a.npz"


def _torchscript(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "a.pt", "w") as archive:
        for name in ("a/data.pkl", "a/constants.pkl"):
            archive.writestr(name, b"\x80\x02}.")
    return folder / "a.pt"


def _nan(source: PDAE) -> torch.Tensor:
    bad = source.decoder.state_dict()["out.2.bias"].clone()
    bad[1] = float("nan")
    return bad


def _half_attention(source: PDAE) -> dict:
    return {k: v for k, v in _unet(source).items() if not k.startswith("output_blocks.1.1.")}


def _no_middle_attention(source: PDAE) -> dict:
    return {k: v for k, v in _unet(source).items() if not k.startswith("middle_block.1.")}


def _pooled(source: PDAE) -> dict:
    return {k: v for k, v in _unet(source).items() if not k.startswith("input_blocks.2.")}


# name: (what makes the file, or the file and further arguments; words that the one line must have)
BAD = {
    # Not a checkpoint at all.
    "missing": (lambda s, d: d / "none.pt", ("neither a bundled model", "nor a file")),
    "empty": (lambda s, d: _write(d / "a.pt", b""), ("empty file", "expected a PyTorch or safetensors checkpoint")),
    "html": (lambda s, d: _write(d / "a.pt", b"\n<!DOCTYPE html><html>..."), ("an HTML page",)),
    "png": (lambda s, d: _write(d / "a.pt", b"\x89PNG\r\n\x1a\n" + bytes(50)), ("a PNG image",)),
    "text": (lambda s, d: _write(d / "a.pt", "très bien\n".encode()), ("a text file",)),
    "yaml": (lambda s, d: _write(d / "a.yml", b"num_heads: 4\n"), ("a configuration, not weights",)),
    "lfs": (lambda s, d: _write(d / "a.pt", b"version https://git-lfs.github.com/spec/v1\noid"), ("Git LFS pointer",)),
    "zip": (lambda s, d: _zip(d), ("a zip archive",)),
    "numpy": (lambda s, d: _npz(d), ("a NumPy archive",)),
    "torchscript": (lambda s, d: _torchscript(d), ("TorchScript",)),
    "noise": (lambda s, d: _write(d / "a.pt", bytes(range(1, 256))), ("not a checkpoint",)),
    "pickle-noise": (lambda s, d: _write(d / "a.pt", b"\x80\x02" + bytes(range(256))), ("truncated or damaged",)),
    "truncated": (lambda s, d: _truncated(s, d, legacy=False), ("truncated", "its end is missing")),
    "truncated-legacy": (lambda s, d: _truncated(s, d, legacy=True), ("truncated or damaged",)),
    "truncated-safetensors": (_cut_safetensors, ("not a complete safetensors file",)),
    "device": (lambda s, d: Path("/dev/null"), ("not a plain file",)),
    "folder": (lambda s, d: d, ("no config.json in it",)),
    "code": (
        lambda s, d: fabricate.save(d / "a.pt", fabricate.autoencoder(s) | {"ema_decoder": Payload(d / "ran")}),
        ("ema_decoder is a __builtin__.getattr (not read", "expected a state_dict"),
    ),
    "whole-module": (
        lambda s, d: fabricate.save(d / "a.pt", s.encoder),
        ("one pickled object, a pdae_fast.models.encoder.Encoder", "torch.save(model.state_dict()"),
    ),
    # A checkpoint, of something else.
    "tensor": (lambda s, d: fabricate.save(d / "a.pt", torch.zeros(3)), ("holds one Tensor",)),
    "nothing": (lambda s, d: fabricate.save(d / "a.pt", {}), ("it holds nothing", "expected a PDAE autoencoder")),
    "other-model": (
        lambda s, d: fabricate.save(d / "a.pt", {"fc.weight": torch.zeros(3, 3)}),
        ("not a checkpoint known here", "fc.weight"),
    ),
    "lucidrains": (
        lambda s, d: fabricate.save(
            d / "model-3.pt",
            {"step": 1, "model": {"model.init_conv.weight": torch.zeros(3), "model.downs.0.0": torch.zeros(3)}},
        ),
        ("a denoising-diffusion-pytorch (lucidrains) model",),
    ),
    "text-conditional": (
        lambda s, d: fabricate.save(
            d / "u.bin", {"down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q.weight": torch.zeros(3, 3)}
        ),
        ("a diffusers model that is no UNet2DModel",),
    ),
    "module-in-an-entry": (
        lambda s, d: fabricate.save(d / "m.pt", {"model": s.encoder, "epoch": 3}),
        ("not a checkpoint known here", "model is a pdae_fast.models.encoder.Encoder (not read"),
    ),
    "optimiser": (
        lambda s, d: fabricate.save(d / "opt1.pt", torch.optim.Adam(s.parameters()).state_dict()),
        ("an optimiser's state", "expected model weights"),
    ),
    "diffae-autoencoder": (
        lambda s, d: fabricate.save(
            d / "last.ckpt",
            {"state_dict": {"ema_model.time_embed.time_embed.0.weight": torch.zeros(2, 2)}, "global_step": 1},
        ),
        ("the U-Net of a Diff-AE alone", "--encoder FILE"),
    ),
    "diffae-conditioned": (
        lambda s, d: fabricate.save(
            d / "last.ckpt",
            {
                "state_dict": fabricate.diffae(s.prior())["state_dict"]
                | {"ema_model.input_blocks.1.0.cond_emb_layers.1.weight": torch.zeros(2, 2)}
            },
        ),
        ("the U-Net of a Diff-AE alone",),
    ),
    "diffae-classifier": (
        lambda s, d: fabricate.save(d / "last.ckpt", {"state_dict": {"classifier.weight": torch.zeros(4, 4)}}),
        ("a Diff-AE attribute classifier",),
    ),
    "guided-classifier": (
        lambda s, d: fabricate.save(
            d / "c.pt", {k: v for k, v in _unet(s).items() if not k.startswith("output_blocks")}
        ),
        ("a guided-diffusion noisy-image classifier",),
    ),
    "statistics-alone": (
        lambda s, d: fabricate.save(d / "s.pt", fabricate.statistics(s)),
        ("latent statistics", "--statistics"),
    ),
    "encoder-alone": (lambda s, d: fabricate.save(d / "e.pt", s.encoder.state_dict()), ("encoder alone", "--encoder")),
    "decoder-alone": (
        lambda s, d: fabricate.save(d / "e.pt", s.decoder.state_dict()),
        ("decoder without an encoder", "--encoder"),
    ),
    "latent-alone": (
        lambda s, d: fabricate.save(d / "l.pt", {"latent_denoise_fn": fabricate.latent_dpm(s)[0].state_dict()}),
        ("latent DPM without the autoencoder", "--latent"),
    ),
    "training-run": (
        lambda s, d: fabricate.save(d / "checkpoint.pt", {"format": "pdae_fast-run-1", "step": 3}),
        ("resume point of a pdae_fast training run",),
    ),
    # The right file, with something wrong in it.
    "nan": (
        lambda s, d: fabricate.save(d / "a.pt", _autoencoder(s, out__2__bias=_nan(s))),
        ("ema_decoder.out.2.bias", "1 NaN"),
    ),
    "wrong-shape": (
        lambda s, d: fabricate.save(d / "a.pt", _autoencoder(s, middle_block__1__norm__bias=torch.zeros(5))),
        ("decoder.middle_block.1.norm.bias", "[5]", "[64]"),
    ),
    "wrong-dimensions": (
        lambda s, d: fabricate.save(d / "a.pt", _autoencoder(s, out__2__weight=torch.zeros(5))),
        ("out.2.weight", "[5]", "expected 4 dimensions"),
    ),
    "missing-tensor": (
        lambda s, d: fabricate.save(d / "a.pt", _autoencoder(s, shift_out__0__bias=None)),
        ("missing 1", "decoder.shift_out.0.bias"),
    ),
    "missing-shape-giver": (
        lambda s, d: fabricate.save(d / "a.pt", _autoencoder(s, time_embed__0__weight=None)),
        ("time_embed.0.weight is missing",),
    ),
    "extra-tensor": (
        lambda s, d: fabricate.save(d / "a.pt", _autoencoder(s, extra__weight=torch.zeros(1))),
        ("unexpected 1", "decoder.extra.weight"),
    ),
    "not-a-tensor": (
        lambda s, d: fabricate.save(d / "a.pt", _autoencoder(s, out__2__bias="x")),
        ("ema_decoder.out.2.bias is a str", "expected a tensor"),
    ),
    "numbered-state": (
        lambda s, d: fabricate.save(d / "a.pt", fabricate.autoencoder(s) | {"ema_decoder": {0: torch.zeros(1)}}),
        ("ema_decoder has the key 0",),
    ),
    "integers": (
        lambda s, d: fabricate.save(d / "a.pt", _autoencoder(s, out__2__bias=torch.zeros(3, dtype=torch.int64))),
        ("ema_decoder.out.2.bias is torch.int64", "expected floating-point"),
    ),
    "flat-with-a-number": (
        lambda s, d: fabricate.save(d / "p.pt", _unet(s) | {"step": 5}),
        ("p.pt: step is a int; expected a tensor",),
    ),
    "entry-is-a-list": (
        lambda s, d: fabricate.save(d / "a.pt", fabricate.autoencoder(s) | {"ema_encoder": [1, 2]}),
        ("ema_encoder is a list", "state_dict"),
    ),
    "another-encoder": (
        lambda s, d: (
            fabricate.save(d / "a.pt", fabricate.autoencoder(s)),
            "--encoder",
            fabricate.save(d / "e.pt", fabricate.pdae(fabricate.config(32, 7)).encoder.state_dict()),
        ),
        ("label_emb.weight has shape [128, 12]", "7 dimensions"),
    ),
    "another-latent": (
        lambda s, d: (
            fabricate.save(d / "a.pt", fabricate.autoencoder(s)),
            "--latent",
            fabricate.save(d / "l.pt", fabricate.latent_dpm(fabricate.pdae(fabricate.config(32, 7)))[1]),
        ),
        ("z of 7 dimensions", "z of 12 dimensions"),
    ),
    "latent-is-a-classifier": (
        lambda s, d: (
            fabricate.save(d / "a.pt", fabricate.autoencoder(s)),
            "--latent",
            fabricate.save(d / "c.pt", fabricate.classifier(s)[1]),
        ),
        ("a PDAE attribute classifier; expected a latent DPM",),
    ),
    "statistics-of-zero": (
        lambda s, d: (
            fabricate.save(d / "a.pt", fabricate.autoencoder(s)),
            "--statistics",
            fabricate.save(d / "s.pt", {"mean": torch.zeros(12), "std": torch.zeros(12)}),
        ),
        ("std has values that are not positive",),
    ),
    "statistics-onto-a-prior": (
        lambda s, d: (
            fabricate.save(d / "p.pt", _unet(s)),
            "--statistics",
            fabricate.save(d / "s.pt", fabricate.statistics(s)),
        ),
        ("a prior has no z",),
    ),
    "heads-do-not-divide": (
        lambda s, d: (fabricate.save(d / "a.pt", fabricate.autoencoder(s)), "--num-heads", 5),
        ("cannot be split by num_heads=5",),
    ),
    "head-channel-does-not-divide": (
        lambda s, d: (fabricate.save(d / "a.pt", fabricate.autoencoder(s)), "--head-channel", 48),
        ("cannot be split by head_channel=48",),
    ),
    "image-size-of-another-encoder": (
        lambda s, d: (fabricate.save(d / "a.pt", fabricate.autoencoder(s)), "--image-size", 64),
        ("image_size 64 but the encoder's weights say 32",),
    ),
    "image-size-that-does-not-fit": (
        lambda s, d: (fabricate.save(d / "p.pt", _unet(s)), "--image-size", 33),
        ("image_size 33 cannot be halved",),
    ),
    "raw-weights-not-there": (
        lambda s, d: (fabricate.save(d / "p.pt", {"ema_denoise_fn": _unet(s)}), "--weights", "raw"),
        ("only the EMA weights",),
    ),
    "configuration-missing": (
        lambda s, d: (fabricate.save(d / "p.pt", _unet(s)), "--config", d / "none.yml"),
        ("none.yml", "cannot be read"),
    ),
    # U-Nets of this family that are built differently.
    "super-resolution": (
        lambda s, d: fabricate.save(d / "p.pt", _unet(s, input_blocks__0__0__weight=torch.zeros(32, 6, 3, 3))),
        ("a super-resolution U-Net",),
    ),
    "other-outputs": (
        lambda s, d: fabricate.save(d / "p.pt", _unet(s, out__2__weight=torch.zeros(4, 32, 3, 3))),
        ("maps 3 channels to 4",),
    ),
    "conv-down": (
        lambda s, d: fabricate.save(
            d / "p.pt", _renamed(_unet(s), "input_blocks.2.0.in_layers.2", "input_blocks.2.0.op")
        ),
        ("do not fit", "unexpected 8 (unet.input_blocks.2.0."),
    ),
    "conv-up": (
        lambda s, d: fabricate.save(
            d / "p.pt", _renamed(_unet(s), "output_blocks.1.2.in_layers.2", "output_blocks.1.2.conv")
        ),
        ("do not fit", "unexpected 8 (unet.output_blocks.1.2."),
    ),
    "pooled": (lambda s, d: fabricate.save(d / "p.pt", _pooled(s)), ("input_blocks.2 has no weights",)),
    "no-middle-attention": (
        lambda s, d: fabricate.save(d / "p.pt", _no_middle_attention(s)),
        ("middle_block.1.qkv.weight is missing",),
    ),
    "uneven-attention": (
        lambda s, d: fabricate.save(d / "p.pt", _half_attention(s)),
        ("output_blocks.1 has none", "rate 2"),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_inputs(case, source, tmp_path, capsys):
    make, words = BAD[case]
    made = make(source, tmp_path)
    arguments = [str(part) for part in (made if isinstance(made, tuple) else (made,))]
    out = tmp_path / "out"
    assert main([*arguments, "--out", str(out)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    for word in words:
        assert word in captured.err
    assert not out.exists()
    assert not (tmp_path / "ran").exists()
