"""Every kernel through Triton's true launch path (binding, specialisation, compilation), without a GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_every_kernel_is_launched_on_every_architecture(tmp_path):
    from pdae_fast.kernels.aot import ARCHITECTURES, BUDGETS

    order = [90, *(arch for arch in ARCHITECTURES if arch != 90)]
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment = {**inherited, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "fake_triton_driver.py"), *map(str, order)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])["found"]
    assert set(found) == set(map(str, order))
    for name, arch in found.items():
        expected = set(BUDGETS) - ({"conv_float8_kernel"} if name == "80" else set())  # which has no fp8
        assert set(arch["launches"]) == expected and sum(arch["launches"].values()) == 2 * arch["kernels"]
        assert arch["again"] < arch["seconds"] / 10  # nothing is compiled twice
