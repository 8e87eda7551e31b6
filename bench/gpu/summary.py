"""What a visit comes to: files for machines, one compact table for people, the issue's bars as PASS or FAIL."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench import quality, tables
from bench.machine import describe
from pdae_fast import cli
from pdae_fast.files import atomic_write

from .cases import STATUSES, CaseLog

LONGEST = 10_800  # characters of the printed table
SHOWN_FAILURES = 14
CONTENDER, FLOAT8_CONTENDER = "fused-bfloat16", "fused-bfloat16-fp8"
# The bars for an H200: times the baseline, times torch.compile, fraction of the bfloat16 matrix product.
BASELINE_BARS, FLOAT8_BAR, COMPILE_BAR = {1: 10.0, 64: 4.0}, (64, 6.0), 1.2
PEAK_BAR, TRAINING_BAR = ("ffhq128", 64, 0.55), 4.0
STEP = ("network", "batch", "contender", "median_s", "spread_s", "ratio", "images_per_s", "peak_fraction",
        "memory_bytes", "error")  # fmt: skip
KERNEL = ("op", "shape", "median_s", "ratio", "copy_fraction", "error")
PREPARE = ("arch", "kernels", "left", "workers", "slowest_worker_s")
PROFILE = ("network", "batch", "kernel", "launches", "expected", "kernel_s", "time_fraction", "moved_bytes",
           "reserved_bytes")  # fmt: skip
CONVOLUTION = ("network", "shape", "count", "median_s", "together_s", "tflop_rate")
GRAPH = (
    "network",
    "batch",
    "single_s",
    "uncaptured_s",
    "captured_s",
    "fields_s",
    "ratio",
    "first_call_extra_s",
    "error",
)
TRAINING = ("network", "batch", "contender", "median_s", "ratio", "ratio_spread", "images_per_s", "memory_bytes",
            "error_losses")  # fmt: skip
REWRITE = ("network", "batch", "changed", "median_s", "ratio", "ratio_spread", "error")

SECTIONS = (
    ("peak", "ceilings", ("what", "rate", "unit")),
    ("kernel", tables.TITLES["kernel"], KERNEL),
    ("graph", "one step: single calls, whole trajectories uncaptured, captured; single calls captured (fields)", GRAPH),
    ("prepare", "kernels compiled before anything is timed", PREPARE),
    ("convolution", "convolutions of one step by shape, bfloat16 channels-last, cuDNN's fastest", CONVOLUTION),
    ("profile", "one step of the fused bfloat16 plan: launches and time by kernel", PROFILE),
    ("rewrite", "one switch turned around; ratio: the default over it, below 1 where the default is better", REWRITE),
    ("startup", tables.TITLES["startup"], None),
    ("training", tables.TITLES["training"], TRAINING),
    ("step", tables.TITLES["step"], STEP),
    ("compiled", "against torch.compile, each side in a process of its own, one after the other", STEP),
)


def write(out: Path, journal: CaseLog, phases: list[str], device: torch.device) -> str:
    """Write results.json, rows.csv and report.txt; returns the report."""
    rows = journal.rows()
    try:
        found = collect(rows)
        text = report(rows, found, phases)
    except Exception as error:  # noqa: BLE001 - a row unlike all that were thought of must not take the others along
        found = {}
        text = f"{report(rows, found, phases)}\n\nFAIL the tables cannot be read: {type(error).__name__}: {error}"
    run = tables.ResultTables()
    run.tables = found
    run.save(out / "results.json", describe(device))
    with atomic_write(out / "rows.csv", "w") as file:
        file.write(_csv(rows))
    with atomic_write(out / "report.txt", "w") as file:
        file.write(text + "\n")
    return text


def collect(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The measured tables. Rows of the compiled opponent join the "step" table, beside the rest."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if "table" in row:
            kept = {k: v for k, v in row.items() if k not in ("phase", "case", "status", "table", "seconds")}
            if row["table"] == "peak":
                kept = {"what": row["case"], **kept}
            found.setdefault(row["table"], []).append(kept)
    # The sides of the bars were measured alone: their ratio is that of the medians.
    alone = [row for row in found.get("step", []) if "ratio" not in row]
    for row in alone:
        over = next((r for r in alone if _same(r, row) and r["contender"] == "baseline"), None)
        if over is not None:
            row["ratio"] = _over(over["median_s"], row["median_s"])
            (low, high), (own_low, own_high) = over["spread_s"], row["spread_s"]
            row["ratio_spread"] = [_over(low, own_high), _over(high, own_low)]
    # They are the last word on a side.
    found["step"] = [r for r in found.get("step", []) if r not in alone] + alone
    if not found["step"]:
        del found["step"]
    for row in found.get("compiled", []):
        if row["contender"].startswith("compile-"):
            found.setdefault("step", []).append({k: v for k, v in row.items() if k not in ("compile_seconds", "note")})
    return found


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return (a["network"], a["batch"]) == (b["network"], b["batch"])


def _over(a: float | None, b: float | None) -> float:
    """a / b; NaN, which no bar holds for, where one of them is no number or cannot be divided by."""
    return a / b if a is not None and b else float("nan")


def _numbers(row: dict[str, Any]) -> dict[str, Any]:
    """``row`` with NaN where JSON has null, which stands for it: what was measured and is no number."""
    return {k: float("nan") if v is None else v for k, v in row.items()}


def _csv(rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(["phase", "case", "status", *(name for row in rows for name in row)]))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def bars(rows: list[dict[str, Any]], found: dict[str, list[dict[str, Any]]]) -> Iterator[tuple[str, bool | None]]:
    """(what was asked and what was found, whether it holds; None when it was not measured)."""
    found = {name: [_numbers(row) for row in table] for name, table in found.items()}
    step = {(r["network"], r["batch"], r["contender"]): r for r in found.get("step", [])}
    compiled = {(r["network"], r["batch"], r["contender"].split("-")[0]): r for r in found.get("compiled", [])}
    compiled = {(n, b, "fused"): r for (n, b, name), r in step.items() if name == CONTENDER} | compiled
    for network in ("celeba64", "ffhq128"):
        for batch in (1, 8, 64):
            if bar := BASELINE_BARS.get(batch):
                ratio = step.get((network, batch, CONTENDER), {}).get("ratio")
                yield _bar(f"{network} batch {batch}: {CONTENDER} >= {bar:g}x the baseline", ratio, bar, "{:.2f}x")
            ours, other = (compiled.get((network, batch, side)) for side in ("fused", "compile"))
            what = f"{network} batch {batch}: {CONTENDER} >= {COMPILE_BAR}x torch.compile"
            if other is not None:
                what += f" ({other['contender'].removeprefix('compile-')})"
            ratio = _over(other["median_s"], ours["median_s"]) if ours and other else None
            yield _bar(what, ratio, COMPILE_BAR, "{:.2f}x")
        batch, bar = FLOAT8_BAR
        ratio = step.get((network, batch, FLOAT8_CONTENDER), {}).get("ratio")
        yield _bar(f"{network} batch {batch} in fp8: >= {bar:g}x the baseline", ratio, bar, "{:.2f}x")
    network, batch, bar = PEAK_BAR
    fraction = step.get((network, batch, CONTENDER), {}).get("peak_fraction")
    yield _bar(f"{network} batch {batch}: >= {bar:.0%} of matmul peak", fraction, bar, "{:.0%}")
    trained = [r for r in found.get("training", []) if r["network"] == "celeba64" and r["contender"] != "baseline"]
    # What is no number loses against every number.
    best = max(trained, key=lambda r: (r["ratio"] == r["ratio"], r["ratio"]), default={"ratio": None})
    what = f"celeba64 training >= {TRAINING_BAR:g}x the published loop"
    if "contender" in best:
        what += f" ({best['contender']})"
    yield _bar(what, best["ratio"], TRAINING_BAR, "{:.2f}x")
    for row in found.get("quality", []):
        if "ssim_difference" in row:
            text = f"{row['what']}, {row['steps']}: SSIM {row['ssim_difference']:+.4f} (within {quality.SSIM_BOUND}), "
            text += f"MSE x{row['ratio_mse']:.3f} (within {quality.MSE_BOUND:.0%})"
            # The bounds are those of 100 steps each way: a quick visit's few steps are printed, not judged.
            yield text, quality.precision_holds(row) if row["steps"] == "100+100" else None
        else:
            text = f"{row['what']}, {row['steps']} steps: {row['error']:.1e} (<= {quality.PLAN_BOUND:.0e})"
            yield text, row["error"] <= quality.PLAN_BOUND
    for phase, what in (("kernels", "every kernel agrees with float64"), ("paths", "every path agrees with float32")):
        own = Counter(r["status"] for r in rows if r["phase"] == phase)
        holds = None if not own["PASS"] + own["FAIL"] else not own["FAIL"]
        yield f"{what}: {own['PASS']} passed, {own['FAIL']} failed, {own['SKIP']} skipped", holds


def _bar(what: str, value: float | None, bar: float, form: str) -> tuple[str, bool | None]:
    return (f"{what}: not measured", None) if value is None else (f"{what}: {form.format(value)}", value >= bar)


def _table(rows: list[dict[str, Any]], names: tuple[str, ...]) -> str:
    return tables.text([{n: row.get(n) for n in names} for row in rows])


def report(rows: list[dict[str, Any]], found: dict[str, list[dict[str, Any]]], phases: list[str]) -> str:
    """At most LONGEST characters; when it would be longer, the middle sections give way, never the bars."""
    facts = next((r for r in rows if r["case"] == "versions" and r["phase"] == "environment"), {})
    head = ", ".join(f"{k} {v}" for k, v in facts.items() if k not in ("phase", "case", "status", "seconds"))
    counts = []
    for phase in phases:
        own = Counter(r["status"] for r in rows if r["phase"] == phase)
        if own:
            seconds = sum(
                r.get("seconds") or 0
                for r in {(r["case"], r.get("seconds")): r for r in rows if r["phase"] == phase}.values()
            )
            counts.append([phase, *(str(own[s]) for s in STATUSES), f"{seconds:.0f}"])
    sections = [head, cli.table(["phase", *STATUSES, "seconds"], counts)]
    for name, title, names in SECTIONS:
        if name in found:
            sections.append(f"{title}\n{_table(found[name], names or tuple(tables.columns(found[name])))}")
    failed = [r for r in rows if r["status"] == "FAIL"]
    if failed:
        lines = [f"FAIL {r['phase']}: {r['case']}: {_reason(r)}"[:200] for r in failed[:SHOWN_FAILURES]]
        if len(failed) > SHOWN_FAILURES:
            lines.append(f"... and {len(failed) - SHOWN_FAILURES} more: rows.csv, failures.txt")
        sections.append("\n".join(lines))
    words = {True: "PASS", False: "FAIL", None: "----"}
    sections.append("\n".join(f"{words[holds]} {what}" for what, holds in bars(rows, found)))
    while len("\n\n".join(sections)) > LONGEST and len(sections) > 3:
        longest = max(range(1, len(sections) - 1), key=lambda i: len(sections[i]))
        if sections[longest].count("\n") <= 2:
            break
        sections[longest] = _halve(sections[longest])
    return "\n\n".join(sections)


def _halve(section: str) -> str:
    lines = [line for line in section.split("\n") if not line.startswith("(cut:")]
    kept = lines[: max(2, len(lines) // 2)]
    return "\n".join([*kept, "(cut: the rest is in results.json)"])


def _reason(row: dict[str, Any]) -> str:
    if "reason" in row:
        return str(row["reason"])
    return ", ".join(f"{k} {row[k]:.2e}" for k in ("error", "allowed") if isinstance(row.get(k), float)) or "failed"
