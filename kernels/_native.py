"""The C sources of native/, built once for this machine's processor and kept in the user's cache folder.

Nothing of it is needed: where there is no compiler, or it fails, `load` says why in one line and the framework's
operators run instead.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

NATIVE_DTYPES = (torch.float32, torch.bfloat16)  # of maps
SOURCES = Path(__file__).parent / "native"
COMPILERS = ("cc", "gcc", "clang")
# A product and a sum may become one operation, and no code has to care for errno or floating-point exceptions.
FLAGS = ["-O3", "-std=gnu11", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared"]
PROCESSOR = (["-march=native"], ["-mcpu=native"], [])  # the first that the compiler takes
SECONDS = 120  # for a compiler that hangs; a build takes one
OPENMP = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads", "GOMP_barrier")


class Unavailable(Exception):
    """Why native code cannot be had here, in one line."""


def threaded(name: str, *functions: str) -> tuple[ctypes.CDLL, str]:
    """(the library of native/`name`.c, whose ``functions`` take a packed struct and answer an int and which runs on
    torch's threads where it can, one line about it). Raises `Unavailable`."""
    library = load(name)
    for function in functions:
        getattr(library, function).argtypes, getattr(library, function).restype = [ctypes.c_char_p], ctypes.c_int
    threads = openmp(*OPENMP)
    if threads is not None:
        library.pdae_threads.argtypes, library.pdae_threads.restype = [ctypes.c_void_p] * 4, None
        library.pdae_threads(*threads)
    return library, "compiled for this processor, " + ("one thread" if threads is None else "on torch's threads")


def multiplying(
    name: str, functions: tuple[str, ...], check: Callable[[ctypes.CDLL, int], str | None]
) -> tuple[ctypes.CDLL | None, str, int]:
    """(library of native/`name`.c as `threaded` has it, or None, one line about it, columns of the micro-kernel of
    native/product.h); ``check`` says what is wrong with the library, given it and those columns, or None."""
    try:
        library, reason = threaded(name, *functions)
    except Unavailable as obstacle:
        return None, str(obstacle), 0
    library.pdae_panel.argtypes, library.pdae_panel.restype = [], ctypes.c_int64
    panel = library.pdae_panel()
    obstacle = check(library, panel) if panel > 0 else "needs a processor with AVX-512 or AVX2"
    return (None, obstacle, 0) if obstacle else (library, reason, panel)


def load(name: str) -> ctypes.CDLL:
    """The library of native/`name`.c, from the cache or built now. Raises `Unavailable`."""
    if os.environ.get("PDAE_FAST_NATIVE", "1").lower() in ("0", "false", "off", "no"):
        raise Unavailable("switched off by PDAE_FAST_NATIVE")
    if os.name != "posix":
        raise Unavailable(f"native code is for POSIX systems, not for {sys.platform}")
    try:
        compiler = _compiler()
        sources = [file.read_bytes() for file in (SOURCES / f"{name}.c", *sorted(SOURCES.glob("*.h")))]
        key = f"{name}-{_digest(*sources, *_machine(compiler))}"
        folder = _cache()
        if folder is None:
            with tempfile.TemporaryDirectory() as temporary:  # a loaded library outlives its file
                return ctypes.CDLL(str(_build(compiler, name, Path(temporary), key)))
        for file in sorted(folder.glob(f"{key}-*.so")):
            if file.name == _name(key, file):
                return ctypes.CDLL(str(file))
            file.unlink(missing_ok=True)  # damaged: its contents are not those it is named after
        return ctypes.CDLL(str(_build(compiler, name, folder, key)))
    except (OSError, ValueError) as error:  # ValueError: a quotation mark in CC that nothing closes
        raise Unavailable(f"the native code cannot be built or loaded: {_line(str(error))}") from error


def _compiler() -> list[str]:
    """The command of the C compiler: $CC, where it is set, and nothing else then."""
    given = shlex.split(os.environ.get("CC", ""))
    for command in [given] if given else [[c] for c in COMPILERS]:
        found = shutil.which(command[0])
        if found:
            return [found, *command[1:]]
    raise Unavailable(f"no C compiler: {f'{given[0]} ($CC)' if given else ', '.join(COMPILERS)} not found")


def _machine(compiler: list[str]) -> list[bytes]:
    """What, beside the source, decides on the result: the compiler, its flags and the processor's abilities."""
    status = os.stat(os.path.realpath(compiler[0]))
    abilities = platform.processor()
    if sys.platform == "linux":
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            abilities = next((line for line in lines if line.startswith(("flags", "Features"))), abilities)
    parts = [*compiler, status.st_size, status.st_mtime_ns, FLAGS, PROCESSOR, platform.machine(), abilities]
    return [str(part).encode() for part in parts]


def _digest(*parts: bytes) -> str:
    # The lengths keep two different lists of parts from reading the same.
    return hashlib.sha256(b"".join(str(len(part)).encode() + b":" + part for part in parts)).hexdigest()[:20]


def _name(key: str, file: Path) -> str:
    return f"{key}-{_digest(file.read_bytes())}.so"


def _cache() -> Path | None:
    """The folder that built libraries are kept in, or None where there is none that only this user can write."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        base = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
        folder = base / "pdae_fast" / "native"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except (OSError, RuntimeError):  # no home, or one that cannot be written
        return None
    private = status.st_uid == os.getuid() and not status.st_mode & 0o022
    return folder if private and os.access(folder, os.W_OK) else None


def _build(compiler: list[str], name: str, folder: Path, key: str) -> Path:
    """Compile native/`name`.c into ``folder``: under another name, then renamed, so that nobody loads a part."""
    handle, temporary = tempfile.mkstemp(suffix=".tmp", prefix=f"{key}-", dir=folder)
    os.close(handle)
    try:
        for processor in PROCESSOR:
            command = [*compiler, *FLAGS, *processor, "-o", temporary, str(SOURCES / f"{name}.c"), "-lm"]
            try:
                done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS)
            except subprocess.TimeoutExpired as error:
                raise Unavailable(f"{compiler[0]} did not end in {SECONDS} seconds") from error
            if done.returncode == 0:
                break
        else:
            message = done.stderr.decode(errors="replace")
            raise Unavailable(f"{compiler[0]} failed with status {done.returncode}: {_line(message)}")
        os.chmod(temporary, 0o700)
        file = folder / _name(key, Path(temporary))
        os.replace(temporary, file)
        return file
    finally:
        Path(temporary).unlink(missing_ok=True)


def _line(text: str) -> str:
    """The line of a message that says most: the first with an error in it, or the first."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no message"]
    return next((line for line in lines if "error" in line.lower()), lines[0])


def openmp(*names: str) -> list[int] | None:
    """Addresses of these functions in the OpenMP runtime that torch's own operators run on, or None.

    They are looked up as the dynamic linker did for torch: what the process shares with all, then what torch's
    library depends on. So no second runtime is ever loaded, whichever it is.
    """
    if sys.platform != "linux":
        return None
    core = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    for path, mode in ((None, 0), (str(core), getattr(os, "RTLD_NOLOAD", 0))):
        try:
            functions = [getattr(ctypes.CDLL(path, mode | ctypes.DEFAULT_MODE), name) for name in names]
        except (OSError, AttributeError):
            continue
        return [ctypes.cast(function, ctypes.c_void_p).value for function in functions]
    return None
