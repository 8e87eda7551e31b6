"""`python -m pdae_fast.export onnx`: the graphs of a model, checked against it, and their manifest.

From Python: ``export_onnx(model, "exported", ExportSettings(dtype="float16"))``.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib
import json
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from .. import checkpoints, cli
from ..config import to_dict
from ..engine.device import DTYPES
from ..engine.features import as_outputs, level_shapes
from ..errors import UserError
from ..files import atomic_write
from ..models import PDAE, Autoencoder, DiffAE, Prior, Student, load_model, unet_of
from ..schedule import build_schedule
from . import manifest as manifests
from .graphs import NORMS, build_graphs, conditioning_width
from .runtime import load_backend
from .staging import check_target, staged_directory
from .student import export_student, is_student_export

if TYPE_CHECKING:
    from ._parity import PlainModules

DESCRIPTION = "Write a model as ONNX graphs that run without PyTorch, every one checked against the model first."
INSTALL = "pip install 'pdae_fast[onnx]'"
OPSETS = {"float32": (21, 22, 23), "float16": (21, 22, 23), "bfloat16": (22, 23)}  # by dtype, the default first
SHARED_WEIGHTS = "step.weights"
STEPS = ("decode_step", "invert_step")


@dataclass(frozen=True)
class ExportSettings:
    """What to export, checked when it is made (UserError).

    steps, encode_steps: DDIM steps down and up (None: the same), constants of the graphs. dtype: of the networks; the
    norms, state and update are always float32. opset: 21, 22 or 23 (None: 21; 22 for bfloat16, which has no Conv
    before). norm: "group" (one GroupNormalization node each) or "instance" (InstanceNormalization, which ONNX Runtime
    computes faster on the CPU). max_batch: the most images of one evaluation (the graphs take any number).
    single_file: also reconstruct.onnx, with the loops inside. label: the class of all images, of a class-conditional
    model (required there).
    features: also write features.onnx, the maps of the middle block and of so many output blocks.
    verify: also run a whole reconstruction through the runtime and compare it with the model.
    """

    steps: int = 100
    encode_steps: int | None = None
    dtype: str = "float32"
    opset: int | None = None
    norm: str = "group"
    max_batch: int = 16
    single_file: bool = False
    verify: bool = False
    label: int | None = None
    features: int | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(f"dtype {self.dtype!r} cannot be exported; expected {', '.join(DTYPES)}")
        opsets = OPSETS[self.dtype]
        if self.opset is None:
            object.__setattr__(self, "opset", opsets[0])
        if self.opset not in opsets:
            raise UserError(
                f"opset {self.opset} cannot be exported in {self.dtype}; expected {', '.join(map(str, opsets))}"
            )
        if self.norm not in NORMS:
            raise UserError(f"norm {self.norm!r} is not known; expected {' or '.join(NORMS)}")
        if self.features is not None and self.features < 0:
            raise UserError(f"features must be at least 0, not {self.features}")
        if self.max_batch < 1:
            raise UserError(f"max batch must be at least 1, not {self.max_batch}")


def add_arguments(p: argparse.ArgumentParser) -> None:
    defaults = ExportSettings()
    p.add_argument("--model", default=cli.DEFAULT_MODEL, help="bundled name, saved directory or foreign checkpoint")
    p.add_argument("--out", required=True, metavar="DIR", help="directory to write; an earlier export is replaced")
    p.add_argument("--steps", type=int, default=defaults.steps, help="DDIM steps of a decoding")
    p.add_argument("--encode-steps", type=int, help="DDIM steps that infer x_T (default: --steps)")
    p.add_argument("--dtype", default=defaults.dtype, help=f"of the networks: {', '.join(DTYPES)}")
    p.add_argument("--opset", type=int, help="21, 22 or 23 (default: 21; 22 for bfloat16)")
    p.add_argument("--norm", default=defaults.norm, help="how a group norm is written: group (one node) or instance")
    p.add_argument("--max-batch", type=int, default=defaults.max_batch, help="the most images of one evaluation")
    p.add_argument("--single-file", action="store_true", help="also write reconstruct.onnx with the loops inside")
    p.add_argument(
        "--features",
        type=int,
        metavar="K",
        help="also write features.onnx: the maps of the middle block and of the first K output blocks",
    )
    p.add_argument("--label", type=int, help="class of all images, of a class-conditional model")
    p.add_argument("--prior", action="store_true", help="only the prior inside a PDAE: no encoder, no G")
    p.add_argument("--verify", action="store_true", help="also compare a whole reconstruction, all steps up and down")
    p.add_argument("--quiet", action="store_true", help="no progress bar, no table")
    cli.add_foreign_options(p)


def main(args: argparse.Namespace) -> None:
    settings = ExportSettings(**{f.name: getattr(args, f.name) for f in dataclasses.fields(ExportSettings)})
    student = None if args.prior else _student(args.model)
    check_target(args.out, is_student_export if student else manifests.is_export)
    _require_onnx()
    if student:
        manifest = export_student(student, args.out, settings, _origin(args.model))
        if not args.quiet:
            error, bound = (manifest["parity"][name] for name in ("relative_error", "bound"))
            print(f"wrote {args.out}: student.onnx, {settings.dtype}, error {error:.1e} (allowed {bound:.0e})")
        return
    model = _load(args.model, args.prior, cli.foreign_options(args))
    start = time.perf_counter()
    with tqdm(total=_work(model, settings), desc="export", disable=args.quiet or None) as bar:
        manifest = export_onnx(model, args.out, settings, _origin(args.model), bar.update)
    if not args.quiet:
        print(_summary(args.out, manifest, model, time.perf_counter() - start))


def export_onnx(
    model: PDAE | DiffAE | Prior,
    out: str | Path,
    settings: ExportSettings | None = None,
    source: dict[str, Any] | None = None,
    progress: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Write ``model`` to the directory ``out`` and return its manifest.

    Everything is written beside ``out``, checked with onnx.checker and compared with the model, and takes its place at
    the end. ``source``: what the manifest says of the model's origin. ``progress`` is called after every piece of work.

    Raises UserError for settings that do not go together, an ``out`` that holds something else, a graph that differs
    from the model by more than its dtype explains, or when onnx or onnxruntime is missing.
    """
    _require_onnx()
    from ._parity import PlainModules

    model, settings = _as_reference(model), settings or ExportSettings()
    _check_label(model, settings.label)
    if settings.features is not None:
        as_outputs(settings.features, unet_of(model))
    schedule = build_schedule(model.config.schedule)
    encode_steps = settings.steps if settings.encode_steps is None else settings.encode_steps
    manifest = _describe(model, settings, encode_steps, source)
    modules = build_graphs(
        model,
        schedule,
        settings.steps,
        encode_steps,
        DTYPES[settings.dtype],
        settings.norm,
        settings.label,
        settings.features,
    )
    seed = secrets.randbits(32)
    with staged_directory(out) as directory:
        _write_graphs(directory, modules, manifest, progress)
        if settings.single_file:
            _write_reconstruct(directory, manifest)
            progress()
        reference = PlainModules(model, seed, settings.label)
        manifest["parity"] = {"seed": seed, "reference": "plain modules, float32"}
        _compare(directory, manifest, reference, settings, progress)
        manifests.write(directory, manifest)
    return manifest


