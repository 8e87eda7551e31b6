"""python -m pdae_fast.export serving: a model repository for NVIDIA Triton Inference Server."""

from __future__ import annotations

import argparse
import mmap
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ... import cli
from ...errors import UserError
from ...files import atomic_write
from ...limits import load_json
from .. import manifest as manifests
from ..backends.tensorrt import check_engines
from ..backends.tensorrt_flavor import file_suffix
from ..staging import check_target, staged_directory
from .pbtxt import Word, dumps

DESCRIPTION = "Write a model repository for NVIDIA Triton Inference Server from exported graphs."
#: beside the repository; written last, so that a directory without it is half-finished
INDEX = "serving.json"
INDEX_FORMAT = "pdae_fast-serving-1"
REPOSITORY = "models"
CLIENT = "client.py"
VERSION = "1"
TYPES = {"float32": "TYPE_FP32", "int64": "TYPE_INT64"}
KINDS = {"gpu": "KIND_GPU", "cpu": "KIND_CPU"}
PIPELINES = ("reconstruct", "invert", "decode")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--onnx", required=True, metavar="DIR", help="written by: python -m pdae_fast.export onnx")
    parser.add_argument(
        "--engine",
        action="append",
        metavar="DIR",
        help="written by: python -m pdae_fast.export tensorrt; served instead of the graphs; repeat for several GPUs",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="directory for the repository and its client")
    parser.add_argument("--name", default="pdae", help="what the names of the models begin with")
    parser.add_argument("--device", choices=list(KINDS), default="gpu", help="where the server runs the graphs")
    parser.add_argument("--instances", type=int, default=1, metavar="N", help="copies of each graph on every GPU")
    parser.add_argument("--pipelines", type=int, default=2, metavar="N", help="loops that may run at the same time")
    parser.add_argument(
        "--queue-delay", type=int, default=1000, metavar="US", help="microseconds that a request waits for company"
    )
    parser.add_argument("--quiet", action="store_true", help="no table")


def main(args: argparse.Namespace) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", args.name):
        raise UserError(f"name {args.name!r}; expected letters, digits, '_', '.' and '-'")
    for option in ("instances", "pipelines"):
        if getattr(args, option) < 1:
            raise UserError(f"--{option} {getattr(args, option)}; expected at least 1")
    if args.queue_delay < 0:
        raise UserError(f"--queue-delay {args.queue_delay}; expected microseconds, 0 or more")
    source = Path(args.onnx).expanduser()
    onnx = manifests.read(source, ["onnxruntime"])
    manifests.check_signatures(source, onnx)
    if args.engine and args.device == "cpu":
        raise UserError("TensorRT engines run on a GPU only; leave out --engine, or --device cpu")
    if onnx["dtype"] == "bfloat16" and args.device == "cpu":
        raise UserError(f"{source}: ONNX Runtime has no bfloat16 convolution on the CPU; export in float32 or float16")
    check_target(args.out, is_serving)
    engines = [Engines(Path(path).expanduser(), onnx) for path in args.engine or ()]
    manifests.check_files(source, onnx)
    layout = Layout(source, onnx, engines, args)
    with staged_directory(args.out, is_serving) as staging:
        for name, (config, files) in layout.models().items():
            version = staging / REPOSITORY / name / VERSION
            version.mkdir(parents=True)
            for target, file in files.items():
                shutil.copyfile(file, version / target)
            with atomic_write(version.parent / "config.pbtxt", "w") as file:
                file.write(dumps(config))
        shutil.copyfile(Path(__file__).with_name(CLIENT), staging / CLIENT)
        cli.write_json(staging / INDEX, layout.index(staging))
    if not args.quiet:
        print(layout.table())
        print(f"{args.out}: start the server with --model-repository={Path(args.out) / REPOSITORY}{layout.needs()}")


