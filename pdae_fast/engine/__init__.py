"""Turns a model into something that runs fast on a device; the only place that knows devices, dtypes and layouts."""

from .device import resolve_device, resolve_dtype
from .plan import Plan, build_plan

__all__ = ["Plan", "build_plan", "resolve_device", "resolve_dtype"]
