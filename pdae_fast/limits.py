"""Values that come from files: read within bounds, and checked, before anything is built from them.

Nothing here imports more than the standard library.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from .errors import UserError

# What no model has more of: a damaged or hostile file is refused before anything is built from it.
MAX_SIZE, MAX_LEVELS, MAX_TIMESTEPS = 2**16, 12, 10**5
MAX_BLOCKS, MAX_LAYERS, MAX_ATTRIBUTES, MAX_NAME = 32, 128, 2**12, 100
MAX_WEIGHTS = 2**32  # of one network; the largest published ones have 2^30
# What no description of a model needs more of: the largest holds a beta for each of MAX_TIMESTEPS.
MAX_TEXT, MAX_VALUES, MAX_DEPTH = 2**23, 2**18, 32


def brief(value: Any) -> str:
    """``value`` as a message shows it: one line, short, whatever it is."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # of anybody's class; also of integers with thousands of digits
        text = f"an unprintable {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


# -- files ------------------------------------------------------------------------------------------------------------


def read_text(path: Path, expected: str, most: int = MAX_TEXT) -> str:
    """A UTF-8 file of at most ``most`` bytes; UserError, which ends with ``expected``, for any other."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: cannot be read (not a plain file); expected {expected}")
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected {expected}") from None
    if len(content) > most:
        raise UserError(f"{path}: more than {most >> 10} KiB; expected {expected}")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file; expected {expected}") from None


def load_json(path: Path, expected: str) -> Any:
    """The value that a JSON file holds, see :func:`parse_json`; UserError when it cannot be had."""
    text = read_text(path, expected)
    try:
        return parse_json(text)
    except ValueError as error:
        raise UserError(f"{path}: not a JSON file ({error})") from None


def parse_json(text: str) -> Any:
    """The value that ``text`` is the JSON of. ValueError for anything else, and for more or deeper nested values than
    MAX_VALUES and MAX_DEPTH. NaN and infinities, which diffusers writes, are read."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH}") from None
    check_tree(value)
    return value


def parts(value: Any) -> Iterable[Any]:
    """What a mapping, list, tuple or set holds, keys included."""
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    return value if isinstance(value, (list, tuple, set, frozenset)) else ()


def check_tree(root: Any, parts: Callable[[Any], Iterable[Any]] = parts) -> None:
    """ValueError where ``root`` holds more than MAX_VALUES values or deeper ones than MAX_DEPTH.

    What is there several times counts several times, so that printing and walking the tree stay possible; what holds
    itself is too deep.
    """
    count, waiting = 0, [(root, 0)]
    while waiting:
        value, depth = waiting.pop()
        inner = parts(value)
        count += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH}")
        if count + len(waiting) + len(inner) > MAX_VALUES:
            raise ValueError(f"more than {MAX_VALUES} values")
        waiting.extend((part, depth + 1) for part in inner)


# -- values -----------------------------------------------------------------------------------------------------------


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def is_int(value: Any, least: int, most: int) -> bool:
    """Whether ``value`` is an int (no bool) from ``least`` to ``most``."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_number(value: Any, least: float, most: float) -> bool:
    """Whether ``value`` is an int or float (no bool, no NaN) from ``least`` to ``most``."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most


def positive(name: str, value: Any, what: str = "a positive integer", most: int = MAX_SIZE) -> None:
    require(is_int(value, 1, math.inf), f"{name} must be {what}, not {brief(value)}")
    require(value <= most, f"{name} must be at most {most}, not {brief(value)}")


def boolean(name: str, value: Any) -> None:
    require(isinstance(value, bool), f"{name} must be true or false, not {brief(value)}")


def one_of(name: str, value: Any, known: Iterable[str]) -> None:
    known = tuple(known)
    require(
        isinstance(value, str) and value in known,
        f"{name} {brief(value)} is not known; expected one of {', '.join(known)}",
    )


def instance(name: str, value: Any, kind: type) -> None:
    require(isinstance(value, kind), f"{name} must be a {kind.__name__}, not {brief(value)}")


def listed(name: str, value: Any, what: str) -> tuple[Any, ...]:
    """A list or tuple as a tuple; ``what`` its values are."""
    require(isinstance(value, (list, tuple)), f"{name} must be a list of {what}, not {brief(value)}")
    return tuple(value)


def weights(what: str, count: int) -> None:
    """UserError where a network would have more than MAX_WEIGHTS weights."""
    require(count <= MAX_WEIGHTS, f"{what} would have {count:.1e} weights; expected at most {MAX_WEIGHTS:.1e}")
