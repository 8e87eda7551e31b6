"""Pixel-exact expectations for every mode; numbers are worked out here, not taken from the code."""

import io
import os
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from pdae_fast.data import BrokenImage, load_image, open_dataset, spec
from pdae_fast.errors import UserError


def save(folder, image, name="a.png", **options):
    path = folder / name
    image.save(path, **options)
    return path


def levels(tensor):
    """Back to 0 ... 255 in float64, [H, W, C]."""
    return (tensor.double().permute(1, 2, 0).numpy() + 1) * 127.5


def noise(shape, high=256, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, high, shape).astype(dtype)


def luma(rgb):
    """ITU-R 601-2."""
    return np.asarray(rgb, np.float64) @ [0.299, 0.587, 0.114]


def over(rgb, alpha, background):
    weight = np.asarray(alpha, np.float64)[..., None] / 255
    return rgb * weight + np.asarray(background, np.float64) * (1 - weight)


def png_chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


# The map to [-1, 1] -------------------------------------------------------------------------------


def test_every_level_maps_as_stated(tmp_path):
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = load_image(save(tmp_path, Image.fromarray(pixels)), 16, channels=1)
    assert image.dtype == torch.float32 and image.shape == (1, 16, 16)
    expected = torch.arange(256, dtype=torch.float64).view(1, 16, 16) / 127.5 - 1
    torch.testing.assert_close(image.double(), expected, rtol=0, atol=1e-7)
    assert image.min() == -1 and image.max() == 1


def test_colour_at_the_right_size_is_untouched(tmp_path):
    pixels = noise((8, 8, 3))
    got = levels(load_image(save(tmp_path, Image.fromarray(pixels)), 8))
    np.testing.assert_allclose(got, pixels, atol=1e-4)


# Modes --------------------------------------------------------------------------------------------


def test_grey_becomes_colour_by_repeating(tmp_path):
    pixels = noise((8, 8))
    got = levels(load_image(save(tmp_path, Image.fromarray(pixels)), 8, channels=3))
    np.testing.assert_allclose(got, np.repeat(pixels[..., None], 3, 2), atol=1e-4)


def test_colour_becomes_grey_by_luma(tmp_path):
    pixels = noise((8, 8, 3))
    got = levels(load_image(save(tmp_path, Image.fromarray(pixels)), 8, channels=1))[..., 0]
    np.testing.assert_allclose(got, luma(pixels), atol=0.51)


def test_black_and_white(tmp_path):
    pixels = noise((8, 8), 2).astype(bool)
    got = levels(load_image(save(tmp_path, Image.fromarray(pixels)), 8, channels=1))[..., 0]
    np.testing.assert_allclose(got, pixels * 255.0, atol=1e-4)


@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0), (10, 200, 30)])
def test_rgba_over_background(tmp_path, background):
    pixels = noise((16, 16, 4))
    pixels[0, :, 3], pixels[1, :, 3] = 0, 255
    got = levels(load_image(save(tmp_path, Image.fromarray(pixels)), 16, background=background))
    np.testing.assert_allclose(got, over(pixels[..., :3], pixels[..., 3], background), atol=0.51)
    np.testing.assert_allclose(got[0], np.broadcast_to(background, (16, 3)), atol=1e-4)
    np.testing.assert_allclose(got[1], pixels[1, :, :3], atol=1e-4)


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_with_alpha_over_a_colour(tmp_path, channels):
    pixels = noise((16, 16, 2))
    background = (250, 20, 90)
    expected = over(np.repeat(pixels[..., :1], 3, 2), pixels[..., 1], background)
    if channels == 1:
        expected = luma(expected)[..., None]
    got = levels(load_image(save(tmp_path, Image.fromarray(pixels)), 16, channels, background))
    np.testing.assert_allclose(got, expected, atol=1.02 if channels == 1 else 0.51)


def test_white_is_the_default_background(tmp_path):
    path = save(tmp_path, Image.new("RGBA", (4, 4), (9, 9, 9, 0)))
    assert (load_image(path, 4) == 1).all()


