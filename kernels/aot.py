"""Compile every kernel for every supported GPU, without a GPU, and hold it to a budget.

    python -m pdae_fast.kernels.aot [--arch 80 90] [--dtype bfloat16] [--kernel fused_kernel]

prints kernel x architecture x dtype with registers, spilled bytes, stack and shared memory, and exits with
status 1 when a kernel does not compile or exceeds its budget, 2 when the check cannot run. What is compiled
is what the launchers launch: each case builds the launch plan of a model's shape on meta tensors.

Must run without TRITON_INTERPRET, which replaces kernels by Python functions when Triton is imported.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ._launch import Launch
from .float8 import CODE, MIN_CAPABILITY

ARCHITECTURES = (80, 89, 90, 100)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
POINTER = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int64: "*i64",
    CODE: "*fp8e4nv",
}  # fmt: skip


@dataclass(frozen=True)
class Budget:
    """Limits of one kernel: registers a thread and shared bytes a program. Spills and stack must be 0."""

    registers: int
    shared: int


# A multiprocessor holds 65536 registers and these kernels run at most 256 threads, so 64 registers let four
# programs share one, 80 three and 128 two: enough to hide memory latency behind each other. Shared memory is
# the scratch of reductions across warps, and 0 where there are none: more would mean that the compiler moves
# data between layouts. Of add_stats_kernel Triton 3.9 takes 1024 at most, Triton 3.6 takes 4096. Products keep their
# sums in registers, of which a thread has 255, and three tiles of both operands in flight, or a float32 tile of sums.
BUDGETS = {
    "fused_kernel": Budget(128, 2048),
    "stats_kernel": Budget(80, 1024),
    "merge_splits_kernel": Budget(80, 1024),
    "apply_kernel": Budget(80, 1024),
    "gradient_sums_kernel": Budget(88, 1024),
    "gradient_input_kernel": Budget(88, 0),
    "ddim_kernel": Budget(40, 0),
    "upsample_kernel": Budget(40, 0),
    "residual_kernel": Budget(48, 0),
    "add_stats_kernel": Budget(80, 4096),
    "add_projected_kernel": Budget(255, 99 << 10),
    "head_kernel": Budget(168, 64 << 10),
    "conv_float8_kernel": Budget(255, 64 << 10),
}


@dataclass(frozen=True)
class Usage:
    """What the assembler says one compiled kernel takes."""

    registers: int
    spilled: int
    stack: int
    shared: int

    def excess(self, budget: Budget) -> list[str]:
        """The limits it breaks, as text."""
        limits = (
            ("registers", self.registers, budget.registers),
            ("spilled bytes", self.spilled, 0),
            ("stack bytes", self.stack, 0),
            ("shared bytes", self.shared, budget.shared),
        )
        return [f"{value} {name} > {limit}" for name, value, limit in limits if value > limit]


def runs_on(launch: Launch, architecture: int) -> bool:
    """Whether this capability has the dtypes of the launch: codes of fp8 from 8.9 on."""
    codes = any(isinstance(v, torch.Tensor) and v.dtype == CODE for v in launch.arguments.values())
    return not codes or divmod(architecture, 10) >= MIN_CAPABILITY


def cases(dtype: torch.dtype) -> Iterator[tuple[str, Launch]]:
    """(what, launch) for every kernel on the shapes that ask most of it, in both layouts, with every option
    on."""
    for what, *launches in _calls(dtype):
        for launch in launches:
            yield what, launch


def _calls(dtype: torch.dtype) -> Iterator[tuple]:
    """(what, launch, ...) a call."""
    from .add_projected_triton import add_projected_launches
    from .add_upsample_triton import add_stats_launches, residual_launches, upsample_launches
    from .ddim_update_triton import ddim_launches
    from .float8_triton import conv_float8_launches
    from .group_norm_plan import (
        apply_launches,
        channel_stats_launches,
        given_statistics,
        gradient_input_launches,
        gradient_sums_launches,
        group_norm_launches,
    )
    from .head_convolution_triton import head_convolution_launches

    def image(batch, channels, size, channels_last=False, dtype=dtype):
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return torch.empty(batch, channels, size, size, dtype=dtype, device="meta", memory_format=layout)

    def table(*shape):
        return torch.empty(shape, dtype=torch.float32, device="meta")

    def norm(batch, c1, c2, size, channels_last, path, bias=True, codes=False):
        x, x2 = image(batch, c1, size, channels_last), image(batch, c2, size, channels_last) if c2 else None
        channels = c1 + c2
        affine = table(batch, channels)
        return group_norm_launches(
            x, table(channels), table(channels), 32, 1e-5, affine, affine, True, x2, table(c1) if bias else None,
            image(batch, channels, size, channels_last, CODE if codes else dtype), table(batch, 32), table(batch, 32),
            path, table(2) if codes else None,
        )  # fmt: skip

    for layout, last in (("NCHW", False), ("channels-last", True)):
        yield f"{layout}, in registers", *norm(1, 256, 256, 16, last, "fused")
        yield f"{layout}, looping", *norm(8, 128, 128, 128, last, "fused")
        yield f"{layout}, no bias, in registers", *norm(1, 256, 256, 16, last, "fused", bias=False)
        yield f"{layout}, no bias, looping", *norm(8, 128, 128, 128, last, "fused", bias=False)
        yield f"{layout}, two passes", *norm(1, 128, 128, 128, last, "split")
        yield f"{layout}, no bias, two passes", *norm(64, 64, 0, 64, last, "split", bias=False)
        yield f"{layout}, groups of 12, two passes", *norm(8, 384, 0, 32, last, "split")
        x, x2, y = image(8, 512, 16, last), image(8, 512, 16, last), image(8, 1024, 16, last)
        given = given_statistics(x, table(8, 512, 2), table(8, 512, 2))
        affine, vector = table(8, 1024), table(1024)
        yield (
            f"{layout}, given statistics",
            *apply_launches(
                x, given, vector, vector, 32, 1e-5, affine, affine, True, x2, table(512), y, table(8, 32), table(8, 32)
            ),
        )
        # Two networks on one batch: a row of the vectors for each, and a second input that both read.
        parts, rows, x2 = given_statistics(x, table(8, 128, 16, 2), table(4, 128, 16, 2)), table(2, 1024), x2[:4]
        yield (
            f"{layout}, given partial statistics",
            *apply_launches(
                x, parts, rows, rows, 32, 1e-5, affine, affine, True, x2, table(2, 512), y, table(8, 32), table(8, 32)
            ),
        )
        table3, grad, x = table(3, 8, 192), image(8, 192, 64, last), image(8, 128, 64, last)
        x2 = image(8, 64, 64, last)
        yield f"{layout}, gradients", *gradient_sums_launches(grad, x, x2, table3, True)[0]
        yield f"{layout}, gradients", *gradient_input_launches(grad, x, x2, table(5, 8, 192), True, x, x2)
        low, high = image(8, 192, 32, last), image(8, 192, 64, last)
        yield f"{layout}, sum then upsample", *upsample_launches(low, low, high)
        yield f"{layout}, upsample then sum", *upsample_launches(high, low, high)
        yield f"{layout}, upsample, sum and bias", *upsample_launches(high, low, high, table(192))
        yield f"{layout}, sum and bias", *residual_launches(high, high, table(192), high)
        yield f"{layout}, sum and statistics", *add_stats_launches(high, high, table(2, 192), high, table(8, 96, 16, 2))
        yield f"{layout}, upsample and statistics", *add_stats_launches(high, low, None, high, table(8, 48, 2, 2))
    # No extent a multiple of 16: scalar accesses, and more addresses in registers.
    yield "odd sizes, in registers", *norm(1, 300, 212, 15, True, "fused")
    yield "odd sizes, two passes", *norm(1, 300, 212, 15, True, "split")
    yield (
        "odd sizes, sum and bias",
        *residual_launches(*[image(1, 75, 15, True)] * 2, table(75), image(1, 75, 15, True)),
    )
    odd = image(1, 75, 15, True)
    yield "odd sizes, sum and statistics", *add_stats_launches(odd, odd, table(75), odd, table(1, 75, 3, 2))
    yield "channels", *channel_stats_launches(image(1, 128, 128, True), table(128), table(1, 128, 2))
    for size, batch, side, c, splits in (("small", 2, 8, 512, 1), ("large", 128, 64, 128, 4), ("odd", 2, 15, 96, 1)):
        h, x2 = image(batch, c, side, True), image(batch // 2, c, side, True)
        weight = torch.empty(2, 2 * c, c, dtype=dtype, device="meta")
        given, partial = (h, h, x2, weight, table(2, c), h), table(batch, c, splits, 2)
        yield f"{size} map, sum and product", *add_projected_launches(*given, None, splits)
        yield f"{size} map, sum, product, statistics", *add_projected_launches(*given, partial, splits)
    for size, *given in (("small", 2, 32, 15, 1), ("large", 128, 128, 128, 3), ("wide", 2, 256, 64, 20)):
        batch, c, side, outputs = given
        weight = torch.empty(2, 9, c, -(-outputs // 16) * 16, dtype=dtype, device="meta")
        given = image(batch, c, side, True), weight, table(2, outputs), table(batch, outputs, side, side)
        yield f"{size} map, to few", *head_convolution_launches(*given)
    for what, batch, side, given, c, outputs in (
        ("small map of codes", 2, 8, 8, 512, 512),
        ("large map of codes", 64, 64, 64, 128, 128),
        ("odd map of codes", 1, 15, 15, 48, 75),
        ("upsampled codes", 64, 64, 32, 128, 128),
    ):
        x, weight = image(batch, c, given, True, CODE), torch.empty(outputs, 3, 3, c, dtype=CODE, device="meta")
        yield what, *conv_float8_launches(x, weight, table(outputs), image(batch, outputs, side, True))
    yield "to codes, in registers", *norm(2, 256, 256, 16, True, "fused", codes=True)
    yield "to codes, two passes", norm(64, 128, 128, 64, True, "split", codes=True)[-1]
    # One pixel and one channel a group: the arguments equal to 1, which Triton compiles in as constants.
    yield "one pixel", *norm(1, 32, 0, 1, False, "fused")
    yield "one pixel, two passes", *norm(1, 32, 0, 1, False, "split")
    x, index = image(8, 3, 256, dtype=torch.float32), torch.empty(8, dtype=torch.int64, device="meta")
    yield (
        "a step a sample",
        *ddim_launches(x, image(8, 3, 256), image(8, 3, 256), table(100, 6), index, True, x),
    )


def compile_launch(launch: Launch, architecture: int) -> Usage:
    """Compile one launch for compute capability `architecture` (90 is 9.0) as Triton's launcher would
    specialise it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, dict(launch.constants), {}
    for position, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments.get(name)
        if isinstance(value, torch.Tensor):
            signature[name] = POINTER[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif name in constants or value == 1:
            signature[name] = "constexpr"
            constants.setdefault(name, 1)
        else:
            signature[name] = "i32"
        if isinstance(value, torch.Tensor) or (signature[name] == "i32" and value % 16 == 0):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launch.options)
    return _assemble(compiled.asm["ptx"], architecture, compiled.metadata.shared)


