"""What users call: images in, codes and images out, on any device, in batches that fit."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from .arguments import as_indices, as_int, as_number, brief
from .engine import build_plan, in_forked_process, out_of_memory, resolve_device, resolve_dtype
from .engine.features import Maps, as_outputs, as_times, no_maps
from .errors import UserError
from .isolation import undisturbed
from .models import PDAE, Autoencoder, DiffAE, Prior
from .samplers import ddim
from .samplers.ddim import Field
from .samplers.noise import ImageNoise, lerp, random_noise, slerp
from .samplers.recipe import Recipe
from .schedule import Trajectory, build_schedule, q_sample
from .tensors import as_image_tensor, as_tensor, as_values, as_weights

R = TypeVar("R")
INTERPOLATIONS = ("latent", "trajectory")
DIFFAE_LATENT_STEPS = 200
# Streams of random numbers of one seed: those of an image's x_T, of its z_T, of the noise in its steps and
# of the noise in what its features are of are apart.
LATENT_STREAM, STEP_STREAM, FEATURE_STREAM = 2**32, 2**33, 2**34


def calls(method: Callable) -> Callable:
    """A method that users call: what it computes depends on no setting of their process, and it changes none."""

    @functools.wraps(method)
    def call(self: Pipeline, *arguments: Any, **keywords: Any) -> Any:
        with undisturbed():
            return method(self, *arguments, **keywords)

    return call


class Pipeline:
    """Runs a model: ``encode``, ``features``, ``invert``, ``decode``, ``reconstruct``, ``interpolate``, ``manipulate``,
    ``sample``.

    Args:
        model: a PDAE or a DiffAE, or a Prior (then there is no z, and only ``features``, ``invert``, ``decode`` and
            ``sample`` make sense).
        recipe: how x_T is inferred and decoded: a Recipe, or the name of one ("published", "fast", "balanced", "exact",
            "reversible", "diffae"); None: the default Recipe. Its fields (steps, encode_steps, spacing, iterations,
            solver, eta, reuse, noise; see Recipe) may be given as keywords, in place of those of ``recipe``.
        device: "auto" (CUDA when there is one), "cpu", "cuda", "cuda:1" ...
        dtype: of the networks: "auto" (bfloat16 for networks from 16 M parameters on devices that multiply it
            natively, else float32), "float32", "bfloat16" or "float16". State and updates are always float32.
        batch_size: images per network evaluation; chosen for the device when None. Results do not depend on it
            beyond rounding.
        progress: called as progress(n) whenever n images have advanced by one network evaluation.
        plan: "auto", "fused" (the engine's rewrites) or "eager" (the modules as they are).
        attention: "auto", "sdpa" or "xformers".
        large_tiles: an approximation: bfloat16 convolutions on the CPU in tiles of 4x4 pixels, faster and with about
            1.6 times the rounding error of a step.
        fp8: an approximation: convolutions of values rounded to e4m3, by the scales that ``calibrate`` wrote to this
            file, or that it holds. Emulated: what it costs in quality can be seen, and no device is faster for it.
        copy: False uses the model's weights where they are, which takes less memory; it must not change any more.
        consume: gives the model away, for the least memory: its U-Net loses the weights that are laid out anew, so that
            it can no longer be run or saved, and the pipeline cannot be pickled.
        label: the class of every image, of a class-conditional model; the methods' ``y`` goes before it.

    Images are floating point tensors [B, C, H, W] in [-1, 1], or arrays of NumPy (arguments.as_images); results come
    back float32 on the CPU, as ordinary tensors. ``pipe.recipe`` says what runs, ``pipe.noise`` how random x_T is
    drawn, and ``pipe.evaluations`` counts network evaluations (in images) since it was made. Raises UserError for
    anything a user can get wrong.

    The weights are copied when it is made (see ``copy``): the model is left as it is, in its mode, and what happens to
    it later is not seen. Several threads may call one pipeline. Copies share the weights; a pickled one carries them,
    without ``progress``, and is built anew where it is read.
    """

    @undisturbed()
    def __init__(
        self,
        model: PDAE | DiffAE | Prior,
        recipe: Recipe | str | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        batch_size: int | None = None,
        progress: Callable[[int], None] | None = None,
        plan: str = "auto",
        attention: str = "auto",
        large_tiles: bool = False,
        fp8: str | os.PathLike | Mapping[str, Any] | None = None,
        label: int | None = None,
        copy: bool = True,
        consume: bool = False,
        **fields: Any,
    ) -> None:
        if not isinstance(model, (Autoencoder, Prior)):
            raise UserError(f"Pipeline needs a PDAE, a DiffAE or a Prior, not {type(model).__name__}")
        if batch_size is not None:
            batch_size = as_int("batch size", batch_size, 1)
        if progress is not None and not callable(progress):
            raise UserError(f"progress must be a function or None, not {brief(progress)}")
        self.model, self.progress = model, progress
        self.label = None if label is None else self._labels([label])
        self.schedule = build_schedule(model.config.schedule)
        self.recipe = Recipe.of(recipe, **fields)
        self.recipe.check(self.schedule)
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(dtype, self.device, sum(p.numel() for p in model.parameters()))
        options = dict(attention=attention, large_tiles=large_tiles, fp8=fp8, reuse=self.recipe.reuse)
        self.plan = build_plan(model, self.device, self.dtype, plan, copy=copy, consume=consume, **options)
        self.batch_size = batch_size or self.plan.batch_size()
        # In float32, whatever the networks run in.
        self._latents = self._directions = None
        kept = "cpu", torch.float32
        if isinstance(model, Autoencoder) and model.config.latent_statistics:
            self._latents = tuple(v.detach().to(*kept, copy=True) for v in (model.latent_mean, model.latent_std))
        if isinstance(model, Autoencoder) and model.classifier is not None:
            self._directions = tuple(
                v.detach().to(*kept, copy=True) for v in (model.classifier.weight, model.classifier.bias)
            )

    def __copy__(self) -> Pipeline:
        other = object.__new__(type(self))
        other.__dict__.update(vars(self))
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> Pipeline:
        other = copy.copy(self)
        other.plan = copy.deepcopy(self.plan, memo)
        return other

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "model": None, "progress": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.model = self.plan.model

    def with_recipe(self, recipe: Recipe | str | None = None, **fields: Any) -> Pipeline:
        """Another pipeline with ``recipe`` (None: this one's) and ``fields`` in place of its own.

        It shares the weights and the progress, and unless it leaves out other work, the count of evaluations.
        """
        other = copy.copy(self)
        other.recipe = Recipe.of(self.recipe if recipe is None else recipe, **fields)
        other.recipe.check(self.schedule)
        if other.recipe.reuse != self.recipe.reuse:
            other.plan = self.plan.reusing(other.recipe.reuse)
        return other

    @property
    def noise(self) -> str:
        """How random x_T is drawn: as the recipe says, or the model's configuration."""
        return self.recipe.noise or self.model.config.noise

    @property
    def evaluations(self) -> dict[str, int]:
        """Network evaluations so far, in images: encoder, trunk, eps, gradient, latent."""
        return self.plan.counts()

    @property
    def equivalents(self) -> float:
        """The same in evaluations of the whole network, trunk, eps and one G, by multiplications; encoder left out."""
        return self.plan.equivalents()

    # -- checks and batching ---------------------------------------------------------------------------------------

    def _images(self, x: Tensor | np.ndarray, what: str, picture: bool = True) -> Tensor:
        return as_image_tensor(x, self.model.image_shape, what, picture)

    def _autoencoder(self, what: str) -> Autoencoder:
        if not isinstance(self.model, Autoencoder):
            raise UserError(f"{what} needs an autoencoder (PDAE or DiffAE); this pipeline holds a prior alone")
        return self.model

    def _mixes(self, what: str) -> PDAE:
        """The model, where codes can be mixed in G."""
        model = self._autoencoder(what)
        if not isinstance(model, PDAE):
            raise UserError(f"{what} mixes G of several z, and a Diff-AE has no G; expected a PDAE")
        return model

    def _codes(self, z: Tensor | None, count: int | None = None) -> Tensor | None:
        if z is None:
            if isinstance(self.model, DiffAE):
                raise UserError("z is missing: every block of a Diff-AE reads it; give z, of encode or sample_latents")
            return None
        D = self._autoencoder("z").config.latent_dim
        z = as_tensor(z, "z")
        if z.ndim != 2 or z.shape[1] != D or (count is not None and len(z) != count):
            raise UserError(f"z has shape {list(z.shape)}; expected [{'B' if count is None else count}, {D}]")
        return as_values(z, "z")

    def _labels(self, y: Any, count: int | None = None) -> Tensor | None:
        """Labels int64 [count] of y, or the pipeline's own [1]; UserError where the model's classes ask for others."""
        classes = self.model.config.unet.num_classes
        if y is None:
            if classes is not None and self.label is None:
                raise UserError(
                    f"y is missing: this model is class-conditional; expected labels from 0 to {classes - 1}, or label="
                )
            return self.label
        if classes is None:
            raise UserError("y: this model is not class-conditional; expected no labels")
        labels = [as_int("y", label, 0, classes - 1) for label in as_indices("y", y)]
        if count is not None and len(labels) != count:
            raise UserError(f"y has {len(labels)} labels; expected {count}, one for each image")
        return torch.tensor(labels, dtype=torch.int64)

    def field(
        self,
        z: Tensor | None = None,
        weights: Tensor | None = None,
        labels: Tensor | None = None,
        part: slice = slice(None),
    ) -> Field:
        """What samplers integrate for the images ``part``; arguments as of engine.Plan.field, the label filled in."""
        labels = self._labels(None) if labels is None else labels
        if labels is not None and len(labels) > 1:
            labels = labels[part]
        if z is None:
            return self.plan.field(None, labels=labels)
        if weights is None:
            return self.plan.field(z[part], labels=labels)
        return self.plan.field(z[:, part], weights[:, part], labels)

    def _chunks(self, count: int) -> Iterator[slice]:
        for start in range(0, count, self.batch_size):
            yield slice(start, min(start + self.batch_size, count))

    def _batched(self, count: int, run: Callable[[slice], Tensor], shape: Sequence[int]) -> Tensor:
        """run(part) for every batch, gathered on the CPU [count, *shape]; UserError when a batch does not fit."""
        return self._collect(self._each(count, lambda part: run(part).cpu()), shape)

    def _each(self, count: int, run: Callable[[slice], R]) -> list[R]:
        """run(part) for every batch; UserError when a batch does not fit."""
        size = min(self.batch_size, count)
        self.plan.check_memory(size)
        parts = []
        for part in self._chunks(count):
            try:
                parts.append(run(part))
            except (RuntimeError, MemoryError) as error:
                if in_forked_process(error):
                    raise UserError(f"{self.device} cannot be used in a forked process; start it by spawn") from None
                if not out_of_memory(error):
                    raise
                raise UserError(
                    f"{size} images at once do not fit the memory of {self.device}; use a smaller batch size"
                ) from None
        return parts

    def _tick(self, count: int) -> Callable[[], None] | None:
        return None if self.progress is None else lambda: self.progress(count)

    def _collect(self, parts: list[Tensor], shape: Sequence[int]) -> Tensor:
        return torch.cat(parts) if parts else torch.empty(0, *shape, dtype=torch.float32)

    # -- the autoencoder -------------------------------------------------------------------------------------------

    @calls
    def encode(self, x0: Tensor) -> Tensor:
        """x0 [B, C, H, W] -> z [B, latent_dim]."""
        model, x0 = self._autoencoder("encode"), self._images(x0, "x0")
        return self._batched(len(x0), lambda part: self.plan.encode(x0[part]), (model.config.latent_dim,))

    @calls
    def features(
        self,
        images: Tensor,
        t: int | Sequence[int] | Tensor = 0,
        outputs: int = 0,
        noised: bool = False,
        seed: int = 0,
        *,
        indices: Sequence[int] | None = None,
        y: Sequence[int] | Tensor | None = None,
    ) -> Maps:
        """What the prior's network says of ``images`` [B, C, H, W]: the maps of its middle block and of its first
        ``outputs`` output blocks, float32 on the CPU.

        ``t``: the time it is told, 0 ... T - 1, one or [B]. It is given the images themselves, or with ``noised`` their
        x_t, whose noise is that of image ``indices[k]`` (None: k) of ``seed``. Of a Diff-AE, whose every block reads z,
        the images are encoded first. ``y``: as in `invert`. What comes after the last map is not computed.
        """
        x0 = self._images(images, "images")
        T, count, unet = self.schedule.T, len(x0), self.plan.unet
        outputs, times = as_outputs(outputs, unet), as_times(t, T, count)
        labels = self._labels(y, count)
        indices = range(count) if indices is None else as_indices("indices", indices)
        if len(indices) != count:
            raise UserError(f"indices has {len(indices)} values; expected {count}, one for each image")
        noise = ImageNoise(seed, indices, self.model.image_shape, stream=FEATURE_STREAM) if noised else None

        def run(part: slice) -> Maps:
            x, at = x0[part], times if len(times) == 1 else times[part]
            z = self.plan.encode(x) if unet.z_width else None
            if noise is not None:
                draws = ImageNoise.of(noise.generators[part], self.model.image_shape)()
                x = q_sample(self.schedule, x.cpu(), torch.tensor(at).expand(len(x)), draws)
            of_part = labels if labels is None or len(labels) == 1 else labels[part]
            found = self.plan.features(x, at, outputs, z, of_part)
            if self.progress is not None:
                self.progress(len(x))
            return Maps.of(level.cpu() for level in found.levels)

        parts = self._each(count, run) or [no_maps(unet, self.model.config.image_size, outputs)]
        return Maps.cat(parts)

    @calls
    def invert(self, x0: Tensor, z: Tensor | None = None, y: Sequence[int] | Tensor | None = None) -> Tensor:
        """Inferred x_T [B, C, H, W] of x0 [B, C, H, W] given its z [B, latent_dim] (None: by the prior alone) and, with
        a class-conditional model, labels y [B].

        By the recipe: DDIM steps upward, or the steps that decode, solved for their start. The solver "belm" returns
        pairs [B, 2, C, H, W]: [:, 0] x_T and [:, 1] the state one point below. UserError where steps draw noise.
        """
        x0, recipe = self._images(x0, "x0"), self.recipe
        z, up = self._codes(z, len(x0)), recipe.up(self.schedule)
        labels = self._labels(y, len(x0))
        self.plan.prepare([0, *(step.t for step in up)])

        def run(part: slice) -> Tensor:
            x, field = x0[part].to(self.device), self.field(z, labels=labels, part=part)
            return recipe.method.infer(field, x, up, recipe.iterations, progress=self._tick(len(x)))

        shape, states = self.model.image_shape, recipe.method.states
        return self._batched(len(x0), run, shape if states == 1 else (states, *shape))

    def _decode(
        self,
        latent: Tensor,
        trajectory: Trajectory,
        field: Callable[[slice], Field],
        noise: Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """Images from ``latent``, batch by batch; ``field(part)`` and ``noise[part]`` are those of a part of them."""
        self.plan.prepare(step.t for step in trajectory)
        recipe, shape = self.recipe, self.model.image_shape

        def run(part: slice) -> Tensor:
            start = latent[part].to(self.device)
            return recipe.method.decode(
                field(part),
                start,
                trajectory,
                eta=recipe.eta,
                noise=None if noise is None else ImageNoise.of(noise[part], shape, self.device),
                progress=self._tick(len(start)),
            )

        return self._batched(len(latent), run, shape)

    def _latent(self, x_T: Tensor) -> Tensor:
        """x_T checked: [B, C, H, W], or the states [B, 2, C, H, W] that the recipe's solver infers."""
        if not (isinstance(x_T, Tensor) and x_T.ndim == 5 and x_T.shape[1] == 2):
            return self._images(x_T, "x_T", picture=False)
        if self.recipe.method.states != 2:
            solver = self.recipe.solver
            raise UserError(f"x_T is a pair of states, which only the solver belm decodes; {solver} takes x_T[:, 0]")
        return self._images(x_T.flatten(0, 1), "x_T", picture=False).unflatten(0, (-1, 2))

    @calls
    def decode(
        self,
        z: Tensor | None = None,
        x_T: Tensor | None = None,
        stop_percent: float = 0.0,
        *,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        count: int | None = None,
        y: Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """Images [B, C, H, W] (not clamped) decoded from z [B, latent_dim] and x_T, [B, C, H, W] or what invert gave.

        Without x_T it is drawn: image k of the call is image ``indices[k]`` (None: k) of ``seed`` (noise.ImageNoise),
        or the next draw of ``generator``. Noise that the steps draw (solver "ddpm", eta above 0) is chosen likewise.
        Without z the prior alone decodes, and G is not run; then ``x_T`` or ``count`` says how many images.
        ``stop_percent``: G is left out for the last part of the trajectory. ``y``: as in `invert`.
        """
        z, x_T = self._codes(z), None if x_T is None else self._latent(x_T)
        indices = None if indices is None else as_indices("indices", indices)
        known = {len(v) for v in (z, x_T, indices) if v is not None}
        if count is not None:
            known.add(as_int("count", count, 0))
        if len(known) != 1:
            raise UserError(
                f"z, x_T, indices and count disagree on the number of images: {sorted(known) or 'none given'}"
            )
        (count,) = known
        labels, trajectory = self._labels(y, count), self.recipe.down(self.schedule, stop_percent)
        if generator is not None:
            if not isinstance(generator, torch.Generator):
                raise UserError(f"generator must be a torch.Generator, not {type(generator).__name__}")
            drawn, noise = self._drawn(count, generator, x_T is None)
        else:
            indices = range(count) if indices is None else indices
            drawn = self.random_x_T(seed, indices) if x_T is None else None
            noise = ImageNoise(seed, indices, (), stream=STEP_STREAM).generators if self.recipe.draws else None
        latent = x_T if drawn is None else drawn
        return self._decode(latent, trajectory, lambda part: self.field(z, labels=labels, part=part), noise)

    @calls
    def random_x_T(self, seed: int, indices: Sequence[int]) -> Tensor:
        """Random x_T [len(indices), C, H, W]: image k of ``seed`` has the same whatever else is asked for with it."""
        return random_noise(self.noise, ImageNoise(seed, indices, self.model.image_shape)())

    def _drawn(
        self, count: int, generator: torch.Generator, x_T: bool
    ) -> tuple[Tensor | None, list[torch.Generator] | None]:
        """Random x_T, where asked for, and generators of the steps' noise, where they draw any.

        One image after the other, so that two calls of n images draw what one call of 2n draws.
        """
        shape, latents, noise = self.model.image_shape, [], []
        for _ in range(count):
            if x_T:
                drawn = torch.randn(1, *shape, generator=generator, device=generator.device, dtype=torch.float32)
                latents.append(drawn.cpu())
            if self.recipe.draws:
                number = torch.randint(2**62, (), generator=generator, device=generator.device)
                noise.append(torch.Generator().manual_seed(int(number)))
        drawn = random_noise(self.noise, self._collect(latents, shape)) if x_T else None
        return drawn, noise if self.recipe.draws else None

    @calls
    def reconstruct(self, x0: Tensor, y: Sequence[int] | Tensor | None = None) -> Tensor:
        """x0 -> z and inferred x_T -> x0 again [B, C, H, W]; y as in `invert`."""
        z = self.encode(x0)
        return self.decode(z, self.invert(x0, z, y), y=y)

    # -- what z is for ---------------------------------------------------------------------------------------------

    @calls
    def interpolate(self, x_a: Tensor, x_b: Tensor, weights: Sequence[float] | Tensor, kind: str = "latent") -> Tensor:
        """Images [n, C, H, W] between two images [1, C, H, W] (or [C, H, W]) at ``weights`` (0 is x_a, 1 is x_b).

        "latent": decode lerp(z_a, z_b). "trajectory": at every step mix lerp(G(x, z_a), G(x, z_b)); the trunk and
        eps_hat serve both (a Diff-AE has no G and knows "latent" only). Either starts from slerp of the two inferred
        x_T.
        """
        self._check_interpolation(kind)
        x_a, x_b = (x[None] if getattr(x, "ndim", None) == 3 else x for x in (x_a, x_b))
        x_a, x_b = self._images(x_a, "x_a"), self._images(x_b, "x_b")
        weights = as_weights(weights)
        if len(x_a) != 1 or len(x_b) != 1:
            raise UserError(f"interpolate takes two single images, not {len(x_a)} and {len(x_b)}")
        x0 = torch.cat([x_a, x_b])
        z = self.encode(x0)
        x_T = self.invert(x0, z)
        return self.blend(z[:, None], x_T[:, None], weights, kind)[0]

    def _check_interpolation(self, kind: str) -> None:
        if kind not in INTERPOLATIONS:
            raise UserError(f"interpolation kind {kind!r} is not known; expected {' or '.join(INTERPOLATIONS)}")
        if kind == "trajectory":
            self._mixes("interpolation kind 'trajectory'")

    @calls
    def blend(self, z: Tensor, x_T: Tensor, weights: Sequence[float] | Tensor, kind: str = "latent") -> Tensor:
        """`interpolate` for P pairs that are encoded already, all of their frames in one batched run.

        z [2, P, latent_dim] and x_T [2, P, C, H, W] (or pairs of states, as invert gave them): the first ends, then
        the second. weights: n numbers, the same for every pair. Returns [P, n, C, H, W].
        """
        self._check_interpolation(kind)
        self._autoencoder("blend")
        z, x_T = as_tensor(z, "z"), as_tensor(x_T, "x_T")
        if z.ndim != 3 or len(z) != 2 or x_T.shape[:2] != z.shape[:2]:
            raise UserError(
                f"z has shape {list(z.shape)} and x_T {list(x_T.shape)}; expected [2, P, latent_dim], [2, P, C, H, W]"
            )
        w, P = as_weights(weights), z.shape[1]
        n, every = len(w), w.repeat(P)
        z_a, z_b = z.repeat_interleave(n, dim=1)
        start = slerp(*x_T.repeat_interleave(n, dim=1), every)
        if kind == "latent":
            x = self.decode(lerp(z_a, z_b, every), start)
        else:
            x = self.decode_mixture(torch.stack([z_a, z_b]), torch.stack([1 - every, every]), start)
        return x.unflatten(0, (P, n))

    @calls
    def decode_mixture(self, z: Tensor, weights: Tensor, x_T: Tensor, stop_percent: float = 0.0) -> Tensor:
        """Decode x_T (as in decode) with G = sum_k weights[k] G(x, z[k]); z [K, B, latent_dim], weights [K, B]."""
        x_T, D = self._latent(x_T), self._mixes("decode_mixture").config.latent_dim
        z, weights = as_tensor(z, "z"), as_tensor(weights, "weights")
        if z.ndim != 3 or tuple(z.shape[1:]) != (len(x_T), D) or weights.shape != z.shape[:2]:
            raise UserError(
                f"z has shape {list(z.shape)} and weights {list(weights.shape)}; "
                f"expected [K, {len(x_T)}, {D}] and [K, {len(x_T)}]"
            )
        if self.recipe.draws:
            raise UserError("decode_mixture decodes with steps that draw no noise")
        z, weights = as_values(z, "z"), as_values(weights, "weights")
        trajectory = self.recipe.down(self.schedule, stop_percent)
        return self._decode(x_T, trajectory, lambda part: self.field(z, weights, part=part))

    def _statistics(self, what: str) -> tuple[Tensor, Tensor]:
        self._autoencoder(what)
        if self._latents is None:
            raise UserError(f"{what} needs the mean and standard deviation of the latents; this model has none")
        return self._latents

    @calls
    def manipulate(self, x0: Tensor, attribute: str | int, scale: float) -> Tensor:
        """Images [B, C, H, W] of x0 with ``attribute`` moved by ``scale`` along the classifier's direction.

        z_norm + scale sqrt(latent_dim) w / ||w||, decoded from the *inferred* x_T, which keeps the rest.
        """
        scale = as_number("scale", scale)
        self.direction(attribute), self._statistics("manipulate")  # a mistake shows before the work
        z = self.encode(x0)
        return self.decode(self.edit(z, attribute, scale), self.invert(x0, z))

    @calls
    def edit(self, z: Tensor, attribute: str | int, scale: float | Tensor) -> Tensor:
        """z [B, latent_dim] with ``attribute`` moved by ``scale`` (a number, or one for each row [B]), as in
        `manipulate`."""
        direction = self.direction(attribute)
        mean, std = self._statistics("manipulate")
        z = self._codes(z)
        if isinstance(scale, (Tensor, np.ndarray)) and scale.ndim:
            scale = as_values(as_tensor(scale, "scale").flatten(), "scale")
            if len(scale) not in (1, len(z)):
                raise UserError(f"scale has {len(scale)} values; expected one, or one for each of {len(z)} rows of z")
        else:
            scale = torch.tensor(as_number("scale", scale), dtype=torch.float32)
        return ((z - mean) / std + scale.reshape(-1, 1) * direction) * std + mean

    @calls
    def direction(self, attribute: str | int) -> Tensor:
        """sqrt(latent_dim) w / ||w|| [latent_dim], w the classifier's row of ``attribute`` (a name or its place)."""
        model = self._autoencoder("manipulate")
        names = model.config.attributes
        if self._directions is None:
            raise UserError(
                "manipulate needs an attribute classifier; this model has none: make one with "
                "`python -m pdae_fast.train classifier`, or give `python -m pdae_fast.convert` the one that there is"
            )
        if isinstance(attribute, str):
            row = names.index(attribute) if attribute in names else -1
        else:
            row = as_int("attribute, where it is not a name,", attribute)
        if not 0 <= row < len(names):
            raise UserError(f"attribute {attribute!r} is not known; expected one of {', '.join(names)}")
        w = self._directions[0][row]
        return model.config.latent_dim**0.5 * w / w.norm()

    @calls
    def logits(self, z: Tensor) -> Tensor:
        """Scores [B, attributes] of the classifier for z [B, latent_dim]; above 0 is positive."""
        self.direction(0)
        mean, std = self._statistics("logits")
        return torch.nn.functional.linear((self._codes(z) - mean) / std, *self._directions)

    @calls
    def sample(
        self,
        count: int,
        *,
        stop_percent: float = 0.3,
        latent_steps: int | None = None,
        latent_clamp: bool | None = None,
        seed: int = 0,
        first: int = 0,
    ) -> Tensor:
        """``count`` new images [count, C, H, W]: z from the latent DPM, then decoded from random x_T.

        ``latent_steps`` and ``latent_clamp`` are those of `sample_latents`. A prior samples alone. They are images
        ``first``, ``first + 1`` ... of ``seed``: the same however a caller splits them.
        """
        count, first = as_int("the number of images", count, 1), as_int("first", first, 0)
        self.recipe.down(self.schedule, stop_percent)  # a mistake shows before the work
        if isinstance(self.model, Prior):
            return self.decode(count=count, seed=seed, indices=range(first, first + count))
        z = self.sample_latents(count, latent_steps, latent_clamp, seed, first)
        return self.decode(z, None, stop_percent, seed=seed, indices=range(first, first + count))

    @calls
    def sample_latents(
        self, count: int, steps: int | None = None, clamp: bool | None = None, seed: int = 0, first: int = 0
    ) -> Tensor:
        """z [count, latent_dim] from the latent DPM, de-normalised; numbers ``first``, ``first`` + 1 ... of seed.

        As the model's own code does. PDAE: as many DDIM steps as the recipe has, z_T and every estimate of z_0 clamped
        to +-1. Diff-AE: 200 "strided" steps, nothing clamped. ``steps`` and ``clamp`` in place of these.
        """
        count, first = as_int("the number of z", count, 0), as_int("first", first, 0)
        trajectory, clamp = self.latent_settings(steps, clamp)
        mean, std = self._statistics("sample")
        D = self.model.config.latent_dim
        z_T = ImageNoise(seed, range(first, first + count), (D,), self.device, LATENT_STREAM)()
        z_T, bound = (z_T.clamp(-1, 1), 1.0) if clamp else (z_T, None)
        z = ddim.integrate(self.plan.latent_field(), z_T, trajectory, clamp=bound)
        return z.cpu() * std + mean

    def latent_settings(self, steps: int | None = None, clamp: bool | None = None) -> tuple[Trajectory, bool]:
        """What `sample_latents` runs with these arguments; UserError where the model has no latent DPM, or the latent
        DPM no such steps."""
        model = self._autoencoder("sample")
        if model.config.latent is None:
            raise UserError(
                "sample needs a latent DPM; this model has none: make one with `python -m pdae_fast.train latent`, or "
                "give `python -m pdae_fast.convert` the one that there is"
            )
        self._statistics("sample")
        diffae = isinstance(model, DiffAE)
        if steps is None:
            steps = DIFFAE_LATENT_STEPS if diffae else self.recipe.steps
        steps = as_int("steps", steps, 1)
        schedule = build_schedule(model.config.latent.schedule)
        trajectory = schedule.decoding(steps, spacing="strided" if diffae else "uniform")
        return trajectory, not diffae if clamp is None else clamp
