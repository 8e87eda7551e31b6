"""Which plan runs where."""

from __future__ import annotations

import copyreg
import dataclasses
import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import UserError
from ..isolation import undisturbed
from ..models import PDAE, Prior
from ..samplers.reuse import NOTHING, Reuse
from . import float8
from .device import resolve_device
from .fused import FusedPlan
from .options import Rewrites
from .plan import Plan

PLANS = ("eager", "fused")
# Relative difference from the modules in the same dtype that two correct plans stay under on one evaluation.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}
# Of two that round to fp8, in any dtype: where a value differs in its last bit and falls to another code, what follows
# differs by as much as fp8 costs.
FLOAT8_TOLERANCE = 2e-1


@undisturbed()
def build_plan(
    model: PDAE | Prior,
    device: torch.device,
    dtype: torch.dtype,
    name: str = "auto",
    *,
    attention: str = "auto",
    options: Rewrites | None = None,
    reuse: Reuse = NOTHING,
    large_tiles: bool = False,
    fp8: str | os.PathLike | Mapping[str, Any] | None = None,
    copy: bool = True,
    consume: bool = False,
) -> Plan:
    """The plan for ``model`` on ``device``, with weights of its own, or without ``copy`` with those of ``model`` where
    they will do; the model itself is not changed, but with ``consume`` it loses those that the plan lays out anew.

    "auto" is "fused"; both compute the same function up to rounding. On CUDA, where kernels of this project run on
    whatever driver and chip the user has, the fused plan is compared with the modules before it is handed out: "auto"
    then falls back to "eager" with a warning, "fused" is a UserError. ``options`` (fused only) switches single
    rewrites off. ``reuse`` are approximations, which the comparison leaves out; so are ``large_tiles``: native
    convolutions of bfloat16 in tiles of 4x4 pixels. ``fp8`` is an approximation that every plan knows: the scales, or
    their file, by which convolutions round to e4m3 (`float8`). UserError for a plan, an attention backend, a reuse,
    tiles or scales that do not exist or cannot run on ``device``.
    """
    device = resolve_device(device)  # what captures on a device without an index cannot give its memory back
    if fp8 is not None:
        model = float8.in_float8(model, fp8)
    if name != "auto" and name not in PLANS:
        raise UserError(f"plan {name!r} is not known; expected auto, {' or '.join(PLANS)}")
    if name == "eager":
        if attention not in ("auto", "sdpa"):
            raise UserError(f"the eager plan runs PyTorch's attention; {attention!r} needs --plan fused")
        if large_tiles:
            raise UserError("the eager plan runs PyTorch's convolutions; large tiles need --plan fused")
        return Plan(model, device, dtype, copy=copy and not consume).reusing(reuse)
    if large_tiles:
        if dtype is not torch.bfloat16:
            raise UserError(f"large tiles are an approximation for bfloat16; {str(dtype)[6:]} networks do without")
        options = dataclasses.replace(options or Rewrites.for_device(device), large_tiles=True)
    plan = FusedPlan(model, device, dtype, options, attention, copy, consume)
    if large_tiles and plan.options.tile != 4:
        reason = plan.native.get("native_convolutions", "no: they run on the CPU").removeprefix("no: ")
        raise UserError(f"large tiles need native bfloat16 convolutions: {reason}")
    if device.type == "cuda":
        difference = disagreement(plan)
        if not difference < (FLOAT8_TOLERANCE if float8.describe(plan.unet) else TOLERANCE[dtype]):
            found = (
                f"the fused plan differs from the modules by {difference:.1e} on {torch.cuda.get_device_name(device)}"
            )
            if name == "fused":
                raise UserError(f"{found}, more than rounding; use --plan eager")
            warnings.warn(f"{found}; running the modules instead", stacklevel=2)
            return Plan(model, device, dtype, copy=copy and not consume).reusing(reuse)
    return plan.reusing(reuse)


def disagreement(plan: FusedPlan) -> float:
    """Relative difference of one evaluation of ``plan`` from the modules it replaces, same device and dtype."""
    reference = Plan(plan.model, plan.device, plan.dtype, copy=False)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, *plan.model.image_shape, generator=generator).to(plan.device)
    z, labels = None, None
    if hasattr(plan.model.config, "latent_dim"):
        z = torch.randn(1, plan.model.config.latent_dim, generator=generator).to(plan.device)
    if plan.unet.class_emb is not None:
        labels = torch.zeros(1, dtype=torch.int64)
    t = plan.model.config.schedule.timesteps // 2
    found, expected = (
        torch.cat([v for v in p.field(z, labels=labels)(x, t, True) if v is not None]) for p in (plan, reference)
    )
    plan.evaluations.clear()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-12))


class Unbuilt:
    """Stands for a plan that cannot run where it was read, and says why when it is used.

    An error while it is read would end the worker of a pool, for which its caller waits for ever.
    """

    def __init__(self, model: PDAE | Prior, error: UserError) -> None:
        self.model, self.error = model, error

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copies ask for those
            raise AttributeError(name)
        raise self.error


def _rebuilt(
    model: PDAE | Prior, device: str, dtype: torch.dtype, name: str, choices: dict[str, Any], counts: dict[str, int]
) -> Plan | Unbuilt:
    try:
        plan = build_plan(model, torch.device(device), dtype, name, copy=False, **choices)
    except UserError as error:
        return Unbuilt(model, error)
    plan.evaluations.update(counts)
    return plan


def _reduced(plan: Plan) -> tuple:
    if any(p.is_meta for p in plan.model.parameters()):
        raise UserError("a pipeline that took its model's weights (consume=True) cannot be pickled")
    choices = {**plan.choices(), "reuse": plan.reuse}
    return _rebuilt, (plan.model, str(plan.device), plan.dtype, plan.name, choices, plan.counts())


# Weights in oneDNN's layout cannot be pickled, and those of native code fit one kind of processor.
for _plan in (Plan, FusedPlan):
    copyreg.pickle(_plan, _reduced)
