"""Writing images and grids of images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from io import BytesIO

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pdae_fast.errors import UserError
from pdae_fast.files import atomic_write, make_folder

_MIN_TILE = 64  # pixels: below this a person sees little


def save_images(images: Tensor, directory: str | os.PathLike, names: Sequence[str]) -> list[str]:
    """Write `directory/NAME.png` for each image, 8-bit, each file whole or not at all.

    images: [B, C, H, W] in [-1, 1], C 1 (grey) or 3; values outside are clamped, then rounded to the nearest
    of 256 levels, so an 8-bit image that was read and not changed is written as it was.
    names: B names; "/" makes subfolders. ".png" is always appended, so different names stay different.
    Returns the paths. Raises ValueError where shapes or names do not fit, UserError when an image holds NaN
    or the system refuses.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) != len(names):
        raise ValueError(f"expected [{len(names)} (as names), 1 or 3, H, W], not {list(images.shape)}")
    paths = []
    for image, name in zip(images, names, strict=True):
        if os.path.isabs(name) or ".." in name.split("/") or not name:
            raise ValueError(f"not a name below the folder: {name!r}")
        path = os.path.join(directory, name + ".png")
        _save_png(_to_picture(image, name), path)
        paths.append(path)
    return paths


def save_grid(
    rows: Sequence[Tensor],
    path: str | os.PathLike,
    labels: Sequence[str] | None = None,
    column_pad: int = 2,
    scale: int | None = None,
) -> None:
    """Write a PNG in which each entry of `rows` is one row of images on white, whole or not at all.

    rows: tensors [N, C, H, W] in [-1, 1] (clamped), one H and W for all; N may differ, and so may C (1 or 3).
    labels: one text for each row, written at its left.
    column_pad: white pixels between images, across and down. scale: whole-number enlargement by repeating
    pixels; by default the smallest that makes the images at least 64 pixels wide and high.
    Raises ValueError where shapes or labels do not fit, UserError when an image holds NaN or the system
    refuses.
    """
    shapes = [list(row.shape) for row in rows]
    sizes = {tuple(row.shape[2:]) for row in rows}
    if len(sizes) != 1 or any(row.ndim != 4 or row.shape[1] not in (1, 3) for row in rows):
        raise ValueError(f"expected rows of [N, 1 or 3, H, W] with one H and W, not {shapes}")
    if labels is not None and len(labels) != len(rows):
        raise ValueError(f"{len(labels)} labels for {len(rows)} rows")
    if column_pad < 0 or (scale is not None and scale < 1):
        raise ValueError(f"column_pad must be at least 0 and scale at least 1, not {column_pad} and {scale}")
    height, width = sizes.pop()
    scale = scale or -(-_MIN_TILE // min(height, width))
    tile_w, tile_h = width * scale, height * scale
    step_x, step_y = tile_w + column_pad, tile_h + column_pad

    font = _font()
    margin, line = _text_extent(labels or [], font)
    mode = "RGB" if any(row.shape[1] == 3 for row in rows) else "L"
    columns = max(len(row) for row in rows)
    # A label may be taller than a small tile.
    step_y = max(step_y, line + column_pad)
    total = (max(1, margin + columns * step_x - column_pad), max(1, len(rows) * step_y - column_pad))
    grid = Image.new(mode, total, "white")
    draw = ImageDraw.Draw(grid)
    for i, row in enumerate(rows):
        if labels is not None:
            draw.text((4, i * step_y + tile_h // 2), labels[i], fill="black", font=font, anchor="lm")
        for j, image in enumerate(row):
            tile = _to_picture(image, f"row {i}, image {j}")
            tile = tile.resize((tile_w, tile_h), Image.Resampling.NEAREST)
            grid.paste(tile, (margin + j * step_x, i * step_y))
    _save_png(grid, path)


def to_png(image: Tensor, name: str = "image") -> bytes:
    """The content of the file that `save_images` would write of ``image`` [C, H, W]; UserError for NaN."""
    file = BytesIO()
    _to_picture(image, name).save(file, "PNG")
    return file.getvalue()


def _to_picture(image: Tensor, name: str) -> Image.Image:
    """[C, H, W] in [-1, 1] to an 8-bit Pillow image."""
    image = image.detach().to("cpu", torch.float32)
    if image.isnan().any():
        raise UserError(f"the image {name} holds NaN; a wider dtype (float32) may help")
    pixels = ((image + 1) * 127.5).clamp(0, 255).round().to(torch.uint8).numpy()
    return Image.fromarray(np.ascontiguousarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)))


def _save_png(picture: Image.Image, path: str | os.PathLike) -> None:
    folder = os.path.dirname(path)
    if folder:
        make_folder(folder)
    with atomic_write(path) as file:
        picture.save(file, "PNG")


def _font():
    try:
        return ImageFont.load_default(size=14)
    except (ImportError, OSError):  # a Pillow without FreeType has only its small bitmap font
        return ImageFont.load_default()


def _text_extent(labels: Sequence[str], font) -> tuple[int, int]:
    """Width and height in pixels that the labels need, with some air; (0, 0) without labels."""
    boxes = [font.getbbox(label) for label in labels]
    if not boxes:
        return 0, 0
    return int(max(box[2] for box in boxes)) + 12, int(max(box[3] for box in boxes)) + 4
