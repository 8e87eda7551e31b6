"""From images to latents in a file: z, the images' names, their labels where known, and x_T when asked for."""

from __future__ import annotations

import argparse
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import cli
from ..data import none_read
from ..errors import UserError
from ..files import atomic_write, claim_folder
from ..pipeline import Pipeline
from ..processes import processes
from . import common
from .common import Cost
from .journal import Block, Journal
from .targets import Targets, find_targets

FORMATS = ("npz", "parquet")
UNKNOWN = -1  # label of an image that the attribute table has no row for


def encode(pipe: Pipeline, block: Block, with_x_T: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """z [B, latent_dim] of the images of ``block`` and x_T [B, C, H, W] (pairs with the solver belm), for a journal."""
    cost = Cost()
    with cost.of(pipe):
        arrays = {"z": pipe.encode(block.images)}
        if with_x_T:
            arrays["x_T"] = pipe.invert(block.images, arrays["z"])
    for name, array in arrays.items():
        bad = ~torch.isfinite(array.flatten(1)).all(dim=1)
        if bool(bad.any()):
            first = block.names[int(bad.nonzero()[0])]
            raise UserError(f"{first}: its {name} holds NaN or infinite values; try --dtype float32")
    return {"cost": cost.values()}, arrays


def label_columns(targets: Targets | None, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Arrays for a file of the images ``indices`` [K]: "labels" int64 [K] (classes) or int8 [K, attributes], UNKNOWN
    where there is none, and "label_names"; empty without ``targets``."""
    if targets is None:
        return {}
    place = {int(index): row for row, index in enumerate(targets.indices)}
    rows = np.array([place.get(int(index), -1) for index in indices], dtype=np.int64)
    dtype = np.int64 if targets.kind == "classes" else np.int8
    labels = np.full((len(rows), *targets.values.shape[1:]), UNKNOWN, dtype)
    labels[rows >= 0] = targets.values[rows[rows >= 0]]
    return {"labels": labels, "label_names": np.array(targets.names)}


class Encoded:
    """What a finished journal of `encode` holds, without the arrays: names, indices int64 [K], broken, cost."""

    def __init__(self, journal: Journal) -> None:
        self.journal, self.cost = journal, Cost()
        self.names: list[str] = []
        self.broken: list[tuple[str, str]] = []
        indices: list[int] = []
        for entry in journal.entries(arrays=False):
            self.names += entry.names
            self.broken += entry.broken
            indices += entry.indices
            if entry.names:
                self.cost.add(entry.values["cost"])
        self.indices = np.array(indices, dtype=np.int64)
        if not self.names:
            raise none_read(self.broken)

    def pieces(self, name: str) -> Iterator[np.ndarray]:
        return (entry.arrays[name] for entry in self.journal.entries() if entry.names)


def write_npz(path: Path, encoded: Encoded, arrays: list[str], labels: dict[str, np.ndarray], about: dict) -> None:
    """numpy.savez of "names", ``arrays`` (float32), ``labels`` and "about" (JSON text), piece by piece: a data set's
    x_T need not fit the memory."""
    with atomic_write(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        whole = {"names": np.array(encoded.names), **labels, "about": np.array(json.dumps(about))}
        for name, array in whole.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
        for name in arrays:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                for i, piece in enumerate(encoded.pieces(name)):
                    if i == 0:
                        shape = (len(encoded.names), *piece.shape[1:])
                        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                        np.lib.format.write_array_header_1_0(member, header)
                    member.write(piece.tobytes())


def write_parquet(path: Path, encoded: Encoded, arrays: list[str], labels: dict[str, np.ndarray], about: dict) -> None:
    """One row an image: "name", each of ``arrays`` as a list of float32 (its shape is in the column's metadata),
    "label" (a class name) or one integer column for each attribute; ``about`` as the file's metadata."""
    pa, parquet = _pyarrow()
    first = {name: next(encoded.pieces(name)).shape[1:] for name in arrays}
    fields = [pa.field("name", pa.string())]
    for name, shape in first.items():
        kind = pa.list_(pa.float32(), int(np.prod(shape)))
        fields.append(pa.field(name, kind, metadata={"shape": json.dumps(list(shape))}))
    names = [str(name) for name in labels.get("label_names", ())]
    classes = labels and labels["labels"].ndim == 1
    fields += [pa.field("label", pa.string())] if classes else [pa.field(name, pa.int8()) for name in names]
    schema = pa.schema(fields, metadata={"pdae_fast": json.dumps(about)})
    row = 0
    with atomic_write(path) as file, parquet.ParquetWriter(file, schema) as writer:
        for entry in encoded.journal.entries():
            if not entry.names:
                continue
            columns: list[Any] = [pa.array(entry.names)]
            for name in arrays:
                flat = pa.array(entry.arrays[name].ravel())
                columns.append(pa.FixedSizeListArray.from_arrays(flat, len(flat) // len(entry.names)))
            if labels:
                own = labels["labels"][row : row + len(entry.names)]
                columns += (
                    [pa.array([names[v] for v in own])] if classes else [pa.array(own[:, j]) for j in range(len(names))]
                )
            row += len(entry.names)
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError("--format parquet needs pyarrow: pip install 'pdae_fast[parquet]'") from None
    return pyarrow, pyarrow.parquet


def check_format(format: str) -> None:
    """UserError, before any work, where the file could not be written at the end."""
    if format == "parquet":
        _pyarrow()


# -- the command ---------------------------------------------------------------------------------------------------

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


def _parser() -> argparse.ArgumentParser:
    p = cli.parser("encode", "Images to latents: z, names, labels where known, and x_T when asked for, in one file.")
    common.add_options(p, out="latents", labels=True)
    p.add_argument("--with-x-T", action="store_true", help="infer x_T too (as large as the image, --steps evaluations)")
    p.add_argument("--format", choices=FORMATS, default="npz", help="of the file; parquet needs pyarrow")
    return p


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    check_format(args.format)
    with processes() as group:
        args.device = group.device(args.device)
        run = common.open_run(args, infers=args.with_x_T)
        targets = _targets(run)
        job = common.job_settings(run, with_x_T=args.with_x_T)
        size = run.pipe.batch_size if args.with_x_T else max(BLOCK_IMAGES, run.pipe.batch_size)
        if group.first:
            claim_folder(run.out)
        journal = Journal(run.out, job, len(run.dataset), size, group)
        total = journal.left() * (run.pipe.recipe.evaluations_up(run.pipe.schedule) if args.with_x_T else 1)
        with common.progress(run.pipe, total, "encode", args.quiet or not group.first) as advance:

            def work(block: Any) -> Any:
                found = encode(run.pipe, block, args.with_x_T)
                if not args.with_x_T:  # the encoder alone reports no progress
                    advance(len(block.names))
                return found

            journal.run(run.dataset, work, args.on_error)
        if group.first:
            report, broken = _write(run, journal, targets, group.size)
            common.say(run, _summary(report), [f"latents.{args.format}", "metrics.json"], broken)


def _write(
    run: common.Run, journal: Journal, targets: Targets | None, size: int
) -> tuple[dict[str, Any], common.Broken]:
    encoded = Encoded(journal)
    labels = label_columns(targets, encoded.indices)
    arrays = ["z", "x_T"] if run.args.with_x_T else ["z"]
    path = run.out / f"latents.{run.args.format}"
    count = len(encoded.names)
    report = common.report(
        run,
        encoded.broken,
        images=count,
        processes=size,
        file=str(path),
        arrays=arrays,
        latent_dim=run.model.config.latent_dim,
        weights=run.weights,
        labels=None if targets is None else {"kind": targets.kind, "names": targets.names},
        **encoded.cost.report(count),
    )
    about = {key: report[key] for key in ("model", "weights", "input", "dtype", "versions")}
    if run.args.with_x_T:
        about |= {key: report[key] for key in run.pipe.recipe.describe()}
    write = write_parquet if run.args.format == "parquet" else write_npz
    write(path, encoded, arrays, labels, about)
    cli.write_json(run.out / "metrics.json", report)
    journal.remove()
    return report, encoded.broken


def _summary(report: dict[str, Any]) -> list[str]:
    what = f"z [{report['images']}, {report['latent_dim']}]" + (" and x_T" if "x_T" in report["arrays"] else "")
    labels = report["labels"]
    known = f"{len(labels['names'])} {labels['kind']}" if labels else "no labels"
    return [
        f"{what}, {known}, of {' '.join(report['input'])} by {report['model']}, {report['dtype']}, {report['device']}, "
        f"{report['seconds']:.1f} seconds ({report['images_per_second']:.3g} images/s)"
    ]
