"""The options of `python -m pdae_fast.train`: what each task takes, with its own defaults."""

from __future__ import annotations

import argparse
import dataclasses

from .. import cli
from ..arguments import seed_option
from ..config import PREDICTIONS, LatentConfig, presets
from ..data.spec import add_crop
from ..student_config import HEADS
from .distillation import LOSSES
from .features import TARGETS
from .policy import ESTIMATORS
from .settings import DEFAULTS, ON_IMAGES, TrainSettings
from .step import STEP_HELP, UNET_ONLY
from .students import CHOICES, TIMES
from .target_codes import PCA

ABOUT = {
    "prior": "train a diffusion model, the prior that PDAE starts from",
    "encoder": "train the encoder alone by regression onto known codes, a warm start for pdae",
    "pdae": "train encoder and G on a frozen prior",
    "diffae": "train a Diff-AE, encoder and conditional U-Net together",
    "latent": "train a latent DPM on the latents of an autoencoder, so that it can sample",
    "classifier": "train a linear attribute classifier on the latents of an autoencoder, so that it can manipulate",
    "student": "train a small CNN to see what a frozen diffusion model sees, without labels",
    "recognise": "teach a student classes, parts or points with few labels",
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
# Of a new prior: the field of UNetConfig or PriorConfig, and what it is.
NEW_PRIOR = {
    "norm_groups": (
        int,
        None,
        "groups of a norm, of a new prior; 8 where a level has 32 channels, so that it sees colour",
    ),
    "num_classes": (int, None, "classes of a new, class-conditional prior, whose images need labels"),
    "prediction": (str, PREDICTIONS, "what the network predicts, also where --init-from predicts something else"),
}
FLAGS = {"num_classes": "--classes"}
ENCODING = ("encoder", "latent", "classifier", "student")  # tasks that know a code of every image, kept in files
STUDENTS = ("student", "recognise")


def _options(p: argparse.ArgumentParser, task: str) -> None:
    """The options of one task."""
    codes = task in ("latent", "classifier")
    whats = {
        "diffae": "Diff-AE to start from",
        "student": "diffusion model to learn from",
        "recognise": "student to start from",
    }
    what = "autoencoder whose latents to train on" if codes else whats.get(task, "prior to start from")
    p.add_argument(
        "--data",
        required=True,
        help="folder of images, fashion-mnist[:DIR], IDX files, lmdb:DIR[:SIZE], avatars (see docs/data.md)",
    )
    p.add_argument("--out", required=True, help="directory of the run")
    p.add_argument(
        "--init-from",
        metavar="MODEL",
        required=codes or task in STUDENTS,
        help=f"{what}: bundled name, directory, foreign checkpoint",
    )
    add_crop(p)
    p.add_argument(
        "--on-error",
        choices=("skip", "fail"),
        default="skip" if codes else "fail",
        help="what a broken image does; skip: the run is that of the readable images alone"
        + (", each of which is decoded once before it begins" * (not codes)),
    )
    if task in ENCODING:
        _encoding_options(p)
    if codes:
        _code_options(p, task)
    elif task in STUDENTS:
        _student_options(p, task)
    else:
        usual = "that of the prior, or the paper's encoder" if task in ("pdae", "encoder") else "fashion32"
        p.add_argument(
            "--architecture",
            metavar="NAME|JSON",
            help=f"of the networks: {', '.join(presets)}, or a config.json (default: {usual})",
        )
        if task == "prior":
            for name, (kind, choices, text) in NEW_PRIOR.items():
                flag = FLAGS.get(name, f"--{name.replace('_', '-')}")
                p.add_argument(flag, dest=name, type=kind, choices=choices, help=text)
        else:
            p.add_argument("--latent-dim", type=int, help="dimensions of z (default: those of --architecture)")
            if task != "diffae":
                p.add_argument("--encoder-channel", type=int, help="width of the encoder (default: of --architecture)")
        if task != "diffae":
            _label_options(p, task)
    if task == "encoder":
        _encoder_options(p)
    elif not codes and task not in STUDENTS:
        p.add_argument(
            "--start-from",
            metavar="MODEL",
            help="pdae: a trained PDAE whose encoder and G to start from, as when its prior was trained further",
        )
        p.add_argument(
            "--velocity",
            type=float,
            default=0.0,
            metavar="K",
            help="add K times the squared error of v, which counts most where x_t is nearly noise; 0 as published",
        )
    if task == "pdae":
        p.add_argument(
            "--freeze-encoder",
            action="store_true",
            help="train G alone: the codes of --start-from, its latent DPM and its classifier stay as they are",
        )
    # Everything that TrainSettings holds is an option of the same name, with the task's default.
    for field in dataclasses.fields(TrainSettings):
        if field.name in ("task", "data"):
            continue
        if task not in ON_IMAGES and field.name == "flip":
            p.set_defaults(flip=False)
            continue
        flag, default = f"--{field.name.replace('_', '-')}", DEFAULTS[task].get(field.name, field.default)
        if isinstance(field.default, bool):
            p.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=HELP[field.name])
        else:
            kind = seed_option if field.name == "seed" else type(field.default)
            p.add_argument(flag, type=kind, default=default, help=HELP[field.name])
    p.add_argument("--resume", action="store_true", help="continue the run in --out")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    p.add_argument("--workers", type=int, default=0, help="processes that load images")
    p.add_argument("--log-every", type=int, default=50, help="steps between lines of log.jsonl")
    p.add_argument("--save-every", type=int, default=1000, help="steps between checkpoints")
    if task not in ("classifier", "encoder", *STUDENTS):
        p.add_argument("--sample-every", type=int, default=0, help="steps between sample grids; 0 is never")
    p.add_argument("--tensorboard", action="store_true", help="also write TensorBoard scalars to --out")
    p.add_argument("--quiet", action="store_true", help="no progress bar, nothing printed")
    speed = p.add_argument_group("speed", "how a step is executed; changes no more than the rounding of its result")
    for name, text in STEP_HELP.items():
        if not (task not in ON_IMAGES and name in UNET_ONLY):
            speed.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=text)
    if task != "recognise":
        cli.add_foreign_options(p)


