"""LMDB files with Diff-AE's and LSUN's keys, written by the library and read without it, whatever damage they have."""

import os
import pickle
import shutil
import sys
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from pdae_fast.data import BrokenImage, LMDBImages, collate, load_image, open_dataset, stream
from pdae_fast.data.lmdb_file import LMDBFile
from pdae_fast.errors import UserError

lmdb = pytest.importorskip("lmdb", reason='needs pip install "pdae_fast[data]"')


def encoded(level, size=8, mode="RGB", kind="webp"):
    buffer = BytesIO()
    colour = level if mode == "L" else (level, level // 2, 255 - level)
    Image.new(mode, (size, size), colour).save(buffer, kind, **({"lossless": True} if kind == "webp" else {}))
    return buffer.getvalue()


def write(path, records, **options):
    """As Diff-AE's conversion scripts do, then without the lock file that writing leaves."""
    with lmdb.open(str(path), map_size=1 << 26, **options) as env, env.begin(write=True) as transaction:
        for key, value in records.items():
            transaction.put(key.encode(), value)
    lock = path / "lock.mdb" if path.is_dir() else path.with_name(path.name + "-lock")
    lock.unlink()
    return path


def images(size, count, width=5, **more):
    return {f"{size}-{i:0{width}d}": encoded(i * 20, size if size != "None" else 30, **more) for i in range(count)}


@pytest.fixture
def ffhq(tmp_path):
    return write(tmp_path / "ffhq.lmdb", {**images(8, 6), **images(16, 6), "length": b"6"})


def test_images_and_names(ffhq):
    dataset = LMDBImages(ffhq, 8)
    assert len(dataset) == 6 and dataset.names[3] == "8-00003" and dataset.stored == "8"
    image, name, label = dataset[3]
    assert image.shape == (3, 8, 8) and name == "8-00003" and label is None
    expected = np.array([60, 30, 195]) / 127.5 - 1
    assert np.allclose(image.numpy().transpose(1, 2, 0), expected, atol=1e-6)
    with pytest.raises(IndexError):
        dataset[6]


def test_the_stored_size_is_chosen(tmp_path):
    path = write(tmp_path / "x.lmdb", {**images(8, 2), **images(16, 2), **images("None", 2, 7), "length": b"2"})
    assert [LMDBImages(path, size).stored for size in (4, 8, 9, 16, 17)] == ["8", "8", "16", "16", "None"]
    assert LMDBImages(path, 8, stored=16).stored == "16"
    assert LMDBImages(path, 8, stored="None").names == ["None-0000000", "None-0000001"]
    with pytest.raises(UserError, match="no images stored as size 32; there are 8, 16, None"):
        LMDBImages(path, 8, stored="32")


def test_seven_digits_and_other_formats(tmp_path):
    path = write(tmp_path / "horse", {**images(8, 2, 7, kind="jpeg"), "8-0000002": encoded(9, 8, "L", "png"),
                                      "length": b"3"})  # fmt: skip
    dataset = LMDBImages(path, 4, channels=1)
    assert dataset.names[2] == "8-0000002" and dataset[2].image.shape == (1, 4, 4) and dataset[0].name == "8-0000000"


def test_open_dataset(ffhq, tmp_path, monkeypatch):
    for spec in (ffhq, str(ffhq), f"lmdb:{ffhq}", [str(ffhq)]):
        dataset = open_dataset(spec, 16)
        assert isinstance(dataset, LMDBImages) and dataset.stored == "16"
    assert open_dataset(f"lmdb:{ffhq}:8", 16, 1, split="test").stored == "8"
    colon = tmp_path / "a:b"
    shutil.copytree(ffhq, colon)
    assert open_dataset(f"lmdb:{colon}", 8).stored == "8" and open_dataset(f"lmdb:{colon}:16", 8).stored == "16"
    for spec, message in (
        ("lmdb:", "no folder in"),
        ("lmdb", "no folder in"),
        (f"lmdb:{tmp_path}/gone", "no such file or folder"),
        (f"lmdb:{tmp_path}", "no data.mdb in it"),
        ([str(ffhq), str(tmp_path)], "cannot be combined"),
        (f"lmdb:{ffhq}:None", "no images stored as size None; there are 8, 16"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            open_dataset(spec, 8)
        assert "\n" not in str(caught.value)


def test_nothing_is_written(ffhq):
    before = (ffhq / "data.mdb").read_bytes()
    stamp = (ffhq / "data.mdb").stat().st_mtime_ns
    os.chmod(ffhq / "data.mdb", 0o444)
    os.chmod(ffhq, 0o555)
    try:
        dataset = LMDBImages(ffhq, 8)
        assert len([dataset[i] for i in range(6)]) == 6
        assert os.listdir(ffhq) == ["data.mdb"]
    finally:
        os.chmod(ffhq, 0o755)
    assert (ffhq / "data.mdb").read_bytes() == before and (ffhq / "data.mdb").stat().st_mtime_ns == stamp


def test_a_database_in_a_single_file(tmp_path):
    path = write(tmp_path / "one.mdb", {**images(8, 2), "length": b"2"}, subdir=False)
    assert len(open_dataset(f"lmdb:{path}", 8)) == 2
    assert os.listdir(tmp_path) == ["one.mdb"]


def test_two_datasets_of_one_file_and_a_pickled_one(ffhq):
    first, second = LMDBImages(ffhq, 8), open_dataset(f"lmdb:{ffhq}/:16", 8)
    third = pickle.loads(pickle.dumps(first))
    assert (first[1].image == third[1].image).all() and second[1].name == "16-00001"
    del first, second
    assert third[5].name == "8-00005"


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loader_workers(ffhq, method):
    dataset = LMDBImages(ffhq, 8)
    dataset[0]  # used before the workers are started
    workers = 2 if method == "fork" else 1
    loader = DataLoader(dataset, batch_size=2, num_workers=workers, multiprocessing_context=method, collate_fn=collate)
    batches = list(loader)
    assert [name for batch in batches for name in batch.names] == dataset.names
    assert all((batch.images[0] == dataset[2 * i].image).all() for i, batch in enumerate(batches))


def test_broken_records_are_named_and_skipped(tmp_path):
    records = images(8, 5) | {"8-00001": b"no image", "8-00003": b"", "length": b"6"}
    dataset = LMDBImages(write(tmp_path / "x", records), 8)
    with pytest.raises(BrokenImage) as caught:
        dataset[1]
    assert str(caught.value) == f"{tmp_path / 'x'}: 8-00001: not an image in a known format"
    broken = []
    names = [name for batch in stream(dataset, 2, broken=broken) for name in batch.names]
    assert names == ["8-00000", "8-00002", "8-00004"]
    assert broken == [
        ("8-00001", "not an image in a known format"),
        ("8-00003", "the file is empty"),
        ("8-00005", "no such record"),
    ]


def test_without_a_length_the_highest_index_counts(tmp_path):
    # In the order of their text, 100000 comes before 99999.
    records = {f"8-{i:05d}": b"x" for i in (0, 99998, 99999, 100000)} | images(16, 3)
    dataset = LMDBImages(write(tmp_path / "x", records), 8)
    assert len(dataset) == 100001 and dataset.names[-1] == "8-100000" and dataset.names[7] == "8-00007"


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ({"length": b"0", **images(8, 1)}, "the key 'length' holds b'0', expected the number of images"),
        ({"length": b"many", **images(8, 1)}, "the key 'length' holds b'many'"),
        ({f"image-{i}": b"" for i in range(9)}, "no images; expected an encoded image under each key"),
        ({"length": b"3"}, "no images; expected an encoded image under each key"),
    ],
)
def test_databases_of_another_kind(tmp_path, records, message):
    path = write(tmp_path / "x", records)
    with pytest.raises(UserError, match=message) as caught:
        LMDBImages(path, 8)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("content", "message"), [(b"", "the file is empty"), (b"x" * 9000, "not an LMDB file")])
