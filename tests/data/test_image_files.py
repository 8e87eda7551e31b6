import inspect
import os
import pickle
import sys

import numpy as np
import pytest
from PIL import Image

from pdae_fast.data import BrokenImage, ImageFiles, collate, readable
from pdae_fast.data.latents import data_fingerprint
from pdae_fast.errors import UserError


def make(folder, *names, level=0):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), level).save(path)


def test_natural_order_and_names(tmp_path):
    make(tmp_path, "10.png", "9.png", "b/2.jpg", "b/11.jpg", "B.gif", "a10/x.png", "a9/x.png", "UPPER.PNG")
    assert ImageFiles(tmp_path, 4).names == ["9", "10", "B", "UPPER", "a9/x", "a10/x", "b/2", "b/11"]


def test_numbers_that_are_equal_have_a_fixed_order(tmp_path):
    make(tmp_path, "1.png", "01.png", "001.png")
    assert ImageFiles(tmp_path, 4).names == ["001", "01", "1"]


def test_samples(tmp_path):
    make(tmp_path, "a.png", level=0)
    make(tmp_path, "b.png", level=255)
    dataset = ImageFiles(str(tmp_path), 8, channels=1)
    assert len(dataset) == 2
    image, name, label = dataset[1]
    assert image.shape == (1, 8, 8) and (image == 1).all() and name == "b" and label is None
    assert (dataset[0].image == -1).all()
    with pytest.raises(IndexError):
        dataset[2]


def test_background_reaches_the_images(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "a.png")
    image = ImageFiles(tmp_path, 4, background=(255, 0, 255))[0].image
    assert image[:, 0, 0].tolist() == [1, -1, 1]


def test_other_files_hidden_entries_and_subfolders(tmp_path):
    make(tmp_path, "a.png", ".hidden.png", ".thumbs/t.png", "sub/b.png", "folder.png/c.png")
    (tmp_path / "readme.txt").write_text("no")
    assert ImageFiles(tmp_path, 4).names == ["a", "folder.png/c", "sub/b"]
    assert ImageFiles(tmp_path, 4, recursive=False).names == ["a"]


def test_equal_stems_keep_their_extension(tmp_path):
    make(tmp_path, "x.png", "x.jpg", "y.png", "x.png.gif")
    names = ImageFiles(tmp_path, 4).names
    assert names[0] == "x.jpg" and names[3] == "y" and len(set(names)) == 4


def test_several_roots_in_the_given_order(tmp_path):
    make(tmp_path, "two/1.png", "two/only.png", "one/1.png", "lone.png")
    dataset = ImageFiles([tmp_path / "two", tmp_path / "one", tmp_path / "lone.png"], 4)
    assert dataset.names == ["two/1.png", "only", "one/1.png", "lone"]


def test_names_are_unique_in_the_worst_case(tmp_path):
    make(tmp_path, "a/r/x.png", "b/r/x.png", "b/r/x.jpg", "a/r/r/x.png", "a/r/x~2.png", "a/r/r/x.png~2.png")
    roots = [
        tmp_path / "a/r",
        tmp_path / "b/r",
        tmp_path / "a/r",
        tmp_path / "a/r/x.png",
        tmp_path / "a/r/x.png",
    ]
    dataset = ImageFiles(roots, 4)
    assert len(dataset) == 4 + 2 + 4 + 2
    assert len(set(dataset.names)) == len(dataset)
    assert dataset.names == ImageFiles(roots, 4).names
    assert not any(name.startswith("/") or ".." in name.split("/") for name in dataset.names)


def test_names_are_printable(tmp_path):
    make(tmp_path, "new\nline.png")
    Image.new("L", (4, 4)).save(tmp_path / "good.png")
    os.rename(tmp_path / "good.png", os.fsencode(tmp_path) + b"/bad\xff.png")
    dataset = ImageFiles(tmp_path, 4)
    assert dataset.names == ["bad_", "new_line"]
    assert [name.encode() for name in dataset.names] and len([*map(dataset.__getitem__, range(2))]) == 2


def test_a_trailing_slash_and_a_relative_path(tmp_path, monkeypatch):
    make(tmp_path, "d/a.png")
    monkeypatch.chdir(tmp_path)
    for root in ("d", "d/", "./d", "."):
        dataset = ImageFiles(root, 4)
        assert dataset.names == ["d/a" if root == "." else "a"] and dataset[0].image.shape == (3, 4, 4)
    assert ImageFiles("d/a.png", 4).names == ["a"]


def test_links_are_followed_once(tmp_path):
    make(tmp_path, "data/a.png", "other/b.png")
    (tmp_path / "data/loop").symlink_to(tmp_path / "data")
    (tmp_path / "data/more").symlink_to(tmp_path / "other")
    (tmp_path / "data/gone.png").symlink_to(tmp_path / "nothing.png")
    dataset = ImageFiles(tmp_path / "data", 4)
    assert dataset.names == ["a", "gone", "more/b"]
    with pytest.raises(BrokenImage, match="gone.png: no such file"):
        dataset[1]


