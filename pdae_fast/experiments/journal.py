"""Long work on many images: cut into blocks, shared by the processes of `torchrun`, continued after a stop.

A block is a fixed range of the data set's images. What a block gave is appended to the folder OUT/parts, by each
process to files of its own, so a killed job loses the blocks in progress and nothing else; the same command, with any
number of processes, does the blocks that are missing. When all are there, one process reads them in the order of the
data set. Rows are thus the same in the same order however many processes there were.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data import Batch, stream
from ..errors import UserError
from ..files import atomic_write, make_folder
from ..processes import Group

PARTS = "parts"
_SETTINGS = "settings.json"


# -- blocks --------------------------------------------------------------------------------------------------------


class Block(NamedTuple):
    """Images [indices] of a data set, without the broken ones; ``broken`` are (name, reason)."""

    number: int
    images: Tensor
    names: list[str]
    indices: list[int]
    broken: list[tuple[str, str]]


class Entry(NamedTuple):
    """What a block gave: JSON values and float32 arrays, besides its images' names."""

    number: int
    names: list[str]
    indices: list[int]
    broken: list[tuple[str, str]]
    values: dict[str, Any]
    arrays: dict[str, np.ndarray]


Work = Callable[[Block], tuple[dict[str, Any], dict[str, Tensor]]]


