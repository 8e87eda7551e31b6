"""What users call: images in, codes and images out, on any device, in batches that fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import sampling, solvers
from .config import check_noise
from .engine import Reuse, build_plan, out_of_memory, resolve_device, resolve_dtype
from .errors import UserError
from .inversion import invert_implicit
from .models import PDAE, Prior
from .reversible import belm_invert
from .schedule import Trajectory, build_schedule

# Ways to infer x_T and decode it, as arguments of Pipeline; what each leaves of the error is in the README. Fewer steps
# are another, coarser decoder, which does not show where x_T is solved for it.
PRESETS: dict[str, dict[str, Any]] = {
    "published": {"steps": 100, "spacing": "uniform", "iterations": 0, "solver": "ddim"},
    "fast": {"steps": 10, "spacing": "quadratic", "iterations": 2, "solver": "ddim"},
    "balanced": {"steps": 13, "spacing": "quadratic", "iterations": 2, "solver": "ddim"},
    "exact": {"steps": 30, "spacing": "quadratic", "iterations": 5, "solver": "ddim"},
    "reversible": {"steps": 19, "spacing": "uniform", "iterations": 0, "solver": "belm"},
}

INTERPOLATIONS = ("latent", "trajectory")


class Pipeline:
    """Runs a model: ``encode``, ``invert``, ``decode``, ``reconstruct``, ``interpolate``, ``manipulate``, ``sample``.

    Args:
        model: a PDAE, or a Prior (then there is no z, and only ``invert``, ``decode`` and ``sample`` make sense).
        steps: DDIM steps of a decoding (and of an inversion, unless given there).
        device: "auto" (CUDA when there is one), "cpu", "cuda", "cuda:1" ...
        dtype: of the networks: "auto" (bfloat16 for networks from 16 M parameters on devices that multiply it
            natively, else float32), "float32", "bfloat16" or "float16". State and updates are always float32.
        batch_size: images per network evaluation; chosen for the device when None. Results do not depend on it
            beyond rounding.
        plan: "auto", "fused" (the engine's rewrites) or "eager" (the modules as they are).
        attention: "auto", "sdpa" or "xformers".
        spacing: of the time points of all trajectories: "uniform" as published, "quadratic", "logsnr" or "karras" (see
            Schedule.timesteps).
        iterations: how x_T is inferred. 0: DDIM steps upward, as published. From 1 on: each of the ``steps`` that
            decode is solved for its start by so many evaluations (see inversion.invert_implicit); these are DDIM steps.
        solver: what decodes: "ddim" as published, "dpm++2m", "dpm++3m", "unipc2", "unipc3" (see solvers), or "belm",
            whose latents are pairs of states [B, 2, C, H, W] that lead back to the image exactly (see reversible).
        reuse: work left out, an approximation: such as "gradient:2", G on every second step (see engine/reuse.py).
        noise: how random x_T is drawn: "normal" as published, or "standardised" (see sampling.random_noise); None: as
            the model's configuration says. An x_T that is given or inferred is taken as it is.
        progress: called as progress(n) whenever n images have advanced by one network evaluation.

    Images are float32 [B, C, H, W] in [-1, 1]; results come back float32 on the CPU. ``pipe.evaluations`` counts
    network evaluations (in images) since it was made. Raises UserError for anything a user can get wrong.
    """

    def __init__(
        self,
        model: PDAE | Prior,
        steps: int = 100,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        batch_size: int | None = None,
        progress: Callable[[int], None] | None = None,
        plan: str = "auto",
        attention: str = "auto",
        spacing: str = "uniform",
        iterations: int = 0,
        solver: str = "ddim",
        reuse: str | Reuse = "none",
        noise: str | None = None,
    ) -> None:
        if not isinstance(model, (PDAE, Prior)):
            raise UserError(f"Pipeline needs a PDAE or a Prior, not {type(model).__name__}")
        if batch_size is not None and batch_size < 1:
            raise UserError(f"batch size must be at least 1, not {batch_size}")
        self.model, self.progress = model, progress
        self.steps, self.spacing, self.iterations, self.solver = steps, spacing, iterations, solver
        self.reuse, self.noise = Reuse.parse(reuse), model.config.noise if noise is None else noise
        self.schedule = build_schedule(model.config.schedule)
        self.check_settings()
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(dtype, self.device, sum(p.numel() for p in model.parameters()))
        self.plan = build_plan(model, self.device, self.dtype, plan, attention=attention, reuse=self.reuse)
        self.batch_size = batch_size or self.plan.batch_size()

    def check_settings(self) -> None:
        """UserError unless steps, spacing, iterations, solver, reuse and noise are known and go together."""
        check_noise(self.noise)
        solvers.check_steps(self.solver, len(self.schedule.timesteps(self.steps, self.spacing)) - 1)
        if self.iterations < 0:
            raise UserError(f"iterations must not be negative, not {self.iterations}")
        if self.iterations and self.solver != "ddim":
            raise UserError(f"iterations solve the steps of ddim and cannot be combined with {self.solver}")
        if self.reuse.keeps and (self.iterations or self.solver == "belm"):
            what = "iterations" if self.iterations else "belm"
            raise UserError(f"reuse {self.reuse} makes a step depend on those before it; {what} cannot run it backward")

    @property
    def evaluations(self) -> dict[str, int]:
        """Network evaluations so far, in images: encoder, trunk, eps, gradient, latent."""
        return dict(self.plan.evaluations)

    @property
    def equivalents(self) -> float:
        """The same in evaluations of the whole network, trunk, eps and one G, by multiplications; encoder left out."""
        return self.plan.equivalents()

    # -- checks and batching ---------------------------------------------------------------------------------------

    def _images(self, x: Tensor, what: str) -> Tensor:
        shape = self.model.image_shape
        if not isinstance(x, Tensor) or x.ndim != 4 or tuple(x.shape[1:]) != shape:
            found = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise UserError(f"{what} has shape {found}; this model expects [B, {', '.join(map(str, shape))}]")
        if not x.is_floating_point():
            raise UserError(f"{what} has dtype {x.dtype}; expected floating point values in [-1, 1]")
        if not bool(torch.isfinite(x).all()):
            raise UserError(f"{what} holds NaN or infinite values")
        return x.detach().float()

    def _pdae(self, what: str) -> PDAE:
        if not isinstance(self.model, PDAE):
            raise UserError(f"{what} needs a PDAE autoencoder; this pipeline holds a prior alone")
        return self.model

    def _codes(self, z: Tensor | None, count: int | None = None) -> Tensor | None:
        if z is None:
            return None
        D = self._pdae("z").config.latent_dim
        if not isinstance(z, Tensor) or z.ndim != 2 or z.shape[1] != D or (count is not None and len(z) != count):
            found = list(z.shape) if isinstance(z, Tensor) else type(z).__name__
            raise UserError(f"z has shape {found}; expected [{'B' if count is None else count}, {D}]")
        return z.detach().float()

    def _chunks(self, count: int) -> Iterator[slice]:
        for start in range(0, count, self.batch_size):
            yield slice(start, min(start + self.batch_size, count))

    def _batched(self, count: int, run: Callable[[slice], Tensor], shape: Sequence[int]) -> Tensor:
        """run(part) for every batch, gathered on the CPU [count, *shape]; UserError when a batch does not fit."""
        size = min(self.batch_size, count)
        self.plan.check_memory(size)
        parts = []
        for part in self._chunks(count):
            try:
                parts.append(run(part).cpu())
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                raise UserError(
                    f"{size} images at once do not fit the memory of {self.device}; use a smaller batch size"
                ) from None
        return self._collect(parts, shape)

    def _tick(self, count: int) -> Callable[[], None] | None:
        return None if self.progress is None else lambda: self.progress(count)

    def _collect(self, parts: list[Tensor], shape: Sequence[int]) -> Tensor:
        return torch.cat(parts) if parts else torch.empty(0, *shape)

    # -- the autoencoder -------------------------------------------------------------------------------------------

    def encode(self, x0: Tensor) -> Tensor:
        """x0 [B, C, H, W] -> z [B, latent_dim]."""
        model, x0 = self._pdae("encode"), self._images(x0, "x0")
        return self._batched(len(x0), lambda part: self.plan.encode(x0[part]), (model.config.latent_dim,))

    def invert(self, x0: Tensor, z: Tensor | None = None, steps: int | None = None) -> Tensor:
        """Inferred x_T [B, C, H, W] of x0 [B, C, H, W] given its z [B, latent_dim] (None: by the prior alone).

        ``steps`` is how many go up; a pipeline with ``iterations`` solves the steps that decode, so it takes no other.
        Nor does one with the solver "belm", which runs them backward: it returns pairs [B, 2, C, H, W], [:, 0] x_T and
        [:, 1] the state one point below. The other solvers' x_T is inferred by DDIM steps upward.
        """
        x0, steps = self._images(x0, "x0"), self.steps if steps is None else steps
        z = self._codes(z, len(x0))

        def field(part: slice) -> sampling.Field:
            return self.plan.field(None if z is None else z[part])

        if self.iterations == 0 and self.solver != "belm":
            return self._integrate(x0, self.schedule.inversion(steps, self.spacing), field)
        if steps != self.steps:
            what = "belm runs" if self.solver == "belm" else "iterations solve"
            raise UserError(f"{what} the {self.steps} steps that decode; leave out encode steps (now {steps})")
        decoding = self.schedule.decoding(steps, spacing=self.spacing)
        self.plan.prepare([0, *(step.t for step in decoding)])

        def run(part: slice) -> Tensor:
            x = x0[part].to(self.device)
            tick = self._tick(len(x))
            if self.solver == "belm":
                return torch.stack(belm_invert(field(part), x, decoding, progress=tick), dim=1)
            return invert_implicit(field(part), x, decoding, iterations=self.iterations, progress=tick).x_T

        shape = self.model.image_shape
        return self._batched(len(x0), run, (2, *shape) if self.solver == "belm" else shape)

    def _integrate(
        self, x: Tensor, trajectory: Trajectory, field: Callable[[slice], sampling.Field], solver: str = "ddim"
    ) -> Tensor:
        """x after ``trajectory``, batch by batch; ``field(part)`` is that of a part of the images."""
        self.plan.prepare(step.t for step in trajectory)
        if solver in solvers.MULTISTEP:  # they must know where a window switches G, and not extrapolate across it
            wants = self.reuse.wants_gradient
            trajectory = tuple(step._replace(use_gradient=step.use_gradient and wants(step.t)) for step in trajectory)

        def run(part: slice) -> Tensor:
            start, companion = x[part].to(self.device), None
            if start.ndim == 5:
                start, companion = start.unbind(1)
            return solvers.decode(
                field(part), start, trajectory, solver, companion=companion, progress=self._tick(len(start))
            )

        return self._batched(len(x), run, self.model.image_shape)

    def _latent(self, x_T: Tensor, solver: str) -> Tensor:
        """x_T checked: [B, C, H, W], or a pair of states [B, 2, C, H, W] for the solver that decodes it."""
        if not (isinstance(x_T, Tensor) and x_T.ndim == 5 and x_T.shape[1] == 2):
            return self._images(x_T, "x_T")
        if solver != "belm":
            raise UserError(f"x_T is a pair of states, which only the solver belm decodes; {solver} takes x_T[:, 0]")
        return self._images(x_T.flatten(0, 1), "x_T").unflatten(0, (-1, 2))

    def decode(
        self,
        z: Tensor | None = None,
        x_T: Tensor | None = None,
        stop_percent: float = 0.0,
        *,
        steps: int | None = None,
        solver: str | None = None,
        seed: int = 0,
        first: int = 0,
        generator: torch.Generator | None = None,
        count: int | None = None,
    ) -> Tensor:
        """Images [B, C, H, W] (not clamped) decoded from z [B, latent_dim] and x_T, [B, C, H, W] or what invert gave.

        Without x_T it is drawn: image k of the call is image ``first + k`` of ``seed`` (see sampling.ImageNoise), or
        the next draw of ``generator``. Without z the prior alone decodes, and G is not run; then ``x_T`` or ``count``
        says how many images. ``stop_percent``: G is left out for the last part of the trajectory. ``steps`` and
        ``solver`` are the pipeline's unless given.
        """
        z, solver = self._codes(z), self.solver if solver is None else solver
        known = {len(v) for v in (z, x_T) if v is not None} | ({count} if count is not None else set())
        if len(known) != 1:
            raise UserError(f"z, x_T and count disagree on the number of images: {sorted(known) or 'none given'}")
        (count,) = known
        if x_T is not None:
            x_T = self._latent(x_T, solver)
        elif generator is None:
            x_T = self.random_x_T(seed, range(first, first + count))
        else:
            x_T = self._drawn(count, generator)
        steps = self.steps if steps is None else steps
        trajectory = self.schedule.decoding(steps, stop_percent, self.spacing)
        solvers.check_steps(solver, len(trajectory))
        return self._integrate(x_T, trajectory, lambda part: self.plan.field(None if z is None else z[part]), solver)

    def random_x_T(self, seed: int, indices: Sequence[int]) -> Tensor:
        """Random x_T [len(indices), C, H, W]: image k of ``seed`` has the same whatever else is asked for with it."""
        return sampling.random_noise(self.noise, sampling.ImageNoise(seed, indices, self.model.image_shape)())

    def _drawn(self, count: int, generator: torch.Generator) -> Tensor:
        shape = self.model.image_shape
        # One image at a time, so that two calls of n images draw what one call of 2n draws.
        draws = [torch.randn(shape, generator=generator, device=generator.device).cpu() for _ in range(count)]
        return sampling.random_noise(self.noise, self._collect([d[None] for d in draws], shape))

    def reconstruct(self, x0: Tensor, encode_steps: int | None = None) -> Tensor:
        """x0 -> z and inferred x_T -> x0 again [B, C, H, W]; ``encode_steps`` defaults to ``steps``."""
        z = self.encode(x0)
        return self.decode(z, self.invert(x0, z, encode_steps))

    # -- what z is for ---------------------------------------------------------------------------------------------

    def interpolate(
        self,
        x_a: Tensor,
        x_b: Tensor,
        weights: Sequence[float] | Tensor,
        kind: str = "latent",
        encode_steps: int | None = None,
    ) -> Tensor:
        """Images [n, C, H, W] between two images [1, C, H, W] (or [C, H, W]) at ``weights`` (0 is x_a, 1 is x_b).

        "latent": decode lerp(z_a, z_b). "trajectory": at every step mix lerp(G(x, z_a), G(x, z_b)); the trunk and
        eps_hat serve both. Either starts from slerp of the two inferred x_T.
        """
        if kind not in INTERPOLATIONS:
            raise UserError(f"interpolation kind {kind!r} is not known; expected {' or '.join(INTERPOLATIONS)}")
        x_a, x_b = (x[None] if x.ndim == 3 else x for x in (x_a, x_b))
        if len(x_a) != 1 or len(x_b) != 1:
            raise UserError(f"interpolate takes two single images, not {len(x_a)} and {len(x_b)}")
        x0 = torch.cat([self._images(x_a, "x_a"), self._images(x_b, "x_b")])
        z = self.encode(x0)
        x_T = self.invert(x0, z, encode_steps)
        return self.blend(z[:, None], x_T[:, None], weights, kind)[0]

    def blend(self, z: Tensor, x_T: Tensor, weights: Sequence[float] | Tensor, kind: str = "latent") -> Tensor:
        """`interpolate` for P pairs that are encoded already, all of their frames in one batched run.

        z [2, P, latent_dim] and x_T [2, P, C, H, W] (or pairs of states, as invert gave them): the first ends, then
        the second. weights: n numbers, the same for every pair. Returns [P, n, C, H, W].
        """
        if kind not in INTERPOLATIONS:
            raise UserError(f"interpolation kind {kind!r} is not known; expected {' or '.join(INTERPOLATIONS)}")
        if z.ndim != 3 or len(z) != 2 or x_T.shape[:2] != z.shape[:2]:
            raise UserError(
                f"z has shape {list(z.shape)} and x_T {list(x_T.shape)}; expected [2, P, latent_dim], [2, P, C, H, W]"
            )
        w, P = torch.as_tensor(weights, dtype=torch.float32).flatten(), z.shape[1]
        n, every = len(w), w.repeat(P)
        z_a, z_b = z.repeat_interleave(n, dim=1)
        start = sampling.slerp(*x_T.repeat_interleave(n, dim=1), every)
        if kind == "latent":
            x = self.decode(sampling.lerp(z_a, z_b, every), start)
        else:
            x = self.decode_mixture(torch.stack([z_a, z_b]), torch.stack([1 - every, every]), start)
        return x.unflatten(0, (P, n))

    def decode_mixture(self, z: Tensor, weights: Tensor, x_T: Tensor, stop_percent: float = 0.0) -> Tensor:
        """Decode x_T (as in decode) with G = sum_k weights[k] G(x, z[k]); z [K, B, latent_dim], weights [K, B]."""
        x_T, D = self._latent(x_T, self.solver), self._pdae("decode_mixture").config.latent_dim
        if z.ndim != 3 or tuple(z.shape[1:]) != (len(x_T), D) or weights.shape != z.shape[:2]:
            raise UserError(
                f"z has shape {list(z.shape)} and weights {list(weights.shape)}; "
                f"expected [K, {len(x_T)}, {D}] and [K, {len(x_T)}]"
            )
        trajectory = self.schedule.decoding(self.steps, stop_percent, self.spacing)
        return self._integrate(
            x_T, trajectory, lambda part: self.plan.field(z[:, part].float(), weights[:, part].float()), self.solver
        )

    def _statistics(self, what: str) -> tuple[Tensor, Tensor]:
        model = self._pdae(what)
        if not model.config.latent_statistics:
            raise UserError(f"{what} needs the mean and standard deviation of the latents; this model has none")
        return model.latent_mean.cpu(), model.latent_std.cpu()

    def manipulate(self, x0: Tensor, attribute: str | int, scale: float, encode_steps: int | None = None) -> Tensor:
        """Images [B, C, H, W] of x0 with ``attribute`` moved by ``scale`` along the classifier's direction.

        z_norm + scale sqrt(latent_dim) w / ||w||, decoded from the *inferred* x_T, which keeps the rest.
        """
        self.direction(attribute)  # a mistake shows before the work
        z = self.encode(x0)
        return self.decode(self.edit(z, attribute, scale), self.invert(x0, z, encode_steps))

    def edit(self, z: Tensor, attribute: str | int, scale: float | Tensor) -> Tensor:
        """z [B, latent_dim] with ``attribute`` moved by ``scale`` (a number, or one for each row [B]), as in
        `manipulate`."""
        direction = self.direction(attribute)
        mean, std = self._statistics("manipulate")
        z, scale = self._codes(z), torch.as_tensor(scale, dtype=torch.float32)
        return ((z - mean) / std + scale.reshape(-1, 1) * direction) * std + mean

    def direction(self, attribute: str | int) -> Tensor:
        """sqrt(latent_dim) w / ||w|| [latent_dim], w the classifier's row of ``attribute`` (a name or its place)."""
        model = self._pdae("manipulate")
        names = model.config.attributes
        if model.classifier is None:
            raise UserError(
                "manipulate needs an attribute classifier; this model has none: make one with "
                "`python -m pdae_fast.train classifier`, or give `python -m pdae_fast.convert` the one that there is"
            )
        row = attribute if isinstance(attribute, int) else (names.index(attribute) if attribute in names else -1)
        if not 0 <= row < len(names):
            raise UserError(f"attribute {attribute!r} is not known; expected one of {', '.join(names)}")
        w = model.classifier.weight[row].detach().cpu()
        return model.config.latent_dim**0.5 * w / w.norm()

    def logits(self, z: Tensor) -> Tensor:
        """Scores [B, attributes] of the classifier for z [B, latent_dim]; above 0 is positive."""
        self.direction(0)
        mean, std = self._statistics("logits")
        classifier = self.model.classifier
        w, b = (v.detach().cpu().float() for v in (classifier.weight, classifier.bias))
        return torch.nn.functional.linear((self._codes(z) - mean) / std, w, b)

    def sample(
        self,
        count: int,
        *,
        stop_percent: float = 0.3,
        latent_steps: int | None = None,
        latent_clamp: bool = True,
        seed: int = 0,
        first: int = 0,
    ) -> Tensor:
        """``count`` new images [count, C, H, W]: z from the latent DPM, then decoded from random x_T.

        ``latent_clamp`` clamps z_T and every estimate of z_0 to +-1 as the released code does. A prior samples alone.
        They are images ``first``, ``first + 1`` ... of ``seed``: the same however a caller splits them.
        """
        if count < 1:
            raise UserError(f"the number of images must be at least 1, not {count}")
        if isinstance(self.model, Prior):
            return self.decode(count=count, seed=seed, first=first)
        z = self.sample_latents(count, latent_steps, latent_clamp, seed, first)
        return self.decode(z, None, stop_percent, seed=seed, first=first)

    def sample_latents(
        self, count: int, steps: int | None = None, clamp: bool = True, seed: int = 0, first: int = 0
    ) -> Tensor:
        """z [count, latent_dim] from the latent DPM, de-normalised; numbers ``first``, ``first`` + 1 ... of seed."""
        model = self._pdae("sample")
        if model.latent_denoiser is None:
            raise UserError(
                "sample needs a latent DPM; this model has none: make one with `python -m pdae_fast.train latent`, or "
                "give `python -m pdae_fast.convert` the one that there is"
            )
        mean, std = self._statistics("sample")
        D = model.config.latent_dim
        # A stream of its own: z_T must not repeat the draws of x_T.
        z_T = sampling.ImageNoise(seed + 2**32, range(first, first + count), (D,), self.device)()
        schedule = build_schedule(model.config.latent.schedule)
        z = sampling.ddim(
            self.plan.latent_field(),
            z_T.clamp(-1, 1) if clamp else z_T,
            schedule,
            self.steps if steps is None else steps,
            clamp=1.0 if clamp else None,
        )
        return z.cpu() * std + mean
