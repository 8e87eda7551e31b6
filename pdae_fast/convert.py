"""Convert a foreign checkpoint into this project's directory, or a model into another project's layout.

python -m pdae_fast.convert FILE --config official.yml --out DIR
python -m pdae_fast.convert AUTOENCODER --latent FILE --classifier FILE --statistics FILE --out DIR
python -m pdae_fast.convert DIFFUSERS_DIR --out DIR
python -m pdae_fast.convert DIR --to official --out model.pt
python -m pdae_fast.convert DIR --to diffusers --out PIPELINE
python -m pdae_fast.convert DIR --to guided --out model.pt
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from . import checkpoints, cli, config
from .checkpoints import Loaded
from .checkpoints.directory import CONFIG_NAME, WEIGHTS_NAME
from .checkpoints.exports import (
    diffusers_paths,
    diffusers_unet,
    guided_flags,
    save_diffusers,
    save_guided,
)
from .checkpoints.foreign import located
from .checkpoints.official import limits, official_paths, refuse, save_official
from .config import PriorConfig
from .errors import UserError
from .files import LOCK, claim_folder, claim_place, is_unfinished, left_by_kill, make_folder
from .models import Autoencoder, Prior
from .models.pdae import refuse_student

_WORK = "convert"
_DTYPES = {"float32": torch.float32, "float16": torch.float16}
# Options of this command, beside the shared ones, that go to checkpoints.load as they are.
_READING = (
    "latent",
    "classifier",
    "statistics",
    "attributes",
    "dropout",
    "weights",
)
_SUFFIXES = {"official": (".pt", ".pth", ".ckpt"), "guided": (".pt", ".pth", ".safetensors")}


def _parser() -> argparse.ArgumentParser:
    p = cli.parser("convert", "Convert a checkpoint of another project, or export one.")
    p.add_argument("source", metavar="MODEL", help="checkpoint file or directory, or name of a bundled model")
    p.add_argument("--out", required=True, metavar="PATH", help="directory to write; a file with --to official, guided")
    layouts = ("pdae_fast", "official", "diffusers", "guided")
    p.add_argument("--to", choices=layouts, default="pdae_fast", help="layout to write")
    p.add_argument("--dtype", choices=tuple(_DTYPES), default="float32", help="of the weights that are written")
    p.add_argument("--overwrite", action="store_true", help="write over files or into a folder that is there")
    p.add_argument("--quiet", action="store_true", help="print nothing")
    cli.add_foreign_options(p)
    group = p.add_argument_group("reading", "what else the files do not say, or say elsewhere")

    def add(name: str, **settings: object) -> None:
        group.add_argument(name, default=argparse.SUPPRESS, **settings)

    add("--latent", metavar="FILE", help="latent DPM to make part of the autoencoder")
    add("--classifier", metavar="FILE", help="attribute classifier to make part of the autoencoder")
    add("--statistics", metavar="FILE", help="mean and std of the latents, to make part of the autoencoder")
    add("--attributes", metavar="FILE|NAMES", help="names of the classifier's rows: a file, or a,b,c")
    add("--dropout", type=float, help="dropout for further training (else from --config, else 0.1)")
    add("--weights", choices=("ema", "raw"), help="which weights to read where a file has both (else ema)")
    return p


def _convert(argv: list[str] | None) -> None:
    args = _parser().parse_args(argv)
    out = Path(args.out).expanduser()
    if args.to == "pdae_fast":
        _check_directory(out, args.overwrite)
        claim_folder(out, _WORK)
    options = cli.foreign_options(args) | {name: getattr(args, name) for name in _READING if hasattr(args, name)}
    loaded = checkpoints.load(args.source, **options)
    model = _build(loaded)
    dtype = _DTYPES[args.dtype]
    if args.to == "pdae_fast":
        _retire(out / CONFIG_NAME, model)
        with _all_or_none([out / WEIGHTS_NAME, out / CONFIG_NAME]):
            model.save_pretrained(out, dtype)
        written = [out]
    else:
        written = _export(out, args, loaded, model, dtype)
    if not args.quiet:
        print(_summary(args, loaded, model, written))


def _export(
    out: Path, args: argparse.Namespace, loaded: Loaded, model: Autoencoder | Prior, dtype: torch.dtype
) -> list[Path]:
    """Write ``model`` in another project's layout; UserError before anything is written where that cannot be."""
    config, state = model.config, model.state_dict()
    with located(args.source):
        {"official": refuse, "diffusers": diffusers_unet, "guided": guided_flags}[args.to](config)
    if args.to == "diffusers":
        if out.exists() and not out.is_dir():
            raise UserError(f"{out}: a file; expected a directory to write into")
        _check_files(diffusers_paths(out), args, left_by_kill(out, _WORK))
        claim_folder(out, _WORK)
        with _all_or_none(diffusers_paths(out)):
            save_diffusers(out, config, state, dtype)
        return [out]
    if out.suffix not in _SUFFIXES[args.to]:
        raise UserError(f"{out}: expected the name of a {_SUFFIXES[args.to][0]} file to write with --to {args.to}")
    paths = [out] if args.to == "guided" else list(official_paths(out, config).values())
    _check_files(paths, args, any(left_by_kill(path, _WORK, inside=False) for path in paths))
    make_folder(out.parent)
    for path in paths:
        claim_place(path, _WORK)
    with _all_or_none(paths):
        if args.to == "official":
            save_official(out, config, state, dtype)
        else:
            save_guided(out, config, state, dtype)
    return paths


