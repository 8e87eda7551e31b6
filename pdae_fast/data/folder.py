"""Folders of image files."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence

from pdae_fast.data.preprocess import EXTENSIONS, WHITE, check_target, load_image, stored_size
from pdae_fast.data.sample import Sample
from pdae_fast.errors import UserError

RESULTS = ("images", "samples")  # folders in which commands write images
EXPECTED = f"expected image files ({' '.join(EXTENSIONS)})"


class ImageFiles:
    """Image files and folders of them as a map-style dataset; nothing is decoded before it is asked for.

    paths: a file, a folder, or a list of both, kept in the given order. A folder is read in natural order
    ("2.png" before "10.png") and, unless `recursive` is False, with its subfolders, symbolic links
    followed. In a folder, hidden entries (".name") and files of other extensions are passed over.
    size, channels, background, crop: see `load_image`.
    without: a folder that is passed over wherever it is found, because results are written there. A folder that is
    this one, or is where commands write images in it, is refused.

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
        crop: str = "centre",
        without: str | os.PathLike | None = None,
    ) -> None:
        self.size = size
        self.channels = channels
        self.background = check_target(size, channels, background, crop)
        self.crop = crop
        roots = [os.fspath(path) for path in ([paths] if isinstance(paths, (str, os.PathLike)) else paths)]
        if not roots:
            raise UserError(f"no input was given; {EXPECTED} or folders of them")
        self._files: list[str] = []
        relative: list[tuple[str, str]] = []  # (given folder, path below it)
        for root in roots:
            found = list(_find(root, recursive, without))
            self._files += [os.path.join(root, below) if below else root for below in found]
            relative += [(root, below) if below else os.path.split(root) for below in found]
        self.names = _unique_names(relative)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Sample:
        image = load_image(self._files[index], self.size, self.channels, self.background, crop=self.crop)
        return Sample(image, self.names[index], None)

    def first_size(self) -> tuple[int, int] | None:
        """Width and height of the first file's image; None where it cannot be read."""
        return stored_size(self._files[0])


def _find(root: str, recursive: bool, without: str | os.PathLike | None) -> Iterator[str]:
    """Paths below `root` of its images; one empty path when `root` is itself an image."""
    if not os.path.isdir(root):
        if not os.path.exists(root):
            raise UserError(f"no such file or folder: {root}; {EXPECTED} or folders of them")
        if not _is_image_name(root):
            raise UserError(f"not an image file: {root}; {EXPECTED}")
        yield ""
        return
    if without is not None and _holds_results(root, without):
        raise UserError(
            f"{root} is where results are written (--out {os.fspath(without)}), which would be read as images; "
            "choose another --out"
        )
    outside = None if without is None or not os.path.isdir(without) else _identity(os.fspath(without))
    below = None
    for below in _walk(root, recursive, outside):
        yield below
    if below is None:
        raise UserError(f"no images in the folder {root}; {EXPECTED}")


def _holds_results(root: str, out: str | os.PathLike) -> bool:
    """Whether `root` is the folder `out`, or in one that commands fill with images there."""
    root, out = os.path.realpath(root), os.path.realpath(out)
    if root != out and not root.startswith(os.path.join(out, "")):
        return False
    return os.path.relpath(root, out).split(os.sep)[0] in (os.curdir, *RESULTS)


def _walk(root: str, recursive: bool, outside: tuple[int, int] | None) -> Iterator[str]:
    """Paths below the folder `root`, in natural order, but for the folder `outside`. An explicit stack: folders may
    nest deeper than Python's recursion."""
    names, folders = _listing(root)
    stack = [("", iter(names), folders, _identity(root))]
    while stack:
        prefix, names, folders, _ = stack[-1]
        for name in names:
            below = prefix + name
            if name not in folders:
                yield below
            elif recursive:
                folder = os.path.join(root, below)
                identity = _identity(folder)
                # A link to a folder that we are inside of would go round for ever.
                if identity != outside and all(identity != outer for *_, outer in stack):
                    inner_names, inner_folders = _listing(folder)
                    stack.append((below + "/", iter(inner_names), inner_folders, identity))
                    break
        else:
            stack.pop()


def _listing(folder: str) -> tuple[list[str], set[str]]:
    """Names of images and subfolders in natural order, and which of them are folders. Of a million files only
    the names are asked: no file is opened or looked at, and the lists hold nothing but strings."""
    names, folders = [], set()
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith("."):
                    continue
                if _is_folder(entry):
                    folders.add(name)
                # A dangling link is kept: it is a broken image to report, not a file to overlook.
                elif not _is_image_name(name):
                    continue
                names.append(name)
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error.strerror}") from error
    names.sort(key=_natural)
    return names, folders


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _identity(folder: str) -> tuple[int, int]:
    try:
        status = os.stat(folder)
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error.strerror}") from error
    return status.st_dev, status.st_ino


def _is_image_name(path: str) -> bool:
    return path.lower().endswith(EXTENSIONS)


_digit_runs = re.compile("([0-9]+)").split


def _natural(name: str) -> str:
    """Sort key: runs of digits compare as numbers; the name itself decides between "1" and "01".

    One string: a million lists of text and numbers are slow to make and to compare. A number is written as
    a mark below every character, how many digits it has, and the digits; two marks close the key.
    """
    parts = _digit_runs(name)  # text at even places, digits at odd ones
    for i in range(1, len(parts), 2):
        digits = parts[i].lstrip("0")
        parts[i] = f"\0{chr(len(digits) + 1)}{digits}"
    return f"{''.join(parts)}\0\0{name}"


def _unique_names(relative: Sequence[tuple[str, str]]) -> list[str]:
    def longer(root: str, below: str, level: int) -> str:
        if level == 0:
            name = os.path.splitext(below)[0]
        elif level == 1:
            name = below
        else:
            name = os.path.basename(os.path.abspath(root)) + "/" + below
        if not (name.isascii() and name.isprintable()):
            # Control characters and undecodable bytes cannot go into a table or a JSON file.
            name = re.sub(r"[\x00-\x1f\x7f\ud800-\udfff]", "_", name)
        return name.lstrip("/")

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
