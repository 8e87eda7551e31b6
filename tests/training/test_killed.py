"""What a run survives: kill -9 anywhere, half-written files, refusing disks, broken images. Nothing may be lost.

Run as a script (`python test_killed.py ...`) this file is the process that is killed.
"""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers import TINY, image_folder, tiny_pdae, tiny_prior
from pdae_fast import PDAE, Prior, UserError
from pdae_fast.data import Labels, open_dataset
from pdae_fast.data.latents import Latents, statistics
from pdae_fast.training import Trainer, TrainSettings
from pdae_fast.training.codes import classifier_task, latent_task
from pdae_fast.training.feed import BatchOrder
from pdae_fast.training.state import CHECKPOINT_NAME
from pdae_fast.training.tasks import TASKS

ALL = ("prior", "pdae", "latent", "classifier")
STEPS, SAVE_EVERY, FATAL = 6, 2, 4


def trainer(name, out, folder, save_every=SAVE_EVERY, **changes):
    """The same run whenever and wherever it is made."""
    torch.manual_seed(0)
    workers = changes.pop("workers", 0)
    batch_size = 4 if name in ("prior", "pdae") else 8
    settings = {"steps": STEPS, "batch_size": batch_size, "lr": 1e-3, "seed": 3, "flip": False, **changes}
    if name == "prior":
        task, dataset = TASKS[name](Prior(TINY.prior)), open_dataset(folder, 32, 1)
    elif name == "pdae":
        model = PDAE.from_prior(tiny_prior(), latent_dim=16, encoder_channel=32)
        task, dataset = TASKS[name](model), open_dataset(folder, 32, 1)
    else:
        z = torch.randn(30, 16, generator=torch.Generator().manual_seed(1))
        latents = Latents(z, [str(i) for i in range(30)], [None] * 30, *statistics(z), "encoder", "images", [])
        if name == "latent":
            task, dataset = latent_task(tiny_pdae(), latents, hidden=32, layers=3)
        else:
            labels = Labels((z[:, :2] > 0).to(torch.uint8), ["a", "b"], list(range(30)), [], [])
            task, dataset, _ = classifier_task(tiny_pdae(), latents, labels)
    settings = TrainSettings(name, "x", **settings)
    return Trainer(task, dataset, settings, out, workers=workers, log_every=1, save_every=save_every, quiet=True)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def dying_save(contents, file, real=torch.save):
    """Half of the checkpoint of the fatal step reaches the disk."""
    buffer = io.BytesIO()
    real(contents, buffer)
    half = contents.get("step") == FATAL
    file.write(buffer.getvalue()[: buffer.tell() // 2] if half else buffer.getvalue())
    if half:
        file.flush()
        os.fsync(file.fileno())
        kill()


def die_before_renaming(name):
    """The file is complete beside its place when the process dies; it is the second one of this name."""
    real, times = os.replace, []

    def replace(source, target):
        if Path(target).name == name:
            times.append(target)
            if len(times) == 2:
                kill()
        real(source, target)

    os.replace = replace


def child(name, out, folder, where):
    if where == "half a checkpoint":
        torch.save = dying_save
    elif where == "half a line of the log":
        run = trainer(name, out, folder)
        log = run._log

        def dying_log(values):
            log(values)
            if run.step == FATAL + 1:
                path = Path(out) / "log.jsonl"
                path.write_bytes(path.read_bytes()[:-20])
                kill()

        run._log = dying_log
        run.run()
    else:
        die_before_renaming(where)
    trainer(name, out, folder).run()


def assert_same_runs(one, two):
    a, b = (torch.load(d / CHECKPOINT_NAME, weights_only=True) for d in (one, two))
    assert a["step"] == b["step"] == STEPS
    for part in ("model", "ema"):
        assert a[part].keys() == b[part].keys()
        assert all(torch.equal(v, b[part][k]) for k, v in a[part].items())
    for k, values in a["optimizer"]["state"].items():
        assert all(torch.equal(v, b["optimizer"]["state"][k][n]) for n, v in values.items())
    for name in ("model.safetensors", "config.json", "train.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    logs = [[json.loads(line) for line in (d / "log.jsonl").read_text().splitlines()] for d in (one, two)]
    assert [(v["step"], v["loss"]) for v in logs[0]] == [(v["step"], v["loss"]) for v in logs[1]]
    assert [v["step"] for v in logs[0]] == list(range(1, STEPS + 1))


@pytest.fixture
def folder(tmp_path):
    return image_folder(tmp_path / "images", 10)


DEATHS = [(name, "half a checkpoint") for name in ALL] + [
    ("latent", CHECKPOINT_NAME),
    ("latent", "model.safetensors"),
    ("classifier", "config.json"),
    ("latent", "half a line of the log"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "where"), DEATHS)
def test_killed_while_writing_then_resumed_equals_uninterrupted(tmp_path, folder, name, where):
    out = tmp_path / "run"
    process = subprocess.run(
        [sys.executable, __file__, name, str(out), str(folder), where],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        text=True,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    unfinished = list(out.glob(".*.tmp"))
    assert bool(unfinished) == (where != "half a line of the log")
    # What users had before the kill still loads, and the last whole checkpoint is there.
    (Prior if name == "prior" else PDAE).from_pretrained(out)
    saved = torch.load(out / CHECKPOINT_NAME, weights_only=True)["step"]
    assert saved == (SAVE_EVERY if where in ("half a checkpoint", CHECKPOINT_NAME) else FATAL)
    run = trainer(name, out, folder)
    run.resume()
    assert run.step == saved and run.run() is None
    assert not list(out.glob(".*.tmp"))
    trainer(name, tmp_path / "straight", folder).run()
    assert_same_runs(out, tmp_path / "straight")


@pytest.mark.parametrize("name", ["prior", "latent"])
@pytest.mark.parametrize("limit", [3000, 200_000])
def test_a_disk_that_refuses_in_the_middle_of_a_file(tmp_path, folder, name, limit):
    """The system cuts a write off; the last checkpoint and the users' model stay, and a resumed run is the same."""
    resource = pytest.importorskip("resource")
    out = tmp_path / "run"
    run = trainer(name, out, folder)
    run.settings = trainer(name, out, folder, steps=2).settings
    run.run()
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.suffix in (".pt", ".safetensors", ".json")}
    run = trainer(name, out, folder)
    run.resume()
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    smallest = min(len(before[CHECKPOINT_NAME]), len(before["model.safetensors"]))
    assert limit < smallest or name == "latent"
    resource.setrlimit(resource.RLIMIT_FSIZE, (min(limit, smallest // 2), hard))
    try:
        with pytest.raises(UserError, match="cannot write .*File too large"):
            run.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert {name: (out / name).read_bytes() for name in before if name != "train.json"} == {
        name: content for name, content in before.items() if name != "train.json"
    }
    assert not list(out.glob(".*.tmp"))
    run = trainer(name, out, folder)
    run.resume()
    run.run()
    trainer(name, tmp_path / "straight", folder).run()
    assert_same_runs(out, tmp_path / "straight")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_log_that_cannot_be_written_is_named(tmp_path, folder):
    run = trainer("latent", tmp_path / "run", folder)
    (tmp_path / "run").mkdir()
    log = run._log

    def full(values):
        (tmp_path / "run" / "log.jsonl").unlink(missing_ok=True)
        (tmp_path / "run" / "log.jsonl").symlink_to("/dev/full")
        log(values)

    run._log = full
    with pytest.raises(UserError, match="cannot write .*log.jsonl: No space left on device"):
        run.run()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(tmp_path, folder):
    (tmp_path / "run").mkdir(mode=0o500)
    with pytest.raises(UserError, match="cannot write .*Permission denied"):
        trainer("prior", tmp_path / "run", folder).run()
    with pytest.raises(UserError, match="cannot create the folder .*Permission denied"):
        trainer("prior", tmp_path / "run" / "inner", folder).run()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_costs_no_finished_step(tmp_path, folder, workers):
    out = tmp_path / "run"
    trainer("prior", tmp_path / "straight", folder, workers=workers).run()
    image = folder / f"{list(BatchOrder(10, 4, seed=3, stop=3))[2][1]:02d}.png"  # first needed by the third step
    shutil.copy(image, tmp_path / "whole.png")
    image.write_bytes(image.read_bytes()[:50])
    with pytest.raises(UserError) as failure:
        trainer("prior", out, folder, save_every=1000, workers=workers).run()
    saved = torch.load(out / CHECKPOINT_NAME, weights_only=True)["step"]
    text = str(failure.value)
    assert text.startswith(str(image)) and "\n" not in text and "Traceback" not in text
    assert saved == 2 and f"step {saved} is saved in {out}" in text
    shutil.copy(tmp_path / "whole.png", image)
    run = trainer("prior", out, folder, workers=workers)
    run.resume()
    assert run.step == saved == len((out / "log.jsonl").read_text().splitlines())
    run.run()
    assert_same_runs(out, tmp_path / "straight")


if __name__ == "__main__":
    child(*sys.argv[1:])
