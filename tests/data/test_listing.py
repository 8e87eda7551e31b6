"""Listing large folders: the order is the natural one, and no file is looked at."""

import builtins
import os
import random
import re

from pdae_fast.data import ImageFiles, folder


def natural(name):
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def test_the_key_orders_like_text_and_numbers_in_turn():
    generator = random.Random(0)
    names = ["".join(generator.choices("a0019.B_-é\udc80\x01", k=generator.randint(1, 7))) for _ in range(5000)]
    names += ["9" * k for k in range(1, 250, 7)] + ["0" * k for k in range(1, 250, 7)]
    assert sorted(names, key=folder._natural) == sorted(names, key=natural)


def test_no_file_is_opened_or_looked_at(tmp_path, monkeypatch):
    for sub in ("", "sub"):
        (tmp_path / sub).mkdir(exist_ok=True)
        for i in range(300):
            (tmp_path / sub / f"{i}.jpg").touch()
    touched = []

    def watch(module, name):
        original = getattr(module, name)

        def watched(*args, **kwargs):
            touched.append(args[0])
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, watched)

    for module, name in ((os, "stat"), (os, "lstat"), (os, "open"), (builtins, "open")):
        watch(module, name)
    dataset = ImageFiles(tmp_path, 8)
    looked_at = {os.fspath(path) for path in touched if isinstance(path, (str, os.PathLike))}
    monkeypatch.undo()
    assert dataset.names[:3] == ["0", "1", "2"] and len(dataset) == 600 and dataset.names[-1] == "sub/299"
    assert looked_at <= {str(tmp_path), str(tmp_path / "sub")}
