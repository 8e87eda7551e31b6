"""The fast plan: the same function as the model, with everything taken out that does not change the result."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import kernels
from ..config import NORM_GROUPS
from ..models import PDAE, Prior
from ..models.layers import AttentionBlock
from ..models.unet import PDAEDecoder
from ..schedule import Trajectory
from . import rewrites
from .attention import resolve_attention
from .blocks import Decoder, Part, leave, repeat
from .device import last_level_cache
from .norms import Affine, Skip
from .options import Rewrites
from .plan import Plan
from .reuse import Kept, Reuse, Turn, Turns
from .trajectory import Conditioning, DeviceTrajectory

# Pixels of a batch up to which the two decoders leave most of a large GPU idle when they run one after the other.
PARALLEL_PIXELS = 2**16
KEPT_TRAJECTORIES = 8


class FusedPlan(Plan):
    """Time tables, z projections once per image, one affine per adaptive norm, and the other :class:`Rewrites`."""

    name = "fused"
    tunes = True
    can_keep = True

    def __init__(
        self,
        model: PDAE | Prior,
        device: torch.device,
        dtype: torch.dtype,
        options: Rewrites | None = None,
        attention: str = "auto",
    ) -> None:
        super().__init__(model, device, dtype)
        wanted = options or Rewrites.for_device(device)
        self.options = options = wanted.usable_on(device, dtype)
        self.native = wanted.native_notes(device, dtype)
        unet = self.unet
        self.attention, attend = resolve_attention(attention, device, dtype, self._attention_shape())
        with torch.inference_mode():
            self.trunk = Part(unet.input_blocks, options, attend)
            self.eps = Decoder(unet.middle_block, unet.output_blocks, unet.out, options, attend)
            self.gradient = (
                Decoder(unet.shift_middle_block, unet.shift_output_blocks, unet.shift_out, options, attend)
                if isinstance(unet, PDAEDecoder)
                else None
            )
        self._parts = [part for part in (self.trunk, self.eps, self.gradient) if part is not None]
        self._cache = last_level_cache(device)
        self._times: dict[int, Tensor] = {}
        self._side = torch.cuda.Stream(device) if options.parallel_decoders else None
        self._trajectories: OrderedDict[tuple, DeviceTrajectory] = OrderedDict()
        self.capture_failure: str | None = None
        self.graph_pool = None

    def _attention_shape(self) -> tuple[int, int, int, int] | None:
        """q of the largest attention map, one image: [1, N, heads, head_dim]."""
        config, blocks = self.unet.config, [m for m in self.unet.modules() if isinstance(m, AttentionBlock)]
        if not blocks:
            return None
        rates = [r for r in config.attention_resolutions if r < 2 ** len(config.channel_multiplier)]
        side = self.model.config.image_size // min([*rates, 2 ** (len(config.channel_multiplier) - 1)])
        block = max(blocks, key=lambda b: b.norm.num_channels)
        return 1, side * side, block.heads, block.norm.num_channels // block.heads

    def reusing(self, reuse: Reuse) -> FusedPlan:
        """As :meth:`Plan.reusing`."""
        plan = super().reusing(reuse)
        plan._trajectories = OrderedDict()
        return plan

    # -- tables ----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def prepare(self, times: Iterable[int]) -> None:
        """Compute the time tables of a schedule, one GEMM for each part; other times are added when they occur."""
        missing = sorted({int(t) for t in times} - self._times.keys())
        if not missing:
            return
        emb = rewrites.time_embeddings(self.unet, torch.tensor(missing, device=self.device))
        rows = torch.cat([torch.cat(part.table.at_times(emb), dim=1) for part in self._parts], dim=1)
        self._times.update(zip(missing, rows.split(1), strict=True))

    def time_rows(self, times: Iterable[int]) -> Tensor:
        """float32 [S, W]: for every time the multipliers and addends of trunk, eps-decoder and G-decoder in a row."""
        times = [int(t) for t in times]
        self.prepare(times)
        return torch.cat([self._times[t] for t in times])

    def _affines(self, row: Tensor) -> list[Affine]:
        widths = [part.table.width for part in self._parts for _ in (0, 1)]
        columns = row.split(widths, dim=1)
        return list(zip(columns[::2], columns[1::2], strict=True))

    @torch.inference_mode()
    def conditioning(self, z: Tensor, weights: Tensor | None = None) -> Conditioning:
        """All projections of z [B, D], or of z [K, B, D] to be mixed with weights [K, B]: once per image."""
        z = z.to(self.device).float()
        label = self.unet.label_emb
        emb_z = F.linear(z.reshape(-1, z.shape[-1]), label.weight.float(), label.bias.float())
        scale, shift = self.gradient.table.of_codes(emb_z)
        if weights is None:
            return Conditioning(scale, shift, None)
        return Conditioning(scale, shift, weights.to(self.device).float()[:, :, None, None, None])

    # -- the networks ----------------------------------------------------------------------------------------------

    def evaluate(
        self, x: Tensor, row: Tensor, codes: Conditioning | None, turn: Turn, kept: Kept, raw: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """(eps_hat, G) of x float32 [B, C, H, W] at the time whose table row [1, W] is given.

        ``turn`` says what is computed and what is taken from ``kept``, where this evaluation leaves what later ones
        may take over; G is None when it says "none". A G that is run needs ``codes``. With ``raw``, the maps that the
        decoders' heads would make eps_hat and one G of.
        """
        affines, run_gradient = self._affines(row), turn.gradient == "run"
        skips = self._features(x, affines[0], turn, kept, self.options.shared_statistics and run_gradient)
        if self._side is None or not run_gradient or len(x) * x.shape[2] * x.shape[3] > PARALLEL_PIXELS:
            eps = self._decode_eps(skips, affines, turn, kept, raw)
            gradient = self._decode_gradient(skips, affines, codes, turn, kept, raw) if run_gradient else None
        else:
            # The side stream waits for the trunk and is waited for: memory that either frees is not reused too early.
            main = torch.cuda.current_stream(self.device)
            self._side.wait_stream(main)
            with torch.cuda.stream(self._side):
                eps = self._decode_eps(skips, affines, turn, kept, raw)
            gradient = self._decode_gradient(skips, affines, codes, turn, kept, raw)
            main.wait_stream(self._side)
        if run_gradient and self.reuse.gradient > 1:
            kept.keep("gradient", gradient)
        return eps, kept["gradient"] if turn.gradient == "kept" else gradient

    def advance(
        self,
        x: Tensor,
        row: Tensor,
        codes: Conditioning | None,
        turn: Turn,
        kept: Kept,
        coefficients: Tensor,
        index: Tensor,
        clamp: bool,
    ) -> Tensor:
        """x after the DDIM step ``index`` of the table ``coefficients``; the rest as :meth:`evaluate`."""
        needed = turn.gradient == "kept" or (
            turn.gradient == "run" and (codes.weights is not None or self.reuse.gradient > 1)
        )  # G itself: to be mixed, or kept for later steps
        if not self.options.fused_output or needed:
            eps, gradient = self.evaluate(x, row, codes, turn, kept)
            return kernels.ddim_update(x, eps, gradient, coefficients, index, clamp)
        h, h_gradient = self.evaluate(x, row, codes, turn, kept, raw=True)
        C = x.shape[1]
        gradient = None if h_gradient is None else self.gradient.output(h_gradient, C)
        return kernels.output_step(
            x, self.eps.output(h, C), gradient, coefficients, index, clamp, NORM_GROUPS, rewrites.EPS
        )

    def _features(self, x: Tensor, affine: Affine, turn: Turn, kept: Kept, share: bool) -> list[Skip]:
        """What the trunk leaves for the decoders, first to last: all maps, or the outer ones."""
        if turn.features == "kept":
            return [Skip(kept[f"skip {i}"]) for i in range(len(self.trunk.stages))]
        h, skips = x.to(self.dtype).contiguous(memory_format=torch.channels_last), []
        for i in range(len(self.trunk.stages) if turn.features == "all" else self.outer):
            h = self.trunk.run(i, h, affine)
            skips.append(leave(h, share, self._cache))
            if self.reuse.trunk > 1:
                kept.keep(f"skip {i}", h)
        return skips

    def _decode(
        self,
        decoder: Decoder,
        name: str,
        skips: list[Skip],
        repeats: int,
        affine: Affine,
        turn: Turn,
        kept: Kept,
        raw: bool,
    ) -> Tensor:
        if self.reuse.deep == 1:
            return decoder(repeat(skips, repeats), affine, raw)
        if turn.features == "all":
            repeated = repeat(skips, repeats)
            kept.keep(name, decoder.deep(repeated, affine, self.outer))
            return decoder.outer(kept[name], repeated[: self.outer], affine, raw)
        return decoder.outer(kept[name], repeat(skips, repeats), affine, raw)

    def _decode_eps(self, skips: list[Skip], affines: list[Affine], turn: Turn, kept: Kept, raw: bool) -> Tensor:
        eps = self._decode(self.eps, "deep eps", skips, 1, affines[1], turn, kept, raw)
        return eps if raw else eps[:, : self.unet.config.input_channel]

    def _decode_gradient(
        self, skips: list[Skip], affines: list[Affine], codes: Conditioning, turn: Turn, kept: Kept, raw: bool
    ) -> Tensor:
        multiplier, addend = affines[2]
        K = 1 if codes.weights is None else len(codes.weights)
        affine = (codes.scale * multiplier, codes.scale * addend + codes.shift)
        gradient = self._decode(self.gradient, "deep gradient", skips, K, affine, turn, kept, raw)
        if codes.weights is None:
            return gradient
        return (codes.weights * gradient.float().unflatten(0, (K, -1))).sum(0)

    def count(self, images: int, codes: Conditioning | None, turn: Turn) -> None:
        """Enter one evaluation of ``images`` images into ``evaluations``; outer parts have counters of their own."""
        prefix = "outer_" if turn.features == "outer" else ""
        if turn.features != "kept":
            self.evaluations[f"{prefix}trunk"] += images
        self.evaluations[f"{prefix}eps"] += images
        if turn.gradient == "run":
            K = 1 if codes.weights is None else len(codes.weights)
            self.evaluations[f"{prefix}gradient"] += images * K

    # -- what samplers get -----------------------------------------------------------------------------------------

    def field(self, z: Tensor | None = None, weights: Tensor | None = None) -> FusedField:
        """As :meth:`Plan.field`."""
        codes = None if z is None else self.conditioning(z, weights)
        return (DeviceField if self.options.fused_update else FusedField)(self, codes)

    def trajectory(
        self, batch: int, codes: Conditioning | None, steps: Trajectory, clamp: float | None
    ) -> DeviceTrajectory:
        """The buffers (and captured graphs) that run ``steps`` on ``batch`` images, kept for the next call.

        A ragged last batch is padded into buffers of up to four times its size rather than captured anew.
        """
        K = None if codes is None or codes.weights is None else len(codes.weights)
        kind = (codes is not None, K, clamp is not None, steps)
        fitting = [b for b, *rest in self._trajectories if tuple(rest) == kind and batch <= b <= 4 * batch]
        key = (min(fitting, default=batch), *kind)
        if key not in self._trajectories:
            self._trajectories[key] = DeviceTrajectory(self, batch, codes, steps, clamp)
            while len(self._trajectories) > KEPT_TRAJECTORIES:
                self._trajectories.popitem(last=False)
        self._trajectories.move_to_end(key)
        return self._trajectories[key]

    def describe(self) -> dict[str, object]:
        """As :meth:`Plan.describe`."""
        on = [name for name, value in vars(self.options).items() if value]
        report = {**super().describe(), "attention": self.attention, "rewrites": on}
        report |= self.native
        if self.device.type == "cuda":
            report["graphs"] = self.capture_failure or sum(len(t.graphs) for t in self._trajectories.values())
        return report


class FusedField:
    """The field of a :class:`FusedPlan`: called as field(x, t, use_gradient).

    Where the plan reuses anything, what is kept lives here: a field then carries one trajectory.
    """

    def __init__(self, plan: FusedPlan, codes: Conditioning | None) -> None:
        self.plan, self.codes = plan, codes
        self.turns, self.kept = Turns(plan.reuse), Kept()

    @torch.inference_mode()
    def __call__(self, x: Tensor, t: int, use_gradient: bool) -> tuple[Tensor, Tensor | None]:
        plan, turn = self.plan, self.turns(t, use_gradient and self.codes is not None)
        with plan.precision():
            eps, gradient = plan.evaluate(x, plan.time_rows([t]), self.codes, turn, self.kept)
        plan.count(len(x), self.codes, turn)
        return eps.float(), None if gradient is None else gradient.float()


class DeviceField(FusedField):
    """A field that carries x along whole trajectories without the host in between."""

    def integrate(
        self, x: Tensor, steps: Trajectory, clamp: float | None, progress: Callable[[], None] | None
    ) -> Tensor:
        """As sampling.integrate; ``clamp`` is 1 or None."""
        run = self.plan.trajectory(len(x), self.codes, steps, clamp)
        return run(x, self.codes, progress)
