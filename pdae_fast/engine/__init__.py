"""Turns a model into something that runs fast on a device; the only place that knows devices, dtypes and layouts."""

from .build import PLANS, build_plan
from .device import resolve_device, resolve_dtype
from .plan import Plan

__all__ = ["PLANS", "Plan", "build_plan", "resolve_device", "resolve_dtype"]
