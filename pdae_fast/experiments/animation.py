"""Frames as a film: GIF by Pillow, MP4 by imageio where it is installed."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import UserError
from ..files import atomic_write

FORMATS = ("gif", "mp4")
_MIN_SIDE = 128  # pixels: smaller films are enlarged, by repeating pixels
_HOLD = 3  # how many frames long each end is shown


def check_format(format: str) -> None:
    """UserError, before any work, where the film could not be written at the end."""
    if format not in FORMATS:
        raise UserError(f"animation {format!r} is not known; expected {' or '.join(FORMATS)}")
    if format == "mp4":
        _imageio()


def write(path: Path, frames: Tensor, seconds: float = 2.0) -> None:
    """A film of ``frames`` [P, n, C, H, W] in [-1, 1] (clamped), P side by side, there and back in twice ``seconds``,
    to ``path`` (.gif, endless, or .mp4), whole or not at all."""
    pictures = _pictures(frames)
    rate = _rate(frames, seconds)
    if path.suffix == ".mp4":
        content = _imageio().imwrite("<bytes>", np.stack(pictures), extension=".mp4", plugin="FFMPEG", fps=rate)
        with atomic_write(path) as file:
            file.write(content)
        return
    with atomic_write(path) as file:
        _save_gif(file, pictures, rate)


def gif(frames: Tensor, seconds: float = 2.0) -> bytes:
    """The content of the GIF that `write` would write."""
    file = BytesIO()
    _save_gif(file, _pictures(frames), _rate(frames, seconds))
    return file.getvalue()


def _rate(frames: Tensor, seconds: float) -> float:
    return max(1.0, len(frames[0]) / seconds)


def _save_gif(file: IO[bytes], pictures: Sequence[np.ndarray], rate: float) -> None:
    first, *others = [Image.fromarray(picture) for picture in pictures]
    first.save(file, "GIF", save_all=True, append_images=others, duration=round(1000 / rate), loop=0)


def _pictures(frames: Tensor) -> list[np.ndarray]:
    """uint8 [H, W, 3] of each moment."""
    side = frames.shape[-1]
    scale = -(-_MIN_SIDE // side)
    pixels = ((frames + 1) * 127.5).clamp(0, 255).round().to(torch.uint8).expand(-1, -1, 3, -1, -1)
    pixels = pixels.repeat_interleave(scale, dim=-1).repeat_interleave(scale, dim=-2)
    film = [
        np.ascontiguousarray(np.hstack([p.permute(1, 2, 0).numpy() for p in moment])) for moment in pixels.unbind(1)
    ]
    return _there_and_back(film)


def _there_and_back(film: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [film[0]] * (_HOLD - 1) + list(film) + [film[-1]] * (_HOLD - 1) + list(film[-2:0:-1])


def _imageio():
    try:
        import imageio.v3
        import imageio_ffmpeg

        imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        raise UserError("MP4 needs imageio with ffmpeg: pip install 'imageio[ffmpeg]' (or --animate gif)") from None
    return imageio.v3
