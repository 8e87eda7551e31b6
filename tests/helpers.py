"""Small models and data that the tests share."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from golden_rule import fill
from pdae_fast import PDAE, LatentConfig, PDAEConfig, Prior, UNetConfig
from pdae_fast.data import Sample
from pdae_fast.engine import graphs
from pdae_fast.engine.options import Rewrites
from pdae_fast.training import Trainer

needs_sklearn = pytest.mark.skipif(
    importlib.util.find_spec("sklearn") is None, reason="needs pip install 'pdae_fast[experiments]'"
)

needs_diffusers = pytest.mark.skipif(
    importlib.util.find_spec("diffusers") is None, reason="needs pip install 'pdae_fast[dev]' (diffusers)"
)


class Later:
    """A module that is imported when a test first uses it: diffusers imports Triton, which tests/kernels must do first,
    when it is collected."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, attribute: str):
        if attribute.startswith(("_", "pytest")):  # pytest looks at what a module holds
            raise AttributeError(attribute)
        return getattr(importlib.import_module(self.name), attribute)


TINY_UNET = UNetConfig(
    input_channel=1,
    base_channel=32,
    channel_multiplier=(1, 1),
    num_residual_blocks_of_a_block=1,
    attention_resolutions=(),
    num_heads=2,
    dropout=0.1,
)
TINY = PDAEConfig(image_size=32, latent_dim=16, encoder_channel=32, unet=TINY_UNET)
# The same with everything that can sit on top of z.
TINY_FULL = dataclasses.replace(
    TINY, latent=LatentConfig(16, 32, 3), attributes=("round", "dark"), latent_statistics=True
)

# What a GPU runs, through the CPU versions of its kernels.
ON_DEVICE = Rewrites(
    packed_weights=False,
    phase_upsample=False,
    kernels=True,
    split_skips=True,
    shared_statistics=True,
    folded_biases=True,
    fused_update=True,
)


def tiny_pdae(config: PDAEConfig = TINY) -> PDAE:
    """Random weights by the golden rule (G is not zero)."""
    model = fill(PDAE(config))
    if config.latent_statistics:
        generator = torch.Generator().manual_seed(5)
        model.latent_mean.copy_(torch.randn(config.latent_dim, generator=generator))
        model.latent_std.copy_(torch.rand(config.latent_dim, generator=generator) + 0.5)
    return model


def tiny_prior(config: PDAEConfig = TINY) -> Prior:
    return fill(Prior(config.prior))


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Calls(TorchDispatchMode):
    """Records the names of the operators that run inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def images(count: int, config: PDAEConfig = TINY, seed: int = 0) -> torch.Tensor:
    shape = (count, config.unet.input_channel, config.image_size, config.image_size)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class Smooth:
    """Images of 24 patterns, each weaker than the one before: principal components that are well apart."""

    def __init__(self, count=60, size=32, seed=0):
        random = np.random.default_rng(seed)
        patterns = random.standard_normal((24, size // 4, size // 4)).repeat(4, 1).repeat(4, 2)
        strength = random.standard_normal((count, 24)) * 0.8 ** np.arange(24)
        self.images = (np.einsum("nk,kyx->nyx", strength, patterns) / 10 + 0.3).astype(np.float32)
        self.names = [f"{i:02d}" for i in range(count)]

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        return Sample(torch.from_numpy(self.images[i][None]), self.names[i], None)


def image_folder(path: Path, count: int, size: int = 32) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(3)
    for i in range(count):
        Image.fromarray(random.integers(0, 256, (size, size), dtype=np.uint8)).save(path / f"{i:02d}.png")
    return path


class Replay:
    """Stands for a captured graph: replays by running the step."""

    def __init__(self, step: Callable[[], None]) -> None:
        self.replay = step


def capture_into(captured: list) -> Callable[..., Replay]:
    """`graphs.capture` without a GPU: it warms up, and adds the memory pool of every capture to ``captured``."""

    def capture(step, reset, device, pool):
        for _ in range(graphs.WARM_UP_STEPS):
            reset(), step()
        captured.append(pool)
        return Replay(step)

    return capture


def resumed_equals_whole(folder: Path, make: Callable[[Path], Trainer]) -> None:
    """Assert that a run which dies after its fifth step, of which four were saved, ends as one that never stopped."""
    whole = make(folder / "whole")
    assert whole.run() is None
    parted = make(folder / "parted")
    batches = parted._batches()
    (folder / "parted").mkdir()
    for _ in range(4):
        parted.train_step(batches)
    parted.save()
    parted.train_step(batches)  # and dies before it saves this one
    resumed = make(folder / "parted")
    resumed.resume()
    resumed.run()
    for a, b in ((whole.model, resumed.model), (whole.ema, resumed.ema)):
        assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    one, two = ((folder / name / "model.safetensors").read_bytes() for name in ("whole", "parted"))
    assert one == two
