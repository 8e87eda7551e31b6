"""Small IDX files in the layout of MNIST and Fashion-MNIST."""

import gzip
import struct

import numpy as np

CODES = {"uint8": 0x08, "int8": 0x09, "int16": 0x0B, "int32": 0x0C, "float32": 0x0D, "float64": 0x0E}


def idx_bytes(array):
    array = np.asarray(array)
    header = bytes([0, 0, CODES[array.dtype.name], array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


def write_set(folder, count=3, shape=(28, 28), packed=True, prefixes=("train", "t10k"), labels=True):
    folder.mkdir(exist_ok=True)
    for seed, prefix in enumerate(prefixes):
        images = np.random.default_rng(seed).integers(0, 256, (count, *shape)).astype(np.uint8)
        files = {"images-idx3": images}
        if labels:
            files["labels-idx1"] = (np.arange(count) + seed).astype(np.uint8)
        for kind, array in files.items():
            content = idx_bytes(array)
            name = f"{prefix}-{kind}-ubyte"
            (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)
    return folder
