"""The switches of the fused plan: what is on by default where, and what can be switched off for diagnosis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from .. import kernels
from .convolution import can_pack, native_status


class Needs(NamedTuple):
    """What a switch needs to be on: one of every group in ``needs``, and none of ``without``."""

    needs: tuple[tuple[str, ...], ...]
    without: tuple[str, ...] = ()


# Other switches, and what the device has; a switch stands below those that it names.
NEEDS = {
    "packed_weights": Needs((("oneDNN",),)),
    "large_tiles": Needs((("native_convolutions",),)),
    "small_tiles": Needs((("native_convolutions",),)),
    "split_skips": Needs((("kernels", "native_norms"),)),
    # The native norms take no statistics: they read a map for less than the others save.
    "shared_statistics": Needs((("split_skips",),), without=("native_norms",)),
    # oneDNN adds residuals and biases inside its packed convolutions: nothing is left to fold.
    "folded_biases": Needs((("kernels",),), without=("packed_weights",)),
    "shared_products": Needs((("split_skips",), ("folded_biases",))),
    "stacked_decoders": Needs((("shared_products",),), without=("phase_upsample", "native_convolutions")),
    "parallel_decoders": Needs((("a GPU",),)),
    "float8": Needs((("kernels",), ("folded_biases",)), without=("native_norms",)),
    "fused_solvers": Needs((("fused_update",),)),
    "graphs": Needs((("a GPU",), ("fused_update",))),
    "captured_fields": Needs((("graphs",),)),
}


@dataclass(frozen=True, kw_only=True)
class Rewrites:
    """Every one of them but ``large_tiles`` is exact up to rounding, and off it leaves a plan that computes the same.
    `NEEDS` says which need others.

    packed_weights: oneDNN's own weight layout, the residual added inside the convolution (CPU).
    phase_upsample: nearest-2x and the 3x3 convolution after it as four 2x2 convolutions.
    kernels: GroupNorm, affine and SiLU as one op of pdae_fast.kernels.
    native_norms: GroupNorm, affine and SiLU in native code, compiled when first used (CPU; before ``kernels``).
    native_convolutions: 3x3 convolutions, and nearest-2x before them, and 1x1 ones, with ``native_norms`` of joined
        maps without the cat, in native code (CPU; before ``packed_weights`` and ``phase_upsample``).
    native_attention: attention in native code (CPU), where no other backend is asked for.
    split_skips: decoder blocks read h and the skip from where they are; the 1x1 skip convolution is a sum of two
        products.
    shared_statistics: a map's statistics are computed once for all norms that read it: with the addition that makes it
        (where biases are folded), or apart.
    shared_products: the parts of both decoders' skip convolutions that read one skip are one product.
    folded_biases: convolution biases are added where the result is read next; an attention's is part of its residual,
        that of the first convolution one of its weights.
    fused_update: time tables, coefficients and the step index live on the device; the DDIM update is one op.
    fused_solvers: the same for the multistep solvers, belm, and x_T by one evaluation a step.
    stacked_decoders: two decoders of one structure run as one on twice the images, where both run at every evaluation.
    parallel_decoders: the two decoders, of stacked ones the convolutions, as branches on two streams (CUDA, small
        batches).
    graphs: one step captured as a CUDA graph and replayed (CUDA).
    captured_fields: single evaluations captured too, for what runs step by step (CUDA; off until measured).
    float8: convolutions that round to fp8 multiply codes, which the norms write (CUDA from 8.9; off until measured).
    large_tiles: native convolutions of bfloat16 in tiles of 4x4 pixels, as of float32: an approximation.
    small_tiles: all of them in tiles of 2x2: less memory.
    """

    packed_weights: bool = True
    phase_upsample: bool = True
    kernels: bool = False
    split_skips: bool = False
    shared_statistics: bool = False
    folded_biases: bool = False
    shared_products: bool = False
    stacked_decoders: bool = False
    fused_update: bool = False
    fused_solvers: bool = False
    parallel_decoders: bool = False
    graphs: bool = False
    captured_fields: bool = False
    float8: bool = False
    native_norms: bool = False
    native_convolutions: bool = False
    native_attention: bool = False
    large_tiles: bool = False
    small_tiles: bool = False

    @property
    def tile(self) -> int | None:
        """The largest of native convolutions, 0 for what suits the dtype; None without them."""
        return (2 if self.small_tiles else 4 if self.large_tiles else 0) if self.native_convolutions else None

    @classmethod
    def for_device(cls, device: torch.device) -> Rewrites:
        """The defaults: on the CPU those that were measured to pay; on CUDA those that save launches or bytes.

        On the CPU the other ops of the project go through the framework and save nothing. On CUDA the phase
        convolutions would save 8% of the arithmetic of CelebA-64 but add a pass that interleaves their results, so they
        are off.
        """
        if device.type != "cuda":
            return cls(native_norms=True, native_convolutions=True, native_attention=True)
        usable = kernels.triton_status()[0]
        names = "kernels split_skips shared_statistics folded_biases shared_products stacked_decoders"
        ops = dict.fromkeys(names.split(), usable)
        whole = dict.fromkeys(("fused_update", "fused_solvers", "parallel_decoders", "graphs"), True)
        return cls(packed_weights=False, phase_upsample=False, **ops, **whole)

    def usable_on(self, device: torch.device, dtype: torch.dtype) -> Rewrites:
        """Without those that cannot run on ``device``, or lack what they need."""
        there = {"a GPU"} if device.type == "cuda" else set()
        if can_pack(device, dtype):
            there.add("oneDNN")
        on = {**vars(self), **{name: usable for name, (usable, _) in self._native(device, dtype).items()}}
        for name, (needs, without) in NEEDS.items():
            given = there | {other for other, value in on.items() if value}
            on[name] &= all(given & set(one_of) for one_of in needs) and not given & set(without)
        if on["float8"] and device.type == "cuda":
            on["float8"] = kernels.float8_obstacle() is None
        return Rewrites(**on)

    def native_notes(self, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
        """How the native ops that were asked for run on ``device``, or why they do not; empty elsewhere."""
        if device.type != "cpu":
            return {}
        found = self._native(device, dtype).items()
        return {name: reason if usable else f"no: {reason}" for name, (usable, reason) in found}

    def _native(self, device: torch.device, dtype: torch.dtype) -> dict[str, tuple[bool, str]]:
        """(usable, reason) of the native ops that are switched on, on maps of ``dtype``; to ask is to compile them."""
        ops = {
            "native_norms": lambda: kernels.native_status(),
            "native_convolutions": lambda: native_status(dtype),
            "native_attention": lambda: kernels.attention_status(),
        }
        can = device.type == "cpu" and dtype in kernels.NATIVE_DTYPES
        return {
            name: status() if can else (False, f"none for {dtype}")
            for name, status in ops.items()
            if getattr(self, name)
        }