def _assemble(ptx: str, architecture: int, shared: int) -> Usage:
    """Run Triton's own ptxas verbosely: the compiled kernel's metadata has neither registers nor spills
    without a driver."""
    from triton.backends.nvidia.compiler import get_ptxas

    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE).group(1)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.ptx")
        with open(path, "w") as file:
            file.write(ptx)
        command = [
            get_ptxas(architecture).path,
            "-v",
            f"--gpu-name={target}",
            path,
            "-o",
            os.path.join(folder, "kernel.o"),
        ]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.search(r"Used (\d+) registers", log)
    if spills is None or registers is None:
        raise RuntimeError(f"ptxas printed no resource usage: {log.strip()}")
    stack, stores, loads = map(int, spills.groups())
    return Usage(int(registers.group(1)), stores + loads, stack, shared)


def check(architectures=ARCHITECTURES, dtypes=tuple(DTYPES), kernels=tuple(BUDGETS)) -> list[str]:
    """Compile, print the table, and return what breaks a budget or does not compile, one line each."""
    problems, seen = [], set()
    print(f"{'kernel':22} {'case':38} {'dtype':9} {'arch':>6} registers spilled stack shared")
    for dtype in dtypes:
        for case, launch in cases(DTYPES[dtype]):
            kernel = launch.kernel.fn.__name__
            seen.add(kernel)
            if kernel not in kernels:
                continue
            for architecture in architectures:
                if not runs_on(launch, architecture):
                    continue
                row = f"{kernel:22} {case:38} {dtype:9} {'sm_' + str(architecture):>6}"
                try:
                    usage = compile_launch(launch, architecture)
                except Exception as error:  # noqa: BLE001 - a compiler failure is this check's finding, whatever its type
                    print(f"{row} does not compile")
                    problems.append(f"{' '.join(row.split())}: {str(error).strip() or type(error).__name__}")
                    continue
                excess = usage.excess(BUDGETS[kernel])
                mark = "  OVER BUDGET" if excess else ""
                print(
                    f"{row} {usage.registers:9} {usage.spilled:7} {usage.stack:5} {usage.shared:6}{mark}",
                    flush=True,
                )
                problems += [f"{' '.join(row.split())}: {text}" for text in excess]
    problems += [f"{kernel}: has a budget but no case" for kernel in set(BUDGETS) - seen]
    return problems


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pdae_fast.kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, help="compute capabilities, 90 for 9.0")
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--kernel", nargs="+", default=list(BUDGETS), choices=BUDGETS)
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes"):
        print("aot: unset TRITON_INTERPRET: interpreted kernels cannot be compiled", file=sys.stderr)
        return 2
    try:
        import triton  # noqa: F401
    except ImportError:
        print("aot: triton is not installed: pip install triton", file=sys.stderr)
        return 2
    problems = check(options.arch, options.dtype, options.kernel)
    for problem in problems:
        print(f"aot: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
