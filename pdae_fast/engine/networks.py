"""The fused networks: prepared weights and tables, and one evaluation or one DDIM step with them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import kernels
from ..models import PDAE, Autoencoder, Prior, unet_of
from ..models.layers import AttentionBlock
from ..models.unet import PDAEDecoder
from . import graphs, rewrites
from .attention import resolve_attention
from .blocks import FusedDecoder, FusedEncoder, FusedStages, SharedProducts, make_skip, repeat
from .convolution import default_tile, forget, native_bytes, native_layers, upsampled_layers
from .norms import Skip, bare, common_part
from .options import Rewrites
from .plan import Plan
from .reuse import Kept, Workload
from .rewrites import Affine
from .stacked import CannotStack, StackedDecoders

# Pixels of a batch up to which the two decoders leave most of a large GPU idle when they run one after the other; of
# stacked ones, the convolutions.
PARALLEL_PIXELS = 2**16


class Conditioning(NamedTuple):
    """z's projections for every norm that reads z, float32 [K * B, W]; ``weights`` [K, B, 1, 1, 1] mix K codes."""

    scale: Tensor
    shift: Tensor
    weights: Tensor | None


class Networks(Plan):
    """Time tables, z projections once per image, one affine per adaptive norm, and the other :class:`Rewrites`: what a
    :class:`FusedPlan` evaluates."""

    def __init__(
        self,
        model: PDAE | Prior,
        device: torch.device,
        dtype: torch.dtype,
        options: Rewrites | None = None,
        attention: str = "auto",
        copy: bool = True,
        consume: bool = False,
    ) -> None:
        wanted = options or Rewrites.for_device(device)
        if attention != "auto":
            wanted = dataclasses.replace(wanted, native_attention=False)
        self._choices = {"options": wanted, "attention": attention}
        self.device, self.options = device, wanted.usable_on(device, dtype)
        self.native = wanted.native_notes(device, dtype)
        # Shared by all that reuse these weights, and cleared when they have been laid out.
        self._awaited: list[int] = []
        self._buffers = kernels.Buffers() if device.type == "cpu" else None
        layers = self._choose_tiles(model, dtype) if self.options.native_convolutions else []
        super().__init__(model, device, dtype, [layer.weight for layer in layers], copy and not consume)
        options, unet = self.options, self.unet
        shape = self._attention_shape()
        self.attention, attend = resolve_attention(attention, device, dtype, shape, options.native_attention)
        with torch.inference_mode():
            part = common_part(unet) if options.shared_statistics else 0
            self.trunk = FusedStages(unet.input_blocks, options, attend, part)
            self.eps = FusedDecoder(unet.middle_block, unet.output_blocks, unet.out, options, attend, part)
            self.gradient = (
                FusedDecoder(unet.shift_middle_block, unet.shift_output_blocks, unet.shift_out, options, attend, part)
                if isinstance(unet, PDAEDecoder)
                else None
            )
            # On a GPU it runs once for many steps, by the modules.
            fused_encoder = device.type == "cpu" and isinstance(model, Autoencoder)
            self.encoder = FusedEncoder(self.model.encoder, options, attend) if fused_encoder else None
        if consume and options.native_convolutions:
            # Each is held by the convolution alone that transforms it, and freed when it has. The encoder's are few and
            # needed: they tell whose the codes are.
            forget(native_layers(unet_of(model)) + native_layers(unet))
        shared = options.shared_products and self.gradient is not None
        self._products = SharedProducts((self.eps, self.gradient)) if shared else None
        self._stacked = None
        if options.stacked_decoders and self.gradient is not None:
            try:
                with torch.inference_mode():
                    self._stacked = StackedDecoders((self.eps, self.gradient))
            except CannotStack:
                self.options = dataclasses.replace(options, stacked_decoders=False)
        self._parts = [part for part in (self.trunk, self.eps, self.gradient) if part is not None]
        # Columns of a row of the tables: those of every part, then the two factors that make eps of the output.
        self._widths = [width for part in self._parts for width in part.table.row_widths]
        self._widths += [] if unet.to_eps is None else [1, 1]
        self._times: dict[int, Tensor] = {}
        self._side = graphs.new_stream(device) if options.parallel_decoders else None
        # Of the captured steps: the memory and stream of all, where they are not every trajectory's own; and why there
        # are none.
        self.graph_pool: graphs.Pool | None = None
        self.capture_failure: str | None = None

    def _choose_tiles(self, model: PDAE | Prior, dtype: torch.dtype) -> list[nn.Conv2d]:
        """The layers that run natively, or none of them where not even the weights of small tiles fit what is free."""
        free, layers, upsampled = self.free_bytes(), native_layers(model), upsampled_layers(model)
        others = [layer for layer in layers if layer not in upsampled]
        for small in (self.options.small_tiles, True):
            tile = 2 if small else self.options.tile or default_tile(dtype)
            own = 2 if small else max(tile, kernels.UPSAMPLED)  # at most, as all of `native_bytes`
            size = native_bytes(others, dtype, tile) + native_bytes(upsampled, dtype, own)
            if size <= free / 2:
                self._awaited.append(size)
                self.options = dataclasses.replace(self.options, small_tiles=small)
                return layers
        self.options = dataclasses.replace(self.options, native_convolutions=False)
        self.native["native_convolutions"] = f"no: weights of {size >> 20} MiB, and {free >> 20} MiB are free"
        return []

    def _attention_shape(self) -> tuple[int, int, int, int] | None:
        """q of the largest attention map, one image: [1, N, heads, head_dim]."""
        config, blocks = self.unet.config, [m for m in self.unet.modules() if isinstance(m, AttentionBlock)]
        if not blocks:
            return None
        rates = [r for r in config.attention_resolutions if r < 2**config.levels]
        side = self.model.config.image_size // min([*rates, 2 ** (config.levels - 1)])
        block = max(blocks, key=lambda b: b.qkv.in_channels)
        return 1, side * side, block.heads, block.qkv.in_channels // block.heads

    def choices(self) -> dict[str, Any]:
        """As :meth:`Plan.choices`."""
        return self._choices

    @contextlib.contextmanager
    def precision(self) -> Iterator[None]:
        """As :meth:`Plan.precision`, with maps in memory of the plan's own."""
        with super().precision(), contextlib.nullcontext() if self._buffers is None else self._buffers.used():
            yield

    def free_bytes(self) -> int:
        """As :meth:`Plan.free_bytes`, with what is held and lent to nobody."""
        return super().free_bytes() + (0 if self._buffers is None else self._buffers.idle())

    def awaited_bytes(self) -> int:
        """As :meth:`Plan.awaited_bytes`."""
        return sum(self._awaited)

    # -- tables ----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def prepare(self, times: Iterable[int]) -> None:
        """Compute the time tables of a schedule; other times are added when they occur."""
        missing = sorted({int(t) for t in times if int(t) not in self._times})
        # Of a class-conditional network there is a row for every label too: they are made when they are needed.
        if missing and self.unet.class_emb is None:
            self._times.update(zip(missing, self._rows(missing).split(1), strict=True))

    def _rows(self, times: list[int], labels: Tensor | None = None) -> Tensor:
        t = torch.tensor(times, device=self.device)
        # In double precision, rounded once: a product of one row is rounded otherwise than one of many, and what a
        # time gives may not depend on which others were asked for before it or with it.
        emb = rewrites.time_embeddings(self.unet, t, labels, torch.float64)
        columns = [values for part in self._parts for values in part.table.at_times(emb)]
        if self.unet.to_eps is not None:
            factors = torch.from_numpy(self.unet.to_eps[times]).to(self.device, torch.float32)
            columns.append(factors.expand(len(emb), 2))
        return torch.cat(columns, dim=1)

    @torch.inference_mode()
    def time_rows(self, times: Iterable[int], labels: Tensor | None = None) -> Tensor:
        """float32 [S, W]: for every time what the norms of trunk, eps-decoder and G-decoder need of it, in a row; or
        [B, W] for one time, or one per image, and labels int64 [B]."""
        times = [int(t) for t in times]
        if labels is not None:
            return self._rows(times, labels)
        self.prepare(times)
        return torch.cat([self._times[t] for t in times])

    def _affines(self, row: Tensor, codes: Conditioning | None) -> list[Affine]:
        columns, found = iter(row.split(self._widths, dim=1)), []
        conditioned = [part.table.width for part in self._parts if part.table.z is not None]
        of_codes = iter(()) if codes is None else zip(*(v.split(conditioned, dim=1) for v in codes[:2]), strict=True)
        for part in self._parts:
            values = [next(columns) for _ in part.table.row_widths]
            found.append(part.table.affine(values, None if part.table.z is None else next(of_codes, None)))
        return found

    @torch.inference_mode()
    def conditioning(self, z: Tensor, weights: Tensor | None = None) -> Conditioning:
        """All projections of z [B, D], or of z [K, B, D] to be mixed with weights [K, B]: once per image."""
        z = z.to(self.device).float().flatten(0, -2)
        if isinstance(self.unet, PDAEDecoder):
            label = self.unet.label_emb
            z = F.linear(z, label.weight.float(), label.bias.float())
        found = [part.table.of_codes(z) for part in self._parts if part.table.z is not None]
        scale, shift = (torch.cat(values, dim=1) for values in zip(*found, strict=True))
        if weights is None:
            return Conditioning(scale, shift, None)
        return Conditioning(scale, shift, weights.to(self.device).float()[:, :, None, None, None])

    def _encode(self, x0: Tensor) -> Tensor:
        """As :meth:`Plan._encode`."""
        if self.encoder is None:
            return super()._encode(x0)
        return self.encoder(x0.to(self.dtype).contiguous(memory_format=torch.channels_last))

    # -- the networks ----------------------------------------------------------------------------------------------

    def evaluate(
        self, x: Tensor, row: Tensor, codes: Conditioning | None, workload: Workload, kept: Kept
    ) -> tuple[Tensor, Tensor | None]:
        """(eps_hat, G) of x float32 [B, C, H, W] at the time whose table row [1, W] is given.

        ``workload`` says what is computed and what is taken from ``kept``, where this evaluation leaves what later ones
        may take over; G is None when it says "none". A G that is run needs ``codes``.
        """
        affines, run_gradient = self._affines(row, codes), workload.gradient == "run"
        skips = self._features(x, affines[0], workload, kept)
        large = len(x) * x.shape[2] * x.shape[3] > PARALLEL_PIXELS
        own, single = skips, run_gradient and codes.weights is None
        stacked = single and self._stacked is not None and self.reuse.deep == 1 and len(row) == 1
        if self._products is not None and single and not stacked:
            own, skips = self._products(skips)
        if stacked:
            affine, side = self._stacked.affine(affines[1:], len(x)), None if large else self._side
            eps, gradient = self._stacked(skips, affine, side)
            eps = self._as_eps(eps, x, row)
        elif self._side is None or not run_gradient or large:
            eps = self._decode_eps(x, row, own, affines, workload, kept)
            gradient = self._decode_gradient(skips, affines, codes, workload, kept) if run_gradient else None
        else:
            # The side stream waits for the trunk and is waited for: memory that either frees is not reused too early.
            main = torch.cuda.current_stream(self.device)
            self._side.wait_stream(main)
            with torch.cuda.stream(self._side):
                eps = self._decode_eps(x, row, own, affines, workload, kept)
            gradient = self._decode_gradient(skips, affines, codes, workload, kept)
            main.wait_stream(self._side)
        if run_gradient and self.reuse.gradient > 1:
            kept.keep("gradient", gradient)
        return eps, kept["gradient"] if workload.gradient == "kept" else gradient

    def advance(
        self,
        x: Tensor,
        row: Tensor,
        codes: Conditioning | None,
        workload: Workload,
        kept: Kept,
        coefficients: Tensor,
        index: Tensor,
        clamp: bool,
    ) -> Tensor:
        """x after the DDIM step ``index`` of the table ``coefficients``; the rest as :meth:`evaluate`."""
        eps, gradient = self.evaluate(x, row, codes, workload, kept)
        return kernels.ddim_update(x, eps, gradient, coefficients, index, clamp)

    def _features(self, x: Tensor, affine: Affine, workload: Workload, kept: Kept) -> list[Skip]:
        """What the trunk leaves for the decoders, first to last: all maps, or the outer ones."""
        if workload.features == "kept":
            return [Skip(kept[f"skip {i}"]) for i in range(len(self.trunk.stages))]
        x = 2 * x - 1 if self.unet.config.center_input_sample else x
        # In a lower precision the first convolution reads all of x.
        wide = torch.promote_types(self.dtype, torch.float32)
        h, skips = x.to(wide).contiguous(memory_format=torch.channels_last), []
        for i in range(len(self.trunk.stages) if workload.features == "all" else self.outer):
            skip = make_skip(self.trunk.run(i, h, affine), self.trunk.part)
            h = skip.x if skip.statistics is None else skip
            skips.append(skip)
            if self.reuse.trunk > 1:
                kept.keep(f"skip {i}", skip.x)
        return skips

    def _decode(
        self,
        decoder: FusedDecoder,
        name: str,
        skips: list[Skip],
        repeats: int,
        affine: Affine,
        workload: Workload,
        kept: Kept,
    ) -> Tensor:
        if self.reuse.deep == 1:
            return decoder(repeat(skips, repeats), affine)
        if workload.features == "all":
            repeated = repeat(skips, repeats)
            kept.keep(name, bare(decoder.deep(repeated, affine, self.outer)))
            return decoder.outer(kept[name], repeated[: self.outer], affine)
        return decoder.outer(kept[name], repeat(skips, repeats), affine)

    def _decode_eps(
        self, x: Tensor, row: Tensor, skips: list[Skip], affines: list[Affine], workload: Workload, kept: Kept
    ) -> Tensor:
        return self._as_eps(self._decode(self.eps, "deep eps", skips, 1, affines[1], workload, kept), x, row)

    def _as_eps(self, out: Tensor, x: Tensor, row: Tensor) -> Tensor:
        out = out[:, : self.unet.config.input_channel]
        if self.unet.to_eps is None:
            return out
        of_x, of_out = row[:, -2:, None, None, None].unbind(1)
        return of_x * x + of_out * out

    def _decode_gradient(
        self, skips: list[Skip], affines: list[Affine], codes: Conditioning, workload: Workload, kept: Kept
    ) -> Tensor:
        K = 1 if codes.weights is None else len(codes.weights)
        gradient = self._decode(self.gradient, "deep gradient", skips, K, affines[2], workload, kept)
        if codes.weights is None:
            return gradient
        return (codes.weights * gradient.float().unflatten(0, (K, -1))).sum(0)

    def _levels(self, x: Tensor, times: Sequence[int], z: Tensor | None, labels: Tensor | None) -> Iterator[Tensor]:
        """As :meth:`Plan._levels`."""
        affines = self._affines(self.time_rows(times, labels), None if z is None else self.conditioning(z))
        skips = self._features(x, affines[0], Workload("all", "none"), Kept())
        return self.eps.levels(skips, affines[1])

    def count(self, images: int, codes: Conditioning | None, workload: Workload) -> None:
        """Enter one evaluation of ``images`` images into ``evaluations``; outer parts have counters of their own."""
        self._awaited.clear()
        prefix, counts = "outer_" if workload.features == "outer" else "", {"eps": images}
        if workload.features != "kept":
            counts["trunk"] = images
        if workload.gradient == "run":
            K = 1 if codes.weights is None else len(codes.weights)
            counts["gradient"] = images * K
        self.count_evaluations(**{prefix + name: n for name, n in counts.items()})
