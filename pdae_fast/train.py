"""Train: `python -m pdae_fast.train {prior,pdae,latent,classifier} --data ... --out ...`; `train curves` plots runs."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import torch

from . import cli
from . import config as configs
from .config import LatentConfig, PDAEConfig, presets
from .data import Labels, open_dataset, read_attributes
from .engine import resolve_device
from .errors import UserError
from .experiments.shards import Group, processes
from .files import make_folder
from .models import PDAE, Prior
from .training import Trainer, TrainSettings
from .training.codes import classifier_task, latent_task
from .training.distributed import say_once
from .training.held_out import evaluate, logits_of, summary
from .training.labels import class_labels, file_labels, split
from .training.latents import Latents, LatentSet, cache_path, encode_dataset
from .training.previews import IMAGES, ImagePreview, SamplePreview, tensorboard
from .training.settings import DEFAULTS
from .training.state import CHECKPOINT_NAME, load
from .training.step import HELP as STEP_HELP
from .training.step import IMAGES_ONLY, StepOptions
from .training.tasks import TASKS
from .training.whitening import whiten_codes

ABOUT = {
    "prior": "train a diffusion model, the prior that PDAE starts from",
    "pdae": "train encoder and G on a frozen prior",
    "latent": "train a latent DPM on the latents of a PDAE, so that it can sample",
    "classifier": "train a linear attribute classifier on the latents of a PDAE, so that it can manipulate",
}

HELP = {
    "steps": "optimiser steps in all",
    "batch_size": "images (or latents) per forward pass, of all processes together",
    "accumulate": "forward passes per optimiser step",
    "lr": "learning rate of Adam",
    "lr_schedule": "constant, or cosine down to zero at --steps",
    "warmup": "steps over which the rate rises to --lr",
    "ema_decay": "of the weights that are saved; reached gradually",
    "flip": "mirror every second image at random",
    "amp": "off, or bfloat16 for the networks",
    "seed": "of initial weights, data order and noise",
}
SHOWN = 5  # broken images that are named one by one


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


def _options(p: argparse.ArgumentParser, task: str) -> None:
    """The options of one task."""
    codes = task in ("latent", "classifier")
    what = "autoencoder whose latents to train on" if codes else "prior to start from"
    p.add_argument(
        "--data",
        required=True,
        help="folder of images, fashion-mnist[:DIR], IDX files, lmdb:DIR[:SIZE], avatars (see docs/data.md)",
    )
    p.add_argument("--out", required=True, help="directory of the run")
    p.add_argument(
        "--init-from",
        metavar="MODEL",
        required=codes,
        help=f"{what}: bundled name, directory, foreign checkpoint",
    )
    if codes:
        _code_options(p, task)
    else:
        p.add_argument(
            "--architecture",
            default="fashion32",
            metavar="PRESET|JSON",
            help=f"{', '.join(presets)}, or a config.json",
        )
        p.add_argument(
            "--start-from",
            metavar="MODEL",
            help="pdae: a trained PDAE whose encoder and G to start from, as when its prior was trained further",
        )
        p.add_argument(
            "--whiten",
            type=int,
            default=0,
            metavar="N",
            help="pdae: start with codes that are uncorrelated over N images, an exact change of coordinates between "
            "encoder and G; 0 leaves them, as published",
        )
    # Everything that TrainSettings holds is an option of the same name, with the task's default.
    for field in dataclasses.fields(TrainSettings):
        if field.name in ("task", "data"):
            continue
        if codes and field.name == "flip":
            p.set_defaults(flip=False)
            continue
        flag, default = f"--{field.name.replace('_', '-')}", DEFAULTS[task].get(field.name, field.default)
        if isinstance(field.default, bool):
            p.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=HELP[field.name])
        else:
            p.add_argument(flag, type=type(field.default), default=default, help=HELP[field.name])
    p.add_argument("--resume", action="store_true", help="continue the run in --out")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    p.add_argument("--workers", type=int, default=0, help="processes that load images")
    p.add_argument("--log-every", type=int, default=50, help="steps between lines of log.jsonl")
    p.add_argument("--save-every", type=int, default=1000, help="steps between checkpoints")
    if task != "classifier":
        p.add_argument("--sample-every", type=int, default=0, help="steps between sample grids; 0 is never")
    p.add_argument("--tensorboard", action="store_true", help="also write TensorBoard scalars to --out")
    p.add_argument("--quiet", action="store_true", help="no progress bar, nothing printed")
    speed = p.add_argument_group("speed", "how a step is executed; changes no more than the rounding of its result")
    for name, text in STEP_HELP.items():
        if not (codes and name in IMAGES_ONLY):
            speed.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=text)
    cli.add_foreign_options(p)


def _code_options(p: argparse.ArgumentParser, task: str) -> None:
    p.add_argument("--latents", metavar="DIR", help="where latents are kept (default: the folder latents beside --out)")
    p.add_argument("--cached-only", action="store_true", help="fail instead of encoding when they are not there")
    p.add_argument("--encode-batch-size", type=int, help="images per encoder pass (default: chosen for the device)")
    p.add_argument("--on-error", choices=("skip", "fail"), default="skip", help="what a broken image does")
    if task == "latent":
        p.add_argument("--hidden", type=int, default=LatentConfig.hidden, help="width of the MLP")
        p.add_argument("--layers", type=int, default=LatentConfig.layers, help="layers of the MLP")
    else:
        p.add_argument(
            "--attributes",
            required=True,
            metavar="FILE|classes",
            help="CelebA's attribute list or a CSV file; 'classes': one attribute for each class of the data set",
        )
        p.add_argument("--columns", nargs="+", metavar="NAME", help="attributes to use (default: all of them)")
        p.add_argument("--holdout", type=float, default=0.1, help="fraction of the images kept for the final test")


def _arguments(argv: list[str] | None):
    p = cli.parser("train", "Train a prior, PDAE on it, or a network on its latents; --resume continues bit for bit.")
    commands = p.add_subparsers(dest="task", required=True, metavar="TASK")
    for task, text in ABOUT.items():
        _options(commands.add_parser(task, help=text, description=text, formatter_class=p.formatter_class), task)
    text = "plot the losses of runs"
    curves = commands.add_parser("curves", help=text, description=text, formatter_class=p.formatter_class)
    curves.add_argument("runs", nargs="+", metavar="RUN", help="directories of runs, or their log.jsonl")
    curves.add_argument("--out", default="curves.png", metavar="PNG", help="the picture to write")
    curves.add_argument("--smooth", type=float, default=0.05, help="fraction of a run that the smooth line averages")
    curves.add_argument("--log", action="store_true", help="logarithmic loss axis")
    return p.parse_args(argv)


def _check(args) -> None:
    """What must be right before anything slow starts."""
    for name in ("log_every", "save_every"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    out = Path(args.out)
    if not args.resume and (out / CHECKPOINT_NAME).exists():
        raise UserError(f"{out} already holds a run; add --resume to continue it, or choose another --out")
    if args.init_from and out.is_dir() and Path(args.init_from).is_dir() and out.samefile(args.init_from):
        raise UserError(f"--out {out} is --init-from itself, which the run would overwrite; choose another --out")
    if args.resume and not (out / CHECKPOINT_NAME).is_file():
        load(out / CHECKPOINT_NAME)  # says so
    if getattr(args, "whiten", 0) and args.task != "pdae":
        raise UserError(f"--whiten prepares the codes of pdae; train {args.task} has none to start with")
    if getattr(args, "start_from", None) and args.task != "pdae":
        raise UserError(f"--start-from gives pdae its encoder and G; train {args.task} starts from --init-from")

    # What only the last part of a task would notice, after hours of encoding.
    if args.task == "latent":
        LatentConfig(1, args.hidden, args.layers)
    elif args.task == "classifier":
        split(2, args.holdout, args.seed)
        if args.attributes != "classes":
            read_attributes(args.attributes, args.columns)


def _image_task(args, device: torch.device):
    """Task, data set and preview of train prior and train pdae."""
    model = build_model(args)
    channels, size, _ = model.image_shape
    dataset = open_dataset(args.data, size, channels, split="train")
    if args.whiten and not args.resume:
        chosen = torch.linspace(0, len(dataset) - 1, min(args.whiten, len(dataset))).long().tolist()
        whiten_codes(model, torch.stack([dataset[i].image for i in chosen]))
    preview = None
    if args.sample_every:
        shown = torch.stack([dataset[i].image for i in range(min(IMAGES, len(dataset)))])
        preview = ImagePreview(shown, device, args.seed)
    return TASKS[args.task](model), dataset, preview


def _latents(args, device: torch.device, group: Group) -> tuple[PDAE, Latents]:
    """The autoencoder of --init-from and the latents of --data by it, kept beside the run."""
    model = PDAE.from_pretrained(args.init_from, **cli.foreign_options(args))
    channels, size, _ = model.image_shape
    dataset = open_dataset(args.data, size, channels, split="train")
    make_folder(args.out)  # an --out that cannot be is better known before the encoding
    cache = Path(args.latents) if args.latents else Path(args.out).absolute().parent / "latents"
    latents = encode_dataset(
        model,
        dataset,
        cache,
        batch_size=args.encode_batch_size,
        device=device,
        on_error=args.on_error,
        require=args.cached_only,
        quiet=args.quiet,
    )
    for name, reason in latents.broken[:SHOWN] if group.first else ():
        print(f"left out: {name}: {reason}", file=sys.stderr)
    if len(latents.broken) > SHOWN and group.first:
        print(f"left out: {len(latents.broken) - SHOWN} more broken images", file=sys.stderr)
    if not args.quiet:
        print(f"{len(latents.z)} latents: {cache_path(cache, latents.encoder, latents.images)}")
    return model, latents


def _labels(args, latents: Latents) -> Labels:
    if args.attributes == "classes":
        if args.columns:
            raise UserError("--columns chooses attributes of a file; --attributes classes takes every class")
        from .experiments.targets import class_names

        known = [label for label in latents.labels if label is not None]
        return class_labels(latents, class_names([args.data], max(known, default=0) + 1))
    labels = file_labels(latents.names, args.attributes, args.columns)
    if labels.report() and not args.quiet:
        print(f"{args.attributes}: {labels.report()}", file=sys.stderr)
    return labels


def _report(trainer: Trainer, held_out: LatentSet, holdout: float, exclusive: bool) -> str:
    """Write metrics.json of the classifier that users get; returns its table."""
    model = trainer.task.export(trainer.ema)
    z, labels = held_out.__getitems__(range(len(held_out)))
    columns = list(model.config.attributes)
    report = evaluate(logits_of(model.classifier, z), labels, columns, exclusive)
    part = "held out" if holdout else "the training images (--holdout 0)"
    cli.write_json(trainer.out / "metrics.json", {"part": part, "step": trainer.step, **report})
    return f"{summary(report)}\n{len(labels)} images, {part}; {trainer.out / 'metrics.json'}"


def main(argv: list[str] | None = None) -> None:
    args = _arguments(argv)
    if args.task == "curves":
        from .training.curves import plot_curves

        print(f"wrote {plot_curves(args.runs, args.out, args.smooth, args.log)}")
        return
    with processes("add --resume to continue from the last checkpoint") as group:
        try:
            _train(args, group)
        except UserError:
            if say_once():
                raise
            raise SystemExit(2) from None


def _train(args, group: Group) -> None:
    names = [field.name for field in dataclasses.fields(TrainSettings)]
    settings = TrainSettings(**{name: getattr(args, name) for name in names})
    _check(args)
    out, device = Path(args.out), resolve_device(group.device(args.device))
    options = StepOptions(**{name: getattr(args, name, False) for name in STEP_HELP})
    options.check(args.task, device, group.size)
    args.quiet = args.quiet or not group.first
    held_out = preview = None
    if args.task in ("prior", "pdae"):
        task, dataset, preview = _image_task(args, device)
    else:
        if not group.first:  # the first process encodes, the others read what it has written
            group.sync()
        model, latents = _latents(args, device, group)
        if group.first:
            group.sync()
        if args.task == "latent":
            task, dataset = latent_task(model, latents, args.hidden, args.layers, args.seed)
            preview = SamplePreview(device, args.seed) if args.sample_every else None
        else:
            task, dataset, held_out = classifier_task(model, latents, _labels(args, latents), args.holdout, args.seed)
    trainer = Trainer(
        task,
        dataset,
        settings,
        out,
        device=device,
        workers=args.workers,
        log_every=args.log_every,
        save_every=args.save_every,
        sample_every=getattr(args, "sample_every", 0),
        preview=preview,
        scalars=tensorboard(out) if args.tensorboard and group.first else None,
        notes={"init_from": args.init_from},
        quiet=args.quiet,
        options=options,
        group=group,
    )
    if args.resume:
        trainer.resume()
    stopped = trainer.run()
    if stopped:
        if group.first:
            print(f"{stopped}: saved step {trainer.step} to {out}; add --resume to continue", file=sys.stderr)
        raise SystemExit(130 if stopped == "SIGINT" else 143)
    if not group.first:
        return
    table = _report(trainer, held_out, args.holdout, args.attributes == "classes") if held_out else None
    if not args.quiet:
        if table:
            print(table)
        print(f"trained to step {trainer.step}; from_pretrained({str(out)!r}) loads the EMA weights")


if __name__ == "__main__":
    sys.exit(cli.run(main))
