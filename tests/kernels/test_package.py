"""What importing the package does, what it does without Triton, and that the kernel tests really ran
kernels."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pdae_fast.kernels import triton_status

WITHOUT_TRITON = """
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
sys.meta_path.insert(0, Absent())

import torch
from pdae_fast.kernels import group_norm, triton_status
arguments = (torch.zeros(1, 4, 2, 2), torch.ones(4), torch.ones(4), 2)
group_norm(*arguments)
torch.compile(group_norm, fullgraph=True, backend="aot_eager")(*arguments)

torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda *_: (9, 0)
print(triton_status())
"""


def python(code, folder):
    # In an empty folder: in the repository's, its pdae_fast/ would come before the installed package.
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_light(tmp_path):
    """No Triton (a third of a second) and no CUDA context."""
    code = "import pdae_fast.kernels, sys, torch; print('triton' in sys.modules, torch.cuda.is_initialized())"
    assert python(code, tmp_path) == "False False"


def test_without_triton(tmp_path):
    """Ops work, eager and compiled, and the status says what is missing."""
    answer = python(WITHOUT_TRITON, tmp_path)
    assert answer.startswith("(False, ") and "triton cannot be imported" in answer


def test_status():
    usable, reason = triton_status()
    assert isinstance(usable, bool) and reason and "\n" not in reason
    if not torch.cuda.is_available():
        assert (usable, reason) == (False, "no CUDA device")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_can_run_here(obstacle):
    """With Triton installed the kernel tests must not skip in silence."""
    assert obstacle is None


def test_every_native_source_is_installed():
    """Headers too: what is compiled on the user's machine needs them."""
    root = Path(__file__).parents[2]
    patterns = re.search(r'"pdae_fast\.kernels": (\[.*\]),\n', (root / "setup.py").read_text()).group(1)
    installed = {file for pattern in ast.literal_eval(patterns) for file in (root / "kernels").glob(pattern)}
    assert installed == {file for file in (root / "kernels" / "native").iterdir() if file.is_file()} != set()
