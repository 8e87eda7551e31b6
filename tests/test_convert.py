"""The command: every kind of file in, the published layout out again. Wrong files: checkpoints/test_bad_inputs.py."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import fabricate
from safetensors.torch import load_file

from pdae_fast import PDAE, Prior, UserError
from pdae_fast.convert import main

# Small enough that a file is written in a millisecond.
CONFIG = fabricate.config(32, 12, attention_resolutions=(2,))


@pytest.fixture(scope="module")
def source() -> PDAE:
    return fabricate.pdae(CONFIG)


def tensors(contents: dict, prefix: str = "") -> dict[str, torch.Tensor]:
    """All tensors of a nested mapping by dotted name."""
    found = {}
    for name, value in contents.items():
        if isinstance(value, dict):
            found |= tensors(value, f"{prefix}{name}.")
        elif isinstance(value, torch.Tensor):
            found[f"{prefix}{name}"] = value
    return found


def read(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def test_command_in_a_process(source, tmp_path):
    path = fabricate.save(tmp_path / "a.pt", fabricate.autoencoder(source))
    command = [sys.executable, "-m", "pdae_fast.convert", str(path), "--out", str(tmp_path / "m"), "--num-heads", "2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    for words in ("a PDAE autoencoder, weights: EMA", "3 x 32 x 32", "12 dimensions", "2 heads", "assumed", "wrote"):
        assert words in done.stdout
    assert PDAE.from_pretrained(tmp_path / "m").config.unet.num_heads == 2
    done = subprocess.run([*command[:-1], "5"], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_prior_and_half_precision(source, tmp_path, capsys):
    prior = source.prior()
    path = fabricate.save(tmp_path / "model.pt", prior.unet.state_dict())
    assert main([str(path), "--out", str(tmp_path / "m"), "--dtype", "float16", "--image-size", "64"]) == 0
    assert "a guided-diffusion U-Net, weights: as stored" in capsys.readouterr().out
    assert {t.dtype for t in load_file(tmp_path / "m" / "model.safetensors").values()} == {torch.float16}
    found = Prior.from_pretrained(tmp_path / "m")
    assert found.config.image_size == 64
    for a, b in zip(found.parameters(), prior.parameters(), strict=True):
        assert torch.equal(a, b.half().float())


@pytest.mark.parametrize("whole", [True, False], ids=["pdae", "prior"])
def test_how_noise_is_drawn_travels_in_the_yaml(tmp_path, whole):
    configuration = dataclasses.replace(fabricate.config(num_heads=4), noise="standardised")
    model = fabricate.pdae(configuration) if whole else fabricate.prior(configuration.prior)
    model.save_pretrained(tmp_path / "ours")
    back = tmp_path / "back.pt"
    assert main([str(tmp_path / "ours"), "--to", "official", "--out", str(back)]) == 0
    kind = PDAE if whole else Prior
    assert kind.from_pretrained(back, config=back.with_suffix(".yml")).config == model.config
    assert kind.from_pretrained(back, num_heads=4).config.noise == "normal"
    back.with_suffix(".yml").write_text(back.with_suffix(".yml").read_text().replace("standardised", "pink"))
    with pytest.raises(UserError, match="noise 'pink' is not known"):
        kind.from_pretrained(back, config=back.with_suffix(".yml"))


@pytest.mark.parametrize("name", ["rgb32-heads4", "grey32-new-two-rates", "rgb64-head-channel"])
def test_official_to_ours_to_official(name, tmp_path):
    model = fabricate.pdae(fabricate.PDAES[name])
    _, latent = fabricate.latent_dpm(model)
    _, classifier = fabricate.classifier(model)
    files = {
        "latent": latent,
        "classifier": classifier,
        "statistics": fabricate.statistics(model),
        "a": fabricate.autoencoder(model),
    }
    paths = {key: str(fabricate.save(tmp_path / f"{key}.pt", contents)) for key, contents in files.items()}
    u = model.config.unet
    heads = ["--num-heads", str(u.num_heads)] if u.head_channel == -1 else ["--head-channel", str(u.head_channel)]
    order = ["--use-new-attention-order"] if u.use_new_attention_order else []
    extras = [word for key in ("latent", "classifier", "statistics") for word in (f"--{key}", paths[key])]
    names = ["--attributes", "hat,beard,young"]
    ours, back = tmp_path / "ours", tmp_path / "back" / "model.pt"
    assert main([paths["a"], "--out", str(ours), *heads, *order, *extras, *names]) == 0
    assert main([str(ours), "--to", "official", "--out", str(back)]) == 0

    made = {"a": back, **{key: back.with_suffix(f".{key}.pt") for key in ("latent", "classifier", "statistics")}}
    for key, path in made.items():
        before, after = tensors(files[key]), tensors(read(path))
        # Only the EMA weights travel; the raw entries of the new file repeat them.
        trained = [k for k in before if k.startswith("ema_") or f"ema_{k}" not in before]
        assert before.keys() == after.keys()
        assert len(trained) > (1 if key == "statistics" else 3)
        assert all(torch.equal(before[k], after[k]) for k in trained)
    assert set(read(back)) == {"step", "encoder", "ema_encoder", "decoder", "ema_decoder", "optimizer", "scaler"}

    again = tmp_path / "again"
    extras = [word for key in ("latent", "classifier", "statistics") for word in (f"--{key}", str(made[key]))]
    assert main([str(back), "--config", str(back.with_suffix(".yml")), "--out", str(again), *extras]) == 0
    assert (ours / "config.json").read_bytes() == (again / "config.json").read_bytes()
    assert (ours / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()


def test_prior_to_official(source, tmp_path, capsys):
    prior = fabricate.prior(fabricate.config(num_heads=4, time_channel=512).prior)
    prior.save_pretrained(tmp_path / "p")
    out = tmp_path / "p.pt"
    assert main([str(tmp_path / "p"), "--to", "official", "--out", str(out)]) == 0
    assert "published code cannot build it: its time embedding is always 128 wide" in capsys.readouterr().out
    assert main([str(out), "--config", str(out.with_suffix(".yml")), "--out", str(tmp_path / "q")]) == 0
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "p" / name).read_bytes() == (tmp_path / "q" / name).read_bytes()


def test_what_is_written_over(source, tmp_path, capsys):
    path = fabricate.save(tmp_path / "a.pt", fabricate.autoencoder(source))
    out = tmp_path / "m"
    assert main([str(path), "--out", str(out), "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert main([str(path), "--out", str(out)]) == 0  # one of ours: replaced
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    assert main([str(path), "--out", str(other)]) == 2
    assert "not empty and not a saved model" in capsys.readouterr().err
    assert main([str(path), "--out", str(other), "--overwrite"]) == 0
    assert (other / "thesis.txt").read_text() == "precious"
    assert main([str(out), "--to", "official", "--out", str(path)]) == 2
    assert "exists" in capsys.readouterr().err
    assert main([str(out), "--to", "official", "--out", str(path), "--overwrite"]) == 0
    assert main([str(path), "--to", "official", "--out", str(path), "--overwrite"]) == 2
    assert "the source itself" in capsys.readouterr().err
    assert main([str(path), "--out", str(path)]) == 2


def test_bad_options_are_one_line(capsys):
    for arguments in (["a.pt"], ["a.pt", "--out", "x", "--num-heads", "two"], ["a.pt", "--out", "x", "--to", "onnx"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_prior_is_no_autoencoder(source, tmp_path):
    path = fabricate.save(tmp_path / "p.pt", fabricate.pdae_prior(source.prior()))
    with pytest.raises(UserError, match="is a prior"):
        PDAE.from_pretrained(path)
    with pytest.raises(UserError, match="has no encoder"):
        PDAE.from_pretrained(path, encoder=path)
