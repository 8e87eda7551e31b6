"""From an image file of any mode and size to a square tensor in [-1, 1].

In this order:
1. Decode the first frame and turn it upright as its EXIF orientation says. ICC profiles are ignored.
2. Cut the largest centred square; an odd remainder leaves the extra row or column at the bottom or right. Of aligned
   CelebA images (178 x 218) the crop "celeba" cuts the 128 x 128 square at left 25, top 57 instead, as published
   CelebA-64 models were trained (Diff-AE's and PDAE's dataset code).
3. Put transparent pixels over the background colour. This comes before resizing, so that colours hidden
   under full transparency cannot bleed into the picture.
4. Bring to the asked channels: colour to grey by ITU-R 601-2 luma, grey to colour by repeating it.
5. Resize with Lanczos, which Pillow widens to the scale when shrinking, so nothing aliases; of Pillow's
   filters it keeps the most detail, which a near-exact autoencoder should be given. An image that already
   has the right size is left alone, so that a saved 8-bit image is read back bit for bit.
6. value / 127.5 - 1.

8-bit images stay 8-bit until step 6. Deep greys (16-bit, 32-bit integer, float) are computed in float32:
integers count as 0 ... 65535 and floats as 0 ... 1, and a file with values outside is refused, because its
scale can only be guessed. Pillow gives 16-bit *colour* files as 8-bit.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from io import BytesIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from pdae_fast.config import CROPS
from pdae_fast.data import png
from pdae_fast.data.sample import BrokenImage
from pdae_fast.errors import UserError

EXTENSIONS = (
    ".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif",
    ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip
WHITE = (255, 255, 255)
ALIGNED = (178, 218)  # width and height of CelebA's aligned images
_CELEBA_BOX = (25, 57, 25 + 128, 57 + 128)  # left, top, right, bottom

# The decoders that may see a file, whatever it is called: some of Pillow's others start programs (EPS).
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM")
_DEEP_INTEGER = ("I", "I;16", "I;16L", "I;16B", "I;16N")
_FLOAT_SLACK = 1e-3  # float images that were resized overshoot [0, 1] a little


def load_image(
    path: str | os.PathLike,
    size: int,
    channels: int = 3,
    background: Sequence[int] = WHITE,
    content: bytes | None = None,
    crop: str = "centre",
) -> Tensor:
    """Read an image file as float32 [channels, size, size] in [-1, 1]; the module's text says how.

    channels: 1 or 3. background: the RGB colour, 0 ... 255, that shows through transparent pixels.
    content: the bytes of the file, for one that lies inside another; `path` then only names it in errors.
    crop: one of CROPS.
    Raises UserError for a bad argument and BrokenImage, naming the file, for one that is missing,
    truncated, damaged (a PNG's checksums are verified), not an image, empty, too many pixels for Pillow
    (`Image.MAX_IMAGE_PIXELS`), deep with values out of range, or not of the size that `crop` is for.
    """
    background = check_target(size, channels, background, crop)
    square = _square(path, _decode(path, content), crop)
    if square.mode in _DEEP_INTEGER or square.mode == "F":
        planes = _deep_planes(path, square, channels, background)
        resized = [np.asarray(_resize(Image.fromarray(plane), size)) for plane in planes]
        # Lanczos overshoots; 8-bit images are clamped by their type.
        return torch.from_numpy(np.stack(resized).clip(0, 1) * 2 - 1)
    try:
        flat = _resize(_flatten(square, channels, background), size)
    except ValueError as error:  # a colour space that Pillow cannot convert
        raise BrokenImage(path, _one_line(error)) from error
    return to_tensor(np.array(flat))


def to_tensor(pixels: np.ndarray) -> Tensor:
    """uint8 [H, W] or [H, W, C] to float32 [C, H, W] in [-1, 1]: value / 127.5 - 1."""
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(pixels, dtype=np.float32)).div_(127.5).sub_(1)


def stored_size(path: str | os.PathLike, content: bytes | None = None) -> tuple[int, int] | None:
    """Width and height that an image file states, without decoding it; None where it cannot be read."""
    try:
        with Image.open(path if content is None else BytesIO(content), formats=_FORMATS) as image:
            return image.size
    except MemoryError:
        raise
    except Exception:
        return None


def check_target(
    size: int, channels: int, background: Sequence[int] = WHITE, crop: str = "centre"
) -> tuple[int, int, int]:
    """UserError unless size is positive, channels 1 or 3, background a colour and crop known; returns the colour."""
    if crop not in CROPS:
        raise UserError(f"crop {crop!r} is not known; expected {' or '.join(CROPS)}")
    if size < 1:
        raise UserError(f"image size must be at least 1, not {size}")
    if channels not in (1, 3):
        raise UserError(f"channels must be 1 (grey) or 3 (colour), not {channels}")
    colour = tuple(background)
    if len(colour) != 3 or not all(0 <= value <= 255 and value == int(value) for value in colour):
        raise UserError(f"background must be three whole numbers from 0 to 255, not {background}")
    return tuple(int(value) for value in colour)


def _decode(path: str | os.PathLike, content: bytes | None) -> Image.Image:
    if content is None and not os.path.isfile(path):  # opening a pipe would wait for ever
        raise BrokenImage(path, "not a plain file" if os.path.exists(path) else "no such file")
    if (os.path.getsize(path) if content is None else len(content)) == 0:
        raise BrokenImage(path, "the file is empty")
    whole = True
    try:
        if content is None:
            with open(path, "rb") as file:
                if file.read(len(png.SIGNATURE)) == png.SIGNATURE:
                    content = png.SIGNATURE + file.read()
        if content is not None and content.startswith(png.SIGNATURE):
            content, whole = png.checked(content)
        with Image.open(path if content is None else BytesIO(content), formats=_FORMATS) as image:
            image.load()
            if not whole:
                raise ValueError("truncated: the file ends without an IEND chunk")
            _turn_upright(image)
            return image
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise BrokenImage(path, "not an image in a known format") from error
    except Exception as error:  # malformed files make Pillow's decoders raise almost anything
        reason = error.strerror if isinstance(error, OSError) and error.strerror else _one_line(error)
        raise BrokenImage(path, reason) from error


def _turn_upright(image: Image.Image) -> None:
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:  # a damaged EXIF block says nothing against the pixels: take them as they are stored
        pass


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _square(path: str | os.PathLike, image: Image.Image, crop: str) -> Image.Image:
    width, height = image.size
    if crop == "celeba":
        if image.size != ALIGNED:
            raise BrokenImage(path, f"{width} x {height} pixels; the crop celeba is for aligned images of 178 x 218")
        return image.crop(_CELEBA_BOX)
    side = min(width, height)
    if width == height:
        return image
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _resize(image: Image.Image, size: int) -> Image.Image:
    return image if image.size == (size, size) else image.resize((size, size), Image.Resampling.LANCZOS)


def _flatten(image: Image.Image, channels: int, background: tuple[int, int, int]) -> Image.Image:
    """An 8-bit image as "L" or "RGB" without transparency."""
    mode = "L" if channels == 1 else "RGB"
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        flat = Image.new("RGB", image.size, background)
        flat.paste(image.convert("RGB"), mask=image.getchannel("A"))
        image = flat
    if image.mode in ("L", "RGB", "1"):
        return image.convert(mode)
    # Palettes, CMYK and the rest: luma is defined on RGB.
    return image.convert("RGB").convert(mode)


def _deep_planes(
    path: str | os.PathLike, image: Image.Image, channels: int, background: tuple[int, int, int]
) -> list[np.ndarray]:
    """A deep grey image as `channels` float32 planes in [0, 1]."""
    pixels = np.asarray(image)
    if image.mode == "F":
        grey = pixels.astype(np.float32)
        if not (grey.min() >= -_FLOAT_SLACK and grey.max() <= 1 + _FLOAT_SLACK):  # false for NaN
            raise BrokenImage(path, f"float values {grey.min():g} to {grey.max():g}, expected 0 to 1")
        return [grey] * channels
    if pixels.min() < 0 or pixels.max() > 65535:
        raise BrokenImage(path, f"integer values {pixels.min()} to {pixels.max()}, expected 0 to 65535")
    grey = pixels.astype(np.float32) / 65535
    if "transparency" not in image.info:
        return [grey] * channels
    if channels == 1:
        background = (Image.new("RGB", (1, 1), background).convert("L").getpixel((0, 0)),)
    clear = pixels == image.info["transparency"]
    return [np.where(clear, np.float32(level / 255), grey) for level in background]
