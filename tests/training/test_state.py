"""A checkpoint that is damaged, or is something else, is refused in one line before anything is trained."""

import json
import math

import numpy as np
import pytest
import torch

from helpers import tiny_pdae
from pdae_fast import UserError
from pdae_fast.data.latents import Latents, statistics
from pdae_fast.training import Trainer, TrainSettings
from pdae_fast.training.codes import latent_task
from pdae_fast.training.curves import read_log
from pdae_fast.training.state import CHECKPOINT_NAME, trim_log


def trainer(out, steps=3):
    z = torch.randn(30, 16, generator=torch.Generator().manual_seed(1))
    latents = Latents(z, [str(i) for i in range(30)], [None] * 30, *statistics(z), "encoder", "images", [])
    task, dataset = latent_task(tiny_pdae(), latents, hidden=32, layers=3)
    settings = TrainSettings("latent", "x", steps=steps, batch_size=8, flip=False)
    return Trainer(task, dataset, settings, out, save_every=1, quiet=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The bytes of a checkpoint of three steps."""
    out = tmp_path_factory.mktemp("run")
    trainer(out).run()
    return (out / CHECKPOINT_NAME).read_bytes()


def refused(out):
    before = sorted((path.name, path.read_bytes()) for path in out.iterdir() if path.is_file())
    with pytest.raises(UserError) as caught:
        trainer(out, 5).resume()
    text = str(caught.value)
    assert text.startswith(str(out)) and "\n" not in text and len(text) < 600
    assert sorted((path.name, path.read_bytes()) for path in out.iterdir() if path.is_file()) == before
    return text


def flipped(data, place):
    return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"",
        lambda data: b"text\n",
        lambda data: b"PK\3\4" + b"\0" * 50,
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data[1:],
        lambda data: b"\x80\2}q\0.",
        lambda data: json.dumps({"format": "pdae_fast-run-1"}).encode(),
    ],
)
def test_files_that_are_no_checkpoint(tmp_path, saved, change):
    (tmp_path / CHECKPOINT_NAME).write_bytes(change(saved))
    assert "not a readable checkpoint" in refused(tmp_path) or "not the checkpoint" in refused(tmp_path)


def test_every_flipped_bit_is_refused_or_changes_nothing(tmp_path, saved):
    """Bits all over the file; what is neither data nor directory (padding, dates) may be anything."""
    (tmp_path / CHECKPOINT_NAME).write_bytes(saved)
    whole = trainer(tmp_path, 5)
    whole.resume()
    expected, refusals = whole.model.state_dict(), 0
    for place in np.random.default_rng(0).integers(0, len(saved), 40):
        (tmp_path / CHECKPOINT_NAME).write_bytes(flipped(saved, int(place)))
        run = trainer(tmp_path, 5)
        try:
            run.resume()
        except UserError as error:
            refusals += 1
            assert "\n" not in str(error)
        else:
            assert all(torch.equal(v, run.model.state_dict()[k]) for k, v in expected.items())
    assert refusals >= 30


def first(values):
    return next(iter(values))


def put(part, value):
    def change(contents):
        contents[part] = value

    return change


def drop(part):
    return lambda contents: contents.pop(part)


def inside(part, how):
    return lambda contents: how(contents[part])


def of_optimizer(how):
    return lambda contents: how(contents["optimizer"]["state"], first(contents["optimizer"]["state"]))


def nan(tensors):
    tensors[first(tensors)].view(-1)[0] = math.nan


def cut(tensors):
    tensors[first(tensors)] = tensors[first(tensors)][:1].clone()


def no_tensor(tensors):
    tensors[first(tensors)] = "weights"


def doubled(tensors):
    tensors[first(tensors)] = tensors[first(tensors)].double()


PARTS = ("step", "settings", "config", "images", "record", "model", "ema", "optimizer")
CHANGES = {
    **{f"no {part}": drop(part) for part in PARTS},
    **{f"{part} is a list": put(part, [1]) for part in PARTS},
    **{f"{part} is none": put(part, None) for part in PARTS},
    **{f"{p} {how.__name__}": inside(p, how) for p in ("model", "ema") for how in (nan, cut, no_tensor, doubled)},
    **{f"{part} empty": put(part, {}) for part in ("model", "ema", "optimizer", "config", "settings")},
    **{f"step {value}": put("step", value) for value in (10**9, 10**400, -1, 2, math.nan, 3.0, True, "3")},
    "images wrong": put("images", -3),
    "config wrong": put("config", {"unet": 3, "kind": "PDAE"}),
    "Adam without state": inside("optimizer", lambda o: o.update(state={})),
    "Adam without one state": of_optimizer(lambda state, key: state.pop(key)),
    "Adam without moments": of_optimizer(lambda state, key: state[key].pop("exp_avg")),
    "Adam without steps": of_optimizer(lambda state, key: state[key].pop("step")),
    "Adam's other step": of_optimizer(lambda state, key: state[key].update(step=torch.tensor(9.0))),
    "Adam's NaN": of_optimizer(lambda state, key: state[key]["exp_avg_sq"].fill_(math.nan)),
    "Adam's negative": of_optimizer(lambda state, key: state[key]["exp_avg_sq"].fill_(-1.0)),
    "Adam's shape": of_optimizer(lambda state, key: state[key].update(exp_avg=torch.zeros(1))),
    "Adam's groups": inside("optimizer", lambda o: o.update(param_groups=3)),
    "Adam's second group": inside("optimizer", lambda o: o["param_groups"].append({"params": [0]})),
    "Adam's unknown parameter": of_optimizer(lambda state, key: state.update({99: state[key]})),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_wrong_contents(tmp_path, saved, name):
    (tmp_path / CHECKPOINT_NAME).write_bytes(saved)
    contents = torch.load(tmp_path / CHECKPOINT_NAME, weights_only=True)
    CHANGES[name](contents)
    torch.save(contents, tmp_path / CHECKPOINT_NAME)
    text = refused(tmp_path) if name not in ("settings empty", "images wrong") else refused_as_another(tmp_path)
    assert "damaged" in text or "cannot resume" in text


def refused_as_another(out):
    with pytest.raises(UserError, match="cannot resume") as caught:
        trainer(out, 5).resume()
    return str(caught.value)


def test_a_log_of_anything(tmp_path):
    path = tmp_path / "log.jsonl"
    good = [json.dumps({"step": i, "loss": 0.5}) for i in (1, 2, 3)]
    bad = ["[1]", "3", "null", '{"step": null, "loss": 1}', '{"step": "x", "loss": 1}', '{"loss": 1}', "[" * 5000,
           '{"step": 2, "loss": NaN}', '{"step": 1' + "0" * 400 + ', "loss": 1}', "9" * 5000]  # fmt: skip
    path.write_bytes("\n".join([*bad, *good]).encode() + b"\n\xff\xfe{\n")
    assert read_log(tmp_path)[0].tolist() == [1, 2, 3]
    trim_log(path, 2)
    assert [line for line in path.read_text().splitlines() if "NaN" not in line] == good[:2]
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="cannot read .*log.jsonl"):
        trim_log(path, 2)
