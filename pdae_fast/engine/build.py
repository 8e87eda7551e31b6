"""Which plan runs where."""

from __future__ import annotations

import torch

from ..errors import UserError
from ..models import PDAE, Prior
from .fused import FusedPlan
from .plan import Plan

PLANS = {"eager": Plan, "fused": FusedPlan}


def build_plan(model: PDAE | Prior, device: torch.device, dtype: torch.dtype, name: str = "auto") -> Plan:
    """The plan for ``model`` on ``device``; the model itself is never changed.

    "auto" is "fused" on the CPU, where it was measured, and "eager" on CUDA, where it was not; both compute the same
    function up to rounding. UserError for a name that does not exist or a plan that cannot run on ``device``.
    """
    if name != "auto" and name not in PLANS:
        raise UserError(f"plan {name!r} is not known; expected auto, {' or '.join(PLANS)}")
    if name == "auto":
        name = "fused" if device.type == "cpu" else "eager"
    if name == "fused" and device.type != "cpu":
        raise UserError(f"the fused plan runs on the CPU only so far, not on {device}; expected --plan auto or eager")
    return PLANS[name](model, device, dtype)
