"""Phase "kernels": every kernel against float64, with the kernels' own tests and on the models' shapes.

The tests of tests/kernels run on a GPU as they are (both layouts, two inputs, split reductions, odd sizes, three
dtypes, NaN-poisoned outputs, gradients); here they are started, one process a file, and counted. Their shapes are
small, so the models' follow.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import ROOT
from bench.contenders import relative
from bench.operations import FLOOR, Operation, framework_norm, norm, operations

from .cases import CaseLog, Cases, Context, Skip

FILES = ("test_ddim_update.py", "test_add_upsample.py", "test_group_norm.py")
DTYPES = (torch.bfloat16, torch.float32, torch.float16)


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
    """The tests of every file, side by side: a row for each file, and one for every test that failed."""
    if importlib.util.find_spec("pytest") is None:
        raise Skip("pytest is not installed")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with tempfile.TemporaryDirectory() as folder:
        running = {}
        for file in files:
            # `-p bench` makes pdae_fast.kernels resolve to the checkout before any test is collected.
            command = [sys.executable, "-m", "pytest", "-p", "bench", "-p", "no:cacheprovider", "-q"]
            command += [f"tests/kernels/{file}", f"--junitxml={folder}/{file}.xml"]
            command += ["-k", "test_op and odd"] if context.quick else []
            with open(f"{folder}/{file}.log", "w") as log:
                running[file] = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment)
        return [_outcome(file, process, Path(folder), context) for file, process in running.items()]


def _outcome(file: str, process: subprocess.Popen, folder: Path, context: Context) -> dict[str, Any]:
    try:
        process.wait(max(1.0, context.left()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    report, log = folder / f"{file}.xml", (folder / f"{file}.log").read_text(encoding="utf-8", errors="replace")
    journal = CaseLog(context.out)
    if not report.exists():
        journal.fail("kernels", file, f"pytest ended with {process.returncode} and no report", log[-4000:])
        return {"status": "FAIL", "reason": f"{file}: no report"}
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for case in xml.etree.ElementTree.parse(report).getroot().iter("testcase"):
        problem = next((child for child in case if child.tag in ("failure", "error")), None)
        if problem is not None:
            counts["failed"] += 1
            name = f"{file} {case.get('name')}"
            journal.fail("kernels", name, problem.get("message") or "failed", problem.text or "")
        else:
            counts["skipped" if any(child.tag == "skipped" for child in case) else "passed"] += 1
    failed = counts["failed"] or not counts["passed"]
    text = f"{file}: " + ", ".join(f"{n} {k}" for k, n in counts.items())
    return {"status": "FAIL" if failed else "PASS", "reason": text}


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
