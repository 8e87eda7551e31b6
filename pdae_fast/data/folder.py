"""Folders of image files."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence

from pdae_fast.data.preprocess import EXTENSIONS, WHITE, check_target, load_image
from pdae_fast.data.sample import Sample
from pdae_fast.errors import UserError

EXPECTED = f"expected image files ({' '.join(EXTENSIONS)})"


class ImageFiles:
    """Image files and folders of them as a map-style dataset; nothing is decoded before it is asked for.

    paths: a file, a folder, or a list of both, kept in the given order. A folder is read in natural order
    ("2.png" before "10.png") and, unless `recursive` is False, with its subfolders, symbolic links
    followed. In a folder, hidden entries (".name") and files of other extensions are passed over.
    size, channels, background: see `load_image`.

    `names[i]` is unique and fit for an output file: the path below the given folder (or the bare file name)
    without its extension. Where two files would share a name they keep the extension, and where that is not
    enough the name of the given folder goes in front.

    `dataset[i]` is a Sample with label None; it raises BrokenImage where the file cannot be used.
    The constructor raises UserError naming the path that is missing, not an image, or without images.
    """

    def __init__(
        self,
        paths: str | os.PathLike | Sequence[str | os.PathLike],
        size: int,
        channels: int = 3,
        background: Sequence[int] = WHITE,
        recursive: bool = True,
    ) -> None:
        self.size = size
        self.channels = channels
        self.background = check_target(size, channels, background)
        roots = [os.fspath(path) for path in ([paths] if isinstance(paths, (str, os.PathLike)) else paths)]
        if not roots:
            raise UserError(f"no input was given; {EXPECTED} or folders of them")
        self._files: list[str] = []
        relative: list[tuple[str, str]] = []  # (given folder, path below it)
        for root in roots:
            found = list(_find(root, recursive))
            self._files += [os.path.join(root, below) if below else root for below in found]
            relative += [(root, below) if below else os.path.split(root) for below in found]
        self.names = _unique_names(relative)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Sample:
        image = load_image(self._files[index], self.size, self.channels, self.background)
        return Sample(image, self.names[index], None)


def _find(root: str, recursive: bool) -> Iterator[str]:
    """Paths below `root` of its images; one empty path when `root` is itself an image."""
    if not os.path.isdir(root):
        if not os.path.exists(root):
            raise UserError(f"no such file or folder: {root}; {EXPECTED} or folders of them")
        if not _is_image_name(root):
            raise UserError(f"not an image file: {root}; {EXPECTED}")
        yield ""
        return
    below = None
    for below in _walk(root, recursive):
        yield below
    if below is None:
        raise UserError(f"no images in the folder {root}; {EXPECTED}")


def _walk(root: str, recursive: bool) -> Iterator[str]:
    """Paths below the folder `root`, in natural order. An explicit stack: folders may nest deeper than
    Python's recursion."""
    stack = [("", iter(_listing(root)), _identity(root))]
    while stack:
        prefix, entries, _ = stack[-1]
        for name, is_folder in entries:
            below = prefix + name
            if not is_folder:
                yield below
            elif recursive:
                folder = os.path.join(root, below)
                identity = _identity(folder)
                # A link to a folder that we are inside of would go round for ever.
                if all(identity != outer for _, _, outer in stack):
                    stack.append((below + "/", iter(_listing(folder)), identity))
                    break
        else:
            stack.pop()


def _listing(folder: str) -> list[tuple[str, bool]]:
    """(name, is a folder) of images and subfolders, in natural order; strings only, as many as a million."""
    try:
        with os.scandir(folder) as entries:
            kept = [
                (entry.name, is_folder)
                for entry in entries
                if not entry.name.startswith(".")
                # A dangling link is kept: it is a broken image to report, not a file to overlook.
                and ((is_folder := entry.is_dir()) or _is_image_name(entry.name))
            ]
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error.strerror}") from error
    kept.sort(key=lambda item: _natural(item[0]))
    return kept


def _identity(folder: str) -> tuple[int, int]:
    try:
        status = os.stat(folder)
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error.strerror}") from error
    return status.st_dev, status.st_ino


def _is_image_name(path: str) -> bool:
    return path.lower().endswith(EXTENSIONS)


def _natural(name: str) -> tuple[list[str | int], str]:
    """Sort key: runs of digits compare as numbers. Splitting puts text at even places and digits at odd ones,
    so keys always compare like with like; the name itself decides between "1" and "01"."""
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def _unique_names(relative: Sequence[tuple[str, str]]) -> list[str]:
    def longer(root: str, below: str, level: int) -> str:
        if level == 0:
            name = os.path.splitext(below)[0]
        elif level == 1:
            name = below
        else:
            name = os.path.basename(os.path.abspath(root)) + "/" + below
        # Control characters and undecodable bytes cannot go into a table or a JSON file.
        return re.sub(r"[\x00-\x1f\x7f\ud800-\udfff]", "_", name).lstrip("/")

    names = [longer(root, below, 0) for root, below in relative]
    for level in (1, 2):
        times = Counter(names)
        if len(times) == len(names):
            return names
        names = [longer(*relative[i], level) if times[name] > 1 else name for i, name in enumerate(names)]
    # What is left: the same file given twice, or folders of one name. Number them.
    seen: set[str] = set()
    for i, name in enumerate(names):
        number = 2
        while names[i] in seen:
            names[i] = f"{name}~{number}"
            number += 1
        seen.add(names[i])
    return names
