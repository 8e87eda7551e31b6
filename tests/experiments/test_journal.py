"""Blocks, the journal, and jobs of several processes: nothing is lost, nothing is done twice, the order is kept."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pdae_fast.data import BrokenImage, Sample
from pdae_fast.errors import UserError
from pdae_fast.experiments.journal import Journal, read_blocks
from pdae_fast.processes import Group

SCRIPT = Path(__file__).parent / "job_for_torchrun.py"


class Images:
    """Image i is the number i everywhere; those in ``broken`` cannot be read."""

    def __init__(self, count, broken=()):
        self.names = [f"image-{i}" for i in range(count)]
        self.broken = broken

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        if i in self.broken:
            raise BrokenImage(self.names[i], f"reason {i}")
        return Sample(torch.full((1, 2, 2), float(i)), self.names[i], None)


def keep(block):
    values = {"sums": block.images.sum(dim=(1, 2, 3)).tolist(), "third": 1 / 3}
    return values, {"half": block.images / 2, "one": torch.tensor([1.5])}


def test_blocks_keep_their_ranges_whatever_is_broken():
    broken = {0, 4, 5, 6, 7, 10}
    found = list(read_blocks(Images(11, broken), 4, [0, 1, 2]))
    assert [b.indices for b in found] == [[1, 2, 3], [], [8, 9]]
    assert [b.images[:, 0, 0, 0].tolist() for b in found if b.names] == [[1, 2, 3], [8, 9]]
    assert [b.names for b in found][0] == ["image-1", "image-2", "image-3"]
    assert [[name for name, _ in b.broken] for b in found] == [
        ["image-0"], ["image-4", "image-5", "image-6", "image-7"], ["image-10"],
    ]  # fmt: skip
    assert found[2].broken[0][1] == "reason 10"
    assert [b.indices for b in read_blocks(Images(11), 4, [2, 0])] == [[8, 9, 10], [0, 1, 2, 3]]
    with pytest.raises(BrokenImage, match="reason 4"):
        list(read_blocks(Images(11, {4}), 4, [0, 1], on_error="fail"))


def journal(out, settings=None, group=None, count=11, block=2):
    return Journal(out, settings or {"steps": 5}, count, block, group or Group())


def test_what_was_kept_comes_back_in_order(tmp_path):
    job = journal(tmp_path)
    assert job.left() == 11 and job.missing() == [0, 1, 2, 3, 4, 5]
    job.run(Images(11, {3}), keep)
    assert job.left() == 11  # of this object's knowledge; a new one reads the disk
    assert journal(tmp_path).left() == 0
    entries = list(job.entries())
    assert [i for e in entries for i in e.indices] == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10]
    assert [s for e in entries for s in e.values["sums"]] == [4.0 * i for i in (0, 1, 2, 4, 5, 6, 7, 8, 9, 10)]
    assert entries[0].values["third"] == 1 / 3  # exactly: JSON keeps every digit
    halves = np.concatenate([e.arrays["half"] for e in entries])
    assert halves.shape == (10, 1, 2, 2) and halves[:, 0, 1, 1].tolist() == [0, 0.5, 1, 2, 2.5, 3, 3.5, 4, 4.5, 5]
    assert entries[1].broken == [("image-3", "reason 3")]
    assert all(e.arrays == {} for e in job.entries(arrays=False))
    job.remove()
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_job_continues_with_other_processes(tmp_path):
    def stop_at_three(block):
        if block.number == 3:
            raise KeyboardInterrupt
        return keep(block)

    with pytest.raises(KeyboardInterrupt):
        journal(tmp_path).run(Images(11), stop_at_three)
    with pytest.raises(UserError, match="lacks 3 blocks"):
        list(journal(tmp_path).entries())
    # A line that a killed process wrote half counts as not written, also when more is appended after it.
    lines = tmp_path / "parts" / "rank-00000.jsonl"
    whole = lines.read_bytes()
    lines.write_bytes(whole[: len(whole) - 20])
    done = []
    for rank in (0, 1):
        part = journal(tmp_path, group=_Alone(rank, 2))
        part.run(Images(11), lambda block: (done.append(block.number), keep(block))[1])
    # Process 0 of 2 does every second block of 2, 3, 4, 5; process 1, which comes later here, every second of 3, 5.
    assert done == [2, 4, 5]
    rest = journal(tmp_path)
    rest.run(Images(11), keep)
    entries = list(rest.entries())
    assert [i for e in entries for i in e.indices] == list(range(11))
    assert [s for e in entries for s in e.values["sums"]] == [4.0 * i for i in range(11)]
    assert np.concatenate([e.arrays["half"] for e in entries])[:, 0, 0, 0].tolist() == [i / 2 for i in range(11)]


class _Alone(Group):
    """One of several processes, which does not wait for the others."""

    def sync(self):
        pass


def test_processes_share_the_blocks(tmp_path):
    missing = [journal(tmp_path, group=_Alone(rank, 3)).missing() for rank in range(3)]
    assert missing == [[0, 3], [1, 4], [2, 5]]


def test_other_settings_are_refused_and_named(tmp_path):
    journal(tmp_path, {"steps": 5, "seed": 1})
    with pytest.raises(UserError, match=r"unfinished run with other settings \(steps 5, now 6\)") as caught:
        journal(tmp_path, {"steps": 6, "seed": 1})
    assert "\n" not in str(caught.value) and "parts" in str(caught.value)
    with pytest.raises(UserError, match="count 11, now 12"):
        journal(tmp_path, {"steps": 5, "seed": 1}, count=12)
    # The size of a block is the unfinished job's: the device's free memory may have chosen another today.
    assert journal(tmp_path, {"steps": 5, "seed": 1}, block=7).block == 2
    (tmp_path / "parts" / "settings.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        journal(tmp_path)


def test_two_jobs_at_once_in_one_folder_are_refused(tmp_path):
    first, second = journal(tmp_path), journal(tmp_path)

    def work(block):
        if block.number == 1:
            with pytest.raises(UserError, match="another process is at work"):
                second.run(Images(11), keep)
        return keep(block)

    first.run(Images(11), work)
    assert len(list(first.entries())) == 6


@pytest.mark.slow
def test_a_killed_process_ends_the_job_and_the_rest_is_done_later(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(SCRIPT), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    (tmp_path / "kill").touch()  # process 1 kills itself at its second block, and removes this file before
    failed = subprocess.run([*command, "first"], env=environment, capture_output=True, text=True, timeout=300)
    assert failed.returncode != 0 and not (tmp_path / "result.json").exists()
    lines = failed.stderr.splitlines()
    told = [line for line in lines if "run the same command again to continue" in line]
    assert len(told) == 1, failed.stderr
    before = {n for path in (tmp_path / "parts").glob("*.jsonl") for n in _numbers(path)}
    assert before and len(before) < 6
    done = subprocess.run([*command, "second"], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["indices"] == list(range(11)) and result["sums"] == [4.0 * i for i in range(11)]
    # Finished blocks were not done again.
    assert result["runs"] == ["first" if number in before else "second" for number in range(6)]


def _numbers(path):
    return [json.loads(line)["block"] for line in path.read_text().splitlines() if line]


# -- damage --------------------------------------------------------------------------------------------------------


def damaged(name, change):
    """A name of a file in parts, and what to do to its bytes."""
    return pytest.param(name, change, id=f"{name.split('.')[-1]}-{change.__name__}")


def shorter(data):
    return data[:-1]


def longer_in_front(data):
    return b"\0" + data


def a_bit(data):
    half = len(data) // 2
    return data[:half] + bytes([data[half] ^ 1]) + data[half + 1 :]


def empty(data):
    return b""


def renamed(data):
    return data.replace(b"image-2", b"image-", 1)


def other_block(data):
    return data.replace(b'"block": 1', b'"block": 2', 1)


def led_away(data):
    return data.replace(b"rank-00000.half.f32", b"../rank-00000.half.f32")


def a_list(data):
    return b"[1, 2]\n" + data + b'{"block": 0}\n{"block": {}}\n"block"\n\xff\xfe\n' + b"[" * 5000 + b"\n"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        damaged(name, change)
        for name, changes in {
            "rank-00000.half.f32": (shorter, longer_in_front, a_bit, empty),
            "rank-00000.one.f32": (shorter, a_bit, empty),
            "rank-00000.jsonl": (shorter, longer_in_front, a_bit, empty, renamed, other_block, led_away, a_list),
        }.items()
        for change in changes
    ],
)
def test_damaged_parts_are_done_again(tmp_path, name, change):
    """Of a job that was stopped after three blocks; whatever is wrong, it ends with the values of one that was not."""

    def stop(block):
        if block.number == 3:
            raise KeyboardInterrupt
        return keep(block)

    whole = journal(tmp_path / "whole")
    whole.run(Images(11), keep)
    expected = list(whole.entries())
    with pytest.raises(KeyboardInterrupt):
        journal(tmp_path / "out").run(Images(11), stop)
    path = tmp_path / "out" / "parts" / name
    path.write_bytes(change(path.read_bytes()))
    journal(tmp_path / "out").run(Images(11), keep)
    again = journal(tmp_path / "out")
    assert again.missing() == []
    for a, b in zip(again.entries(), expected, strict=True):
        assert a[:5] == b[:5] and all(np.array_equal(v, b.arrays[k]) for k, v in a.arrays.items())


def test_an_array_that_is_lost_before_the_results_are_written(tmp_path):
    job = journal(tmp_path)
    job.run(Images(11), keep)
    path = tmp_path / "parts" / "rank-00000.one.f32"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="lacks 1 blocks; run the same command again"):
        list(job.entries())


@pytest.mark.parametrize(
    ("old", "new"),
    [('"block": 2', '"block": 3'), ('"block": 2', '"block": 0'), ('"steps": 5', '"steps": 6'), ("{", "[")],
)
def test_settings_that_were_changed_are_refused(tmp_path, old, new):
    journal(tmp_path)
    path = tmp_path / "parts" / "settings.json"
    path.write_text(path.read_text().replace(old, new))
    for settings in ({"steps": 5}, {"steps": 6}):
        with pytest.raises(UserError, match="missing or damaged; delete") as caught:
            journal(tmp_path, settings)
        assert "\n" not in str(caught.value)


def test_blocks_of_another_size_are_not_taken_over(tmp_path):
    journal(tmp_path / "a", block=3).run(Images(11), keep)
    journal(tmp_path / "b", block=2)
    for path in (tmp_path / "a" / "parts").glob("rank-*"):
        path.rename(tmp_path / "b" / "parts" / path.name)
    assert journal(tmp_path / "b", block=2).left() == 11


def test_a_full_disk_is_said_with_the_name_of_the_part(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    job = journal(tmp_path / "a")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*rank-00000\.half\.f32: No space left on device"):
        job.run(Images(11), keep)