def test_hidden_colour_does_not_bleed_when_resizing(tmp_path):
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[..., 3] = 255
    pixels[:, ::2] = (255, 0, 0, 0)  # red, but invisible
    got = levels(load_image(save(tmp_path, Image.fromarray(pixels)), 8, background=(0, 0, 0)))
    np.testing.assert_allclose(got, 0, atol=1e-4)


def palette_image():
    image = Image.fromarray(noise((8, 8), 3))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255] + [0] * 759)
    return image


def test_palette(tmp_path):
    image = palette_image()
    assert image.mode == "P"
    got = levels(load_image(save(tmp_path, image), 8))
    np.testing.assert_allclose(got, np.eye(3)[np.asarray(image)] * 255, atol=1e-4)


@pytest.mark.parametrize(
    ("transparency", "alphas"),
    [(1, (255, 0, 255)), (bytes([255, 51, 0]), (255, 51, 0))],
    ids=["one", "table"],
)
def test_palette_with_transparency(tmp_path, transparency, alphas):
    image = palette_image()
    index = np.asarray(image)
    expected = over(np.eye(3)[index] * 255, np.array(alphas)[index], (0, 100, 200))
    got = levels(load_image(save(tmp_path, image, transparency=transparency), 8, background=(0, 100, 200)))
    np.testing.assert_allclose(got, expected, atol=0.51)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_transparent_colour_of_a_png(tmp_path, mode):
    image = Image.new(mode, (4, 4), 7 if mode == "L" else (7, 8, 9))
    image.paste(50 if mode == "L" else (50, 60, 70), (0, 0, 2, 4))
    path = save(tmp_path, image, transparency=7 if mode == "L" else (7, 8, 9))
    got = levels(load_image(path, 4, background=(1, 2, 3)))
    np.testing.assert_allclose(got[:, :2], np.broadcast_to(50 if mode == "L" else (50, 60, 70), (4, 2, 3)), atol=1e-4)
    np.testing.assert_allclose(got[:, 2:], np.broadcast_to((1, 2, 3), (4, 2, 3)), atol=1e-4)


def test_cmyk(tmp_path):
    inks = noise((8, 8, 4))
    path = save(tmp_path, Image.fromarray(inks, "CMYK"), "a.tif")
    c, m, y, k = np.moveaxis(inks.astype(np.float64), -1, 0)
    expected = np.stack([(255 - ink) * (255 - k) / 255 for ink in (c, m, y)], -1)
    np.testing.assert_allclose(levels(load_image(path, 8)), expected, atol=1.01)


def test_adobe_cmyk_jpeg_is_not_negative(tmp_path):
    path = save(tmp_path, Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "a.jpg")
    assert levels(load_image(path, 8)).min() > 250  # no ink is white


@pytest.mark.parametrize("kind", ["png", "tiff", "tiff big-endian", "pgm", "tiff 32-bit"])
@pytest.mark.parametrize("channels", [1, 3])
def test_deep_integers_count_to_65535(tmp_path, kind, channels):
    pixels = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    path = tmp_path / f"a.{kind.split()[0]}"
    if kind == "pgm":
        path.write_bytes(b"P5 8 8 65535\n" + pixels.astype(">u2").tobytes())
    elif kind == "tiff 32-bit":
        Image.fromarray(pixels.astype(np.int32)).save(path)
    elif kind == "tiff big-endian":
        Image.frombytes("I;16B", (8, 8), pixels.astype(">u2").tobytes()).save(path)
    else:
        Image.fromarray(pixels).save(path)
    image = load_image(path, 8, channels)
    expected = torch.from_numpy(pixels.astype(np.float64) / 65535 * 2 - 1).expand(channels, 8, 8)
    torch.testing.assert_close(image.double(), expected, rtol=0, atol=2e-7)
    assert image.unique().numel() == 64  # 8 bits would merge some


@pytest.mark.parametrize(("channels", "shown"), [(3, (10, 200, 30)), (1, (luma((10, 200, 30)),))])
def test_deep_png_with_transparent_value(tmp_path, channels, shown):
    pixels = np.full((4, 4), 30000, np.uint16)
    pixels[:, 0] = 777
    path = save(tmp_path, Image.fromarray(pixels), transparency=777)
    got = levels(load_image(path, 4, channels, background=(10, 200, 30)))
    np.testing.assert_allclose(got[:, 0], np.broadcast_to(shown, (4, channels)), atol=0.51)
    np.testing.assert_allclose(got[:, 1:], 30000 / 257, atol=1e-3)