def _label_options(p: argparse.ArgumentParser, task: str) -> None:
    """How a class-conditional prior is told the classes of the images."""
    p.add_argument("--label", type=int, metavar="K", help="class-conditional prior: the class of all images")
    if task != "encoder":
        p.add_argument(
            "--attributes", metavar="FILE", help="class-conditional prior: an attribute file, one column for each class"
        )
        p.add_argument("--columns", nargs="+", metavar="NAME", help="its columns, in the order of the classes")


def _encoding_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--latents", metavar="DIR", help="where latents are kept (default: the folder latents beside --out)")
    p.add_argument("--cached-only", action="store_true", help="fail instead of encoding when they are not there")
    p.add_argument("--encode-batch-size", type=int, help="images per encoder pass (default: chosen for the device)")


def _encoder_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--target",
        default=PCA,
        metavar="pca|features|MODEL",
        help="the codes to learn: the principal components of the images, or of what the trunk of the prior finds in "
        "them, each divided by its standard deviation; or those of a PDAE of any image size (bundled name, directory), "
        "whose G is copied where it fits",
    )
    p.add_argument(
        "--start-from",
        metavar="MODEL",
        help="pca, features: a trained PDAE whose G to take, by a linear map from the codes to those that it knows",
    )
    p.add_argument(
        "--target-images", type=int, default=10_000, metavar="N", help="images that components are fitted on"
    )
    p.add_argument(
        "--attributes",
        metavar="FILE",
        help="attributes that begin the codes, one dimension of z each; the target's codes follow, without what the "
        "attributes tell of them: G and encoder of MODEL are taken by linear maps",
    )
    p.add_argument("--columns", nargs="+", metavar="NAME", help="its columns to use (default: all of them)")
    _holdout_option(p)


def _student_options(p: argparse.ArgumentParser, task: str) -> None:
    add = p.add_argument
    add(
        "--task",
        dest="reads",
        choices=HEADS,
        required=task == "recognise",
        help="what is read from the images" + ("; --choose policy is rewarded by it" * (task == "student")),
    )
    add("--labels", type=int, metavar="N", help="images whose labels are seen, drawn by --seed (default: all)")
    add("--attributes", metavar="FILE", help="--task classes: an attribute file, one column for each class")
    add("--columns", nargs="+", metavar="NAME", help="its columns, in the order of the classes")
    if task == "recognise":
        add("--freeze", action="store_true", help="train the head alone")
        add("--scratch", action="store_true", help="start from random weights of the same shape, to compare")
        add(
            "--head-first",
            type=float,
            metavar="SHARE",
            help="of the steps, in which the head alone learns; then all does, what was learned before at a tenth of "
            "the rate (default: 0.5; 0, all at one rate, with --scratch)",
        )
        _holdout_option(p)
        return
    add("--choose", default="0", metavar="T|" + "|".join(CHOICES), help="the teacher's time, or how it is chosen")
    add("--times", type=int, nargs="+", metavar="T", help=f"to choose among (default: {' '.join(map(str, TIMES))})")
    add("--loss", choices=tuple(LOSSES), default="dense", help="between the student's maps and the teacher's")
    add("--target", choices=TARGETS, default="middle", help="what of the teacher: middle block, decoder blocks, or z")
    add("--noised", action="store_true", help="the teacher sees x_t in place of the image")
    add("--estimator", choices=ESTIMATORS, default="exact", help="of the policy's gradient")
    add("--entropy", type=float, default=0.1, help="weight of the policy's entropy, falls to 0 by half of --steps")
    add("--width", type=int, default=16, help="channels of the student's first level, a multiple of 8")
    add("--depth", type=int, default=1, help="residual blocks of each level")
    add("--halvings", type=int, help="of the resolution (default: those of the teacher's middle block)")
    add("--label", type=int, metavar="K", help="class-conditional teacher: the class of all images")


def _holdout_option(p: argparse.ArgumentParser) -> None:
    p.add_argument("--holdout", type=float, default=0.1, help="fraction of the images kept for the final test")


def _code_options(p: argparse.ArgumentParser, task: str) -> None:
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
        _holdout_option(p)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; ``task`` says which. A mistake ends with one line and status 2."""
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
