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
    native_norms: GroupNorm, affine and SiLU in native code, compiled when first used (CPU; before ``kernels``).
    native_convolutions: 3x3 convolutions, and nearest-2x before them, in native code (CPU; before ``packed_weights``
        and ``phase_upsample``).
    split_skips: decoder blocks read h and the skip from where they are; the 1x1 skip convolution is a sum of two
        products (needs ``kernels`` or ``native_norms``).
    shared_statistics: a skip's channel statistics are computed once for both decoders (needs ``split_skips``).
    folded_biases: convolution biases are added where the result is read next (needs ``kernels``).
    fused_update: time tables, coefficients and the step index live on the device; the DDIM update is one op.
    parallel_decoders: the two decoders as branches on two streams (CUDA, small batches).
    graphs: one step captured as a CUDA graph and replayed (CUDA; needs ``fused_update``).
    fused_output: both decoders' heads and the DDIM update as one op, where nothing else needs eps or G (whole DDIM
        trajectories with at most one G, none kept; needs ``kernels`` and ``fused_update``).
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
    native_norms: bool = False
    fused_output: bool = False
    native_convolutions: bool = False

    @classmethod
    def for_device(cls, device: torch.device) -> Rewrites:
        """The defaults: on the CPU those that were measured to pay; on CUDA those that save launches or bytes.

        On the CPU the other ops of the project go through the framework and save nothing, and a sum of two skip
        convolutions costs what the cat of their inputs does. On CUDA the phase convolutions would save 8% of the
        arithmetic of CelebA-64 but add a pass that interleaves their results, so they are off. ``fused_output`` saves
        bytes there but multiplies in a kernel of the project what cuDNN would: off until a GPU says that it pays.
        """
        if device.type != "cuda":
            return cls(native_norms=True, native_convolutions=True)
        usable = kernels.triton_status()[0]
        return cls(False, False, usable, usable, usable, usable, True, True, True)

    def usable_on(self, device: torch.device, dtype: torch.dtype) -> Rewrites:
        """Without those that cannot run on ``device``, or lack what they need."""
        cuda, off = device.type == "cuda", dataclasses.replace
        options = self if can_pack(device, dtype) else off(self, packed_weights=False)
        if options.native_norms and not (_native_dtype(device, dtype) and kernels.native_status()[0]):
            options = off(options, native_norms=False)
        if options.native_convolutions and not _convolutions(device, dtype)[0]:
            options = off(options, native_convolutions=False)
        if not options.kernels:
            options = off(options, split_skips=options.split_skips and options.native_norms, folded_biases=False)
        # The native norms take no statistics: they read a map for less than the others save.
        if not options.split_skips or options.native_norms:
            options = off(options, shared_statistics=False)
        if not (options.kernels and options.fused_update):
            options = off(options, fused_output=False)
        if not (cuda and options.fused_update):
            options = off(options, graphs=False)
        # oneDNN adds residuals and biases inside its packed convolutions: nothing is left to fold.
        if options.packed_weights:
            options = off(options, folded_biases=False)
        return options if cuda else off(options, parallel_decoders=False)

    def native_notes(self, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
        """How ``native_norms`` and ``native_convolutions`` run on ``device``, or why they do not, where asked for."""
        if device.type != "cpu":
            return {}
        found = {}
        if self.native_norms:
            found["native_norms"] = (
                kernels.native_status() if _native_dtype(device, dtype) else (False, f"none for {dtype}")
            )
        if self.native_convolutions:
            found["native_convolutions"] = _convolutions(device, dtype)
        return {name: reason if usable else f"no: {reason}" for name, (usable, reason) in found.items()}


def _convolutions(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """(usable, reason) of native convolutions on maps of ``dtype``."""
    if device.type != "cpu" or dtype is not torch.float32:
        return False, f"none for {dtype}"
    return kernels.winograd_status()


def _native_dtype(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cpu" and dtype in kernels.NATIVE_DTYPES
