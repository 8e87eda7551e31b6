"""What precision costs: the bundled model on the bundled images, encoded and decoded in one dtype and in the other."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from pdae_fast import PDAE, Pipeline, metrics
from pdae_fast.data import open_dataset
from pdae_fast.data.bundled import SAMPLES, bundled_for
from pdae_fast.engine.float8 import calibration
from pdae_fast.experiments.calibrate import IMAGES as CALIBRATED
from pdae_fast.experiments.calibrate import RECIPE, calibrate

from .contenders import relative

MODEL = "fashion32"
# Recipes that precision is measured with, and on how many images.
RECIPES, IMAGES = ("published", "fast", "balanced", "exact", "reversible", "diffae"), 64
# Of a recipe's SSIM and MSE in bfloat16, inferred x_T, where nothing amplifies rounding.
RECIPE_SSIM_BOUND, RECIPE_MSE_BOUND = 0.001, 0.1
# The bounds that are held: a low precision against float32 of the same plan (the images have a spread of their own,
# so the means differ by less than any one image), and the float32 plan against the plain modules after the decoding.
SSIM_BOUND, MSE_BOUND, PLAN_BOUND = 0.002, 0.15, 1e-4


def bundled_images(model: PDAE, limit: int | None = None) -> Tensor:
    """x0 [N, C, H, W] in [-1, 1]: the sample images of the package, at most ``limit``."""
    channels, size, _ = model.image_shape
    dataset = open_dataset([SAMPLES], size, channels, split="test")
    return torch.stack([dataset[i].image for i in range(len(dataset))][:limit])


def precision_loss(
    device: torch.device, steps: int = 100, limit: int | None = None, dtype: str = "bfloat16", plan: str = "auto"
) -> dict[str, Any]:
    """A row of the "quality" table: ``steps`` up and ``steps`` down in ``dtype`` against float32, same plan."""
    model = PDAE.from_pretrained(MODEL)
    x0 = bundled_images(model, limit)
    found = {}
    for name in ("float32", dtype):
        pipe = Pipeline(model, "published", steps=steps, device=device, dtype=name, plan=plan, batch_size=len(x0))
        x = pipe.reconstruct(x0)
        found[name] = (metrics.ssim(x0, x).mean().item(), metrics.mse(x0, x).mean().item())
    (ssim, mse), (ssim_low, mse_low) = found["float32"], found[dtype]
    return {
        "what": f"{dtype} against float32, {pipe.plan.name} plan",
        "model": MODEL,
        "images": len(x0),
        "steps": f"{steps}+{steps}",
        "ssim_float32": round(ssim, 5),
        f"ssim_{dtype}": round(ssim_low, 5),
        "ssim_difference": ssim_low - ssim,
        "mse_float32": mse,
        f"mse_{dtype}": mse_low,
        "ratio_mse": mse_low / mse,
    }


def split_images(model: str, shape: tuple[int, int, int], places: slice) -> Tensor:
    """x0 [N, C, H, W] in [-1, 1]: the test images of a bundled model's data that are at ``places``."""
    dataset = open_dataset([bundled_for(model, shape[0])], shape[1], shape[0], split="test")
    return torch.stack([dataset[i].image for i in range(len(dataset))[places]])


@functools.cache
def float8_scales(model: str) -> dict[str, Any]:
    """The scales of fp8 of a bundled model, of the last of its test images: none of those that losses are of."""
    pipe = Pipeline(PDAE.from_pretrained(model), RECIPE, device="cpu", dtype="float32", plan="eager")
    x0 = split_images(model, pipe.model.image_shape, slice(-CALIBRATED, None))
    return calibration(pipe.model, calibrate(pipe, x0, range(len(x0))))


def recipe_losses(
    device: torch.device,
    model: str = MODEL,
    recipes: tuple[str, ...] = RECIPES,
    limit: int = IMAGES,
    dtype: str = "bfloat16",
    **options: Any,
) -> list[dict[str, Any]]:
    """Rows of the "quality" table: ``dtype`` (with ``options`` of the Pipeline) against float32, for every recipe, with
    x_T inferred and random."""
    pdae = PDAE.from_pretrained(model)
    x0 = split_images(model, pdae.image_shape, slice(limit))
    rows, low = [], "_".join([dtype, *options])
    for recipe in recipes:
        found: dict[str, dict[str, tuple[float, float]]] = {"inferred": {}, "random": {}}
        for name, dtype_of, keywords in (("float32", "float32", {}), (low, dtype, options)):
            pipe = Pipeline(pdae, recipe, device=device, dtype=dtype_of, **keywords)
            for x_T, x in (("inferred", pipe.reconstruct(x0)), ("random", pipe.decode(pipe.encode(x0), seed=0))):
                found[x_T][name] = metrics.ssim(x0, x).mean().item(), metrics.mse(x0, x).mean().item()
        for x_T, values in found.items():
            (ssim, mse), (ssim_low, mse_low) = values["float32"], values[low]
            rows.append({
                "what": " ".join([f"{dtype} against float32", *options]),
                "model": model, "images": limit, "steps": recipe, "x_T": x_T, "ssim_float32": round(ssim, 5),
                f"ssim_{low}": round(ssim_low, 5), "ssim_difference": ssim_low - ssim, "mse_float32": mse,
                f"mse_{low}": mse_low, "ratio_mse": mse_low / mse,
            })  # fmt: skip
    return rows


def precision_holds(row: dict[str, Any]) -> bool:
    """Whether the loss is within the bounds, in either direction; NaN is not."""
    return abs(row["ssim_difference"]) <= SSIM_BOUND and abs(row["ratio_mse"] - 1) <= MSE_BOUND


def plan_difference(device: torch.device, steps: int = 100, limit: int = 4, plan: str = "auto") -> dict[str, Any]:
    """A row: the float32 ``plan`` on ``device`` against the plain modules on the CPU, same z and x_T, decoded."""
    model = PDAE.from_pretrained(MODEL)
    x0 = bundled_images(model, limit)
    plain = Pipeline(model, "published", steps=steps, device="cpu", dtype="float32", plan="eager")
    fast = Pipeline(model, "published", steps=steps, device=device, dtype="float32", plan=plan)
    z = plain.encode(x0)
    x_T = plain.invert(x0, z)
    return {
        "what": f"float32 {fast.plan.name} plan against the plain modules",
        "model": MODEL,
        "images": len(x0),
        "steps": f"{steps}",
        "error": relative(fast.decode(z, x_T), plain.decode(z, x_T)),
    }
