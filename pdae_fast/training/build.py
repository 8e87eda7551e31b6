"""From the options of a command to the network that it trains."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from .. import cli
from .. import config as configs
from ..config import AnyConfig, DiffAEConfig, PDAEConfig, PriorConfig, ScheduleConfig, presets
from ..errors import UserError
from ..models import PDAE, DiffAE, Prior
from . import warm_start
from .arguments import FLAGS, NEW_PRIOR

NEW = "fashion32"  # the architecture of a new network where none is asked for
BARE = {"latent": None, "attributes": (), "latent_statistics": False}  # of an autoencoder with nothing on top of z


def _architecture(name: str) -> AnyConfig:
    if name in presets:
        return presets[name]
    path = Path(name)
    if not path.exists():
        raise UserError(f"--architecture {name}: neither an architecture ({', '.join(presets)}) nor a config.json")
    return configs.load(path)


def _prior_of(name: str) -> PriorConfig:
    """The prior of the architecture ``name``."""
    config = _architecture(name)
    if isinstance(config, DiffAEConfig):
        raise UserError(f"--architecture {name}: describes a Diff-AE; expected a prior or a PDAE")
    return config.prior if isinstance(config, PDAEConfig) else config


def _new_prior(args) -> Prior:
    """A fresh prior of --architecture, changed by what other options say."""
    config = _prior_of(args.architecture or NEW)
    foreign = cli.foreign_options(args)
    kind, timesteps = foreign.pop("schedule", None), foreign.pop("timesteps", None)
    for name in foreign:
        raise UserError(f"--{name.replace('_', '-')} is for the checkpoint of --init-from; a new prior has none")
    schedule = config.schedule
    if kind or timesteps:  # its numbers are those of the process that it was
        timesteps = timesteps or schedule.timesteps
        schedule = ScheduleConfig(kind or schedule.kind, timesteps, zero_terminal_snr=schedule.zero_terminal_snr)
    given = {name: getattr(args, name) for name in NEW_PRIOR if getattr(args, name) is not None}
    unet = dataclasses.replace(
        config.unet, **{name: given.pop(name) for name in list(given) if name in vars(config.unet)}
    )
    return Prior(dataclasses.replace(config, unet=unet, schedule=schedule, **given))


def _trained_prior(args) -> Prior:
    """The prior of --init-from; with another --prediction a start; UserError where --architecture, or an
    option for a new prior, says otherwise."""
    if not args.init_from:
        raise UserError(
            f"train {args.task} needs a pre-trained prior: give --init-from NAME, DIR or FILE (or train prior first)"
        )
    for name in NEW_PRIOR:
        if name != "prediction" and getattr(args, name, None) is not None:
            flag = FLAGS.get(name, f"--{name.replace('_', '-')}")
            raise UserError(f"{flag} is for a new prior; that of --init-from {args.init_from} is trained as it is")
    named = _prior_of(args.architecture) if args.architecture else None
    prior = Prior.from_pretrained(args.init_from, **cli.foreign_options(args))
    if named is not None:
        found = warm_start.misfit(named, prior.config)
        if found:
            raise UserError(
                f"--architecture {args.architecture}: its {found[0]} is {found[1]}, that of the prior of --init-from "
                f"{found[2]}; the networks are those of --init-from: leave --architecture out"
            )
    return warm_start.predicting(prior, getattr(args, "prediction", None) or prior.config.prediction)


def _autoencoder(args, prior: Prior) -> dict[str, int]:
    """latent_dim and encoder_channel: as given, else of --architecture, a preset around this prior, or the paper."""
    named = _architecture(args.architecture) if args.architecture else None
    if not isinstance(named, PDAEConfig):
        alike = (config for config in presets.values() if warm_start.misfit(config.prior, prior.config) is None)
        named = next(alike, PDAEConfig())
    given = {name: getattr(args, name) for name in ("latent_dim", "encoder_channel")}
    return {name: getattr(named, name) if value is None else value for name, value in given.items()}


def _diffae(args) -> DiffAE:
    """A fresh Diff-AE of --architecture, or that of --init-from without what was trained on its codes."""
    if args.init_from:
        for name in ("architecture", "latent_dim"):
            if getattr(args, name) is not None:
                flag = f"--{name.replace('_', '-')}"
                raise UserError(
                    f"{flag} is for a new Diff-AE; that of --init-from {args.init_from} is trained as it is"
                )
        start = DiffAE.from_pretrained(args.init_from, **cli.foreign_options(args))
        config = dataclasses.replace(start.config, **BARE)
        state = {k: v for k, v in start.state_dict().items() if k.startswith(("encoder.", "unet."))}
        model = DiffAE.from_state(config, state, args.init_from)
        model.notes = start.notes
        return model
    for name in cli.foreign_options(args):
        raise UserError(f"--{name.replace('_', '-')} is for the checkpoint of --init-from; a new Diff-AE has none")
    name = args.architecture or NEW
    config = _architecture(name)
    if isinstance(config, PriorConfig) or config.unet.num_classes is not None:
        raise UserError(f"--architecture {name}: describes a prior; expected a Diff-AE, or a PDAE without classes")
    width = config.latent_dim if args.latent_dim is None else args.latent_dim
    if isinstance(config, PDAEConfig):
        config = _diffae_like(config)
    return DiffAE(dataclasses.replace(config, latent_dim=width, **BARE))


def _diffae_like(config: PDAEConfig) -> DiffAEConfig:
    """A Diff-AE with the U-Net of a PDAE. As in all of Diff-AE's own, its encoder has one level more, as wide as the
    deepest, and the time embedding is as wide as z."""
    widths = config.unet.channel_multiplier
    shared = {name: getattr(config, name) for name in ("image_size", "schedule", "noise", "prediction", "crop")}
    unet = dataclasses.replace(config.unet, time_channel=config.latent_dim)
    return DiffAEConfig(unet=unet, latent_dim=config.latent_dim, encoder_multiplier=(*widths, widths[-1]), **shared)


def build_model(args) -> Prior | PDAE | DiffAE:
    """The model to train on images: fresh, from --init-from, or around the prior of that. It remembers --crop."""
    model = _built(args)
    if args.crop:
        model.config = dataclasses.replace(model.config, crop=args.crop)
    return model


def _built(args) -> Prior | PDAE | DiffAE:
    torch.manual_seed(args.seed)
    if args.task == "diffae":
        return _diffae(args)
    if args.task == "prior":
        return _trained_prior(args) if args.init_from else _new_prior(args)
    prior = _trained_prior(args)
    settings = _autoencoder(args, prior)
    if args.task == "pdae" and args.freeze_encoder:
        start = PDAE.from_pretrained(args.start_from)
        for name, value in settings.items():
            own = getattr(start.config, name)
            if own != value and (args.architecture or getattr(args, name) is not None):
                raise UserError(f"--start-from {args.start_from}: its {name} is {own}, not {value}")
        return warm_start.around(start, prior, args.start_from)
    model = PDAE.from_prior(prior, **settings)
    model.notes = prior.notes
    if args.task == "pdae" and args.start_from:
        warm_start.take_trained_half(model, PDAE.from_pretrained(args.start_from), args.start_from)
    return model