def is_serving(path: Path) -> bool:
    """Whether ``path`` is what this command wrote earlier, and may be replaced."""
    try:
        return load_json(path / INDEX, INDEX_FORMAT)["format"] == INDEX_FORMAT
    except (UserError, KeyError, TypeError, IndexError):
        return False


class Engines:
    """A directory of engines, checked to be of these ONNX graphs and fit for the server."""

    def __init__(self, directory: Path, onnx: dict[str, Any]) -> None:
        self.directory, self.manifest = directory, manifests.read(directory, ["tensorrt", "tensorrt-rtx"])
        made = self.manifest
        if made["backend"] == "tensorrt-rtx":
            raise UserError(
                f"{directory}: engines of TensorRT for RTX, which the server's TensorRT backend does not load; build "
                "with --flavor tensorrt, or serve the ONNX graphs"
            )
        graphs = manifests.GRAPHS[onnx["kind"]]
        hashes = (made.get("onnx") or {}).get("graphs", {})
        if any(hashes.get(name) != onnx["graphs"][name]["sha256"] for name in graphs):
            raise UserError(f"{directory}: built from other ONNX graphs than those given; build once more")
        profile = made.get("profile")
        if not isinstance(made.get("tensorrt_version"), str):
            raise UserError(f"{directory}: does not say which TensorRT built it; build once more")
        if not isinstance(profile, list) or profile[0] != 1:
            raise UserError(f"{directory}: profile {profile}; a server gets single images, so build with MIN 1")
        self.files = {
            capability: check_engines(directory, made, capability) for capability in made.get("engines") or {}
        }
        if not self.files:
            raise UserError(f"{directory}: lists no engines; build once more")