class _Range:
    """The data set restricted to some blocks, for `stream`."""

    def __init__(self, dataset: Any, indices: list[int]) -> None:
        self.dataset, self.indices = dataset, indices
        self.names = [dataset.names[i] for i in indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[self.indices[index]]


def read_blocks(dataset: Any, size: int, numbers: list[int], on_error: str = "skip") -> Iterator[Block]:
    """The blocks ``numbers`` of ``size`` images each, read ahead by threads; constant memory.

    A block keeps its range whatever is broken in it: who does which block must not change what it holds.
    """
    count = len(dataset)
    ranges = [range(n * size, min((n + 1) * size, count)) for n in numbers]
    broken: list[tuple[str, str]] = []
    view = _Range(dataset, [i for places in ranges for i in places])
    samples = stream(view, 1, on_error, broken, prefetch=2 * size)
    reported, following = 0, next(samples, None)
    for number, places in zip(numbers, ranges, strict=True):
        taken: list[Batch] = []
        indices: list[int] = []
        bad = 0
        for i in places:
            if following is not None and following.names[0] == dataset.names[i]:
                taken.append(following)
                indices.append(i)
                following = next(samples, None)
            else:
                bad += 1
        names = [batch.names[0] for batch in taken]
        images = torch.cat([batch.images for batch in taken]) if taken else torch.empty(0)
        yield Block(number, images, names, indices, broken[reported : reported + bad])
        reported += bad


# -- the journal ---------------------------------------------------------------------------------------------------


class Journal:
    """The finished blocks of one job in OUT/parts.

    out: the job's folder, made where missing. settings: JSON values that decide the results; another job's unfinished
    parts are refused, with the settings that differ. block: images of a block (those of the unfinished job win).
    Raises UserError for other settings, and when another job is at work in the same folder.
    """

    def __init__(self, out: Path, settings: dict[str, Any], count: int, block: int, group: Group) -> None:
        self.folder, self.group, self.count = out / PARTS, group, count
        settings = json.loads(json.dumps({**settings, "count": count}))
        path = self.folder / _SETTINGS
        if group.first:
            make_folder(self.folder)
            if not path.exists():
                with atomic_write(path, "w") as file:
                    file.write(json.dumps({"block": block, "settings": settings}, indent=2) + "\n")
        group.sync()
        found = self._settings(path)
        differ = [key for key in settings if found["settings"].get(key) != settings[key]]
        if differ:
            changes = ", ".join(
                f"{key} {_brief(found['settings'].get(key))}, now {_brief(settings[key])}" for key in differ
            )
            raise UserError(
                f"{out} holds an unfinished run with other settings ({changes}); repeat that command to finish it, "
                f"choose another --out, or delete {self.folder}"
            )
        self.block = found["block"]
        self.blocks = -(-count // self.block)
        self._name = f"rank-{group.rank:05d}"
        self._files: dict[str, Any] = {}
        self._places = self._scan()
        group.sync()  # nobody appends before everybody has read

    @staticmethod
    def _settings(path: Path) -> dict[str, Any]:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return {"block": int(found["block"]), "settings": dict(found["settings"])}
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{path} cannot be read; delete {path.parent} to start again") from None

    def _scan(self) -> dict[int, tuple[Path, int]]:
        """Where the line of each finished block starts. A line that a killed process left half is no line."""
        places: dict[int, tuple[Path, int]] = {}
        for path in sorted(self.folder.glob("rank-*.jsonl")):
            offset = 0
            with open(path, "rb") as file:
                for line in file:
                    number = _number(line)
                    if number is not None and number < self.blocks:
                        places[number] = (path, offset)
                    offset += len(line)
        return places

    def missing(self) -> list[int]:
        """The blocks that this process has to do."""
        left = [n for n in range(self.blocks) if n not in self._places]
        return left[self.group.rank :: self.group.size]

    def left(self) -> int:
        """Images in those blocks."""
        return sum(min((n + 1) * self.block, self.count) - n * self.block for n in self.missing())

    def add(self, block: Block, values: dict[str, Any], arrays: dict[str, Tensor]) -> None:
        """Keep what ``block`` gave; after this returns it survives a kill, and a power cut."""
        line: dict[str, Any] = {
            "block": block.number,
            "names": block.names,
            "indices": block.indices,
            "broken": block.broken,
            "values": values,
            "arrays": {},
        }
        for name, array in arrays.items():
            data = array.detach().cpu().contiguous().numpy().astype("<f4", copy=False)
            end = f"{self._name}.{name}.f32"
            offset = self._append(end, data.tobytes())
            line["arrays"][name] = [end, offset, list(data.shape)]
        # After the arrays: a line stands for everything that it names.
        self._append(f"{self._name}.jsonl", json.dumps(line).encode() + b"\n")

    def _append(self, name: str, content: bytes) -> int:
        file = self._files.get(name)
        if file is None:
            file = self._files[name] = open(self.folder / name, "ab")  # noqa: SIM115 (closed by `close`)
            _lock(file, self.folder)
            if file.tell() and name.endswith(".jsonl"):
                file.write(b"\n")  # ends what a killed process may have left half; an empty line is no line
        offset = file.tell()
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        return offset

    def run(self, dataset: Any, work: Work, on_error: str = "skip") -> None:
        """``work`` on every missing block of this process, then wait for the other processes.

        work(block) returns JSON values and float32 arrays to keep; it is not called for a block of broken images.
        """
        try:
            for block in read_blocks(dataset, self.block, self.missing(), on_error):
                values, arrays = work(block) if block.names else ({}, {})
                self.add(block, values, arrays)
        finally:
            for file in self._files.values():
                file.close()
        self.group.sync()

    def entries(self, arrays: bool = True) -> Iterator[Entry]:
        """What all blocks gave, in the order of the data set, one at a time; for the first process, after `run`.

        arrays: whether to read them; without, they are empty.
        """
        places = self._scan()
        if lost := [n for n in range(self.blocks) if n not in places]:
            raise UserError(f"{self.folder} lacks {len(lost)} blocks; run the same command again to continue")
        for number in range(self.blocks):
            path, offset = places[number]
            with open(path, "rb") as file:
                file.seek(offset)
                line = json.loads(file.readline())
            found = {name: self._array(*where) for name, where in line["arrays"].items()} if arrays else {}
            broken = [(name, reason) for name, reason in line["broken"]]
            yield Entry(number, line["names"], line["indices"], broken, line["values"], found)

    def _array(self, name: str, offset: int, shape: list[int]) -> np.ndarray:
        return np.fromfile(self.folder / name, "<f4", int(np.prod(shape)), offset=offset).reshape(shape)

    def remove(self, with_folder: bool = False) -> None:
        """Delete the parts (``with_folder``: and the folder they are in): the results are written."""
        shutil.rmtree(self.folder.parent if with_folder else self.folder)


def _number(line: bytes) -> int | None:
    if not line.endswith(b"\n"):
        return None
    try:
        return int(json.loads(line)["block"])
    except (ValueError, KeyError, TypeError):
        return None


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _lock(file: Any, folder: Path) -> None:
    """Refuse to write beside another process: two would do the same blocks, and one would delete the other's."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"another process is at work in {folder}; choose another --out or wait for it") from None
