"""Checks of what users hand over, the same for the pipeline, the commands and the exported runner (no PyTorch here)."""

from __future__ import annotations

import argparse
import math
import operator
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from .errors import UserError
from .limits import brief

MOST_SEED = 2**63 - 1
# Images are in [-1, 1], and decoded ones a little outside; an untrained network's are far outside, to both sides.
UNUSUAL, EIGHT_BIT = 2.0, 16.0
CONVERT = "for 0 to 255 pass x / 127.5 - 1, for 0 to 1 pass 2 * x - 1"


class ImageRangeWarning(UserWarning):
    """Images that are probably not in [-1, 1]."""


def as_int(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """``value`` as an int: whole numbers of any type (NumPy's, a tensor's), no bool and no float."""
    try:
        if isinstance(value, (bool, np.bool_)) or str(getattr(value, "dtype", "")).endswith("bool"):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise UserError(f"{name} must be a whole number, not {brief(value)}") from None
    if least is not None and number < least and most is None:
        raise UserError(f"{name} must be at least {least}, not {brief(number)}")
    if (least is not None and number < least) or (most is not None and number > most):
        raise UserError(f"{name} must be between {least} and {most}, not {brief(number)}")
    return number


def as_seed(value: Any) -> int:
    return as_int("seed", value, 0, MOST_SEED)


def as_number(name: str, value: Any, least: float = -math.inf, most: float = math.inf) -> float:
    """``value`` as a finite float from ``least`` to ``most``; a number of any type, no bool and no text."""
    try:
        if isinstance(value, (bool, np.bool_, str, bytes)):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise UserError(f"{name} must be a number, not {brief(value)}") from None
    if not math.isfinite(number) or not least <= number <= most:
        expected = "finite" if math.isinf(least) and math.isinf(most) else f"a number between {least:g} and {most:g}"
        raise UserError(f"{name} must be {expected}, not {number:g}")
    return number


def as_indices(name: str, values: Any) -> Sequence[int]:
    """Numbers of images: whole numbers from 0, in a range, a list, an array ..."""
    if isinstance(values, range) and (not values or min(values[0], values[-1]) >= 0):
        return values
    if not isinstance(values, Iterable) or isinstance(values, (str, bytes, dict)):
        raise UserError(f"{name} must be whole numbers, not {brief(values)}")
    try:
        return [as_int(name, value, 0) for value in values]
    except TypeError:  # a number that says it can be iterated: an array or a tensor without dimensions
        raise UserError(f"{name} must be whole numbers, not {brief(values)}") from None


def as_images(x: Any, shape: tuple[int, int, int], what: str, batch: str = "B", take_8_bit: bool = True) -> np.ndarray:
    """Images of NumPy as float32 [B, C, H, W] in [-1, 1], as `own_array`; ``shape`` is the model's [C, H, W].

    Floating point arrays are taken as they are, 8-bit ones as 0 to 255, both also with the channels last and 8-bit ones
    also as one image [H, W, C], [C, H, W] or, with one channel, [H, W]. UserError for all others, in which ``batch``
    stands for B.
    """
    channels, height, width = shape
    if not isinstance(x, np.ndarray):
        raise UserError(wrong_shape(x, shape, what, batch))
    given, eight = x, x.dtype == np.uint8
    if eight and x.shape in ((height, width, channels), shape):
        x = x[None]
    elif eight and channels == 1 and x.shape == (height, width):
        x = x[None, None]
    if x.shape[1:] == (height, width, channels) and x.shape[1:] != shape:
        x = x.transpose(0, 3, 1, 2)
    if x.ndim != 4 or x.shape[1:] != shape:
        raise UserError(wrong_shape(given, shape, what, batch))
    if x.dtype.kind != "f" and not (eight and take_8_bit):
        raise UserError(f"{what} has dtype {x.dtype}; expected floating point values in [-1, 1]: {CONVERT}")
    x = own_array(x)
    if not np.isfinite(x).all():
        raise UserError(f"{what} holds NaN or infinite values")
    return x / np.float32(127.5) - np.float32(1) if eight else x


def own_array(x: np.ndarray) -> np.ndarray:
    """x as float32, C-contiguous and writable, which a file mapped into memory is not and a tensor has to be."""
    return np.require(x, np.float32, ["C_CONTIGUOUS", "WRITEABLE", "ENSUREARRAY"])


def check_range(low: float, high: float, what: str) -> None:
    """UserError or a warning for images whose values, from ``low`` to ``high``, are not in [-1, 1]."""
    found = f"{what} has values from {low:g} to {high:g}; images are in [-1, 1]: {CONVERT}"
    if low >= 0 and high > EIGHT_BIT:
        raise UserError(found)
    if max(-low, high) > UNUSUAL or (low >= 0 and low < high <= 1):
        warnings.warn(found, ImageRangeWarning, stacklevel=4)


def wrong_shape(x: Any, shape: Sequence[int], what: str, batch: str = "B") -> str:
    expected = f"[{batch}, {', '.join(map(str, shape))}]"
    if isinstance(x, (list, tuple)):
        return f"{what} has shape {type(x).__name__}; expected one tensor or array {expected}: stack the images"
    found = list(x.shape) if hasattr(x, "shape") else type(x).__name__
    return f"{what} has shape {found}; this model expects {expected}"


# -- for argparse, whose one line names the option ---------------------------------------------------------------------


def option(check: Callable[[int], Any]) -> Callable[[str], int]:
    """The type of an option that takes a whole number which ``check`` may refuse."""

    def parse(text: str) -> int:
        number = int(text)
        try:
            check(number)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return number

    parse.__name__ = "int"
    return parse


seed_option = option(as_seed)