class Layout:
    """The models of one repository: their configurations and files."""

    def __init__(self, source: Path, onnx: dict[str, Any], engines: list[Engines], args: argparse.Namespace) -> None:
        self.source, self.onnx, self.args = source, onnx, args
        self.engines: dict[str, tuple[Path, dict[str, Any]]] = {}
        for made in engines:
            for capability, files in made.files.items():
                if capability in self.engines:
                    raise UserError(f"{made.directory}: a second set of engines for compute capability {capability}")
                self.engines[capability] = made.directory, files
        versions = {made.manifest["tensorrt_version"] for made in engines}
        if len(versions) > 1:
            raise UserError(f"engines of TensorRT {' and '.join(sorted(versions))}; a server has one version")
        self.tensorrt = next(iter(versions), None)
        self.max_batch = min([onnx["max_batch"], *(made.manifest["max_batch"] for made in engines)])

    def models(self) -> dict[str, tuple[dict[str, Any], dict[str, Path]]]:
        """Configuration and files ({name in the version's folder: where from}) by name of the model."""
        found = {}
        for graph in manifests.GRAPHS[self.onnx["kind"]]:
            found[f"{self.args.name}_{graph}"] = self._graph(graph)
        for task in PIPELINES:
            files = {"model.py": Path(__file__).with_name("model.py")}
            found[f"{self.args.name}_{task}"] = self._pipeline(task), files
        return found

    def _graph(self, graph: str) -> tuple[dict[str, Any], dict[str, Path]]:
        entry = self.onnx["graphs"][graph]
        # The server can only merge requests if every input has a row for every image. The step number has not: requests
        # at different steps must never share a batch, so these models take the batch as an ordinary dimension, and
        # requests are merged one level higher, in the pipelines, where all images are at the same step.
        batched = all(isinstance(tensor["shape"][0], str) for tensor in entry["inputs"])
        config: dict[str, Any] = {"name": f"{self.args.name}_{graph}"}
        if self.engines:
            names = {capability: f"model.{file_suffix(capability)}.plan" for capability in self.engines}
            files = {names[c]: directory / made[graph]["file"] for c, (directory, made) in self.engines.items()}
            config |= {
                "backend": "tensorrt",
                "default_model_filename": next(iter(names.values())),
                "cc_model_filenames{}": names,
            }
        else:
            # Weights that graphs share are found by their name beside the graph.
            path = self.source / entry["file"]
            files = {"model.onnx": path, **{n: self.source / n for n in self.onnx["files"] if _mentions(path, n)}}
            config |= {"backend": "onnxruntime", "default_model_filename": "model.onnx"}
        config |= {
            "max_batch_size": self.max_batch if batched else 0,
            "input": _tensors(entry["inputs"], batched),
            "output": _tensors(entry["outputs"], batched),
            "instance_group": [{"kind": Word(KINDS[self.args.device]), "count": self.args.instances}],
        }
        return config | (self._batching() if batched else {}), files

    def _pipeline(self, task: str) -> dict[str, Any]:
        has_z = self.onnx["kind"] != "prior"
        image = ["N", *self.onnx["image_shape"]]
        latents = [manifests.tensor_entry("x_T", "float32", image)]
        if has_z:
            latents.append(manifests.tensor_entry("z", "float32", ["N", self.onnx["latent_dim"]]))
        x0, x = ([manifests.tensor_entry(name, "float32", image)] for name in ("x0", "x"))
        inputs, outputs = {"reconstruct": (x0, x), "invert": (x0, latents), "decode": (latents, x)}[task]
        parameters = {
            "task": task,
            "prefix": self.args.name,
            "kind": self.onnx["kind"],
            "steps": str(self.onnx["steps"]),
            "encode_steps": str(self.onnx["encode_steps"]),
        }
        return {
            "name": f"{self.args.name}_{task}",
            "backend": "python",
            "max_batch_size": self.max_batch,
            "input": _tensors(inputs, True),
            "output": _tensors(outputs, True),
            # A process each, which only waits for the graphs: it needs no GPU.
            "instance_group": [{"kind": Word("KIND_CPU"), "count": self.args.pipelines}],
            "parameters{}": {name: {"string_value": value} for name, value in parameters.items()},
            **self._batching(),
        }

    def _batching(self) -> dict[str, Any]:
        return {"dynamic_batching": {"max_queue_delay_microseconds": self.args.queue_delay}}

    def index(self, staging: Path) -> dict[str, Any]:
        """What serving.json says: where everything came from, and every file with its hash."""
        paths = sorted(path for path in staging.rglob("*") if path.is_file())
        return {
            "format": INDEX_FORMAT,
            "name": self.args.name,
            "max_batch": self.max_batch,
            "tensorrt_version": self.tensorrt,
            "onnx": {name: entry["sha256"] for name, entry in self.onnx["graphs"].items()},
            "model": self.onnx.get("model"),
            "files": {path.relative_to(staging).as_posix(): manifests.file_entry(path) for path in paths},
        }

    def needs(self) -> str:
        return f" (a server with TensorRT {self.tensorrt})" if self.tensorrt else ""

    def table(self) -> str:
        rows = [
            [
                name,
                config["backend"],
                str(config["max_batch_size"] or "-"),
                _words(config["input"]),
                _words(config["output"]),
            ]
            for name, (config, _) in self.models().items()
        ]
        return cli.table(["model", "backend", "merges up to", "inputs", "outputs"], rows, left=5)


def _mentions(path: Path, name: str) -> bool:
    """Whether the ONNX file at ``path`` refers to the file ``name`` for weights, which it does by this name."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(name.encode()) >= 0


def _tensors(entries: Iterable[dict[str, Any]], batched: bool) -> list[dict[str, Any]]:
    """Inputs or outputs; with ``batched`` the server adds the first dimension itself."""
    return [
        {
            "name": entry["name"],
            "data_type": Word(TYPES[entry["dtype"]]),
            "dims": manifests.dims(entry["shape"][1 if batched else 0 :]),
        }
        for entry in entries
    ]


def _words(tensors: list[dict[str, Any]]) -> str:
    return ", ".join(f"{tensor['name']} {tensor['dims']}" for tensor in tensors)
