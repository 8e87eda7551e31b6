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
import shutil
import signal
import subprocess
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import idx_files
import killing
from helpers import TINY, TINY_FULL, image_folder, tiny_pdae
from pdae_fast import cli, config, convert, encode, evaluate, interpolate, reconstruct, sample, train
from pdae_fast.data import __main__ as avatars
from pdae_fast.data import load_image, open_dataset, read_attributes
from pdae_fast.data.latents import encode_dataset
from pdae_fast.errors import UserError
from pdae_fast.files import claim_folder, claim_place
from pdae_fast.training.curves import read_log
from pdae_fast.training.state import trim_log

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
        "interpolate": (interpolate.main, *run, *small, "--points", 2, "--kinds", "latent"),
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
        argv = [str(a) for a in argv]
        return main(argv) if main is convert.main else cli.run(main, argv)

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


def some(names, short):
    """Only the names ``short`` in the short form."""
    long = pytest.mark.skipif(MANY == 1, reason="part of the long form: FAULTS=2 or more")
    return [name if name in short else pytest.param(name, marks=long) for name in names]


KILLED = ("train prior", "train latent", "encode", "reconstruct", "evaluate", "avatars", "convert", "convert back")


@pytest.mark.slow
@pytest.mark.parametrize("name", some([*KILLED, "export"], ("train latent", "encode", "reconstruct", "convert")))
def test_killed_again_and_again_it_ends_as_one_that_was_not(tmp_path, shared, name):
    needs(name)
    job = jobs(shared)[name]
    straight = killing.run(call(job, tmp_path / "straight"))
    assert straight.status == 0, straight.err
    expected, random, kills = results(tmp_path / "straight"), np.random.default_rng(len(name)), 0
    rounds = MANY if name != "export" else -(-MANY // 4)
    for number in range(rounds):
        folder = tmp_path / f"killed-{number}"
        for _ in range(1 if MANY == 1 else 4):
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
@pytest.mark.parametrize("name", some(["convert", "convert back"], ["convert"]))
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
        assert re.fullmatch(r"error: another process is writing to .*out.*; wait until it ends.*\n", ended.err), (
            ended.err
        )


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
@pytest.mark.parametrize("name", some(WRITERS, ("encode", "evaluate", "convert", "convert back")))
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


@pytest.fixture
def disk(tmp_path):
    """A function that makes a disk of so many bytes, or gives the one it has made another size; returns its folder."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def sized(bytes_):
        more = "remount," if os.path.ismount(folder) else ""
        command = ["mount", "-t", "tmpfs", "-o", f"{more}size={bytes_}", "tmpfs", str(folder)]
        made = subprocess.run(command, capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"no disk can be mounted here: {made.stderr.strip()}")
        return folder

    if shutil.which("mount") is None:
        pytest.skip("no disk can be mounted here: there is no mount")
    yield sized
    if os.path.ismount(folder):
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", some(WRITERS, ("reconstruct", "avatars", "convert", "convert back")))
def test_a_disk_that_is_full(tmp_path, shared, disk, name):
    """As above, on a real one, where what is full is the sum of all files."""
    needs(name)
    job = jobs(shared)[name]
    assert killing.run(call(job, tmp_path / "straight")).status == 0
    expected, pages = results(tmp_path / "straight"), 0
    for data in killing.content(tmp_path / "straight").values():
        pages += -(-len(data or b"") // 4096)
    for share in (0.4, 0.7, *np.random.rand(MANY - 1)):
        folder = disk(4096 * max(1, int(pages * share)))
        ended = killing.run(call(job, folder))
        assert ended.status == 2, ended.err
        assert re.fullmatch(r"error: .*(out|model).*: No space left on device.*", ended.err.strip()), ended.err
        disk(2**26)
        again = killing.run(call(job, folder))
        assert again.status == 0 and results(folder) == expected, again.err
        shutil.rmtree(folder / "out")


# -- damaged files -----------------------------------------------------------------------------------------------------


def mutated(data, random, other):
    """``data`` with one thing wrong; ``other``: another kind of file, for its head."""
    half, place = len(data) // 2, int(random.integers(0, max(1, len(data))))
    kind = int(random.integers(0, 8))
    if kind <= 1 and data:
        return data[:place] + bytes([data[place] ^ 1 << int(random.integers(8))]) + data[place + 1 :]
    if kind == 2:
        return data[:place]
    if kind == 3:
        return data[:place] + random.bytes(int(random.integers(1, 9))) + data[place:]
    if kind == 4:
        return data[:place] + data[place + int(random.integers(1, 64)) :]
    if kind == 5:
        return other[:64] + data[64:]
    if kind == 6:
        return data[half:] + data[:half]
    numbers = list(re.finditer(rb"-?[0-9]+(\.[0-9]+)?", data[: 1 << 16]))
    if not numbers:
        return data[:place] + bytes(16) + data[place + 16 :]
    number = numbers[int(random.integers(0, len(numbers)))]
    wild = (b"1e400", b"-1", b"NaN", b"1" + b"0" * 30, b"9" * 5000, b'"x"', b"null", b"[]", b"{}", b"", "²".encode())
    return data[: number.start()] + wild[int(random.integers(0, len(wild)))] + data[number.end() :]


def kinds(folder, shared):
    """Kind of file -> its path, a function that reads it, and whether every damage of it can be told."""
    needs("avatars")
    data = image_folder(folder / "images", 4)
    idx = idx_files.write_set(folder / "idx", count=6)
    rows = "".join(f"{i:06d}.jpg {' '.join(str(j * i % 3 - 1) for j in range(3))}\n" for i in range(5))
    (folder / "celeba.txt").write_text(f"5\nBald Smiling Young\n{rows}")
    (folder / "table.csv").write_text("image,a,b,hair\n" + "".join(f"{i}.png,{i % 2},0.5,red\n" for i in range(5)))
    (folder / "log.jsonl").write_text("".join(json.dumps({"step": i, "loss": 1 / (i + 1)}) + "\n" for i in range(9)))
    job, drawn = jobs(shared)["avatars"], folder / "drawn"
    killing.run(call(job, drawn))
    model, parts = tiny_pdae(), folder / "encoded" / "out" / "parts"

    def latents():
        found = encode_dataset(model, open_dataset(data, 32, 1), folder / "cache", device="cpu", quiet=True)
        return found.z.numpy().tobytes(), found.names, found.labels

    def labels(path):
        found = read_attributes(path)
        return found.images, found.columns, found.values.tolist()

    def first_of_idx():
        return [open_dataset(idx, 32, 1)[i].image.numpy().tobytes() for i in range(6)]

    def manifest():
        return [open_dataset(drawn / "out", 16, 1).names, killing.run(call(job, drawn)).status]

    def log():
        trim_log(folder / "log.jsonl", 8)  # as --resume does
        return [values.tolist() for values in read_log(folder)]

    latents()
    return {
        "PNG": (data / "01.png", lambda: load_image(data / "01.png", 32, 1).numpy().tobytes(), True),
        "latents": (next((folder / "cache").iterdir()), latents, True),
        "IDX": (next(idx.glob("train-images*")), first_of_idx, next(idx.glob("train-images*")).suffix == ".gz"),
        "CelebA's list": (folder / "celeba.txt", lambda: labels(folder / "celeba.txt"), False),
        "CSV": (folder / "table.csv", lambda: labels(folder / "table.csv"), False),
        "log": (folder / "log.jsonl", log, False),
        "manifest": (drawn / "out" / "manifest.json", manifest, True),
        **_parts(folder, shared, parts),
    }


def _parts(folder, shared, parts):
    """The files of an encoding that was stopped after its first block."""
    job, here = jobs(shared)["encode"], folder / "encoded"
    killing.run(call(job, here), at=14)
    begun = killing.content(here)
    assert any(name.endswith(".jsonl") and data for name, data in begun.items()), begun.keys()

    def finished(path):
        damaged = path.read_bytes()
        for name, data in begun.items():
            put(here / name, damaged if here / name == path else data or b"")
        ended = killing.run(call(job, here))
        if ended.status == 2:
            raise UserError(ended.err.removeprefix("error: ").removesuffix("\n"))
        assert ended.status == 0, ended.err
        return results(here)

    return {
        f"journal's {path.name}": (path, partial(finished, path), True)
        for path in (here / name for name in begun if "parts/" in name)
        if path.is_file()
    }


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _too_long(number, frame):
    raise AssertionError("it hangs")


@pytest.mark.slow
def test_damaged_files_are_refused_or_give_what_the_whole_ones_give(tmp_path, shared, capfd):
    previous = signal.signal(signal.SIGALRM, _too_long)
    random, table = np.random.default_rng(7), {}
    files = kinds(tmp_path, shared)
    other = {name: path.read_bytes() for name, (path, _, _) in files.items()}
    try:
        for name, (path, read, told) in files.items():
            whole, outcomes = other[name], Counter()
            put(path, whole)
            expected = read()
            for _ in range((6 if name.startswith("journal") else 30) * MANY):
                put(path, mutated(whole, random, other[str(random.choice(list(other)))]))
                signal.alarm(60)
                try:
                    found = read()
                except UserError as error:
                    assert "\n" not in str(error) and len(str(error)) < 2000
                    outcomes["refused"] += 1
                else:
                    outcomes["same" if found == expected else "other"] += 1
                    assert found == expected or not told, name
                signal.alarm(0)
            put(path, whole)
            table[name] = outcomes
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    with capfd.disabled():
        print("".join(f"\n{name}: {dict(outcomes)}" for name, outcomes in table.items()))