def _require_onnx() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(f"{name} cannot be imported ({error}); {INSTALL}") from None


def _student(name: str) -> Student | None:
    """The student that ``name`` holds, or None."""
    path = Path(name).expanduser() / checkpoints.directory.CONFIG_NAME
    if not path.is_file():
        return None
    try:
        kind = json.loads(path.read_bytes()).get("kind")
    except (OSError, ValueError, AttributeError):
        return None
    return Student.from_pretrained(name) if kind == "student" else None


def _load(name: str, prior: bool, options: dict[str, Any]) -> PDAE | DiffAE | Prior:
    if prior:
        return Prior.from_pretrained(name, **options)
    return load_model(name, **options)


def _check_label(model: PDAE | DiffAE | Prior, label: int | None) -> None:
    classes = model.config.unet.num_classes
    if classes is None and label is not None:
        raise UserError(f"label {label}: this model is not class-conditional; expected none")
    if classes is not None and not (label is not None and 0 <= label < classes):
        raise UserError(
            f"label {label}: graphs of a class-conditional model are those of one class; "
            f"expected one from 0 to {classes - 1} (--label)"
        )


def _as_reference(model: PDAE | DiffAE | Prior) -> PDAE | DiffAE | Prior:
    """``model`` as the reference is: float32, on the CPU, in eval mode; copied when it is not."""
    weights = next(model.parameters())
    if weights.dtype == torch.float32 and weights.device.type == "cpu" and not model.training:
        return model
    return copy.deepcopy(model).to("cpu", torch.float32).eval()


