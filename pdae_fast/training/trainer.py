"""The plain, correct trainer of every task: Adam, EMA, accumulation, optional bfloat16, resumption bit for bit."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .. import config as configs
from ..errors import UserError
from ..files import atomic_write, clear_unfinished, make_folder
from ..models import PDAE, Prior
from ..processes import Group
from . import distributed, state
from .distributed import PeerGone
from .feed import BatchOrder, Prefetcher, Prepared, closing_feed, global_seed, step_generator
from .losses import Losses
from .settings import TrainSettings
from .step import GraphedStep, StepOptions, arrange, build_forward, build_optimizer, load_optimizer, move, set_rates
from .tasks import Task

Scalars = Callable[[int, dict[str, float]], None]


class Trainer:
    """Trains ``task`` on ``dataset`` into the directory ``out``.

    ``out`` receives train.json (settings, and ``notes``), checkpoint.pt (everything a resumed run needs), log.jsonl
    (one line per ``log_every`` steps), samples/*.png, and at every save the model of the EMA weights as config.json +
    model.safetensors, so that ``from_pretrained(out)`` always works. ``preview(model, step, path)`` draws a sample
    grid; ``scalars(step, values)`` receives what is logged. ``options`` say how a step is executed. With several
    processes each makes a Trainer with its ``group`` and calls the same methods; the first one writes. Raises UserError
    for an unusable ``out``, a mismatch on resume, data that cannot be read or a non-finite loss.
    """

    def __init__(
        self,
        task: Task,
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
        notes: dict[str, Any] | None = None,
        quiet: bool = False,
        options: StepOptions | None = None,
        group: Group | None = None,
    ) -> None:
        if settings.task != task.name:
            raise ValueError(f"the settings are for task {settings.task}, not {task.name}")
        if len(dataset) == 0:
            raise UserError(f"the data set is empty; expected {task.units}")
        self.settings, self.dataset, self.out = settings, dataset, Path(out)
        self.device = torch.device(device)
        self.workers, self.log_every, self.save_every, self.sample_every = workers, log_every, save_every, sample_every
        self.preview, self.scalars, self.notes, self.quiet = preview, scalars, dict(notes or {}), quiet
        self.options, self.group = options or StepOptions(), group or Group()
        self.options.check(task.name, self.device, self.group.size)
        distributed.rows(self.group, settings.batch_size)  # says so where it cannot be shared
        self.task = task.to(self.device)
        arrange(self.task, self.options)
        self.model = task.model
        parts: dict[str, dict[str, torch.nn.Parameter]] = {}
        for name, p in self.model.named_parameters():
            if p.requires_grad:
                parts.setdefault(task.part_of(name), {})[name] = p
        trained = {name: p for part in parts.values() for name, p in part.items()}
        self.parts, self.parameters = list(parts), list(trained.values())
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        averages = dict(self.ema.named_parameters())
        self.ema_parameters = [averages[name] for name in trained]
        values = [list(part.values()) for part in parts.values()]
        self.optimizer = build_optimizer(values, settings.lr, self.device, self.options)
        self.step, self.saved_step = 0, None
        self._forward = self._graphed = None
        deferred = self.device.type == "cuda" or self.group.size > 1
        self.losses = Losses(self.device, deferred, functools.partial(distributed.gather, self.group))
        self._stop: str | None = None

    # -- state -----------------------------------------------------------------------------------------------------

    def resume(self, may_lack: bool = False) -> int:
        """Continue the run in ``out`` exactly where its last checkpoint left it.

        may_lack: whether the data set may have lost images since, whose number is returned; the order of the others is
        then that of a run which never had them.
        """
        path = self.out / state.CHECKPOINT_NAME
        saved = state.load(path)
        self.settings.check_resumable(saved["settings"])
        count, task = len(self.dataset), self.task
        fewer = saved["images"] - count if may_lack and count < saved["images"] else 0
        state.check_same_run(saved, self.out, self._config(), task.units, count + fewer, task.record)
        state.check_whole(path, saved, self.model, self.ema, self.parameters)
        self.model.load_state_dict(saved["model"])
        self.ema.load_state_dict(saved["ema"])
        load_optimizer(self.optimizer, saved["optimizer"])
        self.step = self.saved_step = saved["step"]
        return fewer

    def save(self) -> None:
        """Write the checkpoint, then the users' model; each is replaced whole. All processes call it, one writes.

        UserError, and nothing is written, when a loss was not finite.
        """
        with self._advice():
            self.losses.check()
        self.saved_step = self.step
        if not self.group.first:
            return
        state.save(
            self.out / state.CHECKPOINT_NAME,
            {
                "step": self.step,
                "settings": dataclasses.asdict(self.settings),
                "config": self._config(),
                "images": len(self.dataset),
                "record": self.task.record,
                "model": self.model.state_dict(),
                "ema": self.ema.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            },
        )
        self.task.export(self.ema).save_pretrained(self.out)

    def _config(self) -> dict[str, Any]:
        return json.loads(configs.dumps(self.task.config))

    # -- one step --------------------------------------------------------------------------------------------------

    def _prepare(self, batch: Any, micro_step: int) -> tuple[Tensor, ...]:
        """This process's arguments of the forward pass ``micro_step``, on the CPU."""
        generator = step_generator(self.settings.seed, micro_step)
        return distributed.draw(self.task, batch, generator, self.settings.flip, self.group)

    def _build(self) -> None:
        """What computes the loss. Not before the first step, when a resumed run's weights are final; and before that
        step's seed is set, because building may draw."""
        if self._forward is None:
            forward = build_forward(self.task, self.options)
            many = self.group.size > 1
            self._forward = distributed.Replicas(forward, self.group, self.device) if many else forward

    def _loss(self, tensors: tuple[Tensor, ...]) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.amp == "bfloat16"):
            return self._forward(*tensors)

    def train_step(self, batches: Iterator[Any]) -> float | Tensor:
        """One optimiser step over ``accumulate`` batches; returns this process's mean loss, a float, or where reading
        it would mean waiting (``losses.deferred``) a scalar on the device."""
        n = self.settings.accumulate
        first = self.step * n
        fetched = self._fetch(batches)
        ready = [b if isinstance(b, Prepared) else self._prepare(b, first + i) for i, b in enumerate(fetched)]
        ready = [move(tensors, self.device, self.options) for tensors in ready]
        self._build()
        self.task.train()
        rate, progress = self.settings.learning_rate(self.step), self.step / self.settings.steps
        set_rates(self.optimizer, [rate * self.task.rate_of(part, progress) for part in self.parts])
        if self.options.cuda_graph:
            losses = self._replay(ready)
        else:
            losses = self._gradients(ready)
            self.optimizer.step()
            self.optimizer.zero_grad()
        if self.group.first:
            with torch.no_grad():
                torch._foreach_lerp_(self.ema_parameters, self.parameters, 1 - self.settings.ema_rate(self.step))
        self.losses.steps += 1
        self.step += 1
        loss = losses.double().mean()
        return loss if self.losses.deferred else float(loss)

    def _gradients(self, ready: list[tuple[Tensor, ...]]) -> Tensor:
        """Forward and backward of the batches of a step."""
        n, losses = len(ready), []
        for i, tensors in enumerate(ready):
            torch.manual_seed(global_seed(self.settings.seed, self.step * n + i, self.group.rank))
            last = i == n - 1
            with self._forward.accumulate() if self.group.size > 1 and not last else nullcontext():
                loss = self._loss(tensors)
                self._count(loss, n)
                with distributed.peers(self.group):
                    (loss / n).backward()
            losses.append(loss.detach())
        return torch.stack(losses)

    def _replay(self, ready: list[tuple[Tensor, ...]]) -> Tensor:
        """The same by a captured graph, Adam included. Its dropout draws from the seed of the first batch."""
        if self._graphed is None:
            self._graphed = GraphedStep(self._passes, self.optimizer, self.device)
        self._graphed.build(ready)  # draws, so it comes before the seed
        torch.manual_seed(global_seed(self.settings.seed, self.step * len(ready)))
        losses = self._graphed(ready).clone()
        for loss in losses:
            self._count(loss, len(ready))
        return losses

    def _passes(self, batches: Sequence[tuple[Tensor, ...]]) -> Tensor:
        """Forward and backward without anything that a capture forbids; the losses [accumulate]."""
        losses = []
        for tensors in batches:
            loss = self._loss(tensors)
            (loss / len(batches)).backward()
            losses.append(loss.detach())
        return torch.stack(losses)

    def _count(self, loss: Tensor, n: int) -> None:
        with self._advice():
            self.losses.add(loss, self.step, 1 / n)

    @contextmanager
    def _advice(self) -> Iterator[None]:
        """Says what may help when a loss is not finite."""
        try:
            yield
        except UserError as error:
            self.optimizer.zero_grad()
            lr = self.settings.lr
            raise UserError(f"{error}. Try a lower --lr (now {lr:g}), --amp off, or look for broken images") from None

    def _fetch(self, batches: Iterator[Any]) -> list[Any]:
        """The batches of a step. Data that cannot be read ends the run, but costs none of its finished steps."""
        reason, failure = None, None
        try:
            fetched = [next(batches) for _ in range(self.settings.accumulate)]
        except (UserError, OSError) as error:
            reason, failure = str(error), error
            if "Original Traceback" in reason:
                # A loader worker rebuilds the error from its whole traceback, which ends with the error itself.
                reason = reason.rpartition(f"{type(error).__name__}: ")[2].strip()
        if distributed.agree(self.group, int(reason is not None)):
            if self.out.is_dir():
                self.save()
                note = f"step {self.step} is saved in {self.out}, --resume continues once the file is whole"
                if self.task.units == "images":
                    note += ", with --on-error skip without it"
                reason = f"{reason or 'another process could not read its images'}; {note}"
            distributed.agree(self.group, 0)  # nobody leaves before the checkpoint is written
            raise UserError(reason) from failure
        return fetched

    # -- the run ---------------------------------------------------------------------------------------------------

    def _batches(self) -> Iterator[Any]:
        n = self.settings.accumulate
        order = BatchOrder(
            len(self.dataset), self.settings.batch_size, self.settings.seed, self.step * n, self.settings.steps * n,
            distributed.rows(self.group, self.settings.batch_size),
        )  # fmt: skip
        loaded = iter(
            DataLoader(
                self.dataset,
                batch_sampler=order,
                num_workers=self.workers,
                collate_fn=self.task.collate,
                persistent_workers=self.workers > 0,
            )
        )
        if self.device.type != "cuda":  # nothing to overlap the loading with
            return loaded
        return Prefetcher(loaded, self._prepare, self.step * n, self.device)

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
        try:
            return self._run()
        except PeerGone:
            where = "nothing was saved yet" if self.saved_step is None else (
                f"step {self.saved_step} is saved in {self.out}, --resume continues from there"
            )  # fmt: skip
            raise UserError(f"another process of this run ended at step {self.step}; {where}") from None

    def _run(self) -> str | None:
        self._start()
        per_step = self.settings.batch_size * self.settings.accumulate
        steps, since = 0, time.perf_counter()
        with (
            self._signals(),
            tqdm(total=self.settings.steps, initial=self.step, unit="step", disable=self.quiet or None) as bar,
            closing_feed(self._batches()) as batches,
        ):
            while self.step < self.settings.steps and not self._stopped():
                self.train_step(batches)
                steps += 1
                bar.update()
                if self.step % self.log_every == 0 or self.step == self.settings.steps:
                    with self._advice():
                        loss = self.losses.mean()
                    seconds = time.perf_counter() - since
                    values = {"loss": loss, "images_per_second": steps * per_step / seconds}
                    bar.set_postfix(loss=f"{values['loss']:.4g}", images=f"{values['images_per_second']:.1f}/s")
                    self._log(values)
                    steps, since = 0, time.perf_counter()
                if self.preview and self.sample_every and self.step % self.sample_every == 0:
                    with self._advice():
                        self.losses.check()
                    self._preview()  # before the checkpoint, after which a resumed run does not come here again
                if self.step % self.save_every == 0:
                    self.save()
            self.save()
            distributed.agree(self.group, 0)  # nobody leaves before the checkpoint is written
        return self._stop

    def _start(self) -> None:
        """What is written before the first step."""
        if distributed.gather(self.group, torch.tensor([float(self.step)], dtype=torch.float64)).unique().numel() > 1:
            raise UserError(f"the processes of this run see different checkpoints; is {self.out} on a shared disk?")
        if not self.group.first:
            return
        make_folder(self.out)
        clear_unfinished(self.out)  # a checkpoint can be gigabytes
        with atomic_write(self.out / "train.json", "w") as file:
            values = {**dataclasses.asdict(self.settings), **self.notes, **self.task.record}
            if self.options.chosen():
                values["step_options"] = self.options.chosen()
            file.write(json.dumps(values, indent=2) + "\n")
        state.trim_log(self.out / "log.jsonl", self.step)

    def _stopped(self) -> bool:
        """Whether any process was told to stop: then all do, after the same step."""
        number = distributed.agree(self.group, signal.Signals[self._stop].value if self._stop else 0)
        self._stop = signal.Signals(number).name if number else None
        return number > 0

    def _preview(self) -> None:
        if self.group.first:
            make_folder(self.out / "samples")
            self.preview(self.task.export(self.ema), self.step, self.out / "samples" / f"{self.step:07d}.png")

    def _log(self, values: dict[str, float]) -> None:
        if self.group.first:
            state.append_log(self.out / "log.jsonl", self.step, values)
            if self.scalars:
                self.scalars(self.step, values)
