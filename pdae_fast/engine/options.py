"""The switches of the fused plan: what is on by default where, and what can be switched off for diagnosis."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from .. import kernels
from .convolution import can_pack


@dataclass(frozen=True)
class Rewrites:
    """Every one of them is exact up to rounding, and off it leaves a plan that computes the same.

    packed_weights: oneDNN's own weight layout, the residual added inside the convolution (CPU).
    phase_upsample: nearest-2x and the 3x3 convolution after it as four 2x2 convolutions.
    kernels: GroupNorm, affine and SiLU as one op of pdae_fast.kernels.
    split_skips: decoder blocks read h and the skip from where they are; the 1x1 skip convolution is a sum of two
        products (needs ``kernels``).
    shared_statistics: a skip's channel statistics are computed once for both decoders (needs ``split_skips``).
    folded_biases: convolution biases are added where the result is read next (needs ``kernels``).
    fused_update: time tables, coefficients and the step index live on the device; the DDIM update is one op.
    parallel_decoders: the two decoders as branches on two streams (CUDA, small batches).
    graphs: one step captured as a CUDA graph and replayed (CUDA; needs ``fused_update``).
    """

    packed_weights: bool = True
    phase_upsample: bool = True
    kernels: bool = False
    split_skips: bool = False
    shared_statistics: bool = False
    folded_biases: bool = False
    fused_update: bool = False
    parallel_decoders: bool = False
    graphs: bool = False

    @classmethod
    def for_device(cls, device: torch.device) -> Rewrites:
        """The defaults: on the CPU those that were measured to pay; on CUDA those that save launches or bytes.

        On the CPU the project's ops go through the framework and save nothing. On CUDA the phase convolutions would
        save 8% of the arithmetic of CelebA-64 but add a pass that interleaves their results, so they are off.
        """
        if device.type != "cuda":
            return cls()
        usable = kernels.triton_status()[0]
        return cls(False, False, usable, usable, usable, usable, True, True, True)

    def usable_on(self, device: torch.device, dtype: torch.dtype) -> Rewrites:
        """Without those that cannot run on ``device``, or lack what they need."""
        cuda, off = device.type == "cuda", dataclasses.replace
        options = self if can_pack(device, dtype) else off(self, packed_weights=False)
        if not options.kernels:
            options = off(options, split_skips=False, folded_biases=False)
        if not options.split_skips:
            options = off(options, shared_statistics=False)
        if not (cuda and options.fused_update):
            options = off(options, graphs=False)
        # oneDNN adds residuals and biases inside its packed convolutions: nothing is left to fold.
        if options.packed_weights:
            options = off(options, folded_biases=False)
        return options if cuda else off(options, parallel_decoders=False)
