"""Long work on many images: cut into blocks, shared by the processes of `torchrun`, continued after a stop.

A block is a fixed range of the data set's images. What a block gave is appended to the folder OUT/parts, by each
process to files of its own, so a killed job loses the blocks in progress and nothing else; the same command, with any
number of processes, does the blocks that are missing. When all are there, one process reads them in the order of the
data set. Rows are thus the same in the same order however many processes there were.

Every line and every array has a length and a checksum. What does not fit them is not a finished block: it is done
again.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data import Batch, stream
from ..errors import UserError
from ..files import atomic_write, make_folder, naming, try_lock
from ..processes import Group

PARTS = "parts"
_SETTINGS = "settings.json"
_SUM = re.compile(rb', "bytes": (\d{1,18}), "crc": (\d{1,10})\}\n')  # how a line ends


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

    out: the job's folder, made where missing; the first process should have claimed it (see `claim_folder`). settings:
    JSON values that decide the results; another job's unfinished parts are refused, with the settings that differ.
    block: images of a block (those of the unfinished job win).
    Raises UserError for other settings, and when another job is at work in the same folder.
    """

    def __init__(self, out: Path, settings: dict[str, Any], count: int, block: int, group: Group) -> None:
        self.folder, self.group, self.count = out / PARTS, group, count
        settings = json.loads(json.dumps({**settings, "count": count}))
        path = self.folder / _SETTINGS
        if group.first:
            make_folder(self.folder)
            if not path.exists():
                content = {"block": block, "settings": settings}
                with atomic_write(path, "w") as file:
                    file.write(json.dumps({**content, "crc": _crc_of(content)}, indent=2) + "\n")
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
        self._job = found["crc"]
        self._name = f"rank-{group.rank:05d}"
        self._files: dict[str, Any] = {}
        self._places = self._scan()
        group.sync()  # nobody appends before everybody has read

    @staticmethod
    def _settings(path: Path) -> dict[str, Any]:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            content = {"block": found["block"], "settings": found["settings"]}
            if found["crc"] != _crc_of(content):
                raise ValueError
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{path} cannot be read: missing or damaged; delete {path.parent} to start again") from None
        return found

    def _scan(self) -> dict[int, tuple[Path, int]]:
        """Where the line of each finished block starts. A line that a killed process left half is no line."""
        places: dict[int, tuple[Path, int]] = {}
        for path in sorted(self.folder.glob("rank-*.jsonl")):
            offset = 0
            with _reading(path), open(path, "rb") as file:
                for line in file:
                    entry = self._entry(line, path)
                    if entry is not None and all(self._array(*where) is not None for where in entry["arrays"].values()):
                        places[entry["block"]] = (path, offset)
                    offset += len(line)
        return places

    def _entry(self, line: bytes, path: Path) -> dict[str, Any] | None:
        """What a line of ``path`` says; None when it is damaged, of another job, or names files of others."""
        end = _SUM.search(line, max(0, len(line) - 64))
        if end is None or end.end() != len(line):
            return None
        content = line[: end.start()] + b"}"
        if int(end[1]) != len(content) or int(end[2]) != zlib.crc32(content):
            return None
        try:
            entry = json.loads(content)
            number, arrays = entry["block"], entry["arrays"]
            places = range(number * self.block, min((number + 1) * self.block, self.count))
            whole = entry["job"] == self._job and len(places) == len(entry["indices"]) + len(entry["broken"])
            fits = len(entry["names"]) == len(entry["indices"]) and all(i in places for i in entry["indices"])
            own = all(re.fullmatch(rf"{re.escape(path.stem)}\.\w+\.f32", where[0]) for where in arrays.values())
            return entry if whole and fits and own and 0 <= number < self.blocks else None
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            return None

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
            "job": self._job,
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
            line["arrays"][name] = [end, offset, list(data.shape), zlib.crc32(data)]
        # After the arrays: a line stands for everything that it names.
        content = json.dumps(line).encode()
        total = f', "bytes": {len(content)}, "crc": {zlib.crc32(content)}}}\n'
        self._append(f"{self._name}.jsonl", content[:-1] + total.encode())

    def _append(self, name: str, content: bytes) -> int:
        path = self.folder / name
        with naming(path):
            file = self._files.get(name)
            if file is None:
                file = self._files[name] = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by `run`)
                if try_lock(file.fileno()) is False:  # by a process whose first has died
                    raise UserError(f"another process is at work in {self.folder}; choose another --out or wait for it")
                if file.tell() and name.endswith(".jsonl"):
                    file.write(b"\n")  # ends what a killed process may have left half; an empty line is no line
            offset, rest = file.tell(), memoryview(content)
            while rest:  # a disk that is nearly full takes a part
                rest = rest[file.write(rest) :]
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

        arrays: whether to give them; without, they are empty.
        """
        places = self._scan()
        if lost := [n for n in range(self.blocks) if n not in places]:
            raise UserError(f"{self.folder} lacks {len(lost)} blocks; run the same command again to continue")
        for number in range(self.blocks):
            path, offset = places[number]
            with _reading(path), open(path, "rb") as file:
                file.seek(offset)
                line = self._entry(file.readline(), path)
            found = {} if line is None else {name: self._array(*where) for name, where in line["arrays"].items()}
            if line is None or any(array is None for array in found.values()):
                raise UserError(f"{path}: changed meanwhile; run the same command again to continue")
            broken = [(name, reason) for name, reason in line["broken"]]
            yield Entry(number, line["names"], line["indices"], broken, line["values"], found if arrays else {})

    def _array(self, name: str, offset: int, shape: list[int], crc: int) -> np.ndarray | None:
        """The array of a line; None when its file is too short or holds something else there."""
        count = math.prod(shape)
        try:
            with open(self.folder / name, "rb") as file:
                file.seek(offset)
                array = np.fromfile(file, "<f4", count)
        except OSError:
            return None
        return array.reshape(shape) if len(array) == count and zlib.crc32(array) == crc else None

    def remove(self, with_folder: bool = False) -> None:
        """Delete the parts (``with_folder``: and the folder they are in): the results are written."""
        shutil.rmtree(self.folder.parent if with_folder else self.folder)


def _crc_of(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