def _write_graphs(
    directory: Path, modules: dict[str, torch.nn.Module], manifest: dict[str, Any], progress: Callable[[], object]
) -> None:
    from . import _tracing

    traced = {}
    for name in list(modules):
        inputs, outputs = _signature(name, manifest)
        traced[name] = _tracing.trace(modules.pop(name), inputs, outputs, manifest["opset"])
        progress()
    _tracing.share_weights([traced[name] for name in STEPS], directory / SHARED_WEIGHTS)
    manifest["files"][SHARED_WEIGHTS] = manifests.file_entry(directory / SHARED_WEIGHTS)
    for name in list(traced):
        path = directory / f"{name}.onnx"
        _tracing.save(traced.pop(name), path)
        _tracing.check(path)
        manifest["graphs"][name] = _entry(directory, name, manifest, [SHARED_WEIGHTS] if name in STEPS else [])


def _write_reconstruct(directory: Path, manifest: dict[str, Any]) -> None:
    from . import _loop, _tracing

    path = directory / f"{manifests.RECONSTRUCT}.onnx"
    model = _loop.compose(directory, manifest["kind"], manifest["steps"], manifest["encode_steps"])
    with atomic_write(path) as file:
        file.write(model.SerializeToString())
    _tracing.check(path)
    manifest["graphs"][manifests.RECONSTRUCT] = _entry(directory, manifests.RECONSTRUCT, manifest, [])


def _compare(
    directory: Path,
    manifest: dict[str, Any],
    reference: PlainModules,
    settings: ExportSettings,
    progress: Callable[[], object],
) -> None:
    """Fill ``manifest["parity"]``; UserError when an error is beyond its bound."""
    from . import _parity

    parity = manifest["parity"]
    with _parity.scratch_directory(directory) as scratch:
        place, described = _parity.checkable(directory, manifest, Path(scratch))
        if place != directory:
            parity["note"] = _parity.BFLOAT16_NOTE
        backend = load_backend(place, described, provider="cpu", threads=torch.get_num_threads())
        batches = tuple(sorted({1, min(3, settings.max_batch)}))
        parity |= _parity.measure(backend, reference, manifest, batches)
        progress()
        if settings.single_file or settings.verify:
            parity |= _parity.measure_all_steps(backend, reference, manifest, settings.single_file, settings.verify)
            progress()
    _parity.refuse({k: v for k, v in parity.items() if isinstance(v, dict)})
    manifest["parity"] = parity


def _work(model: PDAE | DiffAE | Prior, settings: ExportSettings) -> int:
    graphs = len(manifests.GRAPHS[to_dict(model.config)["kind"]])
    graphs += settings.features is not None
    return graphs + 1 + settings.single_file + (settings.single_file or settings.verify)


# -- what the manifest and the terminal say of an export --------------------------------------------------------------


