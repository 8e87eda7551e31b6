import gzip
import struct
import tracemalloc

import numpy as np
import pytest

from idx_files import CODES, idx_bytes, write_set
from pdae_fast.data import FASHION_CLASSES, FashionMNIST, read_idx
from pdae_fast.errors import UserError


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("packed", [False, True])
def test_read_idx_types(tmp_path, dtype, packed):
    array = (np.arange(24).reshape(2, 3, 4) * 5 - 60 * (dtype != "uint8")).astype(dtype)
    path = tmp_path / "anything"  # the name says nothing about compression
    path.write_bytes(gzip.compress(idx_bytes(array)) if packed else idx_bytes(array))
    got = read_idx(path)
    assert got.dtype == np.dtype(dtype) and got.dtype.isnative
    np.testing.assert_array_equal(got, array)


GOOD = idx_bytes(np.arange(12, dtype=np.uint8).reshape(3, 4))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file"),
        (b"\x89PNG\r\n\x1a\n", "not an IDX file"),
        (b"\0\0\x08", "not an IDX file"),
        (b"\0\0\x07\x01" + GOOD[4:], "not an IDX file"),
        (b"\0\0\x08\x00", "not an IDX file"),
        (GOOD[:9], "truncated in the header"),
        (GOOD[:-1], r"truncated, expected 12 bytes for shape \[3, 4\]"),
        (GOOD + b"x", "too long, expected 12 bytes"),
        (gzip.compress(GOOD, mtime=0)[:-12], "gzip stream is truncated"),
        (gzip.compress(GOOD[:-1], mtime=0), "truncated, expected 12 bytes"),
        (gzip.compress(GOOD, mtime=0)[:14] + b"\xff\xff" + gzip.compress(GOOD, mtime=0)[16:], "gzip stream is damaged"),
        (b"\x1f\x8b not gzip at all", "gzip stream is damaged"),
        (gzip.compress(GOOD, mtime=0)[:-8] + bytes(8), "gzip stream is damaged"),
    ],
)
def test_read_idx_refuses(tmp_path, content, message):
    path = tmp_path / "x-idx"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_idx(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_read_idx_missing_and_folder(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(UserError, match=f"cannot read {path}"):
            read_idx(path)


def test_a_lying_header_does_not_eat_memory(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"\0\0\x08\x03" + struct.pack(">3I", 2**31, 2**15, 2**15) + bytes(100))
    tracemalloc.start()
    with pytest.raises(UserError, match="truncated"):
        read_idx(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 << 20


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("train", "seed", "name"), [(False, 1, "test-00002"), (True, 0, "train-00002")])
def test_fashion(tmp_path, packed, train, seed, name):
    dataset = FashionMNIST(write_set(tmp_path, packed=packed), train=train)
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 28, 28)).astype(np.float64)
    image, got_name, label = dataset[2]
    assert len(dataset) == 3 and got_name == name == dataset.names[2]
    assert type(label) is int and label == 2 + seed
    expected = np.full((1, 32, 32), -1.0)
    expected[0, 2:30, 2:30] = pixels[2] / 127.5 - 1
    np.testing.assert_allclose(image.numpy(), expected, atol=1e-7)
    assert dataset.images.dtype == np.uint8


@pytest.mark.parametrize(("size", "start"), [(28, 0), (29, 0), (31, 1), (64, 18)])
def test_fashion_sizes_are_padded_never_resized(tmp_path, size, start):
    image = FashionMNIST(write_set(tmp_path), size=size)[0].image
    assert image.shape == (1, size, size)
    pixels = np.random.default_rng(1).integers(0, 256, (3, 28, 28))[0] / 127.5 - 1
    inside = np.s_[start : start + 28]
    np.testing.assert_allclose(image[0].numpy()[inside, inside], pixels, atol=1e-7)
    assert image.sum().item() == pytest.approx(pixels.sum() - (size**2 - 28**2), abs=1e-2)


def test_fashion_in_colour_and_without_labels(tmp_path):
    image, _, label = FashionMNIST(write_set(tmp_path, labels=False), channels=3)[0]
    assert image.shape == (3, 32, 32) and (image[0] == image[2]).all() and label is None
    image[0] = 7  # the channels are not one memory
    assert not (image[1] == 7).any()


def test_fashion_classes():
    assert len(FASHION_CLASSES) == 10 and FASHION_CLASSES[9] == "Ankle boot" and FASHION_CLASSES[3] == "Dress"


def test_fashion_refuses(tmp_path):
    with pytest.raises(UserError, match="size must be at least 28"):
        FashionMNIST(write_set(tmp_path / "a"), size=27)
    with pytest.raises(UserError, match=r"no Fashion-MNIST in .*t10k-images-idx3-ubyte\[\.gz\]"):
        FashionMNIST(tmp_path)
    with pytest.raises(UserError, match="no Fashion-MNIST"):
        FashionMNIST(write_set(tmp_path / "b", prefixes=("train",)), train=False)
    folder = write_set(tmp_path / "c", packed=False)
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(2, np.uint8)))
    with pytest.raises(UserError, match="expected 3 bytes, one label an image"):
        FashionMNIST(folder)
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(np.zeros((3, 28, 28), np.float32)))
    with pytest.raises(UserError, match=r"not float32 \[3, 28, 28\]"):
        FashionMNIST(folder)
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(np.zeros((0, 28, 28), np.uint8)))
    with pytest.raises(UserError, match=r"not uint8 \[0, 28, 28\]"):
        FashionMNIST(folder)
