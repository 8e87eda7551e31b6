"""Random x_T, one generator per image, and how two latents are mixed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..arguments import as_indices, as_seed
from ..config import check_noise


def lerp(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """(1 - w) a + w b; a and b broadcast against each other, weight [B]."""
    w = weight.view(-1, *[1] * (max(a.ndim, b.ndim) - 1))
    return (1 - w) * a + w * b


def slerp(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Spherical interpolation over all dimensions but the first; a and b [1 or B, ...], weight [B].

    Falls back to :func:`lerp` where the two are (nearly) parallel.
    """
    flat_a, flat_b = a.flatten(1).double(), b.flatten(1).double()
    cosine = torch.nn.functional.cosine_similarity(flat_a, flat_b, dim=1).clamp(-1, 1)
    theta = torch.acos(cosine)
    sine = torch.sin(theta)
    w = weight.double()
    parallel = sine < 1e-4
    safe = torch.where(parallel, torch.ones_like(sine), sine)
    weight_a = torch.where(parallel, 1 - w, torch.sin((1 - w) * theta) / safe)
    weight_b = torch.where(parallel, w, torch.sin(w * theta) / safe)
    shape = (-1, *[1] * (a.ndim - 1))
    return (weight_a.view(shape) * a.double() + weight_b.view(shape) * b.double()).to(a.dtype)


class ImageNoise:
    """Standard normal noise with one generator per image, so that results do not depend on how a batch is split.

    Image number ``indices[k]`` of seed ``seed`` gets the same draws whatever else is in its batch, on every device
    (drawn on the CPU). ``stream``: other draws for the same seed. Calling the object returns float32
    [len(indices), *shape]. UserError for a seed outside 0 ... 2^63 - 1 and for what is no index.
    """

    def __init__(
        self,
        seed: int,
        indices: Sequence[int],
        shape: Sequence[int],
        device: torch.device | str = "cpu",
        stream: int = 0,
    ) -> None:
        self.shape, self.device, seed = tuple(shape), device, as_seed(seed) + stream
        states = [
            np.random.SeedSequence((seed, i)).generate_state(1, np.uint64)[0] for i in as_indices("indices", indices)
        ]
        self.generators = [torch.Generator().manual_seed(int(state) >> 1) for state in states]

    @classmethod
    def of(
        cls, generators: Sequence[torch.Generator], shape: Sequence[int], device: torch.device | str = "cpu"
    ) -> ImageNoise:
        """With an image's own generator each, which goes on where it is."""
        noise = cls(0, (), shape, device)
        noise.generators = list(generators)
        return noise

    def __call__(self) -> Tensor:
        if not self.generators:
            return torch.empty(0, *self.shape, dtype=torch.float32, device=self.device)
        draws = [torch.randn(self.shape, generator=g, dtype=torch.float32, device="cpu") for g in self.generators]
        return torch.stack(draws).to(self.device)


def standardise(x: Tensor) -> Tensor:
    """x [B, C, H, W] shifted and scaled to mean 0 and standard deviation 1 in every channel of every image."""
    variance, mean = torch.var_mean(x, dim=(2, 3), correction=0, keepdim=True)
    return (x - mean) * variance.clamp_min(torch.finfo(x.dtype).tiny).rsqrt()


def random_noise(kind: str, draws: Tensor) -> Tensor:
    """x_T of one of config.NOISES from standard normal ``draws`` [B, C, H, W].

    "normal" is those draws, as published. "standardised" takes from them the little by which the mean and the spread of
    a finite map differ from 0 and 1. A U-Net whose norms have few channels in a group does not see that difference (a
    norm takes away just these two numbers) and leaves it in eps_hat, where 1 / sqrt(SNR) turns it into speckles and
    wrong colours. Not in the paper.
    """
    check_noise(kind)
    return standardise(draws) if kind == "standardised" else draws
