"""Two processes train what one does: the same weights, the same logs, one checkpoint; and what happens when one dies.

`torchrun` runs this file too: then `worker` is what each process does.
"""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import student_toy
from golden_rule import fill
from helpers import TINY, TINY_FULL, image_folder, images, tiny_pdae, tiny_prior
from pdae_fast import PDAE, DiffAE, DiffAEConfig, UserError, config, train
from pdae_fast.data import Sample
from pdae_fast.data.latents import LatentSet
from pdae_fast.processes import Group, processes
from pdae_fast.training import Trainer, TrainSettings
from pdae_fast.training import distributed as ranks
from pdae_fast.training.feed import BatchOrder, global_seed, step_generator
from pdae_fast.training.recognition import Labelled
from pdae_fast.training.settings import ON_IMAGES
from pdae_fast.training.state import CHECKPOINT_NAME
from pdae_fast.training.students import RecogniseTask, with_head
from pdae_fast.training.tasks import ClassifierTask, DiffAETask, ImagesWithRows, LatentTask, PDAETask, PriorTask

ROOT = Path(__file__).resolve().parents[2]
CASES = [
    *(("prior", 1), ("prior", 2), ("pdae", 1), ("pdae", 2), ("labelled", 2), ("diffae", 2)),
    *(("latent", 2), ("classifier", 2)),
    *(("student", 2), ("student by a policy", 2), ("recognise", 1)),
]
STEPS = 3
# Dropout draws by the shape of what a process computes, so with it one process and two do the same only on average.
PLAIN = dataclasses.replace(TINY, unet=dataclasses.replace(TINY.unet, dropout=0.0))


class Pictures(list):
    """Random images; number ``bad`` is ``what``, or cannot be read."""

    def __init__(self, bad=None, what=None):
        super().__init__(Sample(image, f"{i}", None) for i, image in enumerate(images(16)))
        self.bad = bad
        if what is not None:
            self[bad] = Sample(torch.full((1, 32, 32), what), "bad", None)
            self.bad = None

    def __getitem__(self, index):
        if index == self.bad:
            raise UserError(f"picture {index} is broken")
        return super().__getitem__(index)


def make(name):
    """(task, data set). The networks are float64: what should be a gradient of zero then is one, also for Adam, which
    would turn float32's rounding of it into a whole step. (The classifier takes float32 only, and has no such weight.)
    """
    if name == "prior":
        task, dataset = PriorTask(tiny_prior(PLAIN)), Pictures()
    elif name == "labelled":
        unet = dataclasses.replace(PLAIN.unet, num_classes=3)
        task = PDAETask(tiny_pdae(dataclasses.replace(PLAIN, unet=unet, prediction="v_prediction")))
        dataset = ImagesWithRows(Pictures(), torch.arange(16) % 3, range(16))
    elif name == "diffae":
        config = DiffAEConfig(image_size=32, latent_dim=16, unet=PLAIN.unet, encoder_multiplier=(1, 1, 1))
        task, dataset = DiffAETask(fill(DiffAE(config))), Pictures()
    elif name.startswith("student"):
        choose = (
            ("policy", {"known": student_toy.truth(), "estimator": "reinforce"}) if "policy" in name else ("all", {})
        )
        task, dataset = student_toy.student_task(choose[0], levels=2, **choose[1])
    elif name == "recognise":
        truth = student_toy.truth("parts")
        task, dataset = (
            RecogniseTask(with_head(student_toy.student(), truth), truth),
            Labelled(student_toy.Pictures(), truth),
        )
    elif name == "pdae":
        torch.manual_seed(0)
        task = PDAETask(PDAE.from_prior(tiny_prior(PLAIN), latent_dim=16, encoder_channel=32))
        dataset = Pictures()
    else:
        random = torch.Generator().manual_seed(7)
        z, labels = torch.randn(12, 16, generator=random), torch.randint(0, 2, (12, 2), generator=random)
        pdae = tiny_pdae(TINY_FULL)
        dataset = LatentSet(z, pdae.latent_mean, pdae.latent_std, labels=labels if name == "classifier" else None)
        task = {"latent": LatentTask, "classifier": ClassifierTask}[name](pdae)
    if name != "classifier":
        task.model.double()
    return task, dataset


