"""Readers that yield images in [-1, 1], with labels where they are known, and writers for results."""

from pdae_fast.data.folder import ImageFiles
from pdae_fast.data.idx import FASHION_CLASSES, FashionMNIST, read_idx
from pdae_fast.data.images import save_grid, save_images
from pdae_fast.data.preprocess import load_image
from pdae_fast.data.sample import Batch, BrokenImage, Sample, collate
from pdae_fast.data.spec import open_dataset
from pdae_fast.data.stream import stream

__all__ = [
    "FASHION_CLASSES",
    "Batch",
    "BrokenImage",
    "FashionMNIST",
    "ImageFiles",
    "Sample",
    "collate",
    "load_image",
    "open_dataset",
    "read_idx",
    "save_grid",
    "save_images",
    "stream",
]