def test_deep_images_are_cut_and_resized(tmp_path):
    column = np.where(np.arange(64) < 32, 1000, 60000).astype(np.uint16)
    path = save(tmp_path, Image.fromarray(np.tile(column[:, None], (1, 100))))
    got = levels(load_image(path, 16, 1))[..., 0]
    np.testing.assert_allclose(got[:5], 1000 / 257, atol=0.3)
    np.testing.assert_allclose(got[-5:], 60000 / 257, atol=0.3)


def test_deep_images_never_overshoot(tmp_path):
    pixels = np.where(np.indices((64, 64)).sum(0) % 32 < 16, 0, 65535).astype(np.uint16)
    image = load_image(save(tmp_path, Image.fromarray(pixels)), 24, 1)
    assert image.min() >= -1 and image.max() <= 1


def test_float_images_count_to_one(tmp_path):
    pixels = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    image = load_image(save(tmp_path, Image.fromarray(pixels), "a.tiff"), 8, 1)
    np.testing.assert_allclose(image[0].double().numpy(), pixels.astype(np.float64) * 2 - 1, atol=2e-7)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.full((4, 4), 255, np.float32), "float values 255 to 255, expected 0 to 1"),
        (np.full((4, 4), np.nan, np.float32), "float values nan"),
        (np.full((4, 4), -1, np.float32), "float values -1 to -1, expected 0 to 1"),
        (np.full((4, 4), 70000, np.int32), "integer values 70000 to 70000, expected 0 to 65535"),
        (np.full((4, 4), -1, np.int32), "integer values -1"),
    ],
)
def test_deep_values_of_unknown_scale_are_refused(tmp_path, pixels, message):
    with pytest.raises(BrokenImage, match=message):
        load_image(save(tmp_path, Image.fromarray(pixels), "a.tiff"), 4)


# Geometry -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.webp"])
def test_exif_orientation(tmp_path, orientation, name):
    """Corners red, green, blue, white; clockwise from the top left of the upright picture."""
    upright = np.zeros((16, 16, 3), np.uint8)
    upright[:8, :8], upright[:8, 8:], upright[8:, 8:], upright[8:, :8] = (
        (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255),
    )  # fmt: skip
    # How the camera stored it: the EXIF table of which stored side holds the upright top and left.
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.transpose(1, 0, 2), 6: np.rot90(upright, 1), 7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {".jpg": {"quality": 95, "subsampling": 0}, ".webp": {"lossless": True}}
    path = save(tmp_path, Image.fromarray(np.ascontiguousarray(stored)), name, exif=exif, **options.get(name[1:], {}))
    np.testing.assert_allclose(levels(load_image(path, 16)), upright, atol=12 if name == "a.jpg" else 1e-4)


@pytest.mark.parametrize("shape", [(4, 10), (10, 4), (4, 7), (7, 4)])
def test_the_centre_is_cut(tmp_path, shape):
    pixels = noise(shape)
    got = levels(load_image(save(tmp_path, Image.fromarray(pixels)), 4, 1))[..., 0]
    # Four of ten leave three on each side; of seven, one before and two after.
    start = {10: 3, 7: 1}[max(shape)]
    expected = pixels[:, start : start + 4] if shape[0] == 4 else pixels[start : start + 4]
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_shrinking_does_not_alias(tmp_path):
    """One-pixel stripes at twelve times the target's resolution average to grey."""
    pixels = np.zeros((96, 96), np.uint8)
    pixels[:, ::2] = 255
    got = levels(load_image(save(tmp_path, Image.fromarray(pixels)), 8, 1))
    np.testing.assert_allclose(got, 127.5, atol=8)


