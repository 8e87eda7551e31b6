"""The plan that runs the reference modules as they are: every faster plan is compared with this one."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..config import UNetConfig
from ..errors import UserError
from ..isolation import cudnn, float32_means_float32
from ..models import PDAE, Prior, unet_of
from ..models.unet import UNet
from ..samplers.reuse import NOTHING, Reuse
from . import float8
from .cost import equivalents
from .device import available_memory, one_at_a_time
from .features import COUNTER, Maps, separate
from .ownership import owned

P = TypeVar("P", bound="Plan")
Evaluate = Callable[[Tensor, int, bool], tuple[Tensor, Tensor | None]]
# Of all plans, so that a plan can be copied: locks cannot.
COUNTING = threading.Lock()


class Plan:
    """Runs ``model`` eagerly on ``device`` in ``dtype``; x and all results are float32 on that device.

    ``evaluations`` counts network evaluations in images: one for every image that passes a trunk, an eps-decoder, a
    G-decoder or the encoder; what is taken from an earlier evaluation (``reuse``) is not counted. Where only the outer
    part of a network ran, that is counted apart ("outer_eps"), and so is an eps-decoder that stopped after its K-th
    output block ("eps_until_K"). This plan knows of reuse only the window of G.

    The weights are the plan's own and never change: what happens to ``model`` later is not seen. Without ``copy`` they
    are those of ``model`` where they will do, and it must not change. Several threads may use a plan; copies share the
    weights, and a pickled plan is built anew where it is read.
    """

    name = "eager"
    tunes = False
    can_keep = False

    def __init__(
        self,
        model: PDAE | Prior,
        device: torch.device,
        dtype: torch.dtype,
        unrounded: Collection[Tensor] = (),
        copy: bool = True,
    ) -> None:
        self.model, self.device, self.dtype = owned(model, device, dtype, unrounded, copy), device, dtype
        self.reuse = NOTHING
        self.evaluations: Counter[str] = Counter()

    def reusing(self: P, reuse: Reuse) -> P:
        """This plan with other approximations: weights and tables are shared, evaluations are counted anew.

        UserError for approximations that this plan, or its network, cannot run.
        """
        if reuse.keeps and not self.can_keep:
            raise UserError(f"reuse {reuse} needs the fused plan; the {self.name} one computes everything anew")
        skips = len(self.unet.input_blocks)
        if reuse.outer > skips:
            raise UserError(f"reuse {reuse}: this network has {skips} skips, not {reuse.outer}")
        if self.unet.z_width is not None and (reuse.gradient > 1 or reuse.window is not None):
            raise UserError(f"reuse {reuse}: leaves out G, which a Diff-AE does not have")
        plan = object.__new__(type(self))
        plan.__dict__.update(vars(self))
        plan.reuse, plan.evaluations = reuse, Counter()
        return plan

    def __deepcopy__(self: P, memo: dict[int, Any]) -> P:
        plan = self.reusing(self.reuse)
        plan.evaluations.update(self.evaluations)
        return plan

    def choices(self) -> dict[str, Any]:
        """What `build_plan` needs to build this plan anew, beside its name, device and dtype."""
        return {}

    @contextlib.contextmanager
    def precision(self) -> Iterator[None]:
        """A context on the plan's device in which float32 means float32: cuDNN would otherwise round to TF32.

        Plans that run the same shapes many times let cuDNN try its algorithms on the first of them (``tunes``). On a
        GPU one thread is inside at a time: cuDNN's switches are the whole process's, and so is the device.
        """
        with contextlib.ExitStack() as context:
            context.enter_context(float32_means_float32())
            if self.device.type == "cuda":
                context.enter_context(one_at_a_time(self.device))
                context.enter_context(cudnn(benchmark=self.tunes, exact=self.dtype is torch.float32))
            yield

    def count_evaluations(self, **images: int) -> None:
        """Add to ``evaluations``."""
        with COUNTING:
            self.evaluations.update(images)

    def counts(self) -> dict[str, int]:
        """``evaluations`` as they are now."""
        with COUNTING:
            return dict(self.evaluations)

    @property
    def unet(self) -> UNet:
        return unet_of(self.model)

    @torch.inference_mode()
    def encode(self, x0: Tensor) -> Tensor:
        """x0 [B, C, H, W] -> z float32 [B, latent_dim]."""
        self.count_evaluations(encoder=len(x0))
        with self.precision():
            return self._encode(x0.to(self.device)).float()

    def _encode(self, x0: Tensor) -> Tensor:
        """The same on the plan's device, z in its dtype."""
        return self.model.encode(x0)

    def prepare(self, times: Iterable[int]) -> None:
        """Announce the time points of a schedule; plans with tables compute them at once."""

    def check_field(self, z: Tensor | None, weights: Tensor | None, labels: Tensor | None) -> None:
        """UserError where `field` needs what is not given, or is given what its network does not read."""
        if self.unet.z_width is not None and (z is None or weights is not None):
            raise UserError(
                "every block of a Diff-AE reads z: there is no prediction without one"
                if z is None
                else "codes are mixed in G, which a Diff-AE does not have"
            )
        self.unet.check_labels(labels)

    def field(self, z: Tensor | None = None, weights: Tensor | None = None, labels: Tensor | None = None) -> Evaluate:
        """The field that samplers integrate, conditioned on ``z``.

        z None: eps_hat alone. z [B, D]: G of every image's own z. z [K, B, D] with weights [K, B]: the mixture
        sum_k weights[k] G(x, z[k]), for which trunk and eps-decoder still run once. Of a Diff-AE z [B, D] goes into
        eps_hat, and there is no G. ``labels`` int64 [B] are those of a class-conditional prior.
        """
        self.check_field(z, weights, labels)
        labels = None if labels is None else labels.to(self.device)
        if z is not None:
            z = z.to(self.device)
            if z.ndim == 3:
                weights = weights.to(self.device)[:, :, None, None, None]

        @torch.inference_mode()
        def evaluate(x: Tensor, t: int, use_gradient: bool) -> tuple[Tensor, Tensor | None]:
            with self.precision():
                return run(x, t, use_gradient)

        def run(x: Tensor, t: int, use_gradient: bool) -> tuple[Tensor, Tensor | None]:
            B = len(x)
            times = torch.full((B,), t, dtype=torch.int64, device=self.device)
            features = self.unet.trunk(x, times, labels, z if self.unet.z_width else None)
            eps = self.unet.decode_eps(features).float()
            self.count_evaluations(trunk=B, eps=B)
            if z is None or self.unet.z_width or not use_gradient or not self.reuse.wants_gradient(t):
                return eps, None
            if z.ndim == 2:
                self.count_evaluations(gradient=B)
                return eps, self.unet.decode_gradient(features, z).float()
            K = len(z)
            self.count_evaluations(gradient=K * B)
            repeated = type(features)(
                features.h.repeat(K, 1, 1, 1),
                tuple(skip.repeat(K, 1, 1, 1) for skip in features.skips),
                features.emb.repeat(K, 1),
                features.x,
                features.t,
            )
            gradients = self.unet.decode_gradient(repeated, z.flatten(0, 1)).float()
            return eps, (weights * gradients.unflatten(0, (K, B))).sum(0)

        return evaluate

    @torch.inference_mode()
    def features(
        self,
        x: Tensor,
        t: int | Sequence[int],
        outputs: int = 0,
        z: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Maps:
        """Maps of the middle block and of the first ``outputs`` output blocks of the eps-decoder for x [B, C, H, W] at
        time ``t``, or at one for each image; what comes after them is not computed.

        z [B, D] of a network whose every block reads it (Diff-AE), ``labels`` int64 [B] or [1] of a class-conditional
        one.
        """
        self.check_field(z, None, labels)
        times = [t] if isinstance(t, int) else t
        z, labels = (None if v is None else v.to(self.device) for v in (z, labels))
        with self.precision():
            levels = self._levels(x.to(self.device), times, z, labels)
            maps = Maps.of(map(separate, itertools.islice(levels, outputs + 1)))
        self.count_evaluations(**{"trunk": len(x), f"{COUNTER}{outputs}": len(x)})
        return maps

    def _levels(self, x: Tensor, times: Sequence[int], z: Tensor | None, labels: Tensor | None) -> Iterator[Tensor]:
        """Maps of the middle block and of the output blocks, each computed when it is asked for."""
        t = torch.tensor(times, dtype=torch.int64, device=self.device)
        return self.unet.levels(self.unet.trunk(x, t.expand(len(x)), labels, z))

    def latent_field(self) -> Evaluate:
        """The latent DPM as a field on z."""
        denoiser = self.model.latent_denoiser

        def evaluate(z: Tensor, t: int, use_gradient: bool) -> tuple[Tensor, None]:
            with torch.inference_mode(), self.precision():
                t_batch = torch.full((len(z),), t, dtype=torch.int64, device=self.device)
                self.count_evaluations(latent=len(z))
                return denoiser(z, t_batch).float(), None

        return evaluate

    def describe(self) -> dict[str, object]:
        """What ran, for reports: the plan, and where it has choices, what it chose."""
        return {"plan": self.name, "reuse": str(self.reuse), **float8.describe(self.unet)}

    def equivalents(self) -> float:
        """``evaluations`` in evaluations of the whole network (trunk, eps-decoder and one G-decoder) of equally many
        multiplications, the encoder and the latent DPM left out; in images."""
        return equivalents(self.model, self.counts(), self.outer)

    @property
    def outer(self) -> int:
        """How many skips are of the outer part of the networks, where one is evaluated alone."""
        return self.reuse.outer or self.unet.config.num_residual_blocks_of_a_block + 1

    def free_bytes(self) -> int:
        """What is free on its device."""
        return available_memory(self.device)

    def awaited_bytes(self) -> int:
        """What the first evaluation takes to stay: weights that are laid out then."""
        return 0

    def check_memory(self, batch: int) -> None:
        """UserError when ``batch`` images cannot fit what is free on the device: a kernel would be killed for it."""
        per_image = activation_bytes(self.model.config.image_size, self.model.config.unet, self.dtype)
        free = max(0, self.free_bytes() - self.awaited_bytes())
        if batch * per_image > free:
            raise UserError(
                f"{batch} images at once need about {batch * per_image >> 20} MiB and {free >> 20} MiB are free on "
                f"{self.device}; use a batch size of at most {max(1, int(free // per_image))}"
            )

    def batch_size(self) -> int:
        """Images per batch that fit the device comfortably and keep it busy."""
        per_image = activation_bytes(self.model.config.image_size, self.model.config.unet, self.dtype)
        fitting = int((self.free_bytes() - self.awaited_bytes()) * 0.5 // per_image)
        if fitting < 1:
            raise UserError(
                f"one {self.model.config.image_size}-pixel image needs about {per_image >> 20} MiB on "
                f"{self.device}, more than is free; use another --device or a smaller model"
            )
        # Beyond these sizes throughput no longer grows, while the wait for the first result does.
        preferred = 256 if self.device.type == "cuda" else 16
        return max(1, min(fitting, preferred))


def activation_bytes(image_size: int, unet: UNetConfig, dtype: torch.dtype) -> int:
    """What one image needs while both decoders run: skips, joined maps, one block's maps, float32 copies.

    Measured for CelebA-64 in float32 on the CPU: 41 MiB an image for the modules, 28 for the fused plan; this says 41.
    """
    elements = 0
    for level, width in enumerate(unet.widths):
        pixels = (image_size >> level) ** 2
        blocks = unet.num_residual_blocks_of_a_block + 1
        elements += width * pixels * (blocks + 2)
    widest = max(width * (image_size >> i) ** 2 for i, width in enumerate(unet.widths))
    return (3 * elements + 12 * widest) * max(4, torch.empty((), dtype=dtype).element_size())
