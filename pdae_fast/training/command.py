"""The command `python -m pdae_fast.train`: from its arguments to a task, its data and a run."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import cli
from ..config import LatentConfig
from ..data import Labels, open_dataset, read_attributes, readable
from ..data.attributes import class_names, file_labels
from ..data.latents import Latents, cache_path, encode_dataset, split
from ..data.spec import crop_for
from ..engine import resolve_device
from ..engine.device import note_slow_dtype
from ..errors import UserError
from ..files import claim_folder
from ..models import PDAE, Autoencoder, Prior, Student, load_model
from ..processes import Group, processes
from ..tensors import weights_fingerprint
from . import codes, recognition, students, target_codes, warm_start
from .arguments import parse
from .build import build_model
from .curves import plot_curves
from .distributed import say_once
from .labels import ImageLabels, image_labels
from .previews import IMAGES, ImagePreview, SamplePreview, tensorboard
from .settings import ON_IMAGES, TrainSettings
from .state import CHECKPOINT_NAME, load
from .step import STEP_HELP, StepOptions
from .target_codes import COMPONENTS
from .tasks import TASKS, ImagesWithRows
from .trainer import Trainer

IMAGES_ALONE = (
    "prior",
    "encoder",
    "pdae",
    "diffae",
    "student",
    "recognise",
)  # tasks that read the images again and again, not codes of them
SHOWN = 5  # broken images that are named one by one
# Each group of a norm is then one channel, whose mean is taken away at the input, the output and between.
NARROW = (
    "note: with {width} channels in {groups} groups every channel is normalised alone, and the network can hardly tell "
    "or set an image's overall brightness and colour; --norm-groups 8 or twice the width can (see docs/training.md)"
)
LEARNED_SIGMA = (
    "note: the learned variance of this prior is not trained further; its rows of the last convolution stay as they are"
)


def _check(args) -> None:
    """What must be right before anything slow starts."""
    for name in ("log_every", "save_every"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    out = Path(args.out)
    _check_new(args)
    for name in ("init_from", "start_from", "target"):
        source = getattr(args, name, None)
        if source and out.is_dir() and Path(source).is_dir() and out.samefile(source):
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"--out {out} is {flag} itself, which the run would overwrite; choose another --out")
    if args.resume and not (out / CHECKPOINT_NAME).is_file():
        load(out / CHECKPOINT_NAME)  # says so
    if not 0 <= getattr(args, "velocity", 0) < math.inf:
        raise UserError(f"--velocity must be a number from 0 up, not {args.velocity}")
    if getattr(args, "freeze_encoder", False) and not args.start_from:
        raise UserError("--freeze-encoder trains G alone; --start-from must give the encoder that stays as it is")
    if getattr(args, "start_from", None):
        if args.task not in ("pdae", "encoder"):
            raise UserError(f"--start-from gives pdae its encoder and G; train {args.task} starts from --init-from")
        if args.task == "encoder" and args.target not in COMPONENTS:
            raise UserError(
                f"--target {args.target} brings its own G; --start-from goes with {' or '.join(COMPONENTS)}"
            )

    # What only the last part of a task would notice, after hours of encoding.
    if args.task == "latent":
        LatentConfig(1, args.hidden, args.layers)
    elif args.task == "encoder":
        split(2, args.holdout, args.seed)
        if args.target_images < 1:
            raise UserError(f"--target-images must be at least 1, not {args.target_images}")
        if args.target in COMPONENTS:
            target_codes.check_pca()
        _check_attributes(args)
    elif args.task == "student":
        students.check_student(args)
    elif args.task == "recognise":
        split(2, args.holdout, args.seed)
    elif args.task == "classifier":
        split(2, args.holdout, args.seed)
        if args.attributes != "classes":
            read_attributes(args.attributes, args.columns)


def _check_attributes(args) -> None:
    if args.attributes:
        read_attributes(args.attributes, args.columns)
    elif args.columns:
        raise UserError("--columns chooses attributes of a file; give --attributes FILE")


def _check_new(args) -> None:
    if not args.resume and (Path(args.out) / CHECKPOINT_NAME).exists():
        raise UserError(f"{args.out} already holds a run; add --resume to continue it, or choose another --out")


def _dataset(
    args, model: Prior | Autoencoder | Student, shape_of: Autoencoder | None = None, part: str = "train"
) -> Any:
    """The images of --data, without the broken ones where training could not know of them otherwise, for ``model``; of
    the shape that ``shape_of`` takes, if it is given. part: of data that has a training and a test part."""
    channels, size, _ = (shape_of or model).image_shape
    crop = crop_for(args.crop, model.config)
    dataset = open_dataset(args.data, size, channels, split=part, crop=crop, without=args.out)
    if args.on_error == "skip" and args.task in IMAGES_ALONE:
        dataset, broken = readable(dataset, args.quiet)
        _say_broken(broken, args.first and shape_of is None)
    return dataset


def _say_broken(broken: list[tuple[str, str]], first: bool) -> None:
    for name, reason in broken[:SHOWN] if first else ():
        print(f"left out: {name}: {reason}", file=sys.stderr)
    if len(broken) > SHOWN and first:
        print(f"left out: {len(broken) - SHOWN} more broken images", file=sys.stderr)


def _image_task(args, device: torch.device):
    """Task, data set and preview of train prior, train pdae and train diffae."""
    model = build_model(args)
    dataset = _dataset(args, model)
    labels = _image_labels(args, model, dataset)
    preview = None
    if args.sample_every:
        shown = torch.stack([dataset[i].image for i in range(min(IMAGES, len(dataset)))])
        preview = ImagePreview(shown, device, args.seed)
    options = {"freeze_encoder": args.freeze_encoder} if args.task == "pdae" else {}
    task = TASKS[args.task](model, args.velocity, **options)
    if labels:
        task.record |= labels.record
        dataset = ImagesWithRows(dataset, labels.values, range(len(dataset)))
    _say_notes(args, model, [f"labels: {labels.source}"] if labels else [])
    return task, dataset, preview


def _image_labels(args, model: Prior | Autoencoder, dataset: Any) -> ImageLabels | None:
    """The labels of ``dataset`` that a class-conditional prior needs, else None."""
    classes = model.config.unet.num_classes
    if classes is None:
        for name in ("label", "attributes", "columns"):
            if getattr(args, name, None) is not None:
                raise UserError(f"--{name} gives a class-conditional prior its labels; this prior has no classes")
        return None
    if args.sample_every:
        raise UserError("--sample-every draws no pictures of a class-conditional prior; leave it out")
    return image_labels(dataset, classes, args.label, args.attributes, args.columns)


def _say_notes(args, model: Prior | Autoencoder, notes: list[str]) -> None:
    """What a user should know of the model to train."""
    if args.quiet:
        return
    for line in [*(f"assumed about the model: {note}" for note in model.notes), *notes]:
        print(line)
    unet = model.config.unet
    if args.task != "pdae" and not args.init_from and min(unet.widths) <= unet.norm_groups:
        print(NARROW.format(width=min(unet.widths), groups=unet.norm_groups))
    if args.task in ("prior", "diffae") and unet.learn_sigma:
        print(LEARNED_SIGMA)


@contextmanager
def _in_turn(group: Group) -> Iterator[None]:
    """The first process does the block before the others, which find what it has written."""
    if not group.first:
        group.sync()
    yield
    if group.first:
        group.sync()


def _cache(args) -> Path:
    return Path(args.latents) if args.latents else Path(args.out).absolute().parent / "latents"


def _say(args, cache: Path, latents: Latents) -> None:
    if not args.quiet:
        print(f"{len(latents.z)} latents: {cache_path(cache, latents.encoder, latents.images)}")


def _encoder_task(args, device: torch.device, group: Group):
    """Task, training images and held-out images of train encoder, all with their codes."""
    model = build_model(args)
    dataset = _dataset(args, model)
    _check_feature_label(args, model.config.unet.num_classes)
    _say_notes(args, model, [])
    data = partial(_dataset, args, model)
    known = None
    if args.attributes:
        labels = file_labels(dataset.names, args.attributes, args.columns)
        known = target_codes.known_attributes(labels, model.config.latent_dim)
    with _in_turn(group):
        options = {"cache": _cache(args), "require": args.cached_only, "quiet": args.quiet}
        encoding = options | {"batch_size": args.encode_batch_size, "device": device}
        sources = g = None
        if args.target in COMPONENTS:
            start = _g_to_start_from(args, model)
            find = target_codes.pca_codes
            if args.target == target_codes.FEATURES:
                T = model.config.schedule.timesteps
                find = partial(target_codes.feature_codes, model.decoder, device=device, T=T, label=args.label)
            components = {"count": args.target_images, "seed": args.seed}
            latents = find(dataset, model.config.latent_dim, **options, **components)
        else:
            start = PDAE.from_pretrained(args.target)
            latents = target_codes.model_codes(model, start, args.target, data(start), **encoding)
        if known is not None:
            latents = target_codes.attributes_first(latents, known, options["cache"], args.cached_only)
        if start is not None and (args.target in COMPONENTS or known is not None):
            sources, g = _g_for_codes(args, model, start, latents, data(start), encoding)
        elif start is not None:
            reason = warm_start.take_g(model, start)
            g = f"G is not taken from {args.target}: {reason}" if reason else f"G is that of {args.target}"
        if g and not args.quiet:
            print(g)
        _say(args, options["cache"], latents)
    return warm_start.encoder_task(model, dataset, latents, args.holdout, args.seed, sources)


def _check_feature_label(args, classes: int | None) -> None:
    """A class-conditional trunk reads all images under one label."""
    needed = classes is not None and args.target == target_codes.FEATURES
    if needed and (args.label is None or not 0 <= args.label < classes):
        raise UserError(
            f"--target features of a class-conditional prior needs --label K from 0 to {classes - 1}, not {args.label}"
        )
    if args.label is not None and not needed:
        raise UserError("--label is for --target features of a class-conditional prior")


def _g_to_start_from(args, model: PDAE) -> PDAE | None:
    """The PDAE of --start-from, if it is given and its G fits."""
    if not args.start_from:
        return None
    start = PDAE.from_pretrained(args.start_from)
    if reason := warm_start.g_misfit(model, start):
        raise UserError(f"--start-from {args.start_from}: {reason}")
    return start


def _g_for_codes(
    args, model: PDAE, start: PDAE, latents: Latents, dataset: Any, encoding: dict[str, Any]
) -> tuple[str, str]:
    """Give ``model`` the G of ``start`` for the codes ``latents``, and the encoder where its own codes are in them; a
    fingerprint of what decides G, and a line."""
    own = args.target not in COMPONENTS
    name = args.target if own else args.start_from
    flag = f"--{'target' if own else 'start-from'} {name}"
    known = target_codes.own_codes(model, start, flag, dataset, **encoding)
    if known.names != latents.names:
        raise UserError(f"{flag}: it has codes of other images than --target; expected the same of both")
    sources = weights_fingerprint(model.decoder, [weights_fingerprint(start.decoder), known.encoder])
    explained = warm_start.take_g_for_codes(model, start, latents.z, known.z)
    what = "G"
    if own and warm_start.take_encoder_for_codes(model, start, latents.z, known.z):
        what = "the encoder too, G"
    return sources, f"{what} is that of {name}, by a linear map that explains {explained:.1%} of the codes it knows"


def _student_task(args, device: torch.device, group: Group):
    """Task and images of train student, with what the teacher says of them."""
    model = load_model(args.init_from, **cli.foreign_options(args))
    dataset = _dataset(args, model)
    if not args.quiet:
        for note in model.notes:
            print(f"assumed about the model: {note}")
    with _in_turn(group):
        return students.student_task(args, model, dataset, _cache(args), device)


def _recognise_task(args):
    """Task, images with their labels, and those that judge it, of train recognise."""
    start = Student.from_pretrained(args.init_from)
    dataset, test = (_dataset(args, start, part=part) for part in ("train", "test"))
    return students.recognise_task(args, start, dataset, test if test.names[:1] != dataset.names[:1] else None)


def _latents(args, device: torch.device, group: Group) -> tuple[Autoencoder, Latents]:
    """The autoencoder of --init-from and the latents of --data by it, kept beside the run."""
    model = Autoencoder.from_pretrained(args.init_from, **cli.foreign_options(args))
    dataset = _dataset(args, model)
    cache = _cache(args)
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
    _say_broken(latents.broken, group.first)
    _say(args, cache, latents)
    return model, latents


def _labels(args, latents: Latents) -> Labels:
    if args.attributes == "classes":
        if args.columns:
            raise UserError("--columns chooses attributes of a file; --attributes classes takes every class")
        known = [label for label in latents.labels if label is not None]
        return codes.class_labels(latents, class_names([args.data], max(known, default=0) + 1))
    labels = file_labels(latents.names, args.attributes, args.columns)
    if labels.report() and not args.quiet:
        print(f"{args.attributes}: {labels.report()}", file=sys.stderr)
    return labels


def _report(args, trainer: Trainer, judged: Any) -> str:
    """Write metrics.json of what users get, a classifier, an encoder or a student; returns its table."""
    model = trainer.task.export(trainer.ema)
    if args.task == "student":
        report = students.describe_policy(trainer.ema, trainer.task, judged)
        cli.write_json(trainer.out / "metrics.json", {"step": trainer.step, **report})
        return f"{students.policy_table(report)}\n{trainer.out / 'metrics.json'}"
    if args.task == "recognise":
        dataset, truth = judged
        report, judged = recognition.evaluate(model, dataset, truth), truth.indices
        text = recognition.summary(truth.task, report)
    elif args.task == "encoder":
        report = warm_start.evaluate(trainer.ema, judged, trainer.device)
        text = warm_start.summary(report)
    else:
        z, labels = judged.__getitems__(range(len(judged)))
        logits = codes.logits_of(model.classifier, z)
        report = codes.evaluate(logits, labels, list(model.config.attributes), args.attributes == "classes")
        text = codes.summary(report)
    part = "held out" if args.holdout else "the training images (--holdout 0)"
    cli.write_json(trainer.out / "metrics.json", {"part": part, "step": trainer.step, **report})
    return f"{text}\n{len(judged)} images, {part}; {trainer.out / 'metrics.json'}"


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.task == "curves":
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
    if group.first:
        claim_folder(out)
        _check_new(args)  # again: a run may have ended since
    args.quiet, args.first = args.quiet or not group.first, group.first
    judged = preview = None
    if args.task in ON_IMAGES:
        task, dataset, preview = _image_task(args, device)
    elif args.task == "encoder":
        task, dataset, judged = _encoder_task(args, device, group)
    elif args.task == "student":
        task, dataset = _student_task(args, device, group)
        judged = dataset if dataset.truth is not None else None
    elif args.task == "recognise":
        task, dataset, judged = _recognise_task(args)
    else:
        with _in_turn(group):
            model, latents = _latents(args, device, group)
        if args.task == "latent":
            task, dataset = codes.latent_task(model, latents, args.hidden, args.layers, args.seed)
            preview = SamplePreview(device, args.seed) if args.sample_every else None
        else:
            labels = _labels(args, latents)
            task, dataset, judged = codes.classifier_task(model, latents, labels, args.holdout, args.seed)
    if not args.quiet and (settings.amp == "bfloat16" or options.frozen_bfloat16):
        note_slow_dtype(torch.bfloat16, device)
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
        notes={name: getattr(args, name) for name in ("init_from", "target") if hasattr(args, name)},
        quiet=args.quiet,
        options=options,
        group=group,
    )
    if args.resume:
        fewer = trainer.resume(args.on_error == "skip" and args.task in IMAGES_ALONE)
        if fewer and group.first:
            print(f"note: {fewer} images fewer than the saved run saw; it goes on with those left", file=sys.stderr)
    stopped = trainer.run()
    if stopped:
        if group.first:
            print(f"{stopped}: saved step {trainer.step} to {out}; add --resume to continue", file=sys.stderr)
        raise SystemExit(130 if stopped == "SIGINT" else 143)
    if not group.first:
        return
    table = _report(args, trainer, judged) if judged else None
    if not args.quiet:
        if table:
            print(table)
        print(f"trained to step {trainer.step}; from_pretrained({str(out)!r}) loads the EMA weights")
