import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pdae_fast.data import ImageFiles, images, save_grid, save_images, to_png
from pdae_fast.errors import UserError


def constant(level, channels=3, size=32):
    return torch.full((channels, size, size), level / 127.5 - 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_round_trip_is_bit_exact(tmp_path, channels):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, channels)).astype(np.uint8)
    pixels.reshape(-1)[:256] = np.arange(256)  # every level
    Image.fromarray(pixels.squeeze()).save(tmp_path / "a.png")
    sample = ImageFiles(tmp_path / "a.png", 16, channels)[0]
    (path,) = save_images(sample.image[None], tmp_path / "out", [sample.name])
    with Image.open(path) as back:
        assert back.mode == {1: "L", 3: "RGB"}[channels]
        np.testing.assert_array_equal(np.asarray(back), pixels.squeeze())


def test_clamped_and_rounded(tmp_path):
    values = torch.tensor([-3.0, -1, 100.4 / 127.5 - 1, 100.6 / 127.5 - 1, 1, 9]).view(1, 1, 1, 6)
    for dtype in (torch.float32, torch.float64):
        (path,) = save_images(values.to(dtype).requires_grad_(), tmp_path, ["a"])
        assert np.asarray(Image.open(path)).tolist() == [[0, 0, 100, 101, 255, 255]]
    (path,) = save_images(torch.full((1, 1, 2, 2), torch.inf), tmp_path, ["inf"])
    assert np.asarray(Image.open(path)).min() == 255


def test_names_become_paths(tmp_path):
    paths = save_images(torch.zeros(3, 1, 4, 4), tmp_path / "new/folder", ["a", "b/c", "x.jpg"])
    assert paths == [str(tmp_path / "new/folder" / name) for name in ("a.png", "b/c.png", "x.jpg.png")]
    files = sorted(p.name for p in tmp_path.rglob("*") if p.is_file())
    assert files == ["a.png", "c.png", "x.jpg.png"]  # and no temporary ones


def test_save_images_refuses(tmp_path):
    for bad in ("/etc/a", "../a", "a/../../b", ""):
        with pytest.raises(ValueError, match="not a name below the folder"):
            save_images(torch.zeros(1, 1, 4, 4), tmp_path, [bad])
    for shape, names in [((2, 1, 4, 4), ["a"]), ((1, 2, 4, 4), ["a"]), ((1, 4, 4), ["a"])]:
        with pytest.raises(ValueError):
            save_images(torch.zeros(shape), tmp_path, names)
    with pytest.raises(UserError, match="image a holds NaN"):
        save_images(torch.full((1, 1, 4, 4), torch.nan), tmp_path, ["a"])
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        save_images(torch.zeros(1, 1, 4, 4), tmp_path / "file", ["a"])


def test_grid_places_every_tile(tmp_path):
    levels = [[10, 20, 30], [40, 50]]
    rows = [torch.stack([constant(level) for level in row]) for row in levels]
    save_grid(rows, tmp_path / "new/grid.png")
    grid = np.asarray(Image.open(tmp_path / "new/grid.png"))
    assert grid.shape == (2 * 64 + 2, 3 * 64 + 2 * 2, 3)  # 32 px doubled
    for i, row in enumerate(levels):
        for j, level in enumerate(row):
            tile = grid[i * 66 : i * 66 + 64, j * 66 : j * 66 + 64]
            assert (tile == level).all()
    assert (grid[64:66] == 255).all() and (grid[:, 64:66] == 255).all()
    assert (grid[66:, 132:] == 255).all()  # the short row


def test_grid_enlarges_by_repeating(tmp_path):
    image = torch.tensor([[0.0, 255], [100, 200]]) / 127.5 - 1
    save_grid([image[None, None]], tmp_path / "g.png", scale=3)
    grid = np.asarray(Image.open(tmp_path / "g.png"))
    np.testing.assert_array_equal(grid, np.kron([[0, 255], [100, 200]], np.ones((3, 3))))
    for size, expected in [(2, 64), (28, 84), (64, 64), (65, 65), (128, 128)]:
        save_grid([torch.zeros(1, 1, size, size)], tmp_path / "g.png")
        assert Image.open(tmp_path / "g.png").size == (expected, expected)


@pytest.mark.parametrize("bitmap_font", [False, True])
def test_grid_labels_stand_at_the_left_of_their_rows(tmp_path, monkeypatch, bitmap_font):
    if bitmap_font:
        from PIL import ImageFont

        monkeypatch.setattr(images, "_font", ImageFont.load_default_imagefont)
    rows = [constant(128)[None]] * 3
    save_grid(rows, tmp_path / "plain.png")
    save_grid(rows, tmp_path / "g.png", labels=["input", "", "a much longer reconstruction"])
    plain, grid = (np.asarray(Image.open(tmp_path / name)) for name in ("plain.png", "g.png"))
    margin = grid.shape[1] - plain.shape[1]
    np.testing.assert_array_equal(grid[:, margin:], plain)
    ink = (grid[:, :margin] < 128).any(-1)
    for i, expected in enumerate([True, False, True]):
        assert ink[i * 66 : i * 66 + 64].any() == expected
    assert ink[132:].sum() > ink[:64].sum()
    assert not ink[:, :2].any() and not ink[:, -2:].any()  # not cut off


def test_grid_labels_taller_than_tiles(tmp_path):
    save_grid([torch.zeros(1, 1, 2, 2)] * 2, tmp_path / "g.png", labels=["one", "two"], scale=1)
    assert Image.open(tmp_path / "g.png").height > 20


def test_grid_mixes_grey_and_colour(tmp_path):
    save_grid([constant(60, 1)[None], torch.stack([constant(0), constant(255)])], tmp_path / "g.png", column_pad=0)
    grid = np.asarray(Image.open(tmp_path / "g.png"))
    assert grid.shape == (128, 128, 3) and (grid[:64, :64] == 60).all() and (grid[64:, :64] == 0).all()


def test_grid_refuses(tmp_path):
    row = torch.zeros(1, 1, 4, 4)
    cases = [
        {"rows": []},
        {"rows": [row, torch.zeros(1, 1, 5, 4)]},
        {"rows": [row[0]]},
        {"rows": [torch.zeros(1, 2, 4, 4)]},
        {"rows": [row], "scale": 0},
        {"rows": [row], "column_pad": -1},
        {"rows": [row], "labels": ["a", "b"]},
    ]
    for case in cases:
        with pytest.raises(ValueError):
            save_grid(path=tmp_path / "g.png", **case)
    with pytest.raises(UserError, match="row 0, image 0 holds NaN"):
        save_grid([row * torch.nan], tmp_path / "g.png")
    assert list(tmp_path.iterdir()) == []


def test_names_of_a_dataset_survive_json_and_saving(tmp_path):
    for name in ("x.png", "x.bmp", "sub/x.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(tmp_path / "in" / name)
    names = json.loads(json.dumps(ImageFiles(tmp_path / "in", 4).names))
    assert len(set(save_images(torch.zeros(3, 1, 4, 4), tmp_path / "out", names))) == 3


def test_to_png_is_the_file_that_save_images_writes(tmp_path):
    x = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(4)) * 2.4 - 1.2
    for image, path in zip(x, save_images(x, tmp_path, ["a", "b"]), strict=True):
        assert to_png(image) == Path(path).read_bytes()
    with pytest.raises(UserError, match="the image a holds NaN"):
        to_png(torch.full((1, 2, 2), float("nan")), "a")
