"""A folder of drawn avatars with exact attributes, part masks, landmarks, and pairs that differ in one attribute."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from itertools import islice
from multiprocessing import connection, get_context, parent_process
from typing import Any, NamedTuple

from PIL import Image
from tqdm import tqdm

from pdae_fast.data.avatar_render import PARTS, Renderer, versions
from pdae_fast.data.avatar_style import (
    AVATARS_VERSION,
    CHOICES,
    LANDMARKS,
    Avatar,
    draw,
    draw_pair,
    labels,
    landmarks,
    shown,
)
from pdae_fast.errors import UserError
from pdae_fast.files import atomic_write, clear_unfinished, make_folder
from pdae_fast.limits import MAX_TEXT, parse_json

MANIFEST, README, DIGEST = "manifest.json", "README.md", "manifest_sha256"
FORMAT = "pdae_fast avatars"
_LARGEST = 2048
_CHUNK = 32  # avatars a worker is handed at a time

_README = """\
# Drawn avatars

These are drawings in the manner of Cartoon Set, made by `python -m pdae_fast.data avatars`. They are not photographs
and show nobody. The style is "Avataaars" (https://avataaars.com/) by Pablo Stanley, free for personal and commercial
use, drawn with DiceBear.

- `images/NUMBER.png`: RGB.
- `masks/NUMBER.png`: the part that each pixel shows, as a palette image; the values are the places in `parts` of
  `manifest.json`. Hidden parts are not in it, faint shadows count as what is below them.
- `attributes.csv`: a row for each image; columns of 0 and 1, then columns of categories ("none": nothing to see).
- `landmarks.csv`: pixels from the outer corner of the first pixel, x right, y down, hidden or not; left is the
  image's left. Then the pose: scale and rotation (degrees, clockwise) about the centre, shift in percent.
- `pairs/`: the same files for images NUMBER_a and NUMBER_b, which differ in one attribute, named in `pairs/pairs.csv`.

Everything follows from the seed: image NUMBER is the same whatever the count.
"""


class Report(NamedTuple):
    """What `make_avatars` did: images drawn now, and found complete from before (pairs count two)."""

    drawn: int
    kept: int


class _Job(NamedTuple):
    """One image to draw: the folder with images/ and masks/, its stem, and how it is decided again."""

    folder: str
    stem: str
    seed: int
    index: int
    half: int | None  # of a pair; None outside pairs


def make_avatars(
    out: str | os.PathLike,
    count: int,
    size: int = 64,
    seed: int = 0,
    pairs: int = 0,
    workers: int = 1,
    quiet: bool = True,
) -> Report:
    """Write `count` avatars of size x size and `pairs` pairs into the folder `out`; its README says what is where.

    Avatar k of a seed is the same whatever count, pairs and workers are. A file is whole or absent; a call that
    was stopped is completed by the same call, and a larger count adds to what is there. The tables are written
    last and hold every complete image in the folder, so a smaller count removes nothing.
    workers: processes that draw (above 1, a script must guard its main module, as always with processes).
    quiet: no progress bar.
    Raises UserError for a bad argument, for missing packages, when the folder holds something else or avatars
    of another seed, size or version, and when the system refuses to write.
    """
    out = os.fspath(out)
    for name, value, least in (("count", count, 0), ("pairs", pairs, 0), ("workers", workers, 1), ("seed", seed, 0)):
        if value < least:
            raise UserError(f"{name} must be at least {least}, not {value}")
    if count + pairs == 0:
        raise UserError("nothing to draw: count and pairs are both 0")
    if not 16 <= size <= _LARGEST:
        raise UserError(f"size must be from 16 to {_LARGEST}, not {size}")
    _claim(out, seed, size)
    clear_unfinished(out)
    roots = [(out, count, False)] + ([(os.path.join(out, "pairs"), pairs, True)] if pairs else [])
    for folder, _, _ in roots:
        make_folder(os.path.join(folder, "images"))
        make_folder(os.path.join(folder, "masks"))
    done = {folder: _complete(folder) for folder, _, _ in roots}
    jobs = (
        job
        for folder, number, paired in roots
        for job in _jobs(folder, number, paired, seed)
        if job.stem not in done[folder]
    )
    total = sum(number * (2 if paired else 1) for _, number, paired in roots)
    kept = sum(job.stem in done[f] for f, number, paired in roots for job in _jobs(f, number, paired, seed))
    with tqdm(total=total, initial=kept, unit="image", disable=quiet) as bar:
        for drawn in _draw_all(jobs, size, workers, total - kept):
            bar.update(drawn)
    for folder, number, paired in roots:
        _write_tables(folder, number, paired, seed, size, done[folder])
    return Report(total - kept, kept)


def is_avatars(folder: str | os.PathLike) -> bool:
    """Whether `folder` was written by `make_avatars`. UserError where it was, and its manifest is damaged or gone:
    taken for a folder of any images, its masks and pairs would be images too."""
    return read_manifest(os.fspath(folder)) is not None


def _claim(out: str, seed: int, size: int) -> None:
    """Make `out` the folder of these avatars, or refuse it."""
    wanted: dict[str, Any] = {"format": FORMAT, "version": AVATARS_VERSION, "seed": seed, "size": size}
    wanted |= {"packages": versions()}
    found = read_manifest(out)
    if found is not None:
        differ = [name for name, value in wanted.items() if found.get(name) != value]
        if differ:
            have = ", ".join(f"{name} {_brief(found.get(name))}" for name in differ)
            ask = ", ".join(f"{name} {_brief(wanted[name])}" for name in differ)
            raise UserError(f"{out} holds avatars of {have}, not {ask}; choose another folder")
        return
    make_folder(out)
    if any(not name.startswith(".") for name in os.listdir(out) if not _is_readme(out, name)):
        raise UserError(f"{out} is not empty and holds no {MANIFEST} of avatars; choose another folder")
    with atomic_write(os.path.join(out, README), "w") as file:
        file.write(_README)
    wanted |= {
        "style": "avataaars",
        "licence": "Avataaars (https://avataaars.com/) by Pablo Stanley, free for personal and commercial use",
        "note": "drawings in the manner of Cartoon Set, not photographs",
        "parts": PARTS,
        "landmarks": tuple(LANDMARKS),
    }
    wanted[DIGEST] = _digest(wanted)
    # Last: a folder with a manifest is ours.
    with atomic_write(os.path.join(out, MANIFEST), "w") as file:
        file.write(json.dumps(wanted, indent=2) + "\n")


def _is_readme(out: str, name: str) -> bool:
    """Whether it is the README that a call wrote which was killed before the manifest."""
    if name != README:
        return False
    try:
        with open(os.path.join(out, name), "rb") as file:
            return file.read() == _README.encode()
    except OSError:
        return False


def _digest(manifest: dict[str, Any]) -> str:
    """SHA-256 of everything the manifest says but this."""
    content = {name: value for name, value in manifest.items() if name != DIGEST}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: str) -> dict[str, Any] | None:
    """What `make_avatars` wrote into `folder`; None for a folder of something else. UserError as `is_avatars`."""
    path = os.path.join(folder, MANIFEST)
    try:
        with open(path, encoding="utf-8") as file:
            content = parse_json(file.read(MAX_TEXT))
    except (OSError, ValueError):
        content = None
    if isinstance(content, dict) and content.get("format") == FORMAT:
        if content.get(DIGEST, _digest(content)) == _digest(content):  # older folders have none
            return content
    elif not (_is_readme(folder, README) and os.path.isdir(os.path.join(folder, "images"))):
        return None
    raise UserError(f"{path}: missing or damaged, so these avatars cannot be told; draw them into another folder")


def _brief(value: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def _stem(index: int, half: int | None = None) -> str:
    return f"{index:06d}" + ("" if half is None else "_" + "ab"[half])


def _jobs(folder: str, number: int, paired: bool, seed: int) -> Iterator[_Job]:
    for index in range(number):
        for half in (0, 1) if paired else (None,):
            yield _Job(folder, _stem(index, half), seed, index, half)


def _decide(seed: int, index: int, half: int | None) -> Avatar:
    return draw(seed, index) if half is None else draw_pair(seed, index)[half]


def _complete(folder: str) -> set[str]:
    """Stems of the images that are there; an image is written after its mask, so it stands for both."""
    with os.scandir(os.path.join(folder, "images")) as entries:
        return {entry.name[:-4] for entry in entries if entry.name.endswith(".png") and entry.name[0] != "."}


def _draw_all(jobs: Iterator[_Job], size: int, workers: int, left: int) -> Iterator[int]:
    """Draw the jobs; yields how many were done since the last time."""
    if workers == 1 or left <= _CHUNK:
        for job in jobs:
            yield _draw_chunk([job], size)
        return
    # Not fork: this process has threads, and a lock that one of them holds would stay locked.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start_worker)
    try:
        running = set()
        while True:
            while len(running) < 2 * workers and (chunk := list(islice(jobs, _CHUNK))):
                running.add(pool.submit(_draw_chunk, chunk, size))
            if not running:
                break
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            yield sum(future.result() for future in finished)
    except BrokenProcessPool as error:
        raise UserError("a drawing process was killed; the same command continues where it stopped") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # The pool's workers would wait for work for ever if the first process were killed.
    connection.wait([parent_process().sentinel])
    os._exit(1)


@cache
def _renderer() -> Renderer:
    return Renderer()


def _draw_chunk(jobs: Sequence[_Job], size: int) -> int:
    renderer = _renderer()
    for job in jobs:
        avatar = _decide(job.seed, job.index, job.half)
        name = job.stem + ".png"
        _save(renderer.mask(avatar, size), os.path.join(job.folder, "masks", name))
        _save(renderer.image(avatar, size), os.path.join(job.folder, "images", name))
    return len(jobs)


def _save(picture: Image.Image, path: str) -> None:
    with atomic_write(path) as file:
        picture.save(file, "PNG")


def _write_tables(folder: str, number: int, paired: bool, seed: int, size: int, found: set[str]) -> None:
    indices = sorted({*range(number), *(int(stem.split("_")[0]) for stem in found if _is_stem(stem, paired))})
    halves = (0, 1) if paired else (None,)
    if paired:  # of a pair begun by an interrupted larger run, one image may be missing
        indices = [i for i in indices if i < number or all(_stem(i, half) in found for half in halves)]

    def avatars() -> Iterator[tuple[str, Avatar]]:
        return ((_stem(i, half) + ".png", _decide(seed, i, half)) for i in indices for half in halves)

    first = draw(seed, 0)
    _write_csv(
        os.path.join(folder, "attributes.csv"),
        ["image", *labels(first.choices), *CHOICES],
        ([name, *labels(a.choices).values(), *shown(a.choices).values()] for name, a in avatars()),
    )
    _write_csv(
        os.path.join(folder, "landmarks.csv"),
        ["image", *(f"{point}_{axis}" for point in LANDMARKS for axis in "xy"), *first.pose._fields],
        (
            [name, *(f"{x:.3f}" for point in landmarks(a.pose, size).values() for x in point), *a.pose]
            for name, a in avatars()
        ),
    )
    if paired:
        _write_csv(
            os.path.join(folder, "pairs.csv"),
            ["first", "second", "attribute", "before", "after"],
            (
                [_stem(i, 0) + ".png", _stem(i, 1) + ".png", name, a.choices[name], b.choices[name]]
                for i in indices
                for a, b, name in [draw_pair(seed, i)]
            ),
        )


def _is_stem(stem: str, paired: bool) -> bool:
    """Whether a file of this stem is ours: people put other files into folders."""
    digits, _, half = stem.partition("_")
    index = int(digits) if digits.isascii() and digits.isdigit() else -1
    return index >= 0 and stem in ([_stem(index, 0), _stem(index, 1)] if paired else [_stem(index)])


def _write_csv(path: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with atomic_write(path, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