def trainer(out, name="prior", group=None, dataset=None, **changes):
    task, usual = make(name)
    values = {"steps": STEPS, "batch_size": 4, "lr": 1e-3, "seed": 3, "flip": task.name in ON_IMAGES, **changes}
    return Trainer(
        task, dataset or usual, TrainSettings(task.name, "x", **values), out, log_every=1, save_every=2, quiet=True,
        group=group,
    )  # fmt: skip


def broken_for(rank):
    """An image that process ``rank`` of two, and nobody else, meets in the third step (none comes twice in the first
    four)."""
    order = BatchOrder(16, 4, seed=3, start=2, stop=3, rows=ranks.rows(Group(rank, 2), 4))
    return next(iter(order))[0]


def message(run):
    try:
        run.run()
    except UserError as error:
        return str(error)
    return "no error"


def worker(root):
    torch.set_num_threads(1)
    with processes() as group:
        for name, accumulate in CASES:
            trainer(root / f"{name}-{accumulate}-two", name, group, accumulate=accumulate).run()
        parted = trainer(root / "parted", "prior", group, steps=4)
        parted.resume()
        parted.run()
        nan = trainer(root / "nan", "prior", group, Pictures(broken_for(1), float("nan")))
        broken = trainer(root / "broken", "prior", group, Pictures(broken_for(1)))
        found = {"nan": message(nan), "broken": message(broken)}
        (root / f"messages-{group.rank}.json").write_text(json.dumps(found))


