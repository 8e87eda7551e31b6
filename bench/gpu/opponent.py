"""Phase "compile": `torch.compile` of the baseline, in processes of its own, which can be stopped.

Compiling takes minutes: the visit starts those of the largest batches early, beside phases that time nothing
(:class:`Early`). They wait, compiled, until the phase says go, and are timed one after the other.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench import ROOT
from bench.compiled import MODES

from .cases import Cases, Context, NotHere
from .side import measured_peaks, order, run_command

FALLBACK_SHARE = 0.35  # of the time left that stays for a cheaper mode if max-autotune takes too long to compile
LEAST_SECONDS = 40.0
GO = ".go"


def _result(out: Path, network: str, batch: int) -> Path:
    return out / f".compiled-{network}-{batch}.json"


def _command(network: str, batch: int, mode: str, context: Context, *options: str) -> list[str]:
    from .speed import timed_steps

    command = [
        *(sys.executable, "-m", "bench.compiled", "--network", network, "--batch", str(batch), "--plans"),
        *("--device", str(context.device), "--mode", mode, "--steps", str(timed_steps(batch, context))),
        *("--out", str(_result(context.out, network, batch)), "--rounds", "20", "--seconds", "6", *options),
    ]
    if peak := measured_peaks(context).get("bfloat16"):
        command += ["--peak", str(peak)]
    return command


class Early:
    """The compilations of the largest batches, begun before their phase; ``look()`` now and then, and ``end()``."""

    def __init__(self, context: Context, command: Any = _command) -> None:
        self.out, self.running = context.out, {}
        for network, batch in order(context)[: len(context.networks)]:
            path = _result(self.out, network, batch)
            path.with_suffix(".started").touch()
            with open(self.out / "log.txt", "a", encoding="utf-8") as log:
                process = subprocess.Popen(
                    command(network, batch, MODES[0], context, "--wait-for", str(self.out / GO)),
                    cwd=ROOT, stdout=log, stderr=log, start_new_session=True,
                )  # fmt: skip
            self.running[path] = process

    def look(self) -> None:
        """Leave a word where a process ended without a result."""
        for path, process in list(self.running.items()):
            if process.poll() is not None:
                del self.running[path]
                if not path.exists():
                    path.write_text(json.dumps({"error": f"ended with {process.returncode}; see log.txt"}))

    def end(self) -> None:
        for process in self.running.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        for path in [*self.out.glob(".compiled-*"), self.out / GO]:
            path.unlink(missing_ok=True)


def cases(context: Context) -> Cases:
    """The bars first: the largest and the smallest batch of every network, then the rest while there is time."""
    if context.quick:
        yield "(all)", _not_compiled
        return
    first = order(context)
    rest = [(n, b) for n in context.networks for b in context.batches if (n, b) not in first]
    for network, batch in [*first, *rest]:
        yield f"{network} batch {batch}", lambda network=network, batch=batch: compile_case(network, batch, context)


def _not_compiled() -> None:
    raise NotHere("a quick visit does not wait for a compiler; try `python -m bench.compiled --network tiny`")


def compile_case(network: str, batch: int, context: Context, command: Any = _command) -> list[dict[str, Any]]:
    """max-autotune within most of the time left, else a mode that compiles faster, else a note that there was none."""
    modes, notes = (MODES[0], "reduce-overhead"), []
    path = _result(context.out, network, batch)
    for mode in modes:
        share = 1.0 if mode == modes[-1] else 1 - FALLBACK_SHARE
        limit, early = context.left() * share, path.with_suffix(".started").exists()
        if limit < LEAST_SECONDS and not early:
            notes.append(f"{mode}: only {limit:.0f} s left")
            continue
        try:
            if early:
                (context.out / GO).touch()
                _await(path, limit)
            else:
                run_command(command(network, batch, mode, context), limit)
        except (subprocess.TimeoutExpired, TimeoutError):
            notes.append(f"{mode} did not compile in {limit:.0f} s")
            continue
        finally:
            path.with_suffix(".started").unlink(missing_ok=True)
        found = json.loads(path.read_text(encoding="utf-8"))
        path.unlink()
        if "error" in found:
            raise RuntimeError(found["error"])
        return [{"status": "INFO", "table": "compiled", "note": "; ".join(notes) or None, **r} for r in found["rows"]]
    raise NotHere("; ".join(notes))


def _await(path: Path, limit: float) -> None:
    end = time.time() + limit
    while not path.exists():
        if time.time() > end:
            raise TimeoutError
        time.sleep(0.2)
