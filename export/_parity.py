"""Exported graphs against the plain float32 modules, on fresh random inputs."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from ..engine.rewrites import resblocks
from ..errors import UserError
from ..models import PDAE, Autoencoder, DiffAE, Prior
from ..samplers import ddim
from ..schedule import Step, build_schedule
from . import manifest as manifests
from ._tracing import widened
from .backends.backend import Backend

# Largest relative error of one evaluation by dtype, float32 plain modules the reference. For a step the error of x_next
# is divided by what a relative error of 1 in the network's output would change of it: relative to x_next itself, most
# of which is x, mistakes of the network would hide; relative to the step's length, rounding would look like one where a
# step is short or x0_hat hardly determined. SMALLEST_EFFECT keeps the rounding of x itself below the bounds.
BOUNDS = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
PERTURBATION, SMALLEST_EFFECT = 0.01, 0.01  # relative to the network's output, to x_next
# After all steps up and down, ||x - reference|| / ||reference||; errors of single steps neither cancel nor simply add.
LOOP_BOUNDS = {"float32": 1e-3, "float16": 1e-1, "bfloat16": 3e-1}
BFLOAT16_NOTE = (
    "measured on a copy of the graph with float32 arithmetic and the weights and casts rounded to bfloat16: "
    "ONNX Runtime has no bfloat16 convolution on the CPU"
)


class PlainModules:
    """The plain modules in float32, on random inputs of ``seed``; one method for every exported graph.

    ``label`` is the class of every image, of a class-conditional network.
    """

    def __init__(self, model: PDAE | DiffAE | Prior, seed: int, label: int | None = None) -> None:
        self.model, self.schedule, self.label = model, build_schedule(model.config.schedule), label
        self.generator = torch.Generator().manual_seed(seed)

    def images(self, count: int) -> Tensor:
        return torch.rand(count, *self.model.image_shape, generator=self.generator) * 2 - 1

    def at_time(self, x0: Tensor, t: int) -> Tensor:
        """x_t of q(x_t | x0): what the network sees at time t."""
        alpha_bar = float(self.schedule.alpha_bar[t])
        noise = torch.randn(x0.shape, generator=self.generator)
        return alpha_bar**0.5 * x0 + (1 - alpha_bar) ** 0.5 * noise

    @torch.inference_mode()
    def conditioning(self, z: Tensor) -> Tensor:
        """[N, 2, M] from every ResBlock's own projection."""
        if isinstance(self.model, DiffAE):
            # z is what the blocks read, and only scales.
            emb, blocks = z, resblocks(self.model.unet)
            pairs = [(scale := b.emb_z_layers(emb), torch.zeros_like(scale)) for b in blocks]
        else:
            decoder = self.model.decoder
            emb = decoder.label_emb(z)
            stages = [decoder.shift_middle_block, *decoder.shift_output_blocks]
            pairs = [b.emb_z_layers(emb).chunk(2, dim=1) for stage in stages for b in resblocks(stage)]
        return torch.stack([1 + torch.cat([s for s, _ in pairs], 1), torch.cat([b for _, b in pairs], 1)], 1)

    @torch.inference_mode()
    def encode(self, x0: Tensor) -> Tensor | None:
        """z [N, D]; None from a prior."""
        return self.model.encode(x0) if isinstance(self.model, Autoencoder) else None

    @torch.inference_mode()
    def features(self, x: Tensor, t: Tensor, z: Tensor | None, count: int) -> list[Tensor]:
        """The first ``count`` maps of the eps-decoder's blocks."""
        unet = self.model.decoder if isinstance(self.model, PDAE) else self.model.unet
        y = None if self.label is None else torch.full((len(x),), self.label)
        trunk = unet.trunk(x, t, y, z if isinstance(self.model, DiffAE) else None)
        return list(itertools.islice(unet.levels(trunk), count))

    def field(self, z: Tensor | None) -> ddim.Field:
        """What samplers integrate: the modules as they are."""

        @torch.inference_mode()
        def evaluate(x: Tensor, t: int, use_gradient: bool) -> tuple[Tensor, Tensor | None]:
            times = torch.full((len(x),), t, dtype=torch.int64)
            if isinstance(self.model, DiffAE):
                return self.model(x, times, z), None
            y = None if self.label is None else torch.full((len(x),), self.label)
            return self.model(x, times, z, y) if z is not None else (self.model(x, times, y), None)

        return evaluate

    def step(self, x: Tensor, z: Tensor | None, step: Step) -> tuple[Tensor, float]:
        """x_next, and how far it would move for a relative error of 1 in eps' = eps - sqrt(1 - alpha_bar) G."""
        eps, gradient = self.field(z)(x, step.t, True)
        alpha_bars = step.alpha_bar, step.alpha_bar_next
        x_next = ddim.ddim_step(x, eps, gradient, *alpha_bars)
        shifted = eps if gradient is None else eps - (1 - step.alpha_bar) ** 0.5 * gradient
        signs = torch.randint(2, x.shape, generator=self.generator) * 2 - 1
        moved = ddim.ddim_step(x, shifted * (1 + PERTURBATION * signs), None, *alpha_bars)
        effect = float((moved.double() - x_next.double()).norm()) / PERTURBATION
        return x_next, max(effect, SMALLEST_EFFECT * float(x_next.double().norm()))

    def reconstruct(self, x0: Tensor, steps: int, encode_steps: int) -> tuple[Tensor, Tensor | None]:
        z = self.encode(x0)
        x_T = ddim.ddim_invert(self.field(z), x0, self.schedule, encode_steps)
        return ddim.ddim(self.field(z), x_T, self.schedule, steps), z


