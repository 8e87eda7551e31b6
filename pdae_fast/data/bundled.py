"""The small labelled data sets inside the package, so that every experiment runs with no arguments."""

from __future__ import annotations

from pathlib import Path

from pdae_fast.errors import UserError

_PRETRAINED = Path(__file__).resolve().parent.parent / "pretrained"
_ROOT = _PRETRAINED / "data"
SAMPLES = _PRETRAINED / "samples"  # sixteen test images, which `reconstruct` takes where none are given
_OF_MODEL = {"fashion32": "fashion", "avatars64": "avatars"}
_OF_CHANNELS = {1: "fashion", 3: "avatars"}
PREFIX = "bundled:"


def bundled_path(name: str) -> str:
    """The folder of the bundled data `name` ("fashion" or "avatars"); UserError naming those that there are."""
    known = sorted(path.name for path in _ROOT.iterdir() if path.is_dir()) if _ROOT.is_dir() else []
    if name not in known:
        there_is = ", ".join(PREFIX + word for word in known) or "none"
        raise UserError(f"no bundled data {PREFIX + name}; there is {there_is}")
    return str(_ROOT / name)


def bundled_for(model: str, channels: int) -> str:
    """The data spec ("bundled:NAME", see `open_dataset`) for a bundled model's name, or for any other model the
    data with its number of channels (1: fashion, 3: avatars)."""
    return PREFIX + (_OF_MODEL.get(model) or _OF_CHANNELS[channels])
