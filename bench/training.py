"""The trainer's ways to run a step, checked against the published loop's losses and timed beside it."""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils.data import DataLoader

from pdae_fast import PDAE
from pdae_fast.data import Sample
from pdae_fast.training import Trainer, TrainSettings
from pdae_fast.training.feed import BatchOrder
from pdae_fast.training.step import StepOptions
from pdae_fast.training.tasks import PDAETask

from .contenders import WrongNumbers
from .machine import PeakMemory
from .networks import build
from .quality import bundled_images
from .timing import Alternation
from .training_baseline import LR, PublishedTraining

SEED = 3
IMAGES = 512
COMPARED = 20  # steps from the same weights whose losses must agree
# ... each of them, relative to the published loop's.
TOLERANCE = {"off": 1e-3, "bfloat16": 0.01}
FAST = {"frozen_bfloat16": True, "fused_adam": True}
SIDES: dict[str, tuple[str, dict[str, bool]]] = {
    "float32": ("off", {}),
    "bfloat16": ("bfloat16", {}),
    "bfloat16 fast": ("bfloat16", FAST),
    "bfloat16 fast fused-norms": ("bfloat16", {**FAST, "fused_norms": True}),
    "bfloat16 fast channels-last": ("bfloat16", {**FAST, "channels_last": True}),
    "bfloat16 fast compile": ("bfloat16", {**FAST, "compile": True}),
    "bfloat16 fast cuda-graph": ("bfloat16", {**FAST, "channels_last": True, "cuda_graph": True}),
}
USUAL = ("float32", "bfloat16", "bfloat16 fast", "bfloat16 fast fused-norms", "bfloat16 fast channels-last")


def untrained(network: str) -> PDAE:
    """A PDAE at the start of its training: the network's prior, a fresh encoder, G = 0; no dropout, whose masks no two
    ways of computing share."""
    whole = build(network)
    config = dataclasses.replace(whole.config, unet=dataclasses.replace(whole.config.unet, dropout=0.0))
    prior = PDAE.from_state(config, whole.state_dict(), network).prior()
    torch.manual_seed(SEED)
    return PDAE.from_prior(prior, latent_dim=config.latent_dim, encoder_channel=config.encoder_channel)


class Side:
    """One contender: ``step()`` trains on the next batch."""

    def __init__(self, name: str, model: PDAE, samples: list[Sample], batch: int, device: torch.device) -> None:
        if name == "baseline":
            self.amp, self.trainer = "off", None
            published = PublishedTraining(model, device, SEED)
            order = BatchOrder(len(samples), batch, SEED)
            pinned = device.type == "cuda"
            self.batches = iter(
                DataLoader(samples, batch_sampler=order, collate_fn=PDAETask.collate, pin_memory=pinned)
            )
            self.take = published.step
            return
        self.amp, options = SIDES[name]
        settings = TrainSettings("pdae", "x", steps=10**9, batch_size=batch, lr=LR, seed=SEED, amp=self.amp)
        # Nothing is written: steps are taken one by one.
        self.trainer = Trainer(
            PDAETask(PDAE.from_state(model.config, model.state_dict(), name)), samples, settings,
            tempfile.gettempdir(), device=device, quiet=True, options=StepOptions(**options),
        )  # fmt: skip
        self.batches, self.take = self.trainer._batches(), self.trainer.train_step

    def step(self) -> Any:
        return self.take(self.batches)

    def close(self) -> None:
        if hasattr(self.batches, "close"):
            self.batches.close()


def apart(losses: Iterable[float], expected: Iterable[float]) -> float:
    """The largest relative difference of two sequences of losses; NaN when one of them has a NaN."""
    differences = [abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True)]
    return float(torch.tensor(differences, dtype=torch.float64).max())


def measure(
    network: str,
    batch: int,
    device: torch.device,
    names: Iterable[str],
    *,
    rounds: int = 15,
    seconds: float = 30.0,
    compared: int = COMPARED,
    drive: Callable[[Alternation, float], bool] | None = None,
    failures: dict[str, Exception] | None = None,
) -> list[dict[str, Any]]:
    """Rows of the "training" table: the published loop and the sides ``names`` (of SIDES), alternated step by step.

    First each trains ``compared`` steps from the same weights on the same batches and draws; WrongNumbers, and no
    speed, when a loss is further from the published loop's than TOLERANCE. ``drive``, ``rounds``, ``seconds`` and
    ``failures`` as in `bench.contenders.measure`. memory: how far building a side and these steps raised the memory in
    use. A timed call is one step with everything around it: loading, draws, Adam, EMA.
    """
    model = untrained(network)
    x0 = bundled_images(model)
    samples = [Sample(image, f"{i}", None) for i, image in zip(range(IMAGES), itertools.cycle(x0))]  # noqa: B905
    sides: dict[str, Side] = {}
    errors: dict[str, float] = {}
    used: dict[str, int | None] = {}
    expected: list[float] = []
    try:
        for name in ("baseline", *names):
            try:
                with PeakMemory(device) as memory:
                    side = Side(name, model, samples, batch, device)
                    losses = [float(v) for v in [side.step() for _ in range(compared)]]
                expected = expected or losses
                errors[name] = apart(losses, expected)
                if not errors[name] <= TOLERANCE[side.amp]:
                    raise WrongNumbers(
                        f"{name}: a loss of the first {compared} steps is {errors[name]:.1%} from the published loop's "
                        f"(allowed {TOLERANCE[side.amp]:.1%}): no speed is reported"
                    )
            except Exception as error:
                if failures is None or name == "baseline":
                    raise
                failures[name] = error
                continue
            sides[name], used[name] = side, memory.bytes
        alternation = Alternation({name: side.step for name, side in sides.items()}, device)
        _, one_round = alternation.first()
        if drive is None:
            alternation.run(rounds, seconds)
        elif not drive(alternation, one_round):
            return []
    finally:
        for side in sides.values():
            side.close()
    rows = []
    for name in sides:
        times, ratio = alternation.spread(name), alternation.ratio(name, "baseline")
        rows.append(
            {
                "network": network,
                "batch": batch,
                "contender": name,
                "median_s": times.median,
                "spread_s": [times.low, times.high],
                "ratio": ratio.median,
                "ratio_spread": [ratio.low, ratio.high],
                "images_per_s": batch / times.median,
                "memory_bytes": used[name],
                "error_losses": errors[name],
                "rounds": ratio.count,
            }
        )
    return rows
