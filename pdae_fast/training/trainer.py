"""The plain, correct trainer: Adam, EMA, accumulation, optional bfloat16, and resumption bit for bit."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .. import config as configs
from ..errors import UserError
from ..files import atomic_write, make_folder
from ..models import PDAE, Prior
from ..schedule import build_schedule
from . import state
from .objective import pdae_loss, prior_loss
from .order import BatchOrder, global_seed, step_generator
from .settings import TrainSettings

Scalars = Callable[[int, dict[str, float]], None]


def _images(samples: list[Any]) -> Tensor:
    return torch.stack([sample.image for sample in samples])


class Trainer:
    """Trains ``model`` (a Prior, or a PDAE around a frozen prior) on ``dataset`` into the directory ``out``.

    ``out`` receives train.json (settings), checkpoint.pt (everything a resumed run needs), log.jsonl (one line per
    ``log_every`` steps), samples/*.png, and at every save the EMA weights as config.json + model.safetensors, so that
    ``from_pretrained(out)`` always works. ``preview(model, step, path)`` draws a sample grid; ``scalars(step, values)``
    receives what is logged. Raises UserError for an unusable ``out``, a mismatch on resume or a non-finite loss.
    """

    def __init__(
        self,
        model: Prior | PDAE,
        dataset: Dataset,
        settings: TrainSettings,
        out: str | Path,
        *,
        device: str | torch.device = "cpu",
        workers: int = 0,
        log_every: int = 50,
        save_every: int = 1000,
        sample_every: int = 0,
        preview: Callable[[Prior | PDAE, int, Path], None] | None = None,
        scalars: Scalars | None = None,
        quiet: bool = False,
    ) -> None:
        if (settings.task == "pdae") != isinstance(model, PDAE):
            raise ValueError(f"task {settings.task} needs a {'PDAE' if settings.task == 'pdae' else 'Prior'}")
        if len(dataset) == 0:
            raise UserError("the data set is empty; expected at least one image")
        self.settings, self.dataset, self.out = settings, dataset, Path(out)
        self.device = torch.device(device)
        self.workers, self.log_every, self.save_every, self.sample_every = workers, log_every, save_every, sample_every
        self.preview, self.scalars, self.quiet = preview, scalars, quiet
        self.model = model.to(self.device)
        self.schedule = build_schedule(model.config.schedule)
        if isinstance(model, PDAE):
            model.requires_grad_(False)
            model.encoder.requires_grad_(True)
            model.decoder.freeze_prior()
        else:
            model.requires_grad_(True)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.ema = copy.deepcopy(model).eval().requires_grad_(False)
        trained = {id(p) for p in self.parameters}
        names = [name for name, p in model.named_parameters() if id(p) in trained]
        ema = dict(self.ema.named_parameters())
        self.ema_parameters = [ema[name] for name in names]
        self.optimizer = torch.optim.Adam(self.parameters, lr=settings.lr, betas=(0.9, 0.999), eps=1e-8)
        self.step = 0
        self._stop: str | None = None

    # -- state -----------------------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Continue the run in ``out`` exactly where its last checkpoint left it."""
        saved = state.load(self.out / state.CHECKPOINT_NAME)
        self.settings.check_resumable(saved["settings"])
        found, own = saved["config"], json.loads(configs.dumps(self.model.config))
        if found != own:
            raise UserError(f"cannot resume: the model in {self.out} has another configuration than the one asked for")
        if saved["images"] != len(self.dataset):
            raise UserError(
                f"cannot resume: the data set has {len(self.dataset)} images but the saved run saw {saved['images']}"
            )
        self.model.load_state_dict(saved["model"])
        self.ema.load_state_dict(saved["ema"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step = saved["step"]

    def save(self) -> None:
        """Write the checkpoint, then the EMA model; each is replaced whole."""
        state.save(
            self.out / state.CHECKPOINT_NAME,
            {
                "step": self.step,
                "settings": dataclasses.asdict(self.settings),
                "config": json.loads(configs.dumps(self.model.config)),
                "images": len(self.dataset),
                "model": self.model.state_dict(),
                "ema": self.ema.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            },
        )
        self.ema.save_pretrained(self.out)

    # -- one step --------------------------------------------------------------------------------------------------

    def _loss(self, images: Tensor, micro_step: int) -> Tensor:
        generator = step_generator(self.settings.seed, micro_step)
        B = len(images)
        t = torch.randint(0, self.schedule.T, (B,), generator=generator)
        noise = torch.randn(images.shape, generator=generator)
        if self.settings.flip:
            flipped = torch.rand(B, generator=generator) < 0.5
            images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
        torch.manual_seed(global_seed(self.settings.seed, micro_step))
        images, t, noise = (v.to(self.device, non_blocking=True) for v in (images, t, noise))
        objective = pdae_loss if isinstance(self.model, PDAE) else prior_loss
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.amp == "bfloat16"):
            return objective(self.model, self.schedule, images, t, noise)

    def train_step(self, batches: Iterator[Tensor]) -> float:
        """One optimiser step over ``accumulate`` batches; returns the mean loss."""
        n, total = self.settings.accumulate, 0.0
        self._set_mode()
        for i in range(n):
            micro_step = self.step * n + i
            loss = self._loss(next(batches), micro_step)
            value = loss.item()
            if not math.isfinite(value):
                self.optimizer.zero_grad()
                raise UserError(
                    f"the loss is {value} at step {self.step}; nothing was written after the last checkpoint. "
                    f"Try a lower --lr (now {self.settings.lr:g}), --amp off, or look for broken images"
                )
            (loss / n).backward()
            total += value / n
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(self.ema_parameters, self.parameters, 1 - self.settings.ema_rate(self.step))
        self.step += 1
        return total

    def _set_mode(self) -> None:
        if isinstance(self.model, PDAE):
            # The frozen half must compute what it will compute at inference: no dropout there.
            self.model.eval()
            for name in self.model.decoder.TRAINED:
                getattr(self.model.decoder, name).train()
            self.model.encoder.train()
        else:
            self.model.train()

    # -- the run ---------------------------------------------------------------------------------------------------

    def _batches(self) -> Iterator[Tensor]:
        n = self.settings.accumulate
        order = BatchOrder(
            len(self.dataset), self.settings.batch_size, self.settings.seed, self.step * n, self.settings.steps * n
        )
        return iter(
            DataLoader(
                self.dataset,
                batch_sampler=order,
                num_workers=self.workers,
                collate_fn=_images,
                pin_memory=self.device.type == "cuda",
                persistent_workers=self.workers > 0,
            )
        )

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Turn SIGINT and SIGTERM into a clean stop after the running step."""

        def handler(number: int, frame: object) -> None:
            if self._stop is not None:  # the second one means it
                raise KeyboardInterrupt
            self._stop = signal.Signals(number).name

        previous = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, old in previous.items():
                signal.signal(number, old)

    def run(self) -> str | None:
        """Train up to ``settings.steps``; returns None, or the name of the signal that stopped it (state is saved)."""
        make_folder(self.out)
        with atomic_write(self.out / "train.json", "w") as file:
            file.write(json.dumps(dataclasses.asdict(self.settings), indent=2) + "\n")
        self._trim_log()
        per_step = self.settings.batch_size * self.settings.accumulate
        losses, since = [], time.perf_counter()
        with (
            self._signals(),
            tqdm(total=self.settings.steps, initial=self.step, unit="step", disable=self.quiet or None) as bar,
        ):
            batches = self._batches()
            while self.step < self.settings.steps and self._stop is None:
                losses.append(self.train_step(batches))
                bar.update()
                if self.step % self.log_every == 0 or self.step == self.settings.steps:
                    seconds = time.perf_counter() - since
                    values = {"loss": sum(losses) / len(losses), "images_per_second": len(losses) * per_step / seconds}
                    bar.set_postfix(loss=f"{values['loss']:.4g}", images=f"{values['images_per_second']:.1f}/s")
                    self._log(values)
                    losses, since = [], time.perf_counter()
                if self.step % self.save_every == 0:
                    self.save()
                if self.preview and self.sample_every and self.step % self.sample_every == 0:
                    make_folder(self.out / "samples")
                    self.preview(self.ema, self.step, self.out / "samples" / f"{self.step:07d}.png")
            self.save()
        return self._stop

    def _trim_log(self) -> None:
        """Drop lines that a killed run wrote after the checkpoint it resumes from."""
        path = self.out / "log.jsonl"
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if line and json.loads(line)["step"] <= self.step]
            with atomic_write(path, "w") as file:
                file.write("".join(line + "\n" for line in lines))

    def _log(self, values: dict[str, float]) -> None:
        with open(self.out / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": self.step, **values}) + "\n")
        if self.scalars:
            self.scalars(self.step, values)
