"""One way in: a bundled name, a directory, or a foreign file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import UserError
from .directory import BUNDLED, Loaded, available, load_directory


def load(source: str | Path, **options: Any) -> Loaded:
    """Read a model from wherever it is; ``options`` concern foreign files only."""
    if isinstance(source, str) and source in available():
        return load_directory(BUNDLED / source)
    path = Path(source).expanduser()
    if path.is_dir():
        return load_directory(path)
    raise UserError(
        f"{source}: neither a bundled model ({', '.join(available()) or 'none'}), nor a directory, nor a file"
    )
