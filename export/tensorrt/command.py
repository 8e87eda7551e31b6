"""python -m pdae_fast.export tensorrt: TensorRT engines from exported ONNX graphs."""

from __future__ import annotations

import argparse
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ... import cli
from ...errors import UserError
from ...files import atomic_write
from .. import manifest as manifests
from ..backends.cuda import present_capability
from ..backends.tensorrt import check_engines
from ..backends.tensorrt_flavor import FLAVORS, file_suffix, parse_capability
from ..staging import check_target, staged_directory
from .build import EngineBuilder, Profile

DESCRIPTION = "Build TensorRT engines from a directory of exported ONNX graphs."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--onnx", required=True, metavar="DIR", help="written by: python -m pdae_fast.export onnx")
    parser.add_argument("--out", required=True, metavar="DIR", help="directory for the engines")
    parser.add_argument(
        "--flavor", choices=list(FLAVORS), default="tensorrt", help="which TensorRT builds and runs them"
    )
    parser.add_argument(
        "--profile", metavar="MIN,OPT,MAX", help="images per evaluation (default: 1,B,B; B of the export)"
    )
    parser.add_argument(
        "--capability",
        action="append",
        metavar="X.Y",
        help="compute capability to build for; repeat for several (default: of the GPU here)",
    )
    parser.add_argument("--tf32", action="store_true", help="let float32 convolutions round their operands to TF32")
    parser.add_argument("--timing-cache", metavar="FILE", help="read and extend the measurements of earlier builds")
    parser.add_argument("--verify", action="store_true", help="run the engines here and compare with ONNX Runtime")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no table")


def main(args: argparse.Namespace) -> None:
    flavor = FLAVORS[args.flavor]
    source = Path(args.onnx).expanduser()
    onnx = manifests.read(source, ["onnxruntime"])
    target = check_target(args.out, is_engines)
    profile = Profile.parse(args.profile or f"1,{onnx['max_batch']},{onnx['max_batch']}")
    if profile.maximum > onnx["max_batch"]:
        raise UserError(f"profile {profile}: {source} was exported for at most {onnx['max_batch']} images at a time")
    if args.timing_cache and flavor.builds_without_gpu:
        raise UserError(f"{flavor.title} measures nothing while it builds, so it has no timing cache")
    builder = EngineBuilder(flavor, profile, args.tf32, _read_timing_cache(args.timing_cache))
    capabilities = _capabilities(builder, args.capability, onnx["dtype"])
    manifests.check_files(source, onnx)

    build(source, onnx, target, builder, capabilities, args)
    if args.verify:
        from .verify import verify

        verify(source, target, quiet=args.quiet)


def is_engines(path: Path) -> bool:
    """Whether ``path`` is what this command wrote earlier, and may be replaced; ONNX graphs may not."""
    with suppress(UserError):
        return manifests.read(path)["backend"] in FLAVORS
    return False


