"""Phase "compile": `torch.compile` of the baseline, in processes of its own, which can be stopped.

Compiling takes minutes, and tries kernels on the GPU: the visit starts it for the cases of the bars all at once, beside
phases that time nothing (:class:`Early`). Each process says when it is ready and waits. Those that are not ready when
the phase begins are stopped before anything is timed; then the others are timed one after the other, each followed by
the engine's side in a process of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import ROOT
from bench.compiled import MODES, READY
from bench.machine import child_environment

from .cases import CaseLog, Cases, Context, NotHere
from .side import BARS, measured_peaks, order, run_command, run_side

TIMING_SECONDS = 30.0  # of one case, both sides
MOST_TIMING_SECONDS = 60.0  # of an opponent that is compiled: then something is wrong with it
FALLBACK_SECONDS = 120.0  # for a mode that compiles faster, where nothing else is ready
LEAST_SECONDS = 40.0  # to compile in


def _result(out: Path, network: str, batch: int) -> Path:
    return out / f".compiled-{network}-{batch}.json"


def _go(result: Path) -> Path:
    return result.with_suffix(".go")


def _ready(result: Path) -> Path:
    return _go(result).with_suffix(READY)


def _command(network: str, batch: int, mode: str, context: Context, *options: str) -> list[str]:
    from .speed import timed_steps

    command = [
        *(sys.executable, "-m", "bench.compiled", "--network", network, "--batch", str(batch), "--plans"),
        *("--device", str(context.device), "--mode", mode, "--steps", str(timed_steps(batch, context))),
        *("--out", str(_result(context.out, network, batch)), "--rounds", "20", "--seconds", "6"),
        *("--with-parent", *options),
    ]
    if peak := measured_peaks(context).get("bfloat16"):
        command += ["--peak", str(peak)]
    return command


class Early:
    """The compilations for the bars, begun before their phase; ``look()`` now and then, ``settle()`` right before the
    phase, and ``end()``."""

    def __init__(self, context: Context, command: Any = _command) -> None:
        self.out, self.start, self.running = context.out, time.time(), {}
        self._clear()  # what a visit left that was killed
        done = CaseLog(self.out).started("compile")
        for network, batch in order(context):
            if f"{network} batch {batch}" in done:
                continue
            path = _result(self.out, network, batch)
            with open(self.out / "log.txt", "a", encoding="utf-8") as log:
                process = subprocess.Popen(
                    command(network, batch, MODES[0], context, "--wait-for", str(_go(path))),
                    cwd=ROOT, stdout=log, stderr=log, start_new_session=True, env=child_environment(),
                )  # fmt: skip
            self.running[path] = process

    def look(self) -> None:
        """Leave a word where a process ended without a result."""
        for path, process in list(self.running.items()):
            if process.poll() is not None:
                del self.running[path]
                if not path.exists():
                    path.write_text(json.dumps({"error": f"ended with {process.returncode}; see log.txt"}))

    def settle(self, end: float, look: Callable[[], None] = lambda: None) -> None:
        """Wait until all are ready, but no longer than to ``end`` (time.time()) less the time that is needed then; stop
        the others."""
        while True:
            self.look()
            late = [path for path in self.running if not _ready(path).exists()]
            needed = (len(self.running) - len(late)) * TIMING_SECONDS or FALLBACK_SECONDS
            if not late or time.time() > end - needed:
                break
            look()
            time.sleep(0.2)
        for path in late:
            _stop(self.running.pop(path))
            path.write_text(json.dumps({"late": f"{MODES[0]} did not compile in {time.time() - self.start:.0f} s"}))

    def end(self) -> None:
        for process in self.running.values():
            _stop(process)
        self.running = {}
        self._clear()

    def _clear(self) -> None:
        for path in self.out.glob(".compiled-*"):
            path.unlink(missing_ok=True)


def _stop(process: subprocess.Popen) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def cases(context: Context) -> Cases:
    """The bars first, and of them those that are compiled; then the rest while there is time."""
    if context.quick:
        yield "(all)", _not_compiled
        return
    bars = order(context)
    bars.sort(key=lambda case: not _ready(_result(context.out, *case)).exists())
    rest = [(n, b) for n in context.networks for b in context.batches if (n, b) not in bars]
    for network, batch in [*bars, *rest]:
        yield f"{network} batch {batch}", lambda network=network, batch=batch: compile_case(network, batch, context)


def _not_compiled() -> None:
    raise NotHere("a quick visit does not wait for a compiler; try `python -m bench.compiled --network tiny`")


def compile_case(
    network: str, batch: int, context: Context, command: Any = _command, ours: Any = run_side
) -> list[dict[str, Any]]:
    """The baseline, torch.compile of it and the engine: max-autotune where it was compiled early or can be now, else a
    mode that compiles faster, else a note that there was none."""
    path, notes = _result(context.out, network, batch), []
    if _ready(path).exists():
        _go(path).touch()
        _await(path, MOST_TIMING_SECONDS)
    early = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if "error" in early:
        raise RuntimeError(early["error"])
    rows = early.get("rows")
    notes += [early["late"]] if "late" in early else []
    for mode in (MODES[1],) if "late" in early else MODES[:2]:
        if rows is not None:
            break
        limit = context.left() - TIMING_SECONDS
        if limit < LEAST_SECONDS:
            notes.append(f"{mode}: only {limit:.0f} s left")
            continue
        # The first of two modes leaves the other a third of the time.
        limit *= 1.0 if mode == MODES[1] else 0.65
        try:
            run_command(command(network, batch, mode, context), limit)
        except subprocess.TimeoutExpired:
            notes.append(f"{mode} did not compile in {limit:.0f} s")
            continue
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    path.unlink(missing_ok=True)
    if rows is None:
        raise NotHere("; ".join(notes))
    head = {"status": "INFO", "table": "compiled", "note": "; ".join(notes) or None}
    try:
        # Right behind the opponent: what has changed since the bars were timed has changed for both.
        row = ours(network, batch, BARS[1], context)
        row["ratio"] = rows[0]["median_s"] / row["median_s"]
        rows.append({k: v for k, v in row.items() if k not in ("status", "table")})
    except Exception as error:  # noqa: BLE001 - the opponent's rows count all the same
        reason = f"{type(error).__name__}: {error}"
        CaseLog(context.out).fail("compile", f"{network} batch {batch}: {BARS[1]}", reason)
    return [{**head, **row} for row in rows]


def _await(path: Path, limit: float) -> None:
    """Wait for the result of a process that was told to go; after ``limit`` seconds it is stopped: TimeoutError."""
    end = time.time() + limit
    while not path.exists():
        if time.time() > end:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(_ready(path).read_text()), signal.SIGKILL)
            raise TimeoutError(f"compiled, and not timed in {limit:.0f} s")
        time.sleep(0.2)