def _origin(name: str) -> dict[str, Any]:
    """The model's name without its folder, and the hash of its weights' file."""
    bundled = name in checkpoints.available()
    path = checkpoints.directory.BUNDLED / name if bundled else Path(name).expanduser().resolve()
    file = path / checkpoints.directory.WEIGHTS_NAME if path.is_dir() else path
    return {"name": path.name, "file": file.name, **manifests.file_entry(file)}


def _describe(
    model: PDAE | DiffAE | Prior, settings: ExportSettings, encode_steps: int, source: dict[str, Any] | None
) -> dict[str, Any]:
    """The manifest as far as it is known before anything is written."""
    import onnx
    import onnxruntime
    import onnxscript

    schedule = build_schedule(model.config.schedule)
    decode, invert = schedule.timesteps(settings.steps), schedule.timesteps(encode_steps)
    return {
        "backend": "onnxruntime",
        "kind": to_dict(model.config)["kind"],
        "image_shape": list(model.image_shape),
        "latent_dim": model.config.latent_dim if isinstance(model, Autoencoder) else None,
        "conditioning_width": conditioning_width(model),
        "noise": model.config.noise,
        "features": None
        if settings.features is None
        else [list(s) for s in level_shapes(unet_of(model), model.config.image_size)[: settings.features + 1]],
        "label": settings.label,
        "dtype": settings.dtype,
        # Rounding to whole time points can merge some: 1000 steps asked for are 999 to run.
        "steps": len(decode) - 1,
        "encode_steps": len(invert) - 1,
        "requested_steps": settings.steps,
        "requested_encode_steps": encode_steps,
        "opset": settings.opset,
        "norm": settings.norm,
        "max_batch": settings.max_batch,
        "schedule": {
            **dataclasses.asdict(model.config.schedule),
            "decode_times": decode[::-1].tolist(),
            "invert_times": invert.tolist(),
        },
        "model": source or {"name": type(model).__name__},
        "versions": {
            **cli.versions(),
            "onnx": onnx.__version__,
            "onnxscript": onnxscript.__version__,
            "onnxruntime": onnxruntime.__version__,
        },
        "graphs": {},
        "files": {},
    }


def _entry(directory: Path, graph: str, manifest: dict[str, Any], external: list[str]) -> dict[str, Any]:
    path = directory / f"{graph}.onnx"
    return {**manifests.graph_entry(path, *_signature(graph, manifest)), "external": external}


def _signature(graph: str, manifest: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    if graph == manifests.FEATURES:
        return manifests.feature_signature(manifest)
    return manifests.signature(graph, manifest["image_shape"], manifest["latent_dim"], manifest["conditioning_width"])


def _summary(out: str, manifest: dict[str, Any], model: PDAE | DiffAE | Prior, seconds: float) -> str:
    rows = []
    for name, entry in manifest["graphs"].items():
        errors = manifest["parity"][name]
        rows.append(
            [name, entry["file"], _size(entry["bytes"]), f"{errors['relative_error']:.1e}", f"{errors['bound']:.0e}"]
        )
    rows += [["", name, _size(entry["bytes"]), "", ""] for name, entry in manifest["files"].items()]
    lines = [cli.table(["graph", "file", "size", "error", "allowed"], rows, left=2)]
    if "all_steps" in manifest["parity"]:
        errors = manifest["parity"]["all_steps"]
        lines.append(
            f"verified: a whole reconstruction differs from the model's by {errors['relative_error']:.1e} (relative)"
        )
    if "note" in manifest["parity"]:
        lines.append(f"errors {manifest['parity']['note']}")
    lines += [f"assumed about the model: {note}" for note in model.notes]
    lines.append(
        f"wrote {out}: {manifest['kind']}, {manifest['encode_steps']} steps up and {manifest['steps']} down, "
        f"{manifest['dtype']}, opset {manifest['opset']}, at most {manifest['max_batch']} images at a time, "
        f"in {seconds:.0f} s"
    )
    return "\n".join(lines)


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