def test_shrinking_is_lanczos(tmp_path):
    """Against the kernel's definition, sinc(x) sinc(x / 3) for |x| < 3, widened by the scale."""
    row = noise((24,)).astype(np.float64)
    path = save(tmp_path, Image.fromarray(np.tile(row.astype(np.uint8), (24, 1))))
    scale = 24 / 8
    expected = []
    for i in range(8):
        distance = (np.arange(24) + 0.5 - (i + 0.5) * scale) / scale
        weights = np.where(abs(distance) < 3, np.sinc(distance) * np.sinc(distance / 3), 0)
        expected.append((weights * row).sum() / weights.sum())
    got = levels(load_image(path, 8, 1))[0, :, 0]
    np.testing.assert_allclose(got, np.clip(expected, 0, 255), atol=1)


def test_tiny_images_grow(tmp_path):
    path = save(tmp_path, Image.new("RGB", (1, 5), (10, 20, 30)))
    np.testing.assert_allclose(levels(load_image(path, 8)), np.broadcast_to((10, 20, 30), (8, 8, 3)), atol=1e-4)


def test_first_frame_is_used(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for name in ("a.gif", "a.png", "a.tif", "a.webp"):
        options = {"lossless": True} if name == "a.webp" else {}
        path = save(tmp_path, frames[0], name, save_all=True, append_images=frames[1:], **options)
        np.testing.assert_allclose(levels(load_image(path, 4)), np.broadcast_to((255, 0, 0), (4, 4, 3)), atol=1e-4)


# Broken files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif", "a.tif", "a.bmp", "a.webp", "a.ppm"])
def test_truncated(tmp_path, name):
    path = save(tmp_path, Image.fromarray(noise((64, 64, 3))), name)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(BrokenImage) as caught:
        load_image(path, 8)
    assert str(caught.value).startswith(f"{path}: ") and caught.value.reason
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"hello, I am a text\n", "not an image in a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image in a known format"),
    ],
    ids=["empty", "text", "postscript"],
)
def test_not_an_image(tmp_path, content, reason):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(BrokenImage) as caught:
        load_image(path, 8)
    assert caught.value.reason == reason


def test_missing_folder_and_pipe(tmp_path):
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")  # opening it would hang
    for name, reason in [
        ("none.png", "no such file"),
        ("folder.png", "plain file"),
        ("pipe.png", "plain file"),
    ]:
        with pytest.raises(BrokenImage, match=reason):
            load_image(tmp_path / name, 8)


