"""Latents of a data set: what they are, and that a cache is reused exactly when it is right."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import idx_files
from helpers import TINY, image_folder, tiny_pdae, tiny_prior
from pdae_fast import Pipeline, UserError
from pdae_fast.data import BrokenImage, open_dataset
from pdae_fast.data import latents as module
from pdae_fast.data.latents import LatentSet, cache_path, encode_dataset, split, statistics


@pytest.fixture
def folder(tmp_path):
    return image_folder(tmp_path / "images", 7)


def pipeline(model=None):
    return Pipeline(model or tiny_pdae(), device="cpu", dtype="float32", plan="eager", batch_size=3)


def encoded(pipe, folder, cache, **options):
    """The latents, and how many images went through the encoder for them."""
    before = pipe.evaluations.get("encoder", 0)
    found = encode_dataset(pipe, open_dataset(folder, 32, 1), cache, quiet=True, **options)
    return found, pipe.evaluations.get("encoder", 0) - before


def test_they_are_the_codes_of_all_images_in_order(tmp_path, folder):
    model, dataset = tiny_pdae(), open_dataset(folder, 32, 1)
    found = encode_dataset(model, dataset, device="cpu", batch_size=3, quiet=True)
    x0 = torch.stack([dataset[i].image for i in range(7)])
    with torch.no_grad():
        exact = model.double().encode(x0.double()).float()  # of two float32 ones the roundings would add up
    torch.testing.assert_close(found.z, exact, rtol=1e-5, atol=1e-6)
    assert found.names == dataset.names and found.labels == [None] * 7 and found.broken == []
    other, _ = encoded(pipeline(), folder, None)
    torch.testing.assert_close(other.z, found.z, rtol=1e-5, atol=1e-6)
    assert (other.encoder, other.images) == (found.encoder, found.images)


def test_statistics_are_numpys(monkeypatch):
    z = torch.randn(1000, 5, generator=torch.Generator().manual_seed(0)) * 1e-3 + 50
    for rows in (1000, 64):  # in one piece, and in pieces that do not divide it
        monkeypatch.setattr(module, "ROWS", rows)
        mean, std = statistics(z)
        exact = z.double().numpy()
        np.testing.assert_allclose(mean, exact.mean(0), rtol=1e-7)
        np.testing.assert_allclose(std, exact.std(0, ddof=1), rtol=1e-6)
    # The unbiased one, which a thousand rows would not tell from the other.
    np.testing.assert_allclose(statistics(torch.tensor([[0.0], [2.0]]))[1], [2**0.5], rtol=1e-6)


def test_what_cannot_be_normalised():
    with pytest.raises(UserError, match="at least 2 images, not 1"):
        statistics(torch.randn(1, 4))
    z = torch.randn(5, 4)
    z[:, 2] = 0.25
    with pytest.raises(UserError, match="1 of 4 dimensions of z are the same for all 5"):
        statistics(z)


def test_a_second_call_encodes_nothing(tmp_path, folder):
    first, passed = encoded(pipeline(), folder, tmp_path / "cache")
    assert passed == 7
    second, passed = encoded(pipeline(), folder, tmp_path / "cache", require=True)
    assert passed == 0
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    # What is added on top of z does not change z: the classifier's trainer reuses what the latent DPM's made.
    full = tiny_pdae(dataclasses.replace(TINY, attributes=("a",), latent_statistics=True))
    full.encoder.load_state_dict(tiny_pdae().encoder.state_dict())
    assert encoded(pipeline(full), folder, tmp_path / "cache")[1] == 0
    assert len(list((tmp_path / "cache").iterdir())) == 1


def changed_weight(folder, model):
    model.encoder.encoder[0].weight.data[0, 0, 0, 0] += 1e-6


def changed_size(folder, model):
    Image.new("L", (33, 32), 7).save(folder / "03.png")


def changed_pixels_of_one_size(folder, model):
    # BMP: other pixels, the same number of bytes.
    for number, level in (("a", 1), ("b", 2)):
        Image.new("L", (32, 32), level).save(folder.parent / f"{number}.bmp")
    shutil.copy(folder.parent / ("b.bmp" if (folder / "07.bmp").exists() else "a.bmp"), folder / "07.bmp")


def one_more(folder, model):
    shutil.copy(folder / "03.png", folder / "99.png")


def another_name(folder, model):
    os.rename(folder / "03.png", folder / "03b.png")


@pytest.mark.parametrize(
    "change",
    [changed_weight, changed_size, changed_pixels_of_one_size, one_more, another_name],
    ids=lambda f: f.__name__,
)
def test_a_changed_model_or_data_set_is_encoded_anew_or_refused(tmp_path, folder, change):
    model = tiny_pdae()
    if change is changed_pixels_of_one_size:
        change(folder, model)
    encoded(pipeline(model), folder, tmp_path / "cache")
    change(folder, model)
    with pytest.raises(UserError, match="no latents of these . images by this encoder"):
        encoded(pipeline(model), folder, tmp_path / "cache", require=True)
    found, passed = encoded(pipeline(model), folder, tmp_path / "cache")
    fresh, _ = encoded(pipeline(model), folder, None)
    assert passed == len(found.z) and torch.equal(found.z, fresh.z)


def test_a_changed_class_or_image_of_arrays_is_noticed(tmp_path):
    root = idx_files.write_set(tmp_path / "idx", count=200)
    one = module.data_fingerprint(open_dataset(str(root), 32, 1))
    assert one == module.data_fingerprint(open_dataset(str(root), 32, 1))
    for name in ("labels", "images"):
        dataset = open_dataset(str(root), 32, 1)
        array = getattr(dataset, name).copy()
        array.flat[len(array.flat) // 200 + 1] ^= 1  # none of the images that are looked at one by one
        setattr(dataset, name, array)
        assert module.data_fingerprint(dataset) != one
    assert module.data_fingerprint(open_dataset(str(root), 28, 1)) != one
    assert encode_dataset(tiny_pdae(), open_dataset(str(root), 32, 1), device="cpu", quiet=True).labels[:3] == [0, 1, 2]


@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign", "mixed up"])
def test_a_damaged_cache_is_made_again(tmp_path, folder, damage):
    first, _ = encoded(pipeline(), folder, tmp_path / "cache")
    (path,) = (tmp_path / "cache").iterdir()
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "foreign":
        torch.save({"weight": torch.ones(3)}, path)
    else:  # the file of another data set under this name
        other = image_folder(tmp_path / "other", 3)
        encoded(pipeline(), other, tmp_path / "elsewhere")
        shutil.copy(next((tmp_path / "elsewhere").iterdir()), path)
    again, passed = encoded(pipeline(), folder, tmp_path / "cache")
    assert passed == 7 and torch.equal(again.z, first.z)
    assert encoded(pipeline(), folder, tmp_path / "cache")[1] == 0


def nan(found):
    found["z"][2, 3] = float("nan")


def fewer_dimensions(found):
    for name in ("z", "mean", "std"):
        found[name] = found[name][..., :-1].clone()


def no_statistics(found):
    del found["std"]


def zero_statistics(found):
    found["std"].zero_()


def reversed_names(found):
    found["names"].reverse()


def words_for_labels(found):
    found["labels"][0] = "many"


def one_value(found):
    found["z"][0, 0] += 1


def a_number_for_z(found):
    found["z"] = 3


@pytest.mark.parametrize(
    "change",
    [
        nan,
        fewer_dimensions,
        no_statistics,
        zero_statistics,
        reversed_names,
        words_for_labels,
        one_value,
        a_number_for_z,
    ],
    ids=lambda f: f.__name__,
)
def test_a_cache_that_holds_something_else_is_made_again_and_said(tmp_path, folder, capsys, change):
    first, _ = encoded(pipeline(), folder, tmp_path / "cache")
    (path,) = (tmp_path / "cache").iterdir()
    found = torch.load(path, weights_only=True)
    change(found)
    torch.save(found, path)
    with pytest.raises(UserError, match="damaged, so that there are no latents of these 7 images"):
        encoded(pipeline(), folder, tmp_path / "cache", require=True)
    capsys.readouterr()
    again, passed = encoded(pipeline(), folder, tmp_path / "cache")
    assert passed == 7 and torch.equal(again.z, first.z) and again.names == first.names
    assert capsys.readouterr().err == f"note: {path}: damaged or of an earlier version; made again\n"


def test_broken_images_are_left_out_and_named_or_fatal(tmp_path, folder):
    (folder / "03.png").write_bytes(b"nothing")
    with pytest.raises(BrokenImage, match="03.png"):
        encoded(pipeline(), folder, tmp_path / "cache", on_error="fail")
    assert not list((tmp_path / "cache").glob("*"))
    found, _ = encoded(pipeline(), folder, tmp_path / "cache")
    assert len(found.z) == 6 and "03" not in found.names and [name for name, _ in found.broken] == ["03"]
    with pytest.raises(BrokenImage, match="03"):  # also when they come from the cache
        encoded(pipeline(), folder, tmp_path / "cache", on_error="fail")
    for path in folder.iterdir():
        path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="none of the 7 images could be read"):
        encoded(pipeline(), folder, tmp_path / "cache")


def test_other_mistakes(tmp_path, folder):
    dataset = open_dataset(folder, 32, 1)
    with pytest.raises(UserError, match="needs an autoencoder"):
        encode_dataset(tiny_prior(), dataset, quiet=True)
    with pytest.raises(UserError, match="on_error"):
        encode_dataset(tiny_pdae(), dataset, on_error="ignore", quiet=True)
    with pytest.raises(UserError, match="the data set is empty"):
        encode_dataset(tiny_pdae(), [], quiet=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="a file has this name"):
        encode_dataset(tiny_pdae(), dataset, tmp_path / "file", device="cpu", quiet=True)
    model = tiny_pdae()
    model.encoder.encoder[0].weight.data.fill_(float("inf"))
    with pytest.raises(UserError, match="00: its latent holds NaN"):
        encode_dataset(model, dataset, tmp_path / "cache", device="cpu", quiet=True)
    assert not list((tmp_path / "cache").glob("*"))


def test_a_full_disk_leaves_no_cache(tmp_path, folder):
    resource = pytest.importorskip("resource")
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))  # the system refuses in the middle of the file
    try:
        with pytest.raises(UserError, match="cannot write .*cache"):
            encoded(pipeline(), folder, tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert not list((tmp_path / "cache").iterdir())
    assert encoded(pipeline(), folder, tmp_path / "cache")[1] == 7


KILLED = """
import io, os, signal, sys, torch
sys.path[:0] = {path!r}
from helpers import tiny_pdae
from pdae_fast.data import open_dataset
from pdae_fast.data.latents import encode_dataset
real = torch.save
def save(contents, file):
    buffer = io.BytesIO()
    real(contents, buffer)
    file.write(buffer.getvalue()[: buffer.tell() // 2])
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
torch.save = save
encode_dataset(tiny_pdae(), open_dataset({folder!r}, 32, 1), {cache!r}, device="cpu", quiet=True)
"""


@pytest.mark.slow
def test_killed_while_writing_the_cache(tmp_path, folder):
    code = KILLED.format(path=sys.path, folder=str(folder), cache=str(tmp_path / "cache"))
    process = subprocess.run([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.returncode == -signal.SIGKILL
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".tmp"]
    found, passed = encoded(pipeline(), folder, tmp_path / "cache")
    assert passed == 7 and cache_path(tmp_path / "cache", found.encoder, found.images).is_file()


def test_normalised_batches(tmp_path):
    z = torch.randn(10, 4, generator=torch.Generator().manual_seed(1)) * 3 + 2
    mean, std = statistics(z)
    whole = LatentSet(z, mean, std)
    torch.testing.assert_close(whole.__getitems__([3, 0]), ((z - mean) / std)[[3, 0]])
    part = LatentSet(z, mean, std, [9, 4, 2], torch.tensor([[1], [0], [1]]))
    codes, labels = part.__getitems__([2, 0])
    torch.testing.assert_close(codes, ((z - mean) / std)[[2, 9]])
    assert labels.tolist() == [[1], [1]] and len(part) == 3
    with pytest.raises(ValueError, match="2 rows of labels for 3"):
        LatentSet(z, mean, std, [1, 2, 3], torch.zeros(2, 1))


def test_the_split():
    for count, holdout, held in ((100, 0.1, 10), (3, 0.01, 1), (3, 0.99, 2), (5, 0.0, 0)):
        train, test = split(count, holdout, seed=1)
        assert len(test) == held and sorted([*train, *test]) == list(range(count))
    assert split(100, 0.1, 1)[1].tolist() == split(100, 0.1, 1)[1].tolist() != split(100, 0.1, 2)[1].tolist()
    for wrong in (-0.1, 1.0, float("nan")):
        with pytest.raises(UserError, match="holdout must be a fraction"):
            split(10, wrong, 0)
