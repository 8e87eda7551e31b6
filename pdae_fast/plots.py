"""One way to draw a chart: matplotlib without a display, one style, a PNG that is written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .errors import UserError
from .files import atomic_write

# Distinguishable with every common colour blindness (Okabe and Ito), and dark enough on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 150,
}


@contextmanager
def chart(
    path: str | os.PathLike, width: float = 6.4, height: float = 4.0, rows: int = 1, columns: int = 1, **options: Any
) -> Iterator[Any]:
    """``with chart(path) as axes:`` gives matplotlib Axes (an array of them for several rows or columns) and writes a
    PNG to ``path`` at the end; ``axes.figure`` is the figure.

    width, height: inches at 150 dots. options: as of ``Figure.subplots``. The figure belongs to no display and no
    global state, so nothing has to be closed. Raises UserError when matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("drawing charts needs matplotlib: pip install 'pdae_fast[plot]'") from None
    style = {**_STYLE, "axes.prop_cycle": matplotlib.cycler(color=COLOURS)}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height))
        yield figure.subplots(rows, columns, **options)
        with atomic_write(path) as file:
            figure.savefig(file, format="png")
