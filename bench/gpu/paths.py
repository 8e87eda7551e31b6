"""Phase "paths": every way the engine can run a network, against the float32 modules on the CPU.

One evaluation (eps and G) of every plan, dtype, rewrite switched off and attention backend; then whole trajectories
up and down, ragged batches, mixtures and guidance that stops early. A low precision is held to one and a half times
the plain modules' own error in it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench.contenders import DTYPES, relative
from bench.networks import build, inputs
from pdae_fast import Pipeline
from pdae_fast.engine import build_plan
from pdae_fast.engine.options import Rewrites
from pdae_fast.samplers.ddim import ddim, ddim_invert
from pdae_fast.schedule import build_schedule

from .cases import Cases, Context, NotHere

CPU = torch.device("cpu")
TIMES = (999, 420, 9)
# One evaluation in float32 through some sixty layers: other summation orders (1e-6 seen on the CPU), on CUDA other
# convolution algorithms too. After 100 steps: the bound.
FLOAT32_BOUND, LOOP_BOUND = {"cpu": 2e-5, "cuda": 1e-4}, 1e-4
# Another batch size is another order of summation, and running a random network upward multiplies rounding about a
# thousandfold (1.4e-4 seen on the CPU); an image that took another's place is off by about 1.
RAGGED_BOUND = 1e-2
# A low precision need not be better than the first, however good the modules happen to be, and never worse than the
# second, however bad.
FLOORS, CEILINGS = {"bfloat16": 5e-3, "float16": 1e-3}, {"bfloat16": 0.06, "float16": 0.01}


def cases(context: Context) -> Cases:
    networks = ("tiny",) if context.quick else ("tiny", "fashion32", "celeba64")
    for network in networks:
        yield from _evaluations(network, context)
    loops = ("tiny",) if context.quick else ("tiny", "fashion32")
    for network in loops:
        yield from _loops(network, context)


def variants(device: torch.device) -> Iterator[tuple[str, dict[str, Any]]]:
    """(label, keywords of build_plan): the fused plan with every switch turned around, and every attention backend."""
    default = Rewrites.for_device(device)
    for field in dataclasses.fields(Rewrites):
        if field.name == "float8":  # acts on a plan with fp8 alone
            continue
        value = getattr(default, field.name)
        changed = dataclasses.replace(default, **{field.name: not value})
        # Some switches need others: one that changes nothing here is not a variant.
        if changed.usable_on(device, torch.bfloat16) != default.usable_on(device, torch.bfloat16):
            yield f"{field.name} {'off' if value else 'on'}", {"options": changed}
    for value in (True, False):
        every = dataclasses.replace(default, **dict.fromkeys((f.name for f in dataclasses.fields(Rewrites)), value))
        yield f"everything {'on' if value else 'off'}", {"options": every}
    for backend in ("sdpa", "xformers"):
        yield f"attention {backend}", {"attention": backend}


@functools.lru_cache(maxsize=2)
def _expected(network: str, batch: int) -> list[tuple[Tensor, ...]]:
    """By the float32 modules on the CPU."""
    model = build(network)
    x, z = inputs(model, batch, CPU)
    return _answers(build_plan(model, CPU, torch.float32, "eager").field(z), x)


def _answers(field: Any, x: Tensor) -> list[tuple[Tensor, ...]]:
    """(eps, G) at TIMES, and eps alone without G: of decoders that are stacked elsewhere, that is another computation,
    with a rounding of its own."""
    eps, gradient = field(x, TIMES[0], False)
    if gradient is not None:
        raise AssertionError("G came back from an evaluation that should have left it out")
    return [*(field(x, t, True) for t in TIMES), (eps,)]


def _difference(found: list[tuple[Tensor, ...]], expected: list[tuple[Tensor, ...]]) -> float:
    """The largest relative error of any eps or G; NaN counts as infinite."""
    errors = [
        relative(f.cpu(), e)
        for pair, truth in zip(found, expected, strict=True)
        for f, e in zip(pair, truth, strict=True)
    ]
    return max(float("inf") if e != e else e for e in errors)


def _evaluate(network: str, batch: int, context: Context, dtype: str, name: str, keywords: dict[str, Any]):
    model = build(network)
    x, z = inputs(model, batch, context.device)
    plan = build_plan(model, context.device, DTYPES[dtype], name, **keywords)
    return plan, _answers(plan.field(z), x)


def _evaluations(network: str, context: Context) -> Cases:
    for dtype in ("float32", "bfloat16", "float16") if context.cuda else ("float32", "bfloat16"):
        for batch in (3,) if context.quick else (1, 5):
            for plan in ("eager", "fused"):
                yield _evaluation_case(network, batch, context, dtype, plan, "", {})
            # On the large network the switches are tried once; float16 differs from bfloat16 in nothing they touch.
            seldom = (network, batch) in (("celeba64", 5), ("fashion32", 1))
            if dtype == "float16" or seldom or (context.quick and dtype != "float32"):
                continue
            for label, keywords in variants(context.device):
                yield _evaluation_case(network, batch, context, dtype, "fused", label, keywords)


def _evaluation_case(network, batch, context, dtype, plan, label, keywords):
    name = f"{network} batch {batch} {dtype}: {plan}{', ' if label else ''}{label}"
    return name, functools.partial(_evaluation, network, batch, context, dtype, plan, keywords)


@functools.lru_cache(maxsize=8)
def _plain_error(network: str, batch: int, context: Context, dtype: str) -> float:
    _, found = _evaluate(network, batch, context, dtype, "eager", {})
    return _difference(found, _expected(network, batch))


def _evaluation(network, batch, context: Context, dtype: str, name: str, keywords: dict[str, Any]) -> dict[str, Any]:
    if keywords.get("attention") == "xformers":
        need_xformers(context)
    plan, found = _evaluate(network, batch, context, dtype, name, keywords)
    error = _difference(found, _expected(network, batch))
    if dtype == "float32":
        allowed = FLOAT32_BOUND[context.device.type]
    else:
        allowed = max(1.5 * _plain_error(network, batch, context, dtype), FLOORS[dtype])
        allowed = min(allowed, CEILINGS[dtype])
    return _held(error, allowed, plan)


def need_xformers(context: Context) -> None:
    if importlib.util.find_spec("xformers") is None:
        raise NotHere("xformers is not installed")
    if not context.cuda:
        raise NotHere("xformers has no kernels for the CPU")


def describe(plan: Any) -> dict[str, Any]:
    """What the plan says about itself, as one text."""
    return {"plan": ", ".join(f"{k} {v}" for k, v in plan.describe().items())}


def _loops(network: str, context: Context) -> Cases:
    steps = 4 if context.quick else 100
    yield f"{network} decode {steps} steps, float32", lambda: _loop(network, context, steps, ddim)
    yield f"{network} invert {steps} steps, float32", lambda: _loop(network, context, steps, ddim_invert)
    yield (
        f"{network} stop_percent 0.3, float32",
        lambda: _loop(network, context, min(steps, 20), functools.partial(ddim, stop_percent=0.3)),
    )
    yield f"{network} without z, float32", lambda: _loop(network, context, min(steps, 20), ddim, with_z=False)
    for label, keywords in variants(context.device) if network == "tiny" and context.cuda else ():
        yield f"{network} 6 steps, float32: {label}", functools.partial(_switched_loop, network, context, keywords)
    yield f"{network} bfloat16 loop against eager's", lambda: _low_precision_loop(network, context, steps)
    yield f"{network} ragged batches", lambda: _ragged(network, context, min(steps, 10))
    yield f"{network} trajectory mixture", lambda: _mixture(network, context)
    yield f"{network} same plan, other z, other steps", lambda: _reuse(network, context)


def _held(error: float, allowed: float = LOOP_BOUND, plan: Any = None) -> dict[str, Any]:
    found = {"status": "PASS" if error <= allowed else "FAIL", "error": error, "allowed": allowed}
    return found if plan is None else found | describe(plan)


def _loop(
    network: str, context: Context, steps: int, sampler, with_z: bool = True, keywords: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The fused plan's trajectory on the device against the modules' on the CPU."""
    model = build(network)
    schedule = build_schedule(model.config.schedule)
    found = []
    for device, name in ((CPU, "eager"), (context.device, "fused")):
        x, z = inputs(model, 2, device)
        plan = build_plan(model, device, torch.float32, name, **((keywords or {}) if name == "fused" else {}))
        plan.prepare(schedule.timesteps(steps))
        found.append(sampler(plan.field(z if with_z else None), x, schedule, steps).cpu())
    return _held(relative(found[1], found[0]), plan=plan)