class _Worst:
    """The largest errors seen of one graph."""

    def __init__(self, bound: float) -> None:
        self.bound, self.relative, self.absolute = bound, 0.0, 0.0

    def add(self, found: np.ndarray, expected: Tensor, scale: float | None = None) -> None:
        """``scale``: what an error of 1 would be; the norm of ``expected`` when None."""
        reference = expected.double()
        error = torch.from_numpy(np.array(found)).double() - reference
        scale = float(reference.norm()) if scale is None else scale
        relative = float(error.norm()) / scale if scale > 0 else float("inf")
        # NaN compares as false everywhere, so that it must not pass through max().
        self.relative = max(self.relative, relative) if np.isfinite(relative) else float("inf")
        self.absolute = max(self.absolute, float(error.abs().max()))

    def report(self) -> dict[str, Any]:
        return {"relative_error": self.relative, "max_abs_error": self.absolute, "bound": self.bound}


def measure(
    backend: Backend, reference: PlainModules, manifest: dict[str, Any], batches: tuple[int, ...]
) -> dict[str, dict[str, Any]]:
    """Errors of every graph but ``reconstruct``, for each number of images in ``batches``, over several steps."""
    bound = BOUNDS[manifest["dtype"]]
    names = manifests.graphs_of(manifest)
    # Conditioning is float32 in every export.
    worst = {name: _Worst(BOUNDS["float32"] if name == "conditioning" else bound) for name in names}
    trajectories = {
        "invert_step": reference.schedule.inversion(manifest["requested_encode_steps"]),
        "decode_step": reference.schedule.decoding(manifest["requested_steps"]),
    }
    for count in batches:
        x0, z, fixed = reference.images(count), None, {}
        if manifest["kind"] != "prior":
            z = reference.encode(x0)
            worst["encoder"].add(backend.run("encoder", {"x0": x0.numpy()})["z"], z)
            conditioning = backend.run("conditioning", {"z": z.numpy()})["conditioning"]
            expected = reference.conditioning(z)
            # Most of 1 + z_s is the 1.
            projections = expected.double() - torch.tensor([1.0, 0.0])[:, None]
            worst["conditioning"].add(conditioning, expected, float(projections.norm()))
            fixed = {"conditioning": conditioning}
        if manifests.FEATURES in worst:
            t = torch.randint(reference.schedule.T, (count,), generator=reference.generator)
            given = fixed if manifest["kind"] == "diffae" else {}
            found = backend.run(manifests.FEATURES, {"x": x0.numpy(), "t": t.numpy(), **given})
            for values, expected in zip(found.values(), reference.features(x0, t, z, len(found)), strict=True):
                worst[manifests.FEATURES].add(values, expected)
        for name, trajectory in trajectories.items():
            drawn = int(torch.randint(len(trajectory), (), generator=reference.generator))
            # The ends of a trajectory are where its coefficients are extreme; one batch has to show that.
            for i in sorted({0, drawn, len(trajectory) - 1} if count == batches[0] else {drawn}):
                x = reference.at_time(x0, trajectory[i].t)
                inputs = {"x": x.numpy(), **fixed, "step": np.array([i], np.int64)}
                worst[name].add(backend.run(name, inputs)["x_next"], *reference.step(x, z, trajectory[i]))
    return {name: errors.report() for name, errors in worst.items()}


