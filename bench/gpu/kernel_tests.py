"""Phase "kernels": every kernel against float64, with the kernels' own tests and on the models' shapes.

The tests of tests/kernels run on a GPU as they are (both layouts, two inputs, split reductions, odd sizes, three
dtypes, NaN-poisoned outputs, gradients); here they are shared out among processes, and counted. Their shapes are
small, so the models' follow.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import ROOT
from bench.contenders import relative
from bench.machine import child_environment
from bench.operations import FLOOR, Operation, framework_norm, norm, operations

from .cases import CaseLog, Cases, Context, NotHere

FILES = (
    "test_ddim_update.py", "test_add_upsample.py", "test_group_norm.py", "test_add_projected.py",
    "test_head_convolution.py", "test_float8.py",
)  # fmt: skip
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
MOST_SHARDS, SHARE = 8, 0.6


def cases(context: Context) -> Cases:
    yield "tests/kernels", lambda: _pytest(FILES[1:2] if context.quick else FILES, context)
    for dtype in DTYPES[:1] if context.quick else DTYPES:
        # One image takes the split reductions, sixteen the fused ones; the choice does not depend on the dtype much.
        batches = (2,) if not context.cuda or context.quick else (1, 16) if dtype == torch.bfloat16 else (16,)
        for batch in batches:
            for operation in operations(batch, dtype, tiny=context.quick):
                name = f"{operation.name} {operation.shape} {str(dtype).removeprefix('torch.')}"
                yield name, lambda operation=operation: _check(operation, context)
    for dtype in DTYPES[:1] if context.quick else DTYPES:
        for last in (False, True):
            for c2 in (0, 128):
                operation = norm(2, 128, c2, 8 if context.quick else 32, dtype, last)
                name = f"gradients of group_norm {operation.shape} {str(dtype).removeprefix('torch.')}"
                yield name, lambda operation=operation: _gradients(operation, context)


def _pytest(files: tuple[str, ...], context: Context) -> list[dict[str, Any]]:
    """The tests, shared out among processes, since most of their time is compilation: a row for each file, and one for
    every test that failed. What ended before the time was up counts."""
    if importlib.util.find_spec("pytest") is None:
        raise NotHere("pytest is not installed")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    shards = min(MOST_SHARDS, os.cpu_count() or 1) if context.cuda else 1
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for shard in range(shards):
            # The plugin's package makes pdae_fast.kernels resolve to the checkout before any test is collected.
            command = [sys.executable, "-m", "pytest", "-p", "bench.gpu.shard", "-p", "no:cacheprovider", "-q"]
            command += [f"tests/kernels/{file}" for file in files] + (
                ["-k", "test_op and odd and bf16"] if context.quick else []
            )
            own = {"PYTHONPATH": path, "SHARD": f"{shard}/{shards}", "SHARD_LINES": f"{folder}/{shard}.jsonl"}
            own["PYTEST_ADDOPTS"] = ""  # of whoever runs this; they may start processes of their own
            with open(f"{folder}/{shard}.log", "w") as log:
                running.append(
                    subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=child_environment(**own))
                )
        # The models' own shapes follow, and want their share of the time.
        end = time.time() + SHARE * context.left()
        try:
            for process in running:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(1.0, end - time.time()))
        finally:
            late = [process for process in running if process.poll() is None]
            for process in late:
                process.kill()
                process.wait()
        return outcomes(files, Path(folder), bool(late), CaseLog(context.out))


def outcomes(files: tuple[str, ...], folder: Path, late: bool, journal: CaseLog) -> list[dict[str, Any]]:
    """A row for each of ``files`` from the lines that the processes left in ``folder``; failed tests go to the
    journal. ``late``: some tests had no time."""
    lines = [
        json.loads(line)
        for path in sorted(folder.glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.endswith("}")
    ]
    rows = []
    for file in files:
        own = [line for line in lines if f"/{file}::" in f"/{line['test']}"]
        counts = Counter(line["outcome"] for line in own)
        for line in own:
            if line["outcome"] == "failed":
                message = line["message"]
                journal.fail("kernels", line["test"], message.splitlines()[-1] if message else "failed", message)
        text = f"{file}: " + ", ".join(f"{counts[k]} {k}" for k in ("passed", "failed", "skipped"))
        if late:
            text += "; the time was up"
        failed = counts["failed"] or not counts["passed"]
        if failed and not own:
            logs = "\n".join(
                path.read_text(encoding="utf-8", errors="replace")[-2000:] for path in folder.glob("*.log")
            )
            journal.fail("kernels", file, "no test of it ended", logs)
        rows.append({"status": "FAIL" if failed else "PASS", "reason": text})
    return rows


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Every tensor made by torch.empty starts as NaN, so that an element a kernel did not write shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filling
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _double(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) else v for k, v in values.items()}


def _check(operation: Operation, context: Context) -> dict[str, Any]:
    """The op's output against float64, no worse than twice the framework's own error."""
    values = operation.draw(torch.Generator(device=context.device).manual_seed(1))
    with poisoned_memory():
        found = operation.ours(**values)
    truth = operation.exact(**_double(values))
    framework = relative(operation.framework(**values), truth)
    return _verdict(relative(found, truth), framework, operation.dtype)


def _verdict(error: float, framework: float, dtype: torch.dtype) -> dict[str, Any]:
    allowed = max(2 * framework, FLOOR[dtype])
    status = "PASS" if error <= allowed else "FAIL"
    return {"status": status, "error": error, "error_framework": framework, "allowed": allowed}


def _gradients(operation: Operation, context: Context) -> list[dict[str, Any]]:
    """Gradients of every input against float64 autograd of the definition."""
    generator = torch.Generator(device=context.device).manual_seed(2)
    values = operation.draw(generator)
    leaves = {k: v for k, v in values.items() if isinstance(v, Tensor)}
    upstream = torch.randn(operation.exact(**_double(values)).shape, generator=generator, device=context.device)

    def gradients(function, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs = {k: v.detach().clone(memory_format=torch.preserve_format).requires_grad_() for k, v in inputs.items()}
        y = function(**inputs)
        found = torch.autograd.grad(y, list(inputs.values()), upstream.to(y.dtype))
        return dict(zip(inputs, found, strict=True))

    truth = gradients(operation.exact, {k: v.double() for k, v in leaves.items()})
    with poisoned_memory():
        ours = gradients(operation.ours, leaves)
    plain = gradients(framework_norm, leaves)
    return [
        {"tensor": k, **_verdict(relative(ours[k], truth[k]), relative(plain[k], truth[k]), operation.dtype)}
        for k in leaves
    ]