def _switched_loop(network: str, context: Context, keywords: dict[str, Any]) -> dict[str, Any]:
    if keywords.get("attention") == "xformers":
        need_xformers(context)
    return _loop(network, context, 6, ddim, keywords=keywords)


def _low_precision_loop(network: str, context: Context, steps: int) -> dict[str, Any]:
    model = build(network)
    schedule = build_schedule(model.config.schedule)
    results = []
    for device, dtype, name in (
        (CPU, "float32", "eager"), (context.device, "bfloat16", "eager"), (context.device, "bfloat16", "fused")
    ):  # fmt: skip
        x, z = inputs(model, 2, device)
        results.append(ddim(build_plan(model, device, DTYPES[dtype], name).field(z), x, schedule, steps).cpu())
    exact, eager, fused = results
    return _held(relative(fused, exact), max(2 * relative(eager, exact), 0.02))


def _ragged(network: str, context: Context, steps: int) -> dict[str, Any]:
    """Seven images in batches of three, three and one come out as the seven in one batch."""
    model = build(network)
    x, _ = inputs(model, 7, CPU)
    x0 = x.clamp(-1, 1)
    results = []
    for size in (7, 3):
        pipe = Pipeline(
            model, "published", steps=steps, device=context.device, dtype="float32", batch_size=size, plan="fused"
        )
        results.append(pipe.reconstruct(x0))
    return _held(relative(results[1], results[0]), RAGGED_BOUND)