def measure_all_steps(
    backend: Backend, reference: PlainModules, manifest: dict[str, Any], graph: bool, loops: bool
) -> dict[str, dict[str, Any]]:
    """Errors of one image after all steps up and down.

    ``graph``: of the single-file graph ("reconstruct", and its z "reconstruct_z"); ``loops``: of the separate graphs
    run by the backend's own loops ("all_steps").
    """
    x0, bound = reference.images(1), LOOP_BOUNDS[manifest["dtype"]]
    x, z = reference.reconstruct(x0, manifest["requested_steps"], manifest["requested_encode_steps"])
    worst: dict[str, _Worst] = {}
    if graph:
        found = backend.run(manifests.RECONSTRUCT, {"x0": x0.numpy()})
        worst[manifests.RECONSTRUCT] = _Worst(bound)
        worst[manifests.RECONSTRUCT].add(found["x"], x)
        if z is not None:
            worst["reconstruct_z"] = _Worst(BOUNDS[manifest["dtype"]])
            worst["reconstruct_z"].add(found["z"], z)
    if loops:
        conditioning = None
        if z is not None:
            code = backend.run("encoder", {"x0": x0.numpy()})["z"]
            conditioning = backend.run("conditioning", {"z": code})["conditioning"]
        x_T = backend.loop("invert_step", x0.numpy(), conditioning, manifest["encode_steps"])
        worst["all_steps"] = _Worst(bound)
        worst["all_steps"].add(backend.loop("decode_step", x_T, conditioning, manifest["steps"]), x)
    return {name: errors.report() for name, errors in worst.items()}


def refuse(parity: dict[str, dict[str, Any]]) -> None:
    """Raise UserError naming the first graph whose error is beyond its bound."""
    for name, values in parity.items():
        if not values["relative_error"] <= values["bound"]:
            raise UserError(
                f"{name} differs from the model by {values['relative_error']:.1e} (relative), more than the "
                f"{values['bound']:.0e} allowed for its dtype; nothing was written"
            )


def checkable(directory: Path, manifest: dict[str, Any], scratch: Path) -> tuple[Path, dict[str, Any]]:
    """Directory and manifest of graphs that ONNX Runtime can run on the CPU: the exported ones, or widened copies."""
    if manifest["dtype"] != "bfloat16":
        return directory, manifest
    for entry in manifest["graphs"].values():
        twin = widened(directory / entry["file"])
        onnx.save(
            twin,
            scratch / entry["file"],
            save_as_external_data=True,
            location=f"{entry['file']}.weights",
            size_threshold=1024,
        )
    return scratch, {**manifest, "dtype": "float32"}


def scratch_directory(beside: Path) -> tempfile.TemporaryDirectory:
    """A place on the same disk for copies as large as the export, cleared with the staged directory ``beside`` it."""
    return tempfile.TemporaryDirectory(prefix=f"{beside.stem}.", suffix=".tmp", dir=beside.parent)
