"""The comparison with what there was before: `pytest bench/ --benchmark-only`, `bench.report`, `bench.gpu`.

setup.py installs the top folders `kernels/` and `export/` inside `pdae_fast`. In a checkout that is not installed (a
GPU machine without a network) they are found here instead, so that `python -m bench.gpu` needs nothing but PyTorch.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
MAPPED = {f"pdae_fast.{folder}": ROOT / folder for folder in ("kernels", "export")}


class CheckoutFinder(importlib.abc.MetaPathFinder):
    """Finds `pdae_fast.kernels` and `pdae_fast.export` in the checkout; their modules follow by the usual way."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        folder = MAPPED.get(name)
        if folder is None or not (folder / "__init__.py").is_file():
            return None
        return importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


# Last, so that an installed package comes first.
if not any(type(finder).__name__ == CheckoutFinder.__name__ for finder in sys.meta_path):
    sys.meta_path.append(CheckoutFinder())
