"""The CPU's compiled group norm: against float64, on any number of threads, and wherever it cannot be had."""

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from pdae_fast.kernels import _native, group_norm, group_norm_native, group_norm_reference, native_fits, native_status
from pdae_fast.kernels.group_norm_native import _function

COMPILER = next((found for found in map(shutil.which, _native.COMPILERS) if found), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler")
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# (batch, C1, C2, H, W, groups)
SHAPES = {
    "one-channel-groups": (1, 8, 0, 6, 6, 8),
    "one-pixel": (2, 12, 0, 1, 1, 4),
    "one-group": (2, 20, 0, 3, 5, 1),
    "straddling-groups": (2, 10, 14, 4, 5, 4),
    "uneven-inputs": (3, 3, 13, 7, 3, 2),
    "one-channel-skip": (1, 15, 1, 9, 8, 4),
    "several-chunks": (1, 40, 0, 13, 11, 8),
    "one-pixel-chunk": (1, 33, 0, 13, 5, 3),
    "straddling-vectors": (3, 50, 46, 16, 9, 32),
    "model": (1, 64, 32, 32, 32, 32),
}
by_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
# Relative RMS error of rounding a result once, with a margin.
ROUNDING = {torch.float32: 3e-7, torch.bfloat16: 2e-3}


@pytest.fixture
def native():
    if COMPILER is None:
        pytest.skip("no C compiler")
    usable, reason = native_status()
    assert usable, reason  # where there is a compiler, nothing may be skipped in silence


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing compiled or loaded yet, and an empty cache folder, which is returned; afterwards all is as before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("PDAE_FAST_NATIVE", raising=False)
    monkeypatch.delenv("CC", raising=False)
    _function.cache_clear()
    yield tmp_path / "pdae_fast" / "native"
    _function.cache_clear()


def case(shape, dtype=torch.float32, own=True, biased=True, silu=True, mean=-2.3, std=0.5, seed=0):
    batch, c1, c2, height, width, groups = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    def image(channels, mean, std):
        values = (draw(batch, channels, height, width) * std + mean).to(dtype)
        return values.contiguous(memory_format=torch.channels_last)

    rows = batch if own else 1
    # Halves of one projection, so rows are strided, as in the plan.
    a, b = draw(rows, 2 * (c1 + c2)).float().chunk(2, 1)
    return SimpleNamespace(
        x=image(c1, mean, std), x2=image(c2, 0.7, 1.5) if c2 else None, a=a, b=b, groups=groups, silu=silu,
        x_bias=3 * draw(c1).float() if biased else None,
    )  # fmt: skip


def run(c, **keywords):
    return group_norm_native(c.x, c.a, c.b, c.groups, 1e-5, c.silu, c.x2, c.x_bias, **keywords)


def affine(c, dtype):
    """Arguments of the definition, weight and bias being neutral."""
    batch, channels = len(c.x), c.a.shape[1]
    x2, x_bias = (None if t is None else t.to(dtype) for t in (c.x2, c.x_bias))
    ones, zeros = torch.ones(channels, dtype=dtype), torch.zeros(channels, dtype=dtype)
    a, b = (t.to(dtype).expand(batch, -1) for t in (c.a, c.b))
    return c.x.to(dtype), ones, zeros, c.groups, 1e-5, a, b, c.silu, x2, x_bias


def exact(c):
    return group_norm_reference(*affine(c, torch.float64))


def framework(c):
    """What the modules do, every step in the dtype of x."""
    x = c.x if c.x_bias is None else c.x + c.x_bias.to(c.x.dtype)[:, None, None]
    x = x if c.x2 is None else torch.cat([x, c.x2], 1)
    y = F.group_norm(x, c.groups)
    y = y * c.a.to(x.dtype)[:, :, None, None] + c.b.to(x.dtype)[:, :, None, None]
    return F.silu(y) if c.silu else y


@by_shape
@by_dtype
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
def test_native(native, poisoned_memory, error, shape, dtype, biased):
    for own, silu in ((False, True), (True, True), (True, False)):
        c = case(shape, dtype, own, biased, silu)
        y = run(c)
        assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
        truth = exact(c)
        assert error(y, truth) <= max(ROUNDING[dtype], error(framework(c), truth))


@by_shape
@by_dtype
def test_statistics(native, error, shape, dtype):
    c = case(shape, dtype)
    mean, rstd = (torch.full((len(c.x), c.groups), float("nan")) for _ in range(2))
    run(c, statistics=(mean, rstd))
    x = c.x.double() + c.x_bias.double()[:, None, None]
    grouped = (x if c.x2 is None else torch.cat([x, c.x2.double()], 1)).reshape(len(x), c.groups, -1)
    assert error(mean, grouped.mean(2)) < 1e-7
    assert error(rstd, (grouped.var(2, correction=0) + 1e-5).rsqrt()) < 1e-6


@by_dtype
@pytest.mark.parametrize("size", [(8, 8), (97, 53)], ids=["small", "large"])
def test_large_mean(native, error, size, dtype):
    """2000 deviations from zero, where E[x^2] - E[x]^2 has nothing left; and a bias that takes that mean away again."""
    c = case((2, 24, 0, *size, 4), dtype, mean=1000.0, std=0.5 if dtype == torch.float32 else 50, biased=False)
    assert error(run(c), exact(c)) < max(1e-6, ROUNDING[dtype])
    c.x_bias = torch.full((24,), -1000.0)
    assert error(run(c), exact(c)) < max(1e-6, ROUNDING[dtype])


def test_outliers(native, error):
    """Among the pixels that the first chunk's deviations are taken from, one is far from all others."""
    c = case((1, 16, 0, 24, 24, 16), biased=False)
    c.x[:, :, 0, 8] = c.x[:, :, 1, 8] = 1e4
    assert error(run(c), exact(c)) < 2e-6


def test_a_constant_map(native):
    """Variance zero: what remains is the addend, exactly."""
    c = case((1, 16, 0, 9, 9, 4), biased=False, silu=False)
    c.x.fill_(-3.7)
    assert torch.equal(run(c), c.b[:, :, None, None].expand_as(c.x))


def test_silu_of_anything(native):
    """From where the exponential overflows to where it vanishes, and NaN."""
    values = torch.cat([torch.linspace(-120, 120, 4001), torch.tensor([-1e30, 1e30, 0.0, -0.0, 1e-30])])
    values = values[: len(values) // 2 * 2]
    for dtype, bound in ((torch.float32, 4e-7), (torch.bfloat16, 4e-3)):
        # A map of +1 and -1 is its own norm but for eps; the affine makes of it what is wanted.
        x = torch.tensor([1.0, -1.0]).to(dtype).view(1, 1, 2, 1).expand(1, len(values), 2, 1)
        x = x.contiguous(memory_format=torch.channels_last)
        zeros = torch.zeros(1, len(values))
        y = group_norm_native(x, zeros, values[None], 1, 1e-5, True)[0, :, 0, 0]
        expected = F.silu(values.double())
        assert ((y - expected).abs() <= bound * expected.abs() + 2e-35 * values.double().abs()).all()
    zeros[0, 5] = float("nan")
    y = group_norm_native(x.float(), zeros, values[None], 1, 1e-5, True)
    assert y[0, 5].isnan().all() and not y[0, :5].isnan().any() and not y[0, 6:].isnan().any()


@by_dtype
def test_overwrite(native, dtype):
    c = case((2, 40, 0, 9, 9, 8), dtype)
    expected, x = run(c), c.x
    assert run(c, overwrite=True).data_ptr() == x.data_ptr() and torch.equal(x, expected)


@by_dtype
@pytest.mark.parametrize("shape", [(1, 64, 32, 32, 32, 32), (3, 96, 0, 20, 21, 32), (4, 64, 0, 16, 16, 32)], ids=str)
def test_any_number_of_threads(native, poisoned_memory, shape, dtype):
    """Rows of one image, images that do not divide evenly, and whole images: the same to the bit."""
    c, before = case(shape, dtype), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            found.append(run(c))
    finally:
        torch.set_num_threads(before)
    assert not found[0].isnan().any() and all(torch.equal(y, found[0]) for y in found)


ONE_RUNTIME = r"""
import re, torch
torch.set_num_threads(2)
def runtimes():
    with open("/proc/self/maps") as maps:
        return sorted({line.split()[-1] for line in maps if re.search(r"/lib(gomp|iomp5|omp)\b", line)})
def threads():
    with open("/proc/self/status") as status:
        return int(re.search(r"Threads:\s*(\d+)", status.read())[1])
x = torch.randn(1, 64, 64, 64).contiguous(memory_format=torch.channels_last)
torch.nn.functional.silu(x)
before = runtimes(), threads()
from pdae_fast.kernels import group_norm_native, native_status
assert native_status()[0], native_status()
a = torch.ones(1, 64)
group_norm_native(x, a, a, 32, 1e-5, True)
assert (runtimes(), threads()) == before, (runtimes(), threads(), before)
print(len(before[0]), before[1], native_status()[1])
"""


@linux_only
def test_threads_are_those_of_torch(native, tmp_path):
    """No second OpenMP runtime is loaded, and no thread started: the pool that torch's SiLU ran on runs this too."""
    done = subprocess.run([sys.executable, "-c", ONE_RUNTIME], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("on torch's threads") or _native.openmp("GOMP_parallel") is None


def test_what_fits(native):
    x = torch.zeros(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    assert native_fits(x) and native_fits(x, x) and native_fits(x.bfloat16(), x.bfloat16())
    for other in (x.half(), x.double(), x.contiguous(), x[:, :4], x[:0]):
        assert not native_fits(other)
    assert not native_fits(x, x.bfloat16())


def test_the_op_runs_it(native):
    """On channels-last maps the op answers by it, bit for bit; what it leaves to torch is computed as well."""
    c = case((2, 24, 8, 5, 7, 4))
    weight, bias = torch.randn(2, 32, generator=torch.Generator().manual_seed(3))
    arguments = (weight, bias, c.groups, 1e-5, c.a, c.b, True)
    found = group_norm(c.x, *arguments, c.x2, x_bias=c.x_bias)
    c.a, c.b = weight * c.a, bias * c.a + c.b
    assert torch.equal(found, run(c))
    nchw = group_norm(c.x.contiguous(), *arguments, c.x2.contiguous(), x_bias=c.x_bias)
    torch.testing.assert_close(nchw, found.contiguous(), atol=2e-5, rtol=1e-5)


# -- building ---------------------------------------------------------------------------------------------------------


def check_numbers(error):
    """The op is right, whatever it ran on."""
    c = case((2, 24, 8, 5, 7, 4))
    assert error(group_norm(*affine(c, torch.float32)), exact(c)) < 2e-6


def unavailable(error):
    """Why there is no native code, checked to be one line, and nothing to be wrong for it."""
    usable, reason = native_status()
    assert not usable and reason and "\n" not in reason
    check_numbers(error)
    return reason


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("CC", "/nonexistent/cc -O2", "no C compiler: /nonexistent/cc ($CC) not found"),
        ("CC", "'", "cannot be built or loaded: No closing quotation"),
        ("PATH", "", "no C compiler: cc, gcc, clang not found"),
        ("PDAE_FAST_NATIVE", "0", "switched off by PDAE_FAST_NATIVE"),
    ],
)
def test_without_a_compiler(fresh, monkeypatch, error, name, value, reason):
    monkeypatch.setenv(name, value)
    assert reason in unavailable(error)


def test_another_kind_of_system(fresh, monkeypatch, error):
    monkeypatch.setattr(_native.os, "name", "nt")
    usable, reason = native_status()
    monkeypatch.undo()
    assert not usable and reason.startswith("native code is for POSIX systems")


@pytest.mark.skipif(os.name != "posix", reason="needs a shell script for a compiler")
def test_a_compiler_that_fails(fresh, monkeypatch, error, tmp_path):
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho warning: old >&2\necho 'fatal error: no space left' >&2\nexit 4\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    assert unavailable(error) == f"{compiler} failed with status 4: fatal error: no space left"
    assert not list(fresh.iterdir())


@needs_compiler
def test_a_build_is_kept(fresh, monkeypatch, error):
    assert native_status()[0]
    (file,) = fresh.iterdir()
    assert file.suffix == ".so" and fresh.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(_native, "_build", lambda *_: pytest.fail("built again"))
    _function.cache_clear()
    assert native_status()[0]
    check_numbers(error)


@needs_compiler
def test_a_damaged_build_is_replaced(fresh, error):
    assert native_status()[0]
    (file,) = fresh.iterdir()
    file.unlink()  # this process has it mapped
    file.write_bytes(b"\x7fELF, but not for long")
    _function.cache_clear()
    assert native_status()[0]
    (file,) = fresh.iterdir()
    assert file.stat().st_size > 1000
    check_numbers(error)


@needs_compiler
def test_a_file_that_is_no_library(fresh, monkeypatch, error):
    """A compiler whose output cannot be loaded."""
    compiler = fresh.parent.parent / "cc"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho nothing > "$2"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    assert "cannot be built or loaded" in unavailable(error)


@needs_compiler
@pytest.mark.parametrize("obstacle", ["a file", "open to all"])
def test_without_a_cache_folder(fresh, monkeypatch, error, tmp_path, obstacle):
    """Built in a temporary folder, of which nothing is left."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    if obstacle == "a file":
        (tmp_path / "pdae_fast").touch()
    else:
        fresh.mkdir(parents=True)
        fresh.chmod(0o777)
    assert native_status()[0]
    assert not list(temporary.iterdir()) and not (fresh.is_dir() and list(fresh.iterdir()))
    check_numbers(error)


@needs_compiler
def test_wrong_code_is_noticed(fresh, monkeypatch, error, tmp_path):
    source = (_native.SOURCES / "group_norm.c").read_text()
    wrong = source.replace("p = p * r + 0.5f;", "p = p * r + 0.52f;")
    assert wrong != source
    (tmp_path / "group_norm.c").write_text(wrong)
    monkeypatch.setattr(_native, "SOURCES", tmp_path)
    assert re.fullmatch(r"the compiled group norm is off by .* in torch\.float32", unavailable(error))


@needs_compiler
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="flags of x86")
@pytest.mark.parametrize("flag", ["-mno-avx512bf16", "-mno-avx512f", "-mno-avx"])
def test_smaller_vectors(fresh, monkeypatch, error, flag):
    monkeypatch.setenv("CC", f"{COMPILER} {flag}")
    usable, reason = native_status()
    assert usable, reason
    for shape in SHAPES.values():
        for dtype in ROUNDING:
            c = case(shape, dtype)
            truth = exact(c)
            assert error(run(c), truth) <= max(ROUNDING[dtype], error(framework(c), truth))
    c = case((1, 16, 0, 4, 4, 16), torch.bfloat16)
    c.x[0, 3, 2, 2] = float("nan")
    assert run(c).isnan().sum() == 16  # of one group


@needs_compiler
def test_two_processes_at_once(fresh, tmp_path):
    code = "from pdae_fast.kernels import native_status; print(native_status())"
    both = [
        subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True) for _ in (0, 1)
    ]
    assert all(process.communicate()[0].startswith("(True, ") for process in both)
    files = list(fresh.iterdir())
    assert files and all(file.suffix == ".so" for file in files)
    for file in files:
        ctypes.CDLL(str(file))
