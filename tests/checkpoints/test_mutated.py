"""Checkpoints with wrong bytes in them: a model of finite weights, or one line that says what is wrong."""

import random

import pytest
import torch
from checkpoints import fabricate
from safetensors.torch import save_file

from pdae_fast import PriorConfig, UserError, checkpoints
from pdae_fast.models import Prior

SMALL = PriorConfig(
    32, fabricate.unet(channel_multiplier=(1,), attention_resolutions=(), middle="none", time_channel=32)
)
MUTANTS = 200


def write(form, path):
    state = fabricate.prior(SMALL).unet.state_dict()
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    return path.read_bytes()


def mutate(content, draw):
    """Some bytes changed, most of them in the file's first and last parts, which say how to read the rest."""
    content = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 8))):
        edge = draw.choice((400, 4000, 30000))
        at = draw.choice((draw.randrange(edge), len(content) - 1 - draw.randrange(edge), draw.randrange(len(content))))
        at = min(max(at, 0), len(content) - 1)
        action = draw.choice(("flip", "set", "set", "remove", "repeat", "cut"))
        if action == "flip":
            content[at] ^= 1 << draw.randrange(8)
        elif action == "set":
            content[at : at + draw.choice((1, 4, 8))] = draw.choice((b"\xff", b"\0", b"\xff" * 8, b"]", b"9", b"\x7f"))
        elif action == "remove":
            del content[at : at + draw.randrange(1, 64)]
        elif action == "repeat":
            content[at:at] = content[at : at + draw.randrange(1, 64)]
        elif draw.random() < 0.2:
            del content[at:]
        if not content:
            break
    return bytes(content)


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_any_bytes_are_a_model_or_one_line(form, tmp_path):
    path = tmp_path / ("a.safetensors" if form == "safetensors" else "a.pt")
    content, draw, read = write(form, path), random.Random(form), 0
    for _ in range(MUTANTS):
        path.write_bytes(mutate(content, draw))
        try:
            loaded = checkpoints.load(path, image_size=32)
            model = Prior.from_state(loaded.config, loaded.state, "here")
        except UserError as error:
            assert str(error).isprintable() and len(str(error)) < 600, str(error)
        else:
            assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
            read += 1
    assert 0 < read < MUTANTS  # some bytes are only weights


def test_a_memo_of_gigabytes_is_not_made(tmp_path):
    """One object kept as number 2^28: an unpickler would first make a table of 4 GiB."""
    path = tmp_path / "a.pt"
    content = write("legacy", path)
    at = content.index(b"ccollections\nOrderedDict\nq\x00") + len(b"ccollections\nOrderedDict\n")
    path.write_bytes(content[:at] + b"r\x00\x00\x00\x10" + content[at + 2 :])
    with pytest.raises(UserError, match="truncated or damaged .an object is kept as number 268435456."):
        checkpoints.load(path, image_size=32)
