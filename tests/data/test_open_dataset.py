import pytest
from PIL import Image

from idx_files import write_set
from pdae_fast.data import FashionMNIST, ImageFiles, open_dataset
from pdae_fast.data import idx as idx_module
from pdae_fast.errors import UserError


@pytest.fixture
def fashion(tmp_path):
    return write_set(tmp_path / "idx")


def test_fashion_by_folder(fashion):
    for spec in (f"fashion-mnist:{fashion}", str(fashion), fashion, [str(fashion)]):
        dataset = open_dataset(spec, 32, 1)
        assert isinstance(dataset, FashionMNIST) and dataset.names[0] == "train-00000"
    assert open_dataset(str(fashion), 32, 1, split="test").names[0] == "test-00000"
    assert open_dataset(str(fashion), 40, 3)[0].image.shape == (3, 40, 40)


def test_fashion_by_name(fashion, monkeypatch, tmp_path):
    monkeypatch.setattr(idx_module, "FASHION_ROOT", str(fashion))
    assert open_dataset("fashion-mnist", 32, 1)[0].label == 0
    monkeypatch.setattr(idx_module, "FASHION_ROOT", str(tmp_path))
    with pytest.raises(UserError, match="dataset-fashion-mnist"):
        open_dataset("fashion-mnist", 32, 1)


def test_images(tmp_path):
    Image.new("RGBA", (6, 6), (0, 0, 0, 0)).save(tmp_path / "a.png")
    (tmp_path / "sub").mkdir()
    Image.new("L", (6, 6)).save(tmp_path / "sub/b.png")
    for spec in (tmp_path, str(tmp_path), [tmp_path / "a.png", tmp_path / "sub"]):
        dataset = open_dataset(spec, 8, split="test")
        assert isinstance(dataset, ImageFiles) and len(dataset) == 2 and dataset[0].image.shape == (3, 8, 8)
    dataset = open_dataset(tmp_path, 4, 1, background=(0, 0, 0), recursive=False)
    assert len(dataset) == 1 and (dataset[0].image == -1).all() and dataset[0].image.shape == (1, 4, 4)


def test_not_understood(tmp_path, fashion):
    for spec in ("fashion-mist", str(tmp_path / "gone"), "", []):
        with pytest.raises(UserError) as caught:
            open_dataset(spec, 32)
        text = str(caught.value)
        assert "fashion-mnist:DIR" in text and ".png" in text and "\n" not in text
    with pytest.raises(UserError, match="'train' or 'test'"):
        open_dataset(str(fashion), 32, split="validation")
    with pytest.raises(UserError, match="cannot be combined"):
        open_dataset([str(fashion), str(tmp_path)], 32)
