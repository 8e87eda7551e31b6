"""One command for a visit to a GPU: `python -m bench.gpu --out DIR`, under nine minutes, without a network.

Checks every kernel and every path against float64 and float32, times the engine against the published computation and
against torch.compile of it, measures bandwidths, graph capture and the loss of precision, and prints one compact table
with the bars last. Every phase is a process with a time budget; one that fails or dies stops no other. DIR gets
report.txt, results.json (for `python -m bench.report`), rows.csv, rows.jsonl, failures.txt and log.txt.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from bench import ROOT

MISSING = [name for name in ("torch", "numpy", "safetensors", "PIL", "tqdm") if importlib.util.find_spec(name) is None]
GRACE = 8.0  # seconds between a phase's own deadline and its end by force
RESTARTS = 4  # of a phase whose process died


def main(argv: list[str] | None = None) -> int:
    from pdae_fast.engine import resolve_device
    from pdae_fast.errors import UserError
    from pdae_fast.files import make_folder

    from . import summary
    from .cases import CaseLog
    from .phase import PHASES

    p = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for everything that is found")
    p.add_argument("--device", default="cuda", help="cuda, cuda:1 ..., or cpu to try the script itself")
    p.add_argument("--quick", action="store_true", help="tiny networks, few steps: does it run at all?")
    p.add_argument("--seconds", type=float, default=520.0, help="for the whole visit")
    p.add_argument("--only", nargs="+", choices=list(PHASES), metavar="PHASE", help=f"of {', '.join(PHASES)}")
    p.add_argument("--networks", nargs="+", help="instead of celeba64 ffhq128")
    p.add_argument("--batches", nargs="+", type=int, help="instead of 1 8 64")
    args = p.parse_args(argv)
    device = resolve_device(args.device)
    quick = args.quick or device.type == "cpu"
    networks = args.networks or (["tiny"] if quick else ["celeba64", "ffhq128"])
    batches = args.batches or ([1, 2] if quick else [1, 8, 64])
    make_folder(args.out)
    journal = CaseLog(args.out)
    if journal.path.exists():
        raise UserError(f"{args.out} already holds a visit; name an empty folder")
    end = time.time() + args.seconds
    chosen = [name for name in PHASES if args.only is None or name in args.only or name == "environment"]
    options = ["--out", str(args.out.resolve()), "--device", str(device), *(["--quick"] if quick else [])]
    options += ["--networks", *networks, "--batches", *map(str, batches)]
    for name in chosen:
        left = end - time.time()
        seconds = min(PHASES[name].seconds or left, left)
        if args.only and name in args.only:
            seconds = left  # asked for by name: it may take what there is
        print(
            f"[{args.seconds - left:5.0f} s] {name}: {PHASES[name].title} (at most {max(0, seconds):.0f} s)", flush=True
        )
        run_phase(name, options, seconds, journal)
    print(summary.write(args.out, journal, list(PHASES), device), flush=True)
    return 1 if any(row["status"] == "FAIL" for row in journal.rows()) else 0


def run_phase(name: str, options: list[str], seconds: float, journal, module: str = "bench.gpu.phase") -> None:
    """Run a phase in processes of its own until every case has had its turn or the time is up."""
    end = time.time() + seconds
    for _ in range(1 + RESTARTS):
        left = end - time.time()
        if left <= 0:
            journal.write(name, "(rest)", "SKIP", reason="no time left")
            return
        seen = len(journal.started(name))
        command = [sys.executable, "-u", "-m", module, name, *options, "--seconds", f"{left:.1f}"]
        with open(journal.path.parent / "log.txt", "a", encoding="utf-8") as log:
            log.write(f"=== {name}\n")
            log.flush()
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
            )  # fmt: skip
            try:
                code = process.wait(left + GRACE)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                if process.poll() is None:  # out of time, or this process was interrupted
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        for case in journal.unfinished(name):
            why = "was still running when the phase's time was up" if code is None else f"ended its process ({code})"
            journal.fail(name, case, f"this case {why}", f"this case {why}; the end of log.txt may say more")
        if code == 0:
            return
        if len(journal.started(name)) == seen:  # it died before its first case: another try would die as well
            how = "was out of time" if code is None else f"ended with {code}"
            journal.fail(name, "(process)", f"the phase's process {how} before it came to a case; see log.txt")
            return
        if code is None:
            return


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