@contextmanager
def _all_or_none(paths: Sequence[Path]) -> Iterator[None]:
    """Where the block fails, as on a full disk, what it has written of ``paths`` is removed: the same command is not
    refused for files that are there."""
    there = {path for path in paths if path.exists()}
    try:
        yield
    except BaseException:
        for path in {*paths} - there:
            with suppress(OSError):
                path.unlink()
        raise


def _build(loaded: Loaded) -> Autoencoder | Prior:
    """The model itself, so that every tensor has met the shape which the configuration expects."""
    refuse_student(loaded)
    cls = Prior if isinstance(loaded.config, PriorConfig) else Autoencoder
    return cls.from_state(loaded.config, loaded.state, loaded.origin)


def _check_directory(out: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: a file; expected a directory to write into (--to official writes a file)")
    # What a killed conversion left is its own.
    if overwrite or not out.is_dir() or left_by_kill(out, _WORK):
        return
    if all(path.name == LOCK or is_unfinished(path.name) for path in out.iterdir()):
        return
    try:
        config.load(out / CONFIG_NAME)
    except UserError:
        raise UserError(
            f"{out}: not empty and not a saved model; expected a new directory (or --overwrite to write into it)"
        ) from None


def _retire(path: Path, model: Autoencoder | Prior) -> None:
    """Remove an earlier configuration that is not the model's: it must not stand beside the new weights for a moment.
    The new one is written last."""
    with suppress(OSError):
        if path.read_text(encoding="utf-8", errors="replace") != config.dumps(model.config):
            path.unlink()


def _check_files(paths: Sequence[Path], args: argparse.Namespace, unfinished: bool) -> None:
    """UserError for files that are there, unless a killed conversion left them (``unfinished``)."""
    source = Path(args.source).expanduser()
    for path in paths:
        if path.exists() and source.exists() and path.samefile(source):
            raise UserError(f"{path}: the source itself; expected another file to write")
        if path.exists() and not args.overwrite and not unfinished:
            raise UserError(f"{path}: exists; expected a new file (or --overwrite)")


def _summary(args: argparse.Namespace, loaded: Loaded, model: Autoencoder | Prior, written: list[Path]) -> str:
    unet, size = loaded.config.unet, loaded.config.image_size
    heads = (
        f"{unet.num_heads} head{'s' * (unet.num_heads > 1)}"
        if unet.head_channel == -1
        else f"heads of {unet.head_channel} channels"
    )
    sigma = ", learned sigma" if unet.learn_sigma else ""
    sigma += f", {unet.num_classes} classes" if unet.num_classes else ""
    predicted = {"epsilon": "", "v_prediction": "; v is predicted", "sample": "; x_0 is predicted"}
    rates = ", ".join(map(str, unet.attention_resolutions)) or "none"
    lines = [
        f"{args.source}: {loaded.kind}, weights: {loaded.weights}",
        f"  images      {unet.input_channel} x {size} x {size}",
        f"  U-Net       base {unet.base_channel}, multipliers {', '.join(map(str, unet.channel_multiplier))}, "
        f"{unet.num_residual_blocks_of_a_block} residual blocks a level{sigma}",
        f"  attention   at rates {rates}{' and in the middle' * (unet.middle == 'attention')}, {heads}, "
        f"{'new' if unet.use_new_attention_order else 'legacy'} layout",
        f"  schedule    {loaded.config.schedule.kind}, {loaded.config.schedule.timesteps} steps"
        + predicted[loaded.config.prediction],
    ]
    if not isinstance(loaded.config, PriorConfig):
        c = loaded.config
        parts = [
            f"latent DPM of {c.latent.layers} layers, {c.latent.hidden} wide" if c.latent else "",
            f"classifier of {len(c.attributes)} attributes" if c.attributes else "",
            "latent statistics" if c.latent_statistics else "",
        ]
        lines.append(
            f"  z           {c.latent_dim} dimensions; " + (", ".join(filter(None, parts)) or "nothing on top")
        )
    lines.append(f"  parameters  {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M")
    lines += [f"  assumed     {note}" for note in loaded.notes]
    if args.to == "official":
        lines += [f"  note        the published code cannot build it: {limit}" for limit in limits(loaded.config)]
    if args.to == "guided":
        flags = " ".join(f"--{name} {value}" for name, value in guided_flags(loaded.config).items())
        lines.append(f"  flags       {flags}")
    return "\n".join([*lines, *(f"wrote {path}" for path in written)])


def main(argv: list[str] | None = None) -> int:
    return cli.run(_convert, argv)


if __name__ == "__main__":
    sys.exit(main())
