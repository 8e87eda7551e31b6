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

    "auto" is "fused", which computes the same function up to rounding. UserError for a name that does not exist.
    """
    if name != "auto" and name not in PLANS:
        raise UserError(f"plan {name!r} is not known; expected auto, {' or '.join(PLANS)}")
    return PLANS["fused" if name == "auto" else name](model, device, dtype)
