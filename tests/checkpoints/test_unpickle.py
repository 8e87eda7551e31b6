"""Files of other trainers: tensors and plain values come out, and nothing that a file names is imported or run."""

import argparse
import builtins
import collections
import copyreg
import io
import os
import pickle
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import fabricate

from pdae_fast import Prior, UserError, checkpoints
from pdae_fast.checkpoints.read import read_file
from pdae_fast.checkpoints.unpickle import Inert, _load, load


class Calls:
    """Unpickling this calls ``function``."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class SetsState:
    def __reduce__(self):
        return SetsState, (), {"__class__": 1, "x": 3}


def hostile(ran: Path) -> dict:
    """Payloads by name; any of them, run, makes ``ran`` appear or the test die."""
    touch = f"open({str(ran)!r}, 'w').close()"
    return {
        "system": Calls(os.system, f"touch {ran}"),
        "eval": Calls(builtins.eval, touch),
        "exec": Calls(builtins.exec, touch),
        "touch": Calls(Path.touch, ran),
        "nested": Calls(torch.storage._load_from_bytes, pickle.dumps(Calls(builtins.eval, touch))),
        "import": Calls(__import__, "antigravity"),
        "attribute": Calls(getattr, os, "system"),
        "partial": __import__("functools").partial(os.system, f"touch {ran}"),
        "state": SetsState(),
    }


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", hostile(Path("x")))
def test_nothing_runs(name, legacy, tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    payload = hostile(ran)[name]
    if name == "attribute":
        payload = Calls(getattr, "text", "upper")
    contents = {"weight": torch.ones(3), "payload": payload, "after": 5}
    torch.save(contents, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)

    def refuse(*arguments, **named):
        raise AssertionError("an import, or a call that the file asked for")

    monkeypatch.delitem(sys.modules, "antigravity", raising=False)
    monkeypatch.setattr(os, "system", refuse)
    found = load(tmp_path / "a.pt", mapped=not legacy)
    assert torch.equal(found["weight"], torch.ones(3))
    assert isinstance(found["payload"], Inert) and found["after"] == 5
    assert not ran.exists() and "antigravity" not in sys.modules


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_what_stands_beside_the_weights(legacy, tmp_path, monkeypatch):
    """As in Diff-AE's files: callback states keyed by a class of pytorch_lightning 1.4.5, and more."""
    lightning = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    lightning.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": lightning.__name__})
    lightning.AttributeDict = type("AttributeDict", (dict,), {"__module__": lightning.__name__})
    for module in ("pytorch_lightning", "pytorch_lightning.callbacks", lightning.__name__):
        monkeypatch.setitem(sys.modules, module, lightning)
    c = fabricate.config(64, num_heads=4).prior
    source = fabricate.prior(c)
    extra = {
        "hyper_parameters": lightning.AttributeDict(img_size=64, net_beatgans_attn_head=4),
        "callbacks": {lightning.ModelCheckpoint: {"best": torch.zeros(1), "path": Path("/x")}},
        "loss": np.float64(0.5),
        "args": argparse.Namespace(lr=1e-4),
        "counts": collections.defaultdict(list, {1: [2]}),
        "set": {1, 2},
        "array": np.arange(3),
        "dtype": torch.float16,
        "size": torch.Size([2]),
    }
    contents = fabricate.diffae(source, **extra)
    torch.save(contents, tmp_path / "last.ckpt", _use_new_zipfile_serialization=not legacy)
    for module in ("pytorch_lightning", "pytorch_lightning.callbacks", lightning.__name__):
        monkeypatch.delitem(sys.modules, module)
    loaded = checkpoints.load(tmp_path / "last.ckpt")
    assert (loaded.config.image_size, loaded.config.unet.num_heads) == (64, 4)
    assert torch.equal(loaded.state["unet.out.2.bias"], source.unet.out[2].bias)
    found = read_file(tmp_path / "last.ckpt")
    assert dict(found["args"]) == {"lr": 1e-4}
    assert (found["counts"], found["set"], found["dtype"], found["size"]) == ({1: [2]}, {1, 2}, torch.float16, (2,))
    assert "pytorch_lightning" not in sys.modules


