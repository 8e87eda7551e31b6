"""Commands that are killed, refused by the disk, started twice or given damaged files: nothing is lost, mixed or taken
for something else.

The short form runs in CI. FAULTS=N in the environment does N times as much; `pytest -s` prints the figures.
"""

import builtins
import errno
import json
import os
import re
import resource
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import killing
from helpers import TINY, TINY_FULL, image_folder, tiny_pdae
from pdae_fast import cli, config, convert, encode, evaluate, interpolate, reconstruct, sample, train
from pdae_fast.data import __main__ as avatars
from pdae_fast.files import claim_folder, claim_place

if not hasattr(os, "fork"):
    pytest.skip("needs fork", allow_module_level=True)

MANY = int(os.environ.get("FAULTS", 1))
PERSONAL = {"seconds", "images_per_second", "processes"}  # what two runs need not share


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A model, images, and the configuration of a small network."""
    folder = tmp_path_factory.mktemp("shared")
    tiny_pdae(TINY_FULL).save_pretrained(folder / "model")
    image_folder(folder / "images", 4)
    (folder / "tiny.json").write_text(config.dumps(TINY))
    return folder


def jobs(shared):
    """Name -> the command that writes "out" in the current folder; what it needs to be done again."""
    run = ("--model", shared / "model", "--input", shared / "images", "--device", "cpu", "--quiet", "--out", "out")
    small = ("--steps", 2, "--batch-size", 2)
    fit = ("--data", shared / "images", "--out", "out", "--device", "cpu", "--quiet", "--steps", 4, "--batch-size", 2,
           "--save-every", 2, "--log-every", 1)  # fmt: skip
    return {
        "train prior": (train.main, "prior", *fit, "--architecture", shared / "tiny.json", "--sample-every", 2),
        "train latent": (train.main, "latent", *fit, "--init-from", shared / "model", "--hidden", 32, "--layers", 3),
        "encode": (encode.main, *run, *small, "--with-x-T"),
        "reconstruct": (reconstruct.main, *run, *small),
        "evaluate": (evaluate.main, *run, "--steps", 2, "--batch-size", 3),
        "sample": (sample.main, *run, *small, "--count", 2, "--latent-steps", 2),
        "interpolate": (interpolate.main, *run, *small, "--points", 2, "--kinds", "z"),
        "avatars": (avatars.main, "avatars", "--out", "out", "--count", 4, "--pairs", 1, "--size", 16, "--workers", 1,
                    "--quiet"),
        "convert": (convert.main, shared / "model", "--out", "out", "--quiet"),
        "convert back": (convert.main, shared / "model", "--to", "official", "--out", "out/model.pt", "--quiet"),
        "export": (partial(_export, shared),),
    }  # fmt: skip


def _export(shared, argv):
    from pdae_fast.export.__main__ import main

    main(["onnx", "--model", str(shared / "model"), "--out", "out", "--steps", "2", "--quiet"])


def call(job, folder):
    """The job as a command in ``folder``; what was begun is resumed."""

    def command():
        folder.mkdir(exist_ok=True)
        os.chdir(folder)
        main, *argv = job
        if main is train.main and Path("out/checkpoint.pt").exists():
            argv.append("--resume")
        return cli.run(main, [str(a) for a in argv])

    return command


def needs(name):
    if name == "avatars":
        pytest.importorskip("resvg_py")
    if name == "export":
        for module in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(module)
    if name == "train latent":
        pytest.importorskip("sklearn")


def results(folder):
    """What a command leaves, without what two runs need not share."""
    found = killing.content(folder)
    for name, data in found.items():
        if name.endswith("log.jsonl"):
            found[name] = [(v["step"], v["loss"]) for v in map(json.loads, data.decode().splitlines())]
        elif name.endswith("metrics.json"):
            found[name] = _impersonal(json.loads(data))
        elif name.endswith("manifest.json") and b"parity" in data:
            found[name] = sorted(json.loads(data)["graphs"])
        elif name.endswith(".npz"):
            with np.load(folder / name) as archive:
                found[name] = {key: archive[key].tobytes() for key in archive}
        elif name.endswith(".csv"):
            found[name] = re.sub(rb"[0-9.e+-]+", b"", data) if b"seconds" in data else data
        elif name.endswith((".pt", ".onnx", ".weights")):
            found[name] = _values(torch.load(folder / name, weights_only=True)) if name.endswith(".pt") else len(data)
    return found


def _impersonal(value):
    if isinstance(value, dict):
        return {k: _impersonal(v) for k, v in value.items() if k not in PERSONAL}
    return [_impersonal(v) for v in value] if isinstance(value, list) else value


def _values(value):
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.numpy().tobytes()
    if isinstance(value, dict):
        return {k: _values(v) for k, v in value.items()}
    return [_values(v) for v in value] if isinstance(value, (list, tuple)) else value


# -- kills -------------------------------------------------------------------------------------------------------------

KILLED = ("train prior", "train latent", "encode", "reconstruct", "evaluate", "avatars", "convert", "convert back")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*KILLED, "export"])
def test_killed_again_and_again_it_ends_as_one_that_was_not(tmp_path, shared, name):
    needs(name)
    job = jobs(shared)[name]
    straight = killing.run(call(job, tmp_path / "straight"))
    assert straight.status == 0, straight.err
    expected, random, kills = results(tmp_path / "straight"), np.random.default_rng(len(name)), 0
    rounds = MANY if name != "export" else -(-MANY // 4)
    for number in range(rounds):
        folder = tmp_path / f"killed-{number}"
        for _ in range(3 if MANY == 1 else 8):
            if number % 3 == 1:
                ended = killing.run(call(job, folder), after=float(random.uniform(0, straight.seconds)))
            else:
                ended = killing.run(call(job, folder), at=int(random.integers(0, straight.changes)))
            if ended.status != -signal.SIGKILL:
                break
            kills += 1
        else:
            ended = killing.run(call(job, folder))
        assert ended.status == 0, ended.err
        assert results(folder) == expected
    print(f"\n{name}: {kills} kills, {rounds} of {rounds} ended as uninterrupted")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["convert", "convert back"])
def test_a_conversion_killed_before_every_change_is_done_by_the_same_command(tmp_path, shared, name):
    job = jobs(shared)[name]
    straight = killing.run(call(job, tmp_path / "straight"))
    for at in range(straight.changes):
        folder = tmp_path / str(at)
        assert killing.run(call(job, folder), at=at).status == -signal.SIGKILL
        again = killing.run(call(job, folder))
        assert again.status == 0, (at, again.err)
        assert results(folder) == results(tmp_path / "straight")


# -- two at once, and disks that refuse --------------------------------------------------------------------------------

WRITERS = (*KILLED, "sample", "interpolate", "export")


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_a_second_process_is_refused_in_one_line_and_changes_nothing(tmp_path, shared, name):
    needs(name)
    (tmp_path / "out").mkdir()

    def claim():
        os.chdir(tmp_path)
        (claim_place if name in ("convert back", "export") else claim_folder)(
            "out/model.pt" if name == "convert back" else "out"
        )

    with killing.held(claim):
        before = killing.content(tmp_path)
        ended = killing.run(call(jobs(shared)[name], tmp_path))
        assert ended.status == 2 and ended.out == "" and killing.content(tmp_path) == before
        assert re.fullmatch(r"error: another process is writing to out.*; wait until it ends.*\n", ended.err), ended.err


def read_only(out):
    """A disk that refuses to change anything in ``out``, for this process."""

    def refuse(path):
        if isinstance(path, (str, os.PathLike)) and os.path.realpath(path).startswith(os.path.realpath(out)):
            raise OSError(errno.EROFS, "Read-only file system", os.fspath(path))

    real_open, real_os_open, real_mkdir = builtins.open, os.open, os.mkdir

    def opened(path, mode="r", *rest, **more):
        if set(mode) & set("wax+"):
            refuse(path)
        return real_open(path, mode, *rest, **more)

    def os_opened(path, flags, *rest, **more):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            refuse(path)
        return real_os_open(path, flags, *rest, **more)

    def made(path, *rest, **more):
        refuse(path)
        return real_mkdir(path, *rest, **more)

    builtins.open, os.open, os.mkdir = opened, os_opened, made


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_a_read_only_output(tmp_path, shared, name):
    needs(name)
    if name != "export":
        (tmp_path / "out").mkdir()
    command = call(jobs(shared)[name], tmp_path)

    def refused():
        read_only(tmp_path if name == "export" else tmp_path / "out")
        return command()

    ended = killing.run(refused)
    assert ended.status == 2 and ended.out == "", ended.err
    assert re.fullmatch(r"error: .*out.*Read-only file system\n", ended.err.split("\r")[-1]), ended.err
    assert killing.content(tmp_path) in ({"out": None}, {})


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_a_disk_that_is_full_after_so_many_bytes(tmp_path, shared, name):
    """One line that names a file; with room the same command ends as if nothing had been."""
    needs(name)
    job = jobs(shared)[name]
    assert killing.run(call(job, tmp_path / "straight")).status == 0
    expected = results(tmp_path / "straight")
    largest = max(len(data or b"") for data in killing.content(tmp_path / "straight").values())
    for number in range(MANY):
        folder, limit = tmp_path / str(number), int(largest * (0.9 if number == 0 else np.random.rand()))
        command = call(job, folder)

        def full(command=command, limit=limit):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            return command()

        ended = killing.run(full)
        assert ended.status == 2, ended.err
        lines = ended.err.splitlines()
        assert len(lines) == 1 and re.search(r"error: .*(cannot write|: File too large)", lines[0]), ended.err
        assert "standard output" not in lines[0]
        again = killing.run(call(job, folder))
        assert again.status == 0 and results(folder) == expected, again.err
