"""Train the bundled models anew, in calls of a few minutes: `python -m bench.train_bundled --minutes 9 --resume DIR`.

Every call goes on where the last one stopped, or was killed, until both models are whole: prior, encoder, PDAE, the
encoder again where attributes are to begin z, classifier, latent DPM, then G alone, each by `python -m
pdae_fast.train` with the settings of the model cards, and at last `python -m pdae_fast.convert` to DIR/NAME/model. A
model that was trained in many calls is, bit for bit, the one of a single call on the same machine (on the CPU). Where
the cards tell of detours (codes of 128 dimensions, whitened ones) this takes the straight way, which the bundled
weights did not. Exit status 0 when all is done, 3 when there is more.

On a machine without network, carry the folder of Debian's package dataset-fashion-mnist (its four idx files) along and
name it, `--fashion fashion-mnist:DIR`. avatars64 draws its data by the wheels of dicebear-core, dicebear-styles and
resvg-py, which have to be installed or carried; or name a folder that was drawn elsewhere, `--avatars DIR`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from pdae_fast import cli, convert, presets
from pdae_fast.config import to_dict
from pdae_fast.data.__main__ import main as make_data
from pdae_fast.engine import resolve_device
from pdae_fast.engine.device import has_native_bfloat16
from pdae_fast.errors import UserError
from pdae_fast.files import atomic_write, claim_folder, claims, make_folder
from pdae_fast.training.command import main as train
from pdae_fast.training.state import CHECKPOINT_NAME

from .networks import TINY

MORE = 3
INTERRUPTED = (130, 143)  # exit statuses of the project's commands
# Of a call: for the step that is running and the checkpoint after it.
MARGIN_SECONDS, MARGIN_SHARE = 20.0, 0.1
ATTRIBUTES = (
    "eyeglasses sunglasses eyepatch beard moustache hat long_hair bald black_hair brown_hair blond_hair gray_hair "
    "pale_skin dark_skin smiling mouth=smile+tongue mouth_open eyes_closed jacket graphic_shirt dark_background"
)


class Stopped(KeyboardInterrupt):
    """The call's time is up, or somebody asks for its end. No Exception: load_state_dict, for one, makes those its own
    error."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One model in the making, in ``folder``; ``factor`` multiplies all steps."""

    model: str
    folder: Path
    data: str
    device: torch.device
    factor: float = 1.0

    def train(
        self,
        task: str,
        out: str,
        options: str,
        steps: int,
        batch: int,
        rate: float,
        words: Sequence[str] = (),
    ) -> Stage:
        """A stage that trains; ``{name}`` in ``options`` is the folder of the run ``name``. ``words``: options
        with paths, which may have spaces."""
        steps = max(1, round(steps * self.factor))
        words = [task, *words, "--data", self.data, "--out", str(self.folder / out), "--device", str(self.device)]
        words += ["--steps", str(steps), "--batch-size", str(batch), "--lr", f"{rate:g}", "--lr-schedule", "cosine"]
        words += ["--save-every", str(min(1000, max(3, steps // 10)))]
        words += [re.sub(r"^\{(.+)\}$", lambda m: str(self.folder / m[1]), word) for word in options.split()]
        if task in ("prior", "encoder", "pdae") and (self.device.type == "cuda" or has_native_bfloat16(self.device)):
            words += ["--amp", "bfloat16", *(["--frozen-bfloat16"] if task == "pdae" else [])]
        if self.device.type == "cuda":
            words += ["--workers", "2", *(["--channels-last"] if task in ("prior", "pdae") else [])]

        def run() -> None:
            resumed = ["--resume"] if (self.folder / out / CHECKPOINT_NAME).exists() else []
            train([*words, *resumed])

        return Stage(out, run, words)


@dataclasses.dataclass(frozen=True)
class Stage:
    """``run`` may be called again after it was stopped. ``words``: of `pdae_fast.train`, where it is that."""

    name: str
    run: Callable[[], object]
    words: list[str] = dataclasses.field(default_factory=list)


IMAGES = "--no-flip --fused-adam --ema-decay 0.999 --warmup"


def fashion32(run: Run) -> Iterator[Stage]:
    new = "--architecture fashion32 --init-from {prior}"
    yield run.train("prior", "prior", f"--architecture fashion32 --velocity 1 {IMAGES} 200", 5000, 32, 5e-4)
    yield run.train("encoder", "encoder", f"{new} --target features", 2000, 64, 1e-3)
    pdae = f"{new} --start-from {{encoder}} --velocity 10 {IMAGES} 200"
    yield run.train("pdae", "pdae", pdae, 5700, 32, 5e-4)
    yield from heads(run, ["--attributes", "classes"], 3000, 2500, 5300, 32)


def avatars64(run: Run) -> Iterator[Stage]:
    if run.data == str(run.folder / "avatars"):
        words = ["avatars", "--out", run.data, "--count", "24000", "--size", "64", "--seed", "1"]
        yield Stage("data", lambda: make_data(words))
    small = dataclasses.replace(presets["avatars64"], image_size=32)
    architecture = run.folder / "32.json"
    yield Stage("architecture", lambda: _write_config(architecture, small))
    prior = f"--architecture {{32.json}} {IMAGES} 100"
    yield run.train("prior", "prior32", prior, 2600, 32, 5e-4)
    yield Stage("prior32to64", lambda: _enlarged(run.folder / "prior32", run.folder / "prior32to64", 64))
    yield run.train("prior", "prior", f"--init-from {{prior32to64}} --velocity 1 {IMAGES} 50", 1500, 16, 4e-4)
    new = "--architecture avatars64 --init-from {prior}"
    target = "--target features --target-images 12000 --holdout 0.05"
    yield run.train("encoder", "encoder", f"{new} {target}", 4000, 32, 1.5e-3)
    pdae = f"{new} --start-from {{encoder}} --velocity 10 {IMAGES} 100"
    yield run.train("pdae", "pdae", pdae, 6400, 16, 5e-4)
    attributes = ["--attributes", f"{run.data}/attributes.csv", "--columns", *ATTRIBUTES.split()]
    yield from heads(run, attributes, 3000, 1500, 5600, 16)


def tiny(run: Run) -> Iterator[Stage]:
    """Everything in seconds, for the test of this file."""
    yield Stage("architecture", lambda: _write_config(run.folder / "tiny.json", TINY))
    new = "--architecture {tiny.json} --init-from {prior}"
    yield run.train("prior", "prior", f"--architecture {{tiny.json}} {IMAGES} 2", 6, 2, 4e-4)
    yield run.train("encoder", "encoder", f"{new} --target features --target-images 24", 6, 4, 1e-3)
    yield run.train("pdae", "pdae", f"{new} --start-from {{encoder}} {IMAGES} 2", 6, 2, 4e-4)
    yield from heads(run, ["--attributes", f"{run.data}/attributes.csv"], 6, 6, 6, 2)


def heads(run: Run, attributes: list[str], classifier: int, latent: int, g: int, batch: int) -> Iterator[Stage]:
    """What follows the PDAE: its encoder with the attributes of a file first in z, classifier and latent DPM on the
    codes, then G alone, and the model that is bundled."""
    few, start = run.model == "tiny", "pdae"
    codes, hidden = 8 if few else 512, "--hidden 32 --layers 3" if few else "--hidden 512 --layers 8"
    if attributes[1] != "classes":
        architecture = "{tiny.json}" if few else run.model
        start, options = "known", f"--architecture {architecture} --init-from {{pdae}} --holdout 0.05 --ema-decay 0.999"
        words = ["--target", str(run.folder / "pdae"), *attributes]
        yield run.train("encoder", start, options, 6 if few else 4000, 4 if few else 32, 1.5e-3, words=words)
    options = f"--init-from {{{start}}} --ema-decay 0.99"
    yield run.train("classifier", "classified", options, classifier, codes, 3e-3, words=attributes)
    options = f"--init-from {{classified}} {hidden} --warmup 50 --ema-decay 0.999"
    yield run.train("latent", "full", options, latent, max(1, codes // 2), 1e-3)
    options = f"--init-from {{full}} --start-from {{full}} --freeze-encoder --velocity 10 --seed 31 {IMAGES} 100"
    yield run.train("pdae", "g", options, g, batch, 6e-4)
    words = [str(run.folder / "g"), "--dtype", "float16", "--out", str(run.folder / "model"), "--overwrite"]
    yield Stage("model", lambda: _converted(words))


RECIPES = {"fashion32": fashion32, "avatars64": avatars64, "tiny": tiny}


def _write_config(path: Path, config) -> None:
    with atomic_write(path, "w") as file:
        file.write(json.dumps(to_dict(config), indent=2))


def _enlarged(source: Path, out: Path, size: int) -> None:
    """The prior of ``source``, whose weights know no size, for images of ``size`` pixels."""
    make_folder(out)
    shutil.copyfile(source / "model.safetensors", out / "model.safetensors")
    values = json.loads((source / "config.json").read_text(encoding="utf-8"))
    cli.write_json(out / "config.json", {**values, "image_size": size})


def _converted(words: list[str]) -> None:
    status = convert.main(words)
    if status in INTERRUPTED:
        raise Stopped
    if status:
        raise UserError(f"{words[0]} could not be converted; see above")


def advance(run: Run) -> None:
    """Every stage that is not done yet, in their order; Stopped when there is no more time."""
    make_folder(run.folder)
    claim_folder(run.folder)
    _check_same(run)
    for stage in RECIPES[run.model](run):
        done = run.folder / f"{stage.name}.done"
        if done.exists():
            continue
        print(f"{run.model}: {stage.name}", flush=True)
        start = time.time()
        try:
            with claims():
                stage.run()
        except SystemExit as end:
            if end.code in INTERRUPTED:
                raise Stopped from None
            raise
        with atomic_write(done, "w") as file:
            file.write(f"{time.time() - start:.1f} s in the last call\n")


def _check_same(run: Run) -> None:
    """UserError where ``run`` is not the one that its folder holds the beginning of."""
    path, own = run.folder / "recipe.json", {"model": run.model, "data": run.data, "factor": run.factor}
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        for name, value in own.items():
            if found.get(name) != value:
                raise UserError(f"{run.folder} was begun with {name} {found.get(name)!r}, not {value!r}")
    else:
        cli.write_json(path, own)


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """After so many seconds, less a margin, the process is asked to end; a trainer saves its step then, and what
    trains nothing ends with Stopped."""

    def stop(number: int, frame: object) -> None:
        raise Stopped

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    before[signal.SIGALRM] = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGTERM))
    margin = min(MARGIN_SECONDS, MARGIN_SHARE * seconds)
    signal.setitimer(signal.ITIMER_REAL, max(0.01, seconds - margin))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(
        prog="python -m bench.train_bundled", description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    p.add_argument("--resume", type=Path, required=True, metavar="DIR", help="where everything is, or will be")
    p.add_argument("--minutes", type=float, default=9.0, help="for this call")
    p.add_argument("--models", nargs="+", choices=list(RECIPES), default=["fashion32", "avatars64"], help="which ones")
    p.add_argument("--fashion", default="fashion-mnist", metavar="DATA", help="training data of fashion32")
    p.add_argument("--avatars", metavar="DIR", help="training data of avatars64 (default: drawn anew)")
    p.add_argument("--tiny", metavar="DIR", help="training data of tiny")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    p.add_argument("--factor", type=float, default=1.0, help="times the steps of the model cards")
    args = p.parse_args(argv)
    if not args.minutes > 0 or not 0 < args.factor < 1000:
        raise UserError(f"--minutes and --factor must be positive, not {args.minutes:g} and {args.factor:g}")
    device = resolve_device(args.device)
    data = {"fashion32": args.fashion, "avatars64": args.avatars, "tiny": args.tiny}
    try:
        with limited(60 * args.minutes):
            for model in args.models:
                folder = args.resume / model
                advance(Run(model, folder, data[model] or str(folder / "avatars"), device, args.factor))
                print(f"{model}: done, {folder / 'model'}", flush=True)
    except Stopped:
        print(f"stopped; the same command goes on: --resume {args.resume}", flush=True)
        raise SystemExit(MORE) from None


if __name__ == "__main__":
    sys.exit(cli.run(main))
