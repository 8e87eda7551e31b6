"""One command for a visit to a GPU: `python -m bench.gpu --out DIR --part 1`, then `--part 2`, each under nine minutes.

Part 1 compiles all kernels, times the engine against the published computation and against torch.compile of it, checks
every kernel against float64 and measures the loss of precision. Part 2 profiles a step, measures graph capture and
bandwidths and checks every path. Needs no network. Every phase is a process with a time budget; one that fails or dies
stops no other, and what was found so far is reported whenever the visit is killed. DIR gets report.txt (with the bars
last), results.json (for `python -m bench.report`), rows.csv, rows.jsonl, failures.txt and log.txt.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench import ROOT

MISSING = [name for name in ("torch", "numpy", "safetensors", "PIL", "tqdm") if importlib.util.find_spec(name) is None]
LOOK_EVERY = 1.0  # seconds between two reports of what was found so far
GRACE = 8.0  # seconds between a phase's own deadline and its end by force
RESTARTS = 4  # of a phase whose process died


def main(argv: list[str] | None = None) -> int:
    from pdae_fast.engine import resolve_device
    from pdae_fast.errors import UserError
    from pdae_fast.files import make_folder

    from . import summary
    from .cases import CaseLog, Context
    from .opponent import Early
    from .phase import PHASES

    p = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for everything that is found")
    p.add_argument("--device", default="cuda", help="cuda, cuda:1 ..., or cpu to try the script itself")
    p.add_argument("--part", type=int, choices=(1, 2), help="two calls instead of one; the second one adds to DIR")
    p.add_argument("--report", action="store_true", help="only write the report of what DIR holds")
    p.add_argument("--quick", action="store_true", help="tiny networks, few steps: does it run at all?")
    p.add_argument("--seconds", type=float, default=520.0, help="for this call")
    p.add_argument("--only", nargs="+", choices=list(PHASES), metavar="PHASE", help=f"of {', '.join(PHASES)}")
    p.add_argument("--networks", nargs="+", help="instead of celeba64 ffhq128")
    p.add_argument("--batches", nargs="+", type=int, help="instead of 1 8 64")
    args = p.parse_args(argv)
    end = time.time() + args.seconds
    device = resolve_device(args.device)
    quick = args.quick or device.type == "cpu"
    networks = args.networks or (["tiny"] if quick else ["celeba64", "ffhq128"])
    batches = args.batches or ([1, 2] if quick else [1, 8, 64])
    make_folder(args.out)
    journal = CaseLog(args.out)
    if args.report:
        print(summary.write(args.out, journal, list(PHASES), device))
        return 0
    if journal.path.exists() and args.part != 2 and not args.only:
        raise UserError(f"{args.out} already holds a visit; name an empty folder")
    chosen = [
        name
        for name, phase in PHASES.items()
        if name == "environment" or (name in args.only if args.only else args.part in (None, phase.part))
    ]
    for name in args.only or ():
        journal.again(name)
    options = ["--out", str(args.out.resolve()), "--device", str(device), *(["--quick"] if quick else [])]
    options += ["--networks", *networks, "--batches", *map(str, batches)]
    early: list[Early] = []

    def look() -> None:
        """While a phase runs: a kill leaves a report of what was found so far."""
        for opponent in early:
            opponent.look()
        if journal.grown():
            try:
                summary.write(args.out, journal, list(PHASES), device)
            except Exception as error:  # noqa: BLE001 - the visit matters more; the report at its end says it again
                print(f"the report so far could not be written: {error}", flush=True)

    try:
        with signalled():
            while chosen:
                before = chosen[: chosen.index("compile")] if "compile" in chosen and not early else None
                if not quick and before is not None and not any(PHASES[name].timed for name in before):
                    context = Context(args.out.resolve(), device, quick, end, tuple(networks), tuple(batches))
                    early.append(Early(context))
                # A quick visit imports everything once.
                now, chosen = (chosen, []) if quick else (chosen[:1], chosen[1:])
                titles = PHASES[now[0]].title if len(now) == 1 else "one after the other"
                if now == ["compile"]:
                    for opponent in early:
                        opponent.settle(end, look)
                left = end - time.time()
                seconds = min(PHASES[now[0]].seconds or left, left)
                if quick or (args.only and now[0] in args.only):
                    seconds = left  # asked for by name: it may take what there is
                names = ", ".join(now)
                print(f"[{args.seconds - left:5.0f} s] {names}: {titles} (at most {max(0, seconds):.0f} s)", flush=True)
                run_phase(",".join(now), options, seconds, journal, look=look)
                if now == ["compile"]:
                    for opponent in early:
                        opponent.end()
    finally:
        for opponent in early:
            opponent.end()
        text = summary.write(args.out, journal, list(PHASES), device)
    print(text, flush=True)
    return 1 if any(row["status"] == "FAIL" for row in journal.rows()) else 0


@contextlib.contextmanager
def signalled() -> Iterator[None]:
    """A polite kill ends the visit as an interrupt does: with a report."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_phase(
    name: str,
    options: list[str],
    seconds: float,
    journal,
    module: str = "bench.gpu.phase",
    look: Callable[[], None] = lambda: None,
) -> None:
    """Run a phase, or several with commas between them, in processes of its own until every case has had its turn or
    the time is up; ``look`` now and then."""
    from bench.machine import child_environment

    end, names = time.time() + seconds, name.split(",")
    for _ in range(1 + RESTARTS):
        left = end - time.time()
        if left <= 0:
            journal.write(names[-1], "(rest)", "SKIP", reason="no time left")
            return
        seen = sum(len(journal.started(n)) for n in names)
        command = [sys.executable, "-u", "-m", module, name, *options, "--seconds", f"{left:.1f}"]
        with open(journal.path.parent / "log.txt", "a", encoding="utf-8") as log:
            log.write(f"=== {name}\n")
            log.flush()
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True,
                env=child_environment(PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])),
            )  # fmt: skip
            try:
                code = _wait(process, left + GRACE, look)
            finally:
                if process.poll() is None:  # out of time, or this process was interrupted
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        for phase, case in ((n, case) for n in names for case in journal.unfinished(n)):
            why = "was still running when the phase's time was up" if code is None else f"ended its process ({code})"
            journal.fail(phase, case, f"this case {why}", f"this case {why}; the end of log.txt may say more")
        if code == 0:
            return
        if sum(len(journal.started(n)) for n in names) == seen:  # it died before a case: another try would die as well
            how = "was out of time" if code is None else f"ended with {code}"
            journal.fail(names[0], "(process)", f"the phase's process {how} before it came to a case; see log.txt")
            return
        if code is None:
            return


def _wait(process: subprocess.Popen, limit: float, look: Callable[[], None]) -> int | None:
    """Its exit status, or None after ``limit`` seconds."""
    end = time.time() + limit
    while time.time() < end:
        try:
            return process.wait(min(LOOK_EVERY, max(0.0, end - time.time())))
        except subprocess.TimeoutExpired:
            look()
    return process.poll()


if __name__ == "__main__":
    if MISSING:
        print(f"error: bench.gpu needs {', '.join(MISSING)}, which this Python does not have", file=sys.stderr)
        sys.exit(2)
    from pdae_fast.errors import UserError

    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