def test_decompression_bomb(tmp_path):
    """A header of 60,000 x 60,000 pixels in a file of a few bytes."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0))
    path = tmp_path / "a.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(bytes(9))))
    with pytest.raises(BrokenImage, match="decompression bomb"):
        load_image(path, 8)


def test_zero_pixels(tmp_path):
    buffer = io.BytesIO()
    Image.new("L", (1, 1)).save(buffer, "BMP")
    content = bytearray(buffer.getvalue())
    content[18:22] = bytes(4)  # BITMAPINFOHEADER: width
    path = tmp_path / "a.bmp"
    path.write_bytes(content)
    with pytest.raises(BrokenImage, match="not an image"):
        load_image(path, 8)


def test_unreadable_exif_does_not_break_an_image(tmp_path):
    path = save(tmp_path, Image.new("RGB", (4, 4), (9, 9, 9)), exif=b"Exif\0\0garbage that is no TIFF header")
    np.testing.assert_allclose(levels(load_image(path, 4)), 9, atol=1e-4)


def test_a_decoder_that_fails_oddly_gives_one_line(tmp_path, monkeypatch):
    def load(image):
        raise IndexError("two\n  lines")

    path = save(tmp_path, Image.new("L", (4, 4)), "a.ppm")
    monkeypatch.setattr("PIL.PpmImagePlugin.PpmImageFile.load", load)
    with pytest.raises(BrokenImage) as caught:
        load_image(path, 4)
    assert caught.value.reason == "two lines"


@pytest.mark.parametrize(
    "arguments", [(0, 3), (8, 2), (8, 4), (8, 3, (1, 2)), (8, 3, (0, 0, 256)), (8, 3, (0, 0, 0.5))]
)
def test_bad_arguments(tmp_path, arguments):
    path = save(tmp_path, Image.new("L", (4, 4)))
    with pytest.raises(UserError) as caught:
        load_image(path, *arguments)
    assert not isinstance(caught.value, BrokenImage)


# -- CelebA's crop -----------------------------------------------------------------------------------------------------


def aligned(path):
    """178 x 218 pixels that say where they are: red is the column, green the row."""
    pixels = np.zeros((218, 178, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(178), np.arange(218)[:, None]
    Image.fromarray(pixels).save(path)
    return path


def test_the_published_crop_of_celeba(tmp_path):
    path = aligned(tmp_path / "000001.png")
    pixels = ((load_image(path, 128, crop="celeba") + 1) * 127.5).round()
    assert pixels[0, 0, 0] == 25 and pixels[1, 0, 0] == 57 and pixels[0, 0, -1] == 152 and pixels[1, -1, 0] == 184
    with Image.open(path) as image:
        expected = np.asarray(image.crop((25, 57, 153, 185)).resize((64, 64), Image.Resampling.LANCZOS))
    found = ((load_image(path, 64, crop="celeba") + 1) * 127.5).round().numpy().transpose(1, 2, 0)
    assert np.array_equal(found, expected)
    centred = ((load_image(path, 178) + 1) * 127.5).round()
    assert centred[0, 0, 0] == 0 and centred[1, 0, 0] == 20
    Image.new("RGB", (64, 64)).save(tmp_path / "small.png")
    with pytest.raises(BrokenImage, match="64 x 64 pixels; the crop celeba is for aligned images of 178 x 218"):
        load_image(tmp_path / "small.png", 64, crop="celeba")
    with pytest.raises(UserError, match="crop 'face' is not known; expected centre or celeba"):
        load_image(path, 64, crop="face")


def test_nothing_said_about_the_crop_of_aligned_images(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    aligned(tmp_path / "a" / "1.png")
    spec._note.cache_clear()
    for crop in ("centre", "celeba"):
        open_dataset(tmp_path / "a", 64, crop=crop)
    assert capsys.readouterr().err == ""
    for _ in range(2):
        assert torch.equal(open_dataset(tmp_path / "a", 64)[0].image, load_image(tmp_path / "a" / "1.png", 64))
    assert len(capsys.readouterr().err.splitlines()) == 1  # once
    chosen = SimpleNamespace(crop="celeba")
    assert [spec.crop_for(asked, chosen) for asked in (None, "centre")] == ["celeba", "centre"]
    assert spec.crop_for(None, SimpleNamespace(crop="centre")) is None


# -- the chunks of a PNG -----------------------------------------------------------------------------------------------


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunk(content, kind, data):
    """``content`` with one more chunk behind the header."""
    return content[:33] + chunk(kind, data) + content[33:]


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    return path


def test_every_flipped_bit_of_a_png_is_seen(picture):
    content = picture.read_bytes()
    for place in range(len(content)):
        picture.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        with pytest.raises(BrokenImage) as caught:
            load_image(picture, 16)
        assert "\n" not in str(caught.value)
    for end in range(0, len(content), 7):
        picture.write_bytes(content[:end])
        with pytest.raises(BrokenImage):
            load_image(picture, 16)


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (b"tEXt", b"Comment\0" + b"x" * (3 << 20)),
        (b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * (3 << 20))),
        (b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(b"x" * (3 << 20))),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b"x" * (3 << 20))),
        (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"x" * (3 << 20))),
        (b"zTXt", b"Comment\0\0not packed"),
        (b"iCCP", b"profile\0\0" + zlib.compress(b"x" * (3 << 20))),
    ],
)
def test_long_text_has_no_part_in_the_pixels(picture, kind, data):
    expected = load_image(picture, 16)
    picture.write_bytes(with_chunk(picture.read_bytes(), kind, data))
    assert torch.equal(load_image(picture, 16), expected)


def test_text_that_says_which_way_is_up_is_read(picture):
    expected = load_image(picture, 16).rot90(-1, (1, 2))
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    picture.write_bytes(with_chunk(picture.read_bytes(), b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp))
    assert torch.equal(load_image(picture, 16), expected)
