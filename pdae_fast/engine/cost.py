"""What the parts of a network cost, in multiplications, so that counts of partial evaluations can be compared."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import PDAEConfig, PriorConfig
from ..models import PDAE, Prior
from ..models.layers import AttentionBlock, time_features
from ..models.unet import PDAEDecoder, UNet
from .features import partial_cost


class Costs(NamedTuple):
    """Multiply-adds of one image, stage by stage: the trunk's; then middle, output stages and head of each decoder.
    ``gradient`` is empty for a prior."""

    trunk: tuple[int, ...]
    eps: tuple[int, ...]
    gradient: tuple[int, ...]

    @property
    def full(self) -> int:
        return sum(self.trunk) + sum(self.eps) + sum(self.gradient)

    def outer(self, skips: int) -> tuple[int, int, int]:
        """Trunk, eps and G of the outer part: the first ``skips`` stages of the trunk, the last of the decoders."""
        eps, gradient = (sum(part[len(part) - skips - 1 :]) for part in (self.eps, self.gradient))
        return sum(self.trunk[:skips]), eps, gradient


def equivalents(model: PDAE | Prior, evaluations: Mapping[str, int], outer: int) -> float:
    """``evaluations`` (as a plan counts them) in whole evaluations of ``model``; ``outer``: see :meth:`Costs.outer`."""
    costs = network_costs(model.config)
    names = ("trunk", "eps", "gradient")
    total = sum(evaluations.get(name, 0) * sum(getattr(costs, name)) for name in names)
    for name, cost in zip(names, costs.outer(outer), strict=True):
        total += evaluations.get(f"outer_{name}", 0) * cost
    total += partial_cost(evaluations, costs.eps)
    return total / costs.full


@functools.lru_cache(maxsize=8)
@torch.no_grad()
def network_costs(config: PDAEConfig | PriorConfig) -> Costs:
    """Counted from the shapes that the modules of ``config`` see, without computing anything."""
    with torch.device("meta"):
        if isinstance(config, PDAEConfig):
            unet, z = PDAEDecoder(config.unet, config.latent_dim), None
        else:  # a Diff-AE has a z that every block reads, a prior has none
            z_width = getattr(config, "latent_dim", None)
            unet = UNet(config.unet, z_width=z_width)
            z = None if z_width is None else torch.empty(1, z_width)
    count = _Count(unet)
    size, channels = config.image_size, config.unet.input_channel
    emb = unet.time_embed(time_features(config.unet, torch.zeros(1, device="meta")))
    count.take()
    h, skips, trunk = torch.empty(1, channels, size, size, device="meta"), [], []
    for stage in unet.input_blocks:
        h = stage(h, emb, z)
        skips.append(h)
        trunk.append(count.take())
    deepest = h

    def decoder(middle: nn.Module, stages: nn.ModuleList, head: nn.Module, emb_z: Tensor | None) -> tuple[int, ...]:
        h = middle(deepest, emb, emb_z)
        found = [count.take()]
        for stage, skip in zip(stages, reversed(skips), strict=True):
            h = stage(torch.cat([h, skip], dim=1), emb, emb_z)
            found.append(count.take())
        head(h)
        return (*found, count.take())

    eps, gradient = decoder(unet.middle_block, unet.output_blocks, unet.out, z), ()
    if isinstance(unet, PDAEDecoder):
        emb_z = unet.label_emb(torch.empty(1, config.latent_dim, device="meta"))
        count.take()
        gradient = decoder(unet.shift_middle_block, unet.shift_output_blocks, unet.shift_out, emb_z)
    return Costs(tuple(trunk), eps, gradient)


class _Count:
    """Adds up the multiplications of every layer that is called; ``take()`` hands them over and starts from 0."""

    def __init__(self, network: nn.Module) -> None:
        self.total = 0
        for module in network.modules():
            if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)):
                module.register_forward_hook(self._layer)
            elif isinstance(module, AttentionBlock):
                module.register_forward_hook(self._attention)

    def take(self) -> int:
        taken, self.total = self.total, 0
        return taken

    def _layer(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.total += output.numel() * math.prod(module.weight.shape[1:])

    def _attention(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        _, channels, height, width = output.shape
        self.total += 2 * channels * (height * width) ** 2  # logits, and the mixture of the values
