"""Readers that yield images in [-1, 1], with labels where they are known, and writers for results."""

from pdae_fast.data.attributes import Attributes, Labels, labels_for, read_attributes
from pdae_fast.data.avatars import make_avatars
from pdae_fast.data.folder import ImageFiles
from pdae_fast.data.idx import FASHION_CLASSES, FashionMNIST, read_idx
from pdae_fast.data.images import save_grid, save_images, to_png
from pdae_fast.data.lmdb_images import LMDBImages
from pdae_fast.data.preprocess import load_image
from pdae_fast.data.sample import Batch, BrokenImage, Sample, Subset, collate
from pdae_fast.data.spec import open_dataset
from pdae_fast.data.stream import none_read, readable, stream

__all__ = [
    "FASHION_CLASSES",
    "Attributes",
    "Batch",
    "BrokenImage",
    "FashionMNIST",
    "ImageFiles",
    "LMDBImages",
    "Labels",
    "Sample",
    "Subset",
    "collate",
    "labels_for",
    "load_image",
    "make_avatars",
    "none_read",
    "open_dataset",
    "read_attributes",
    "read_idx",
    "readable",
    "save_grid",
    "save_images",
    "stream",
    "to_png",
]
