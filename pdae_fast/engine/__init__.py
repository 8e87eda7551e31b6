"""Turns a model into something that runs fast on a device; the only place that knows devices, dtypes and layouts."""

from .build import PLANS, build_plan
from .device import in_forked_process, out_of_memory, resolve_device, resolve_dtype
from .options import Rewrites
from .plan import Plan

__all__ = [
    "PLANS",
    "Plan",
    "Rewrites",
    "build_plan",
    "in_forked_process",
    "out_of_memory",
    "resolve_device",
    "resolve_dtype",
]