def test_files_that_are_no_database(tmp_path, content, message):
    (tmp_path / "data.mdb").write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_dataset(tmp_path, 8)
    assert os.listdir(tmp_path) == ["data.mdb"]


def test_a_truncated_database_does_not_kill_the_process(ffhq):
    size = os.path.getsize(ffhq / "data.mdb")
    os.truncate(ffhq / "data.mdb", size - 4096)
    with pytest.raises(UserError, match=rf"data.mdb: truncated, {size - 4096} bytes of {size}"):
        LMDBImages(ffhq, 8)


def test_the_package_is_not_needed(ffhq, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmdb", None)
    assert open_dataset(ffhq, 8)[2].name == "8-00002"


# -- other files ------------------------------------------------------------------------------------------------------


def hashed(count, size=40, noise=0):
    """As in LSUN's files: 40 hexadecimal digits, and WebP images, some larger than a page."""
    random = np.random.default_rng(5)
    records = {}
    for i in range(count):
        pixels = random.integers(0, 256, (size + noise * (i % 3), size, 3), dtype=np.uint8)
        buffer = BytesIO()
        Image.fromarray(pixels).save(buffer, "webp", lossless=True)
        records[random.bytes(20).hex()] = buffer.getvalue()
    return records


def test_lsun(tmp_path):
    records = hashed(300, noise=20)
    path = write(tmp_path / "bedroom_val_lmdb", records)
    dataset = open_dataset(path, 16)
    assert dataset.names == sorted(records) and dataset.stored is None
    for name in dataset.names[::37]:
        assert torch.equal(dataset[dataset.names.index(name)].image, load_image("x", 16, content=records[name]))
    assert dataset.first_size() == Image.open(BytesIO(records[dataset.names[0]])).size
    with pytest.raises(UserError, match="no images; expected"):
        open_dataset(f"lmdb:{path}:256", 16)


def test_keys_that_are_no_names(tmp_path):
    records = {key: encoded(i * 10) for i, key in enumerate(["a/b", "..", "ä", "hex-61", "plain"])}
    dataset = LMDBImages(write(tmp_path / "x", records), 8)
    assert dataset.names == ["hex-2e2e", "hex-612f62", "hex-6865782d3631", "plain", "hex-c3a4"]
    assert [round(float((dataset[i].image[0, 0, 0] + 1) * 127.5)) for i in range(5)] == [10, 0, 30, 40, 20]


@pytest.mark.parametrize("keys", [1, 70, 5000])
def test_the_reader_against_the_library(tmp_path, keys):
    """Trees of one to three levels, keys and values of many lengths, after deletions."""
    random = np.random.default_rng(keys)
    records = {}
    for i in range(keys):
        size = int(random.integers(0, 9000 if i % 50 == 0 else 90))
        records[random.bytes(int(random.integers(1, 300)))] = random.bytes(size)
    with lmdb.open(str(tmp_path / "x"), map_size=1 << 28) as env:
        with env.begin(write=True) as transaction:
            for key, value in records.items():
                transaction.put(key, value)
        with env.begin(write=True) as transaction:
            for key in [k for i, k in enumerate(records) if i % 7 == 3]:
                transaction.delete(key)
                del records[key]
        with env.begin() as transaction:
            expected = [(bytes(k), bytes(v)) for k, v in transaction.cursor()]
    found = LMDBFile(str(tmp_path / "x" / "data.mdb"))
    assert [(entry.key, found.value(entry)) for entry in found.items()] == expected
    for key in [*list(records)[:: max(1, keys // 40)], b"", b"\xff" * 300, b"nothing"]:
        assert found.get(key) == records.get(key)
        after = [k for k, _ in expected if k >= key]
        assert next((entry.key for entry in found.items(key)), None) == (after[0] if after else None)


def test_flipped_bits_in_the_headers_of_pages(tmp_path):
    """No signal, no traceback: what the library would follow out of the file is one line, or one broken image."""
    whole = write(tmp_path / "x", hashed(60, noise=40)) / "data.mdb"
    content, random = whole.read_bytes(), np.random.default_rng(1)
    good = {s.name: s.image for s in map(LMDBImages(whole, 8).__getitem__, range(60))}
    outcomes = {"refused": 0, "broken": 0, "same": 0}
    # 1, 2, 8: branches, leaves and the two heads; all others are values, and there are many more of them.
    inner = [p for p in range(len(content) // 4096) if content[p * 4096 + 10] in (1, 2, 8)]
    for i in range(300):
        page = int(random.choice(inner)) if i % 2 else int(random.integers(0, len(content) // 4096))
        at = page * 4096 + int(random.integers(0, 200))
        whole.write_bytes(content[:at] + bytes([content[at] ^ 1 << int(random.integers(8))]) + content[at + 1 :])
        broken, images = [], {}
        try:
            for batch in stream(LMDBImages(whole, 8), 16, broken=broken):
                images |= dict(zip(batch.names, batch.images, strict=True))
        except UserError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
        else:
            # The bits of an image or of a key cannot be told; no other image may change.
            wrong = [name for name, image in images.items() if name not in good or not torch.equal(image, good[name])]
            assert len(wrong) <= 1
            outcomes["broken" if broken else "same"] += 1
    assert outcomes["refused"] > 5 and outcomes["broken"] > 5, outcomes


def test_numbers_that_are_too_long(tmp_path):
    path = write(tmp_path / "x", {**images(8, 2), "length": b"9" * 5000})
    with pytest.raises(UserError, match="the key 'length' holds"):
        LMDBImages(path, 8)
    path = write(tmp_path / "y", {"8-" + "9" * 400: encoded(1), "9" * 400 + "-1": encoded(1)})
    assert len(LMDBImages(path, 8)) == 2 and LMDBImages(path, 8).stored is None
