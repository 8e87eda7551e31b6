"""A saved directory: what was written is what is read, or it is refused."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import tiny_pdae
from pdae_fast import PDAE, UserError
from pdae_fast.checkpoints.directory import WEIGHTS_NAME, digest


@pytest.fixture
def saved(tmp_path):
    tiny_pdae().save_pretrained(tmp_path / "m")
    return tmp_path / "m"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_flipped_bit_of_the_weights_is_noticed(tmp_path, dtype):
    tiny_pdae().save_pretrained(tmp_path, dtype)
    path = tmp_path / WEIGHTS_NAME
    PDAE.from_pretrained(tmp_path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    generator = torch.Generator().manual_seed(0)
    for place in torch.randint(header, len(whole), (40,), generator=generator).tolist():
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged or changed"):
            PDAE.from_pretrained(tmp_path)


def test_a_damaged_header_is_no_other_model(saved):
    path = saved / WEIGHTS_NAME
    whole, state = path.read_bytes(), PDAE.from_pretrained(saved).state_dict()
    for place in range(8, 8 + int.from_bytes(whole[:8], "little"), 97):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        try:
            found = PDAE.from_pretrained(saved).state_dict()
        except UserError:
            continue
        assert all(torch.equal(found[name], state[name]) for name in state)  # the digest's own name was hit, say


def test_the_digest_is_of_names_types_shapes_and_values():
    state = {"b": torch.tensor([[1.0, 2.0]]), "a": torch.zeros(0, dtype=torch.float16)}
    expected = hashlib.sha256(b"a torch.float16 [0]\nb torch.float32 [1, 2]\n" + state["b"].numpy().tobytes())
    assert digest(state) == expected.hexdigest()


def test_weights_without_a_digest_are_read(saved):
    path = saved / WEIGHTS_NAME
    state = load_file(path)
    save_file(state, path)
    assert torch.equal(PDAE.from_pretrained(saved).state_dict()["encoder.encoder.0.weight"],
                       state["encoder.encoder.0.weight"])  # fmt: skip


def test_weights_that_are_no_floats(saved):
    path = saved / WEIGHTS_NAME
    state = load_file(path)
    state["decoder.out.2.bias"] = state["decoder.out.2.bias"].to(torch.int32)
    save_file(state, path)
    with pytest.raises(UserError, match=r"decoder\.out\.2\.bias is torch.int32; expected floating-point"):
        PDAE.from_pretrained(saved)
    assert json.loads((saved / "config.json").read_text())["kind"] == "pdae"