def build(
    source: Path,
    onnx: dict[str, Any],
    target: Path,
    builder: EngineBuilder,
    capabilities: list[str],
    args: argparse.Namespace,
) -> None:
    """Write ``target``: engines of every graph for ``capabilities``, and the manifest.

    Engines that are there already, built from the same graphs with the same settings and version, are kept, so that
    one directory can be filled on several machines.
    """
    graphs = manifests.GRAPHS[onnx["kind"]]
    inputs = {
        "graphs": {name: onnx["graphs"][name]["sha256"] for name in graphs},
        "files": {name: entry["sha256"] for name, entry in onnx["files"].items()},
    }
    made = {
        "backend": builder.flavor.name,
        "tensorrt_version": builder.trt.__version__,
        "profile": [builder.profile.minimum, builder.profile.optimum, builder.profile.maximum],
        "tf32": builder.tf32,
        "onnx": inputs,
    }
    kept = _kept(target, made)
    new = [capability for capability in capabilities if capability not in kept]
    rows = []
    with staged_directory(target, is_engines) as staging:
        engines: dict[str, dict[str, Any]] = {}
        for capability, entries in kept.items():
            engines[capability] = entries
            for entry in entries.values():
                _link(target / entry["file"], staging / entry["file"])
        bar = tqdm(total=len(new) * len(graphs), unit="engine", disable=True if args.quiet else None)
        with bar:
            for capability in new:
                engines[capability] = {}
                for graph in graphs:
                    bar.set_description(f"{graph} for {capability}")
                    began = time.perf_counter()
                    built = builder.build(
                        source / onnx["graphs"][graph]["file"], onnx["graphs"][graph], onnx["dtype"], capability
                    )
                    path = staging / f"{graph}.{file_suffix(capability)}.engine"
                    with atomic_write(path) as file:
                        file.write(built.plan)
                    entry = {"file": path.name, **manifests.file_entry(path), "layers": built.layers}
                    engines[capability][graph] = entry
                    seconds = time.perf_counter() - began
                    rows.append(
                        [
                            graph,
                            capability,
                            _precisions(built.layers),
                            f"{entry['bytes'] / 2**20:.1f}",
                            f"{seconds:.1f}",
                        ]
                    )
                    _write_timing_cache(args.timing_cache, builder.timing_cache)
                    bar.update()
        first = engines[capabilities[0]]
        manifests.write(
            staging,
            {
                **{k: v for k, v in onnx.items() if k not in ("format", "graphs", "files")},
                **made,
                "max_batch": builder.profile.maximum,
                "refittable": False,
                "versions": {**(onnx.get("versions") or {}), builder.flavor.module: builder.trt.__version__},
                "graphs": {
                    name: {
                        **{k: first[name][k] for k in ("file", "sha256", "bytes")},
                        **{k: onnx["graphs"][name][k] for k in ("inputs", "outputs")},
                    }
                    for name in graphs
                },
                "files": {},
                "engines": engines,
            },
        )
    if not args.quiet:
        if rows:
            print(cli.table(["graph", "capability", "convolutions", "MiB", "seconds"], rows, left=3))
        already = f"; already there for {', '.join(kept)}" if kept else ""
        print(f"{target}: {builder.flavor.title} {builder.trt.__version__}, profile {builder.profile}{already}")


def _capabilities(builder: EngineBuilder, asked: list[str] | None, dtype: str) -> list[str]:
    present, reason = present_capability() if asked is None or not builder.flavor.builds_without_gpu else (None, "")
    if asked is None and present is None:
        how = "name one with --capability" if builder.flavor.builds_without_gpu else "build on the GPU they are for"
        raise UserError(f"no GPU here to build for ({reason}); {how}")
    capabilities = list(dict.fromkeys(parse_capability(text) for text in asked or [present]))
    for capability in capabilities:
        builder.check_capability(capability, dtype, present)
    return capabilities


def _kept(target: Path, made: dict[str, Any]) -> dict[str, Any]:
    """Engines at ``target``, by capability, that a build with the settings ``made`` would only write once more."""
    with suppress(UserError):
        earlier = manifests.read(target, [made["backend"]])
        if isinstance(earlier.get("engines"), dict) and all(earlier.get(k) == value for k, value in made.items()):
            return {capability: check_engines(target, earlier, capability) for capability in earlier["engines"]}
    return {}


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def _precisions(layers: dict[str, dict[str, int]]) -> str:
    return ", ".join(f"{n} {dtype}" for dtype, n in layers.get("convolution", {}).items()) or "none"


def _read_timing_cache(path: str | None) -> bytes | None:
    if path is None:
        return None
    if not Path(path).absolute().parent.is_dir():  # found out now, not after the build
        raise UserError(f"{path}: no such directory to write the timing cache into")
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected a timing cache") from error


def _write_timing_cache(path: str | None, content: bytes | None) -> None:
    if path is not None and content is not None:
        with atomic_write(path) as file:
            file.write(content)
