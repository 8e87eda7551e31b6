"""Every kernel compiles for every supported GPU, within its budget of registers, spills and shared memory."""

import importlib.util
import os
import subprocess
import sys

import pytest

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture
def python(tmp_path):
    """Run Python in a process that does not interpret kernels unless told to, and in an empty folder: in the
    repository's, its pdae_fast/ would come before the installed package."""

    def run(*arguments, **environment):
        inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        command = [sys.executable, *arguments]
        return subprocess.run(command, env={**inherited, **environment}, cwd=tmp_path, capture_output=True, text=True)

    return run


@needs_triton
@pytest.mark.slow
def test_budgets(python):
    """bfloat16 on all four, of which the first has no fp8; the command itself, without arguments, also does float16 and
    float32."""
    done = python("-m", "pdae_fast.kernels.aot", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    for architecture in ("sm_80", "sm_89", "sm_90", "sm_100"):
        assert done.stdout.count(architecture) == 54 + 6 + (0 if architecture == "sm_80" else 6)


@needs_triton
def test_over_budget_fails(python):
    """One register too few must be an exit status of 1 and one line that names the kernel."""
    code = (
        "import sys; from pdae_fast.kernels import aot; aot.BUDGETS['ddim_kernel'] = aot.Budget(16, 0); "
        "sys.exit(aot.main(['--kernel', 'ddim_kernel', '--arch', '90', '--dtype', 'float32']))"
    )
    done = python("-c", code)
    assert done.returncode == 1
    assert "ddim_kernel" in done.stderr and "registers > 16" in done.stderr


@needs_triton
def test_interpreter_is_refused(python):
    done = python("-m", "pdae_fast.kernels.aot", TRITON_INTERPRET="1")
    assert done.returncode == 2 and "TRITON_INTERPRET" in done.stderr


def test_usage():
    from pdae_fast.kernels.aot import Budget, Usage

    assert Usage(32, 0, 0, 64).excess(Budget(32, 64)) == []
    assert Usage(33, 8, 16, 65).excess(Budget(32, 64)) == [
        "33 registers > 32", "8 spilled bytes > 0", "16 stack bytes > 0", "65 shared bytes > 64",
    ]  # fmt: skip
