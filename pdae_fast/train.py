"""Train: `python -m pdae_fast.train {prior,pdae} --data ... --out ...`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import torch
from torch import Tensor

from . import cli
from . import config as configs
from .config import PDAEConfig, presets
from .data import open_dataset, save_grid
from .engine import resolve_device
from .errors import UserError
from .models import PDAE, Prior
from .pipeline import Pipeline
from .training import Trainer, TrainSettings
from .training.settings import TASKS
from .training.state import CHECKPOINT_NAME

HELP = {
    "steps": "optimiser steps in all",
    "batch_size": "images per forward pass",
    "accumulate": "forward passes per optimiser step",
    "lr": "learning rate of Adam",
    "lr_schedule": "constant, or cosine down to zero at --steps",
    "warmup": "steps over which the rate rises to --lr",
    "ema_decay": "of the weights that are saved; reached gradually",
    "flip": "mirror every second image at random",
    "amp": "off, or bfloat16 for the networks",
    "seed": "of initial weights, data order and noise",
}
PREVIEW_IMAGES = 8
PREVIEW_STEPS = 20


def _architecture(args) -> PDAEConfig:
    if args.architecture in presets:
        return presets[args.architecture]
    path = Path(args.architecture)
    if not path.exists():
        raise UserError(
            f"--architecture {args.architecture}: neither a preset ({', '.join(presets)}) nor a config.json"
        )
    config = configs.load(path)
    if not isinstance(config, PDAEConfig):
        raise UserError(f"{path}: describes a prior; expected the config.json of a PDAE")
    return config


def build_model(args) -> Prior | PDAE:
    """The model to train: fresh, or around the prior of --init-from."""
    torch.manual_seed(args.seed)
    if args.task == "prior":
        if args.init_from:
            return Prior.from_pretrained(args.init_from, **cli.foreign_options(args))
        return Prior(_architecture(args).prior)
    if not args.init_from:
        raise UserError(
            "train pdae needs a pre-trained prior: give --init-from NAME, DIR or FILE (or train prior first)"
        )
    prior = Prior.from_pretrained(args.init_from, **cli.foreign_options(args))
    config = _architecture(args)
    model = PDAE.from_prior(prior, latent_dim=config.latent_dim, encoder_channel=config.encoder_channel)
    if args.start_from:
        _take_trained_half(model, PDAE.from_pretrained(args.start_from), args.start_from)
    return model


def _take_trained_half(model: PDAE, start: PDAE, name: str) -> None:
    """Give ``model`` the encoder and the G of ``start``, a PDAE of the same shape around another prior."""
    for field in ("image_size", "latent_dim", "encoder_channel", "unet", "schedule"):
        own, other = getattr(model.config, field), getattr(start.config, field)
        if own != other:
            raise UserError(f"--start-from {name}: its {field} is {other}; the model to train has {own}")
    model.encoder.load_state_dict(start.encoder.state_dict())
    for part in model.decoder.TRAINED:
        getattr(model.decoder, part).load_state_dict(getattr(start.decoder, part).state_dict())


class _Preview:
    """Draws samples (prior) or inputs and their reconstructions (PDAE) with the EMA weights."""

    def __init__(self, images: Tensor, device: torch.device, seed: int) -> None:
        self.images, self.device, self.seed = images, device, seed

    def __call__(self, model: Prior | PDAE, step: int, path: Path) -> None:
        pipe = Pipeline(model, steps=PREVIEW_STEPS, device=self.device, dtype="float32")
        if isinstance(model, Prior):
            save_grid([pipe.decode(count=len(self.images), seed=self.seed)], path, ["samples"])
            return
        z = pipe.encode(self.images)
        rows = {
            "input": self.images,
            "inferred x_T": pipe.decode(z, pipe.invert(self.images, z)),
            "random x_T": pipe.decode(z, seed=self.seed),
            "without G": pipe.decode(count=len(self.images), seed=self.seed),
        }
        save_grid(list(rows.values()), path, list(rows))


def _scalars(directory: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs TensorBoard: pip install 'pdae_fast[train]'") from None
    writer = SummaryWriter(str(directory))

    def log(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return log


def _arguments(argv: list[str] | None):
    p = cli.parser("train", "Train a prior, or PDAE on a frozen prior; --resume continues bit for bit.")
    p.add_argument("task", choices=TASKS)
    p.add_argument(
        "--data", required=True, help="folder of images (a broken one ends the run), fashion-mnist[:DIR], or IDX files"
    )
    p.add_argument("--out", required=True, help="directory of the run")
    p.add_argument(
        "--architecture", default="fashion32", metavar="PRESET|JSON", help=f"{', '.join(presets)}, or a config.json"
    )
    p.add_argument(
        "--init-from", metavar="MODEL", help="prior to start from: bundled name, directory, foreign checkpoint"
    )
    p.add_argument(
        "--start-from",
        metavar="MODEL",
        help="pdae: a trained PDAE whose encoder and G to start from, as when its prior was trained further",
    )
    # Everything that TrainSettings holds is an option of the same name, with the same default.
    for field in dataclasses.fields(TrainSettings):
        if field.name in ("task", "data"):
            continue
        flag = f"--{field.name.replace('_', '-')}"
        if isinstance(field.default, bool):
            p.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default, help=HELP[field.name])
        else:
            p.add_argument(flag, type=type(field.default), default=field.default, help=HELP[field.name])
    p.add_argument("--resume", action="store_true", help="continue the run in --out")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    p.add_argument("--workers", type=int, default=0, help="processes that load images")
    p.add_argument("--log-every", type=int, default=50, help="steps between lines of log.jsonl")
    p.add_argument("--save-every", type=int, default=1000, help="steps between checkpoints")
    p.add_argument("--sample-every", type=int, default=0, help="steps between sample grids; 0 is never")
    p.add_argument("--tensorboard", action="store_true", help="also write TensorBoard scalars to --out")
    p.add_argument("--quiet", action="store_true", help="no progress bar")
    cli.add_foreign_options(p)
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = _arguments(argv)
    for name in ("log_every", "save_every"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    out = Path(args.out)
    if not args.resume and (out / CHECKPOINT_NAME).exists():
        raise UserError(f"{out} already holds a run; add --resume to continue it, or choose another --out")
    names = [field.name for field in dataclasses.fields(TrainSettings)]
    settings = TrainSettings(**{name: getattr(args, name) for name in names})
    device = resolve_device(args.device)
    if args.start_from and args.task != "pdae":
        raise UserError(f"--start-from gives pdae its encoder and G; train {args.task} starts from --init-from")
    model = build_model(args)
    channels, size, _ = model.image_shape
    dataset = open_dataset(args.data, size, channels, split="train")
    trainer = Trainer(
        model,
        dataset,
        settings,
        out,
        device=device,
        workers=args.workers,
        log_every=args.log_every,
        save_every=args.save_every,
        sample_every=args.sample_every,
        preview=_Preview(
            torch.stack([dataset[i].image for i in range(min(PREVIEW_IMAGES, len(dataset)))]), device, args.seed
        )
        if args.sample_every
        else None,
        scalars=_scalars(out) if args.tensorboard else None,
        quiet=args.quiet,
    )
    if args.resume:
        trainer.resume()
    stopped = trainer.run()
    if stopped:
        print(f"{stopped}: saved step {trainer.step} to {out}; add --resume to continue", file=sys.stderr)
        raise SystemExit(130 if stopped == "SIGINT" else 143)
    if not args.quiet:
        print(f"trained to step {trainer.step}; from_pretrained({str(out)!r}) loads the EMA weights")


if __name__ == "__main__":
    sys.exit(cli.run(main))