def _mixture(network: str, context: Context) -> dict[str, Any]:
    model = build(network)
    schedule = build_schedule(model.config.schedule)
    results = []
    for device, name in ((CPU, "eager"), (context.device, "fused")):
        x, _ = inputs(model, 2, device)
        z = torch.stack([inputs(model, 2, device, seed)[1] for seed in (1, 2, 3)])
        weights = torch.tensor([[0.2, 0.5], [0.3, 0.5], [0.5, 0.0]], device=device)
        field = build_plan(model, device, torch.float32, name).field(z, weights)
        results.append(ddim(field, x, schedule, 5).cpu())
    return _held(relative(results[1], results[0]))


def _reuse(network: str, context: Context) -> dict[str, Any]:
    """What a plan keeps (tables, captured graphs, buffers) must not leak from one trajectory into the next, and a
    result must stay what it was when the next trajectory runs."""
    model = build(network)
    schedule = build_schedule(model.config.schedule)
    plan, plain = (build_plan(model, d, torch.float32, n) for d, n in ((context.device, "fused"), (CPU, "eager")))
    kept, worst = [], 0.0
    for seed, steps, batch in ((1, 4, 2), (2, 4, 2), (3, 7, 2), (4, 4, 3), (5, 4, 2)):
        x, z = inputs(model, batch, context.device, seed)
        found = ddim(plan.field(z), x, schedule, steps)
        kept.append((found, found.clone()))
        worst = max(worst, relative(found.cpu(), ddim(plain.field(z.cpu()), x.cpu(), schedule, steps)))
    if not all(torch.equal(a, b) for a, b in kept):
        raise AssertionError("a result was overwritten by a later trajectory")
    return _held(worst)