def torchrun(*command):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--nnodes", "1"),
        *("--master-addr", "127.0.0.1", "--master-port", str(port), *map(str, command)),
    ]


ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What `worker` left, after one process trained the first two steps of "parted"."""
    root = tmp_path_factory.mktemp("two")
    trainer(root / "parted", steps=2).run()
    done = subprocess.run(torchrun(__file__, root), env=ENVIRONMENT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return root


def saved(folder):
    return torch.load(folder / CHECKPOINT_NAME, weights_only=True)


def assert_same_run(a, b):
    one, other = saved(a), saved(b)
    assert one["step"] == other["step"]
    for part in ("model", "ema"):
        for name, value in one[part].items():
            atol = 1e-9 if value.dtype == torch.float64 else 1e-6
            torch.testing.assert_close(value, other[part][name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
    moments = (run["optimizer"]["state"][0]["exp_avg"] for run in (one, other))
    torch.testing.assert_close(*moments, rtol=1e-4, atol=1e-9)
    logs = [[json.loads(line) for line in (d / "log.jsonl").read_text().splitlines()] for d in (a, b)]
    assert [line["step"] for line in logs[0]] == [line["step"] for line in logs[1]]
    assert [line["loss"] for line in logs[0]] == pytest.approx([line["loss"] for line in logs[1]], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "accumulate"), CASES)
def test_two_processes_do_what_one_does(two, tmp_path, name, accumulate):
    """To 1e-9 in float64: weights, averaged weights, moments and the logged mean loss."""
    trainer(tmp_path / "one", name, accumulate=accumulate).run()
    assert_same_run(two / f"{name}-{accumulate}-two", tmp_path / "one")


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(two, tmp_path):
    """Two steps by one process, two by two processes, two by one again."""
    end = trainer(two / "parted", steps=6)
    end.resume()
    assert end.step == 4
    end.run()
    trainer(tmp_path / "straight", steps=6).run()
    assert_same_run(two / "parted", tmp_path / "straight")


@pytest.mark.slow
def test_what_one_process_meets_ends_all_of_them(two):
    """Both name the same step, whoever met it; what was whole is saved, what was not is not."""
    first, second = (json.loads((two / f"messages-{rank}.json").read_text()) for rank in (0, 1))
    for found in (first, second):
        assert found["nan"].startswith("the loss is nan at step 2; nothing was written after the last checkpoint")
        assert f"step 2 is saved in {two / 'broken'}, --resume continues" in found["broken"]
    assert "is broken" in second["broken"] and "another process" in first["broken"]
    assert saved(two / "nan")["step"] == saved(two / "broken")["step"] == 2


# -- in one process ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 4])
def test_the_shares_of_a_batch_are_the_batch(size):
    """Images, t, noise and flips of all processes, put together, are those of one process, bit for bit."""
    whole = [list(BatchOrder(10, 4, 1, stop=3, rows=ranks.rows(Group(r, size), 4))) for r in range(size)]
    assert [sum(parts, []) for parts in zip(*whole, strict=True)] == list(BatchOrder(10, 4, 1, stop=3))
    task, x = PriorTask(tiny_prior()), images(4)
    alone = ranks.draw(task, x, step_generator(3, 5), True, Group())
    groups = [Group(r, size) for r in range(size)]
    shares = [ranks.draw(task, x[ranks.rows(g, 4)], step_generator(3, 5), True, g) for g in groups]
    for parts, expected in zip(zip(*shares, strict=True), alone, strict=True):
        assert torch.equal(torch.cat(parts), expected)
    assert not torch.equal(alone[0], x)  # something was flipped


def test_dropout_differs_between_processes_and_is_what_it_was_in_the_first():
    assert len({global_seed(3, n, rank) for n in (0, 1) for rank in (0, 1, 2)}) == 6
    assert global_seed(3, 7) == global_seed(3, 7, 0) == 2532036506714696957


def test_a_batch_that_cannot_be_shared(tmp_path):
    with pytest.raises(UserError, match="--batch-size 4 counts the images of all processes.*multiple of 3"):
        trainer(tmp_path, group=Group(1, 3))


def test_only_a_lost_connection_is_somebody_elses_end():
    for text, expected in (("... Connection closed by peer [::1]:7", ranks.PeerGone), ("out of range", RuntimeError)):
        with pytest.raises(expected), ranks.peers(Group(0, 2)):
            raise RuntimeError(text)
    with pytest.raises(RuntimeError), ranks.peers(Group()):
        raise RuntimeError("Connection closed by peer")


# -- the command, stopped and killed -----------------------------------------------------------------------------------


def rank_of(pid):
    try:
        values = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        parent = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1]
    except OSError:
        return None, None
    return next((int(v[5:]) for v in values if v.startswith(b"RANK=")), None), int(parent)


def process_of(rank, parent):
    pids = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()]
    return next(pid for pid in pids if rank_of(pid) == (rank, parent))


def steps_in(out):
    log = out / "log.jsonl"
    return [json.loads(line)["step"] for line in log.read_text().splitlines()] if log.exists() else []


def wait_until(process, condition):
    for _ in range(3000):
        if condition():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("no progress")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes in /proc")
def test_sigterm_saves_one_step_and_a_killed_process_ends_the_run(tmp_path):
    """Two processes; SIGTERM to torchrun; on with two processes; SIGKILL to the second; on with one."""
    (tmp_path / "config.json").write_text(config.dumps(TINY))
    image_folder(tmp_path / "images", 10)
    out = tmp_path / "run"

    def options(steps):
        return [
            *("prior", "--data", str(tmp_path / "images"), "--out", str(out), "--steps", str(steps)),
            *("--architecture", str(tmp_path / "config.json"), "--batch-size", "4", "--device", "cpu"),
            *("--log-every", "1", "--save-every", "3"),
        ]

    def start(*more):
        command = torchrun("-m", "pdae_fast.train", *options(10**6), *more)
        return subprocess.Popen(
            command, env=ENVIRONMENT, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    process = start("--quiet")
    wait_until(process, lambda: len(steps_in(out)) >= 4)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    step = saved(out)["step"]
    assert process.returncode != 0 and stderr.count(f"SIGTERM: saved step {step} to {out}") == 1
    assert steps_in(out) == list(range(1, step + 1))

    process = start("--quiet", "--resume")
    wait_until(process, lambda: len(steps_in(out)) >= step + 4)
    os.kill(process_of(1, process.pid), signal.SIGKILL)
    killed = time.time()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode != 0 and time.time() - killed < 30
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    last = saved(out)["step"]
    assert last >= step + 1 and last % 3 == 0
    assert len(errors) == 1 and "error: another process of this run ended at step" in errors[0]
    assert f"step {last} is saved in {out}, --resume continues from there" in errors[0]

    train.main([*options(last + 2), "--quiet", "--resume"])
    assert saved(out)["step"] == last + 2
    assert steps_in(out) == list(range(1, last + 3))


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