def test_a_broken_image_is_named_and_the_rest_work(tmp_path):
    make(tmp_path, "a.png", "c.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    dataset = ImageFiles(tmp_path, 4)
    with pytest.raises(BrokenImage) as caught:
        dataset[1]
    assert str(caught.value) == f"{tmp_path / 'b.png'}: not an image in a known format"
    assert dataset[2].name == "c"


def test_broken_image_survives_pickling(tmp_path):
    error = pickle.loads(pickle.dumps(BrokenImage("a.png", "the file is empty")))
    assert str(error) == "a.png: the file is empty" and error.reason == "the file is empty"


def test_the_dataset_serves_a_data_loader(tmp_path):
    from torch.utils.data import DataLoader

    make(tmp_path, *(f"{i}.png" for i in range(5)))
    loader = DataLoader(pickle.loads(pickle.dumps(ImageFiles(tmp_path, 4))), batch_size=2, collate_fn=collate)
    assert [(list(b.images.shape), b.names, b.labels) for b in loader][-1] == ([1, 3, 4, 4], ["4"], [None])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", "no such file or folder: {}; expected image files"),
        ("empty", "no images in the folder {}; expected image files"),
        ("notes.txt", "not an image file: {}; expected image files"),
    ],
)
def test_unusable_paths_are_named(tmp_path, what, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no")
    make(tmp_path, "good.png")
    path = tmp_path / what
    with pytest.raises(UserError) as caught:
        ImageFiles([tmp_path / "good.png", path], 4)
    assert str(caught.value).startswith(message.format(path))
    assert ".png" in str(caught.value) and "\n" not in str(caught.value)


def test_no_paths_and_bad_targets(tmp_path):
    make(tmp_path, "a.png")
    with pytest.raises(UserError, match="no input"):
        ImageFiles([], 4)
    with pytest.raises(UserError, match="channels"):
        ImageFiles(tmp_path, 4, channels=4)


def test_folders_deeper_than_recursion(tmp_path):
    make(tmp_path, "d/" * 150 + "a.png")
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 100)
    try:
        names = ImageFiles(tmp_path, 4).names
    finally:
        sys.setrecursionlimit(limit)
    assert names == ["d/" * 150 + "a"]


def test_sixteen_bit_and_colour_files_mix(tmp_path):
    Image.fromarray(np.full((4, 4), 65535, np.uint16)).save(tmp_path / "deep.png")
    Image.new("RGB", (9, 4), "white").save(tmp_path / "wide.png")
    assert all((sample.image == 1).all() for sample in map(ImageFiles(tmp_path, 4).__getitem__, range(2)))


def test_a_link_to_itself_is_a_broken_image_or_nothing(tmp_path):
    make(tmp_path, "a.png")
    (tmp_path / "b.png").symlink_to("b.png")
    (tmp_path / "folder").symlink_to("folder")
    dataset = ImageFiles(tmp_path, 4)
    assert dataset.names == ["a", "b"] and dataset[0].name == "a"
    with pytest.raises(BrokenImage, match="no such file"):
        dataset[1]
    for name in ("b.png", "folder"):
        with pytest.raises(UserError, match="no such"):
            ImageFiles(tmp_path / name, 4)


def test_results_are_no_images(tmp_path, monkeypatch):
    make(tmp_path, "a.png", "sub/b.png", "out/images/a.png", "out/grid.png", "outer/c.png")
    assert ImageFiles(tmp_path, 4).names == ["a", "out/grid", "out/images/a", "outer/c", "sub/b"]
    for out in (tmp_path / "out", f"{tmp_path}/sub/../out/"):
        assert ImageFiles(tmp_path, 4, without=out).names == ["a", "outer/c", "sub/b"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("out")
    assert ImageFiles(".", 4, without="link").names == ["a", "outer/c", "sub/b"]
    # What is named is read where commands write no images.
    assert ImageFiles("sub", 4, without=".").names == ["b"] and ImageFiles("out/grid.png", 4, without="out").names
    for root in (".", "out", "out/images", tmp_path / "link"):
        with pytest.raises(UserError, match="where results are written .*choose another --out"):
            ImageFiles(root, 4, without=root if root == "." else "out")


def test_the_readable_images_alone(tmp_path):
    make(tmp_path / "whole", "a.png", "c.png", "d.png")
    make(tmp_path / "parts", "a.png", "b.png", "c.png", "d.png")
    assert readable(ImageFiles(tmp_path / "parts", 4))[1] == []
    (tmp_path / "parts" / "b.png").write_bytes(b"no image")
    whole = ImageFiles(tmp_path / "whole", 4)
    left, broken = readable(ImageFiles(tmp_path / "parts", 4))
    assert left.names == whole.names and broken == [("b", "not an image in a known format")]
    assert [left[i].name for i in range(3)] == ["a", "c", "d"] and len(pickle.loads(pickle.dumps(left))) == 3
    assert data_fingerprint(left) == data_fingerprint(whole)
    (tmp_path / "parts" / "c.png").write_bytes((tmp_path / "whole" / "c.png").read_bytes() + b" ")
    assert data_fingerprint(readable(ImageFiles(tmp_path / "parts", 4))[0]) != data_fingerprint(whole)
    for name in "abcd":
        (tmp_path / "parts" / f"{name}.png").write_bytes(b"")
    with pytest.raises(UserError, match="none of the 4 images could be read"):
        readable(ImageFiles(tmp_path / "parts", 4))