def tensors() -> dict:
    return {
        "complex64": torch.zeros(3, dtype=torch.complex64),
        "int64": torch.zeros(3, dtype=torch.int64),
        "float8": torch.zeros(3).to(torch.float8_e4m3fn),
        "sparse": torch.eye(3).to_sparse(),
        "quantised": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "a str": "text",
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", tensors())
def test_other_tensors_are_named(kind, tmp_path):
    state = fabricate.prior(fabricate.config().prior).unet.state_dict()
    path = fabricate.save(tmp_path / "p.pt", state | {"out.2.bias": tensors()[kind]})
    with pytest.raises(UserError, match=f"out.2.bias is .*{kind}") as error:
        checkpoints.load(path)
    assert "\n" not in str(error.value)


def test_torchs_own_unpickler_cannot_be_forced(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(UserError, match="TORCH_FORCE_WEIGHTS_ONLY_LOAD is set"):
        read_file(fabricate.save(tmp_path / "a.pt", {"a": torch.zeros(1)}))


def test_views_and_shared_storages_are_read(tmp_path):
    whole = torch.randn(6, 4)
    contents = {"whole": whole, "part": whole[1:3], "turned": whole.T, "parameter": torch.nn.Parameter(whole)}
    for legacy in (False, True):
        torch.save(contents, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
        found = load(tmp_path / "a.pt", mapped=not legacy)
        assert all(torch.equal(found[name], tensor) for name, tensor in contents.items())


def rewritten(path: Path, change) -> None:
    """``path`` with its members replaced by ``change(name, bytes)``, stored as torch does."""
    with zipfile.ZipFile(path) as archive:
        members = [(member.filename, archive.read(member)) for member in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members:
            archive.writestr(name, change(name, content))


def test_a_tensor_may_not_reach_beyond_its_storage(tmp_path):
    torch.save({"a": torch.zeros(8)}, tmp_path / "a.pt")
    # K\x08 is the size in the pickle.
    rewritten(tmp_path / "a.pt", lambda n, b: b.replace(b"K\x08\x85", b"K\x7f\x85") if n.endswith("data.pkl") else b)
    with pytest.raises(UserError, match="beyond its storage"):
        read_file(tmp_path / "a.pt")


def test_a_flipped_bit_is_noticed(tmp_path):
    source = fabricate.prior(fabricate.config().prior)
    path = fabricate.save(tmp_path / "p.pt", source.unet.state_dict())
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged: its part .* is not as it was written"):
        Prior.from_pretrained(path)


def test_files_without_check_sums_are_read(tmp_path):
    source = fabricate.prior(fabricate.config().prior)
    torch.serialization.set_crc32_options(False)
    try:
        path = fabricate.save(tmp_path / "p.pt", source.unet.state_dict())
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(checkpoints.load(path).state["unet.out.2.bias"], source.unet.out[2].bias)


# Every way in which a pickle can ask for a call or an import, by hand.
OPCODES = {
    "reduce": b"cos\nsystem\n(S'touch RAN'\ntR.",
    "inst": b"(S'touch RAN'\nios\nsystem\n.",
    "obj": b"(cos\nsystem\nS'touch RAN'\no.",
    "newobj": b"\x80\x02cos\nsystem\nU\x09touch RAN\x85\x81.",
    "newobj-ex": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x09touch RAN\x85}\x92.",
    "stack-global": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x09touch RAN\x85R.",
    "dotted": b"\x80\x04\x8c\x0ctorch._utils\x8c\x09os.system\x93\x8c\x09touch RAN\x85R.",
    "twice": b"cfunctools\npartial\n(cos\nsystem\ntR(S'touch RAN'\ntR.",
    "build": b"ccollections\nOrderedDict\n)R(S'items'\ncos\nsystem\ndb.",
}


@pytest.mark.parametrize("name", OPCODES)
def test_no_opcode_reaches_a_function(name, monkeypatch):
    monkeypatch.setattr(os, "system", lambda *a: pytest.fail("called"))
    found = _load(io.BytesIO(OPCODES[name]))
    assert isinstance(found, dict)
    assert not any(callable(value) and value is os.system for value in vars(found).values())


def test_registered_extensions_are_not_followed():
    copyreg.add_extension("os", "system", 240)
    try:
        assert isinstance(_load(io.BytesIO(b"\x80\x02\x82\xf0U\x04true\x85R.")), Inert)
    finally:
        copyreg.remove_extension("os", "system", 240)
