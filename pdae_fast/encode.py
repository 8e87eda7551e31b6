"""Encode images to latents in a file: `python -m pdae_fast.encode --input photos/ --out latents`."""

from __future__ import annotations

import sys
from typing import Any

from . import cli
from .errors import UserError
from .experiments import common
from .experiments.encode import FORMATS, Encoded, check_format, encode, label_columns, write_npz, write_parquet
from .experiments.journal import Journal
from .experiments.targets import Targets, find_targets
from .processes import processes

# Every block is flushed to disk, which would cost more than encoding a small one.
BLOCK_IMAGES = 256


def _targets(run: common.Run) -> Targets | None:
    """Labels where there are any; asking for them makes their absence an error."""
    if run.args.attributes or run.args.columns:
        return find_targets(run.args, run.spec, run.dataset)
    try:
        return find_targets(run.args, run.spec, run.dataset)
    except UserError:
        return None


def main(argv: list[str] | None = None) -> None:
    p = cli.parser("encode", "Images to latents: z, names, labels where known, and x_T when asked for, in one file.")
    common.add_options(p, out="latents", labels=True)
    p.add_argument("--with-x-T", action="store_true", help="infer x_T too (as large as the image, --steps evaluations)")
    p.add_argument("--format", choices=FORMATS, default="npz", help="of the file; parquet needs pyarrow")
    args = common.parse(p, argv)
    check_format(args.format)
    with processes() as group:
        args.device = group.device(args.device)
        run = common.open_run(args)
        targets = _targets(run)
        job = common.job_settings(run, with_x_T=args.with_x_T)
        size = run.pipe.batch_size if args.with_x_T else max(BLOCK_IMAGES, run.pipe.batch_size)
        journal = Journal(run.out, job, len(run.dataset), size, group)
        up = common.evaluations(run.pipe, "inferred", run.encode_steps) - common.evaluations(run.pipe, "random", None)
        total = journal.left() * (up if args.with_x_T else 1)
        with common.progress(run.pipe, total, "encode", args.quiet or not group.first) as advance:

            def work(block: Any) -> Any:
                found = encode(run.pipe, block, args.with_x_T, run.encode_steps)
                if not args.with_x_T:  # the encoder alone reports no progress
                    advance(len(block.names))
                return found

            journal.run(run.dataset, work, args.on_error)
        if group.first:
            report = _write(run, journal, targets, group.size)
            if not args.quiet:
                print(_summary(report))


def _write(run: common.Run, journal: Journal, targets: Targets | None, size: int) -> dict[str, Any]:
    encoded = Encoded(journal)
    labels = label_columns(targets, encoded.indices)
    arrays = ["z", "x_T"] if run.args.with_x_T else ["z"]
    path = run.out / f"latents.{run.args.format}"
    count = len(encoded.names)
    report = common.report(
        run,
        images=count,
        processes=size,
        file=str(path),
        arrays=arrays,
        latent_dim=run.model.config.latent_dim,
        weights=common.fingerprint(run.model),
        labels=None if targets is None else {"kind": targets.kind, "names": targets.names},
        broken=[{"name": name, "reason": reason} for name, reason in encoded.broken],
        **encoded.cost.report(count),
    )
    about = {key: report[key] for key in ("model", "weights", "input", "dtype", "versions")}
    if run.args.with_x_T:
        about |= {key: report[key] for key in ("steps", "encode_steps", "spacing", "iterations", "solver")}
    write = write_parquet if run.args.format == "parquet" else write_npz
    write(path, encoded, arrays, labels, about)
    cli.write_json(run.out / "metrics.json", report)
    journal.remove()
    return report


def _summary(report: dict[str, Any]) -> str:
    what = f"z [{report['images']}, {report['latent_dim']}]" + (" and x_T" if "x_T" in report["arrays"] else "")
    labels = report["labels"]
    known = f"{len(labels['names'])} {labels['kind']}" if labels else "no labels"
    lines = [
        f"{what}, {known}, of {' '.join(report['input'])} by {report['model']}, {report['dtype']}, {report['device']}, "
        f"{report['seconds']:.1f} seconds ({report['images_per_second']:.3g} images/s)"
    ]
    if report["broken"]:
        named = ", ".join(b["name"] for b in report["broken"][:5])
        lines.append(f"{len(report['broken'])} broken images skipped: {named}")
    lines += [f"assumed about the model: {note}" for note in report["assumed"]]
    lines.append(f"wrote {report['file']}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(cli.run(main))
