"""The modules that are traced into graphs: the model by the engine's exact rewrites, in plain torch operations.

Time tables are constants, every adaptive norm is one affine, all projections of z are one graph of their own that runs
once per image, and the DDIM update is part of the step. No custom operator is used, so none can leak into a graph.
Networks compute in ``dtype``; norms, SiLU, softmax, tables, conditioning, state and update are float32 always.

The engine's own blocks can be traced with other norms and convolutions, but give a fifth more nodes and run 7% slower
under ONNX Runtime: a slice of the affine for every norm and channels-last attention are free in PyTorch only.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..engine.rewrites import Affine, AffineTable, resblocks, time_embeddings
from ..kernels import ddim_coefficients
from ..models import PDAE, Autoencoder, DiffAE, Prior, unet_of
from ..models.layers import AttentionBlock, HalfBlock, ResBlock, Stage
from ..models.unet import PDAEDecoder, UNet
from ..schedule import Schedule, Trajectory

NORMS = ("group", "instance")


class Norm(nn.Module):
    """float32 GN(x) * multiplier + addend; x [N, C, H, W] of any dtype.

    The affine is [C], or [N, C] when it differs between images. ``form`` "group" is one GroupNormalization node;
    "instance" is InstanceNormalization over [N, groups, *], which some runtimes compute faster and, where the mean is
    far from zero, more precisely.
    """

    def __init__(self, layer: nn.GroupNorm, form: str) -> None:
        super().__init__()
        self.form, self.groups, self.eps = form, layer.num_groups, layer.eps
        channels = layer.num_channels
        self.register_buffer("ones", torch.ones(channels), persistent=False)
        self.register_buffer("zeros", torch.zeros(channels), persistent=False)

    def forward(self, x: Tensor, multiplier: Tensor, addend: Tensor) -> Tensor:
        x = x.float()
        if self.form == "group":
            if multiplier.ndim == 1:
                return F.group_norm(x, self.groups, multiplier, addend, self.eps)
            normal = F.group_norm(x, self.groups, self.ones, self.zeros, self.eps)
        else:
            normal = F.instance_norm(x.reshape(x.shape[0], self.groups, -1), eps=self.eps).reshape(x.shape)
        return normal * multiplier[..., None, None] + addend[..., None, None]


class FixedNorm(Norm):
    """A Norm whose affine is the layer's own."""

    def __init__(self, layer: nn.GroupNorm, form: str) -> None:
        super().__init__(layer, form)
        self.weight = nn.Parameter(layer.weight.detach().float(), requires_grad=False)
        self.bias = nn.Parameter(layer.bias.detach().float(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, self.weight, self.bias)


def as_dtype(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of ``layer`` with its weights in ``dtype``."""
    return copy.deepcopy(layer).to(dtype).requires_grad_(False)


class TracedResidual(nn.Module):
    """One ResBlock whose adaptive norm gets its affine from outside."""

    def __init__(self, block: ResBlock, dtype: torch.dtype, form: str) -> None:
        super().__init__()
        self.dtype, self.resample, self.divisor = dtype, block._resample, block.divisor
        self.norm_in = FixedNorm(block.in_layers[0], form)
        self.conv_in = as_dtype(block.in_layers[2], dtype)
        self.norm_out = Norm(block.out_layers[0], form)
        self.conv_out = as_dtype(block.out_layers[3], dtype)
        self.skip = as_dtype(block.skip_connection, dtype)

    def forward(self, x: Tensor, affine: Affine) -> Tensor:
        h = F.silu(self.norm_in(x)).to(self.dtype)
        h = self.conv_in(self.resample(h))
        if affine.offset is not None:
            h = h.float() + affine.offset[..., None, None]
        h = self.conv_out(F.silu(self.norm_out(h, affine.multiplier, affine.addend)).to(self.dtype))
        out = self.skip(self.resample(x)) + h
        return out if self.divisor == 1 else out / self.divisor


class TracedAttention(nn.Module):
    """The attention block with its projections as 1x1 convolutions and explicit products.

    Explicit because opset 23's Attention is refused by TensorRT for RTX, and attention is a few per cent of the work.
    """

    def __init__(self, block: AttentionBlock, dtype: torch.dtype, form: str) -> None:
        super().__init__()
        self.dtype, self.heads, self.split_heads, self.divisor = dtype, block.heads, block.split_heads, block.divisor
        self.norm = traced(block.norm, dtype, form)
        self.qkv, self.proj = (self._convolution(layer, dtype) for layer in (block.qkv, block.proj_out))

    @staticmethod
    def _convolution(layer: nn.Conv1d, dtype: torch.dtype) -> nn.Conv2d:
        convolution = nn.Conv2d(layer.in_channels, layer.out_channels, 1)
        convolution.weight.data = layer.weight.detach()[..., None].clone()
        convolution.bias.data = layer.bias.detach().clone()
        return convolution.to(dtype).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        rows = self.qkv(self.norm(x).to(self.dtype)).reshape(B, 3 * C, H * W)
        q, k, v = self.split_heads(rows)
        logits = (q * (C // self.heads) ** -0.5) @ k.transpose(-1, -2)
        h = logits.float().softmax(-1).to(self.dtype) @ v
        out = x + self.proj(h.transpose(-1, -2).reshape(B, C, H, W))
        return out if self.divisor == 1 else out / self.divisor


class TracedHalf(nn.Module):
    """One block of Diff-AE's encoder."""

    def __init__(self, block: HalfBlock, dtype: torch.dtype, form: str) -> None:
        super().__init__()
        self.dtype, self.pool, self.divisor = dtype, block.pool, block.divisor
        self.norm = FixedNorm(block.in_layers[0], form)
        self.conv, self.skip = as_dtype(block.in_layers[2], dtype), as_dtype(block.skip_connection, dtype)

    def forward(self, x: Tensor) -> Tensor:
        out = self.skip(self.pool(x)) + self.conv(self.pool(F.silu(self.norm(x)).to(self.dtype)))
        return out if self.divisor == 1 else out / self.divisor


def traced(layer: nn.Module, dtype: torch.dtype, form: str) -> nn.Module:
    """What stands for ``layer`` of a network in ``dtype``."""
    if isinstance(layer, ResBlock):
        return TracedResidual(layer, dtype, form)
    if isinstance(layer, HalfBlock):
        return TracedHalf(layer, dtype, form)
    if isinstance(layer, AttentionBlock):
        return TracedAttention(layer, dtype, form)
    return FixedNorm(layer, form) if isinstance(layer, nn.GroupNorm) else as_dtype(layer, dtype)


class TracedStages(nn.Module):
    """A run of stages (a trunk, or a middle block with its output blocks); affines come in the order of its blocks."""

    def __init__(self, stages: Iterable[Stage], dtype: torch.dtype, form: str) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.ModuleList(traced(layer, dtype, form) for layer in stage) for stage in stages)

    def run(self, index: int, x: Tensor, affines: list[Affine]) -> Tensor:
        """Stage ``index``; takes the affines it needs from the front of ``affines``."""
        for layer in self.stages[index]:
            x = layer(x, affines.pop(0)) if isinstance(layer, TracedResidual) else layer(x)
        return x


class TracedDecoder(TracedStages):
    """Middle block, output blocks and head of one decoder; only the channels that are used are computed."""

    def __init__(
        self, middle: Stage, blocks: nn.ModuleList, head: nn.Sequential, channels: int, dtype: torch.dtype, form: str
    ) -> None:
        super().__init__([middle, *blocks], dtype, form)
        self.norm = FixedNorm(head[0], form)
        self.head = as_dtype(head[2], dtype)
        # A learned variance, if the prior has one, is dropped here instead of after its computation.
        self.head.weight = nn.Parameter(self.head.weight[:channels].clone(), requires_grad=False)
        self.head.bias = nn.Parameter(self.head.bias[:channels].clone(), requires_grad=False)

    def forward(self, skips: list[Tensor], affines: list[Affine]) -> Tensor:
        h = self.run(0, skips[-1], affines)
        for i, skip in enumerate(reversed(skips), start=1):
            h = self.run(i, torch.cat([h, skip], dim=1), affines)
        return self.head(F.silu(self.norm(h)).to(self.head.weight.dtype)).float()


def _tables(unet: UNet) -> list[AffineTable]:
    """Those of the trunk, of the eps-decoder and, of a PDAE, of the G-decoder."""
    stages = [[*unet.input_blocks], [unet.middle_block, *unet.output_blocks]]
    if isinstance(unet, PDAEDecoder):
        stages.append([unet.shift_middle_block, *unet.shift_output_blocks])
    return [AffineTable([b for stage in part for b in resblocks(stage)]) for part in stages]


def _conditioned(unet: UNet) -> list[AffineTable]:
    """Those of the norms that read z."""
    return [table for table in _tables(unet) if table.z is not None]


class TracedNetworks(nn.Module):
    """Trunk, eps-decoder and (of a PDAE) G-decoder, with everything of theirs that does not depend on a schedule.

    A class-conditional network is that of one ``label``.
    """

    def __init__(self, model: PDAE | DiffAE | Prior, dtype: torch.dtype, form: str, label: int | None = None) -> None:
        super().__init__()
        unet = unet_of(model)
        self.label = None if label is None else torch.tensor([label])
        unet.check_labels(self.label)
        channels = unet.config.input_channel
        self.unet, self.dtype, self.tables = [unet], dtype, _tables(unet)
        self.trunk = TracedStages(unet.input_blocks, dtype, form)
        self.eps = TracedDecoder(unet.middle_block, unet.output_blocks, unet.out, channels, dtype, form)
        self.gradient = None
        if isinstance(unet, PDAEDecoder):
            blocks = unet.shift_middle_block, unet.shift_output_blocks, unet.shift_out
            self.gradient = TracedDecoder(*blocks, channels, dtype, form)

    def rows(self, times: list[int]) -> list[tuple[Tensor, ...]]:
        """What the norms of the two or three parts need of ``times``, each [S, sum C]; see AffineTable.at_times."""
        emb = time_embeddings(self.unet[0], torch.tensor(times), self.label, torch.float64)
        return [table.at_times(emb) for table in self.tables]


class StepGraph(nn.Module):
    """One DDIM step (Algorithm 3; upward: the inversion of section 3.2) of a PDAE, a Diff-AE or a prior alone.

    x [N, C, H, W], conditioning [N, 2, M] (not for a prior), step int64 [1] -> x_next [N, C, H, W], all float32.
    ``networks`` may be shared by several steps.
    """

    def __init__(self, networks: TracedNetworks, trajectory: Trajectory) -> None:
        super().__init__()
        self.networks, unet = networks, networks.unet[0]
        times = [step.t for step in trajectory]
        values = [values for part in networks.rows(times) for values in part]
        self.widths = [v.shape[1] for v in values]
        self.widths_z = [table.width for table in networks.tables if table.z is not None]
        self.register_buffer("rows", torch.cat(values, dim=1).detach(), persistent=False)
        # Of the norms that time does not scale.
        for i, table in enumerate(networks.tables):
            if not table.scale_shift:
                self.register_buffer(f"multiplier{i}", table.weight.detach(), persistent=False)
                self.register_buffer(f"addend{i}", table.bias.detach(), persistent=False)
        coefficients = ddim_coefficients([s.alpha_bar for s in trajectory], [s.alpha_bar_next for s in trajectory])
        self.register_buffer("coefficients", coefficients[..., None, None, None], persistent=False)
        self.converts, self.centres = unet.to_eps is not None, unet.config.center_input_sample
        if self.converts:
            factors = torch.from_numpy(unet.to_eps[times]).float()[..., None, None, None]
            self.register_buffer("to_eps", factors, persistent=False)

    def _row(self, table: Tensor, step: Tensor) -> Tensor:
        return table.index_select(0, step)[0]

    def _affines(self, conditioning: Tensor | None, step: Tensor) -> list[list[Affine]]:
        """Those of every block of every part."""
        values = iter(self._row(self.rows, step).split(self.widths))
        codes = iter(() if conditioning is None else conditioning.split(self.widths_z, dim=2))
        found = []
        for i, table in enumerate(self.networks.tables):
            offset = None
            if table.scale_shift:
                multiplier, addend = next(values), next(values)
            else:
                multiplier, addend, offset = getattr(self, f"multiplier{i}"), getattr(self, f"addend{i}"), next(values)
            if table.z is not None:
                # Time first, then z: (1 + z_s) (multiplier h + addend) + z_b.
                scale, shift = next(codes).unbind(1)
                multiplier, addend = scale * multiplier, scale * addend + shift
            wide = [v for v in (multiplier, addend, offset) if v is not None]
            widths = [columns.stop - columns.start for columns in table.columns]
            found.append([Affine(*block) for block in zip(*(v.split(widths, dim=-1) for v in wide), strict=True)])
        return found

    def forward(self, x: Tensor, conditioning: Tensor | None, step: Tensor) -> Tensor:
        networks, affines = self.networks, self._affines(conditioning, step)
        h, skips = (2 * x - 1 if self.centres else x).to(networks.dtype), []
        for i in range(len(networks.trunk.stages)):
            h = networks.trunk.run(i, h, affines[0])
            skips.append(h)
        eps = networks.eps(skips, affines[1])
        if self.converts:
            of_x, of_out = self._row(self.to_eps, step).unbind(0)
            eps = of_x * x + of_out * eps
        inverse_root, ratio, shift, inverse_ratio, root_next, noise_next = self._row(self.coefficients, step).unbind(0)
        if networks.gradient is not None:
            eps = eps - shift * networks.gradient(skips, affines[2])
        scaled = x * inverse_root
        x0 = (scaled - ratio * eps).clamp(-1, 1)
        return root_next * x0 + noise_next * ((scaled - x0) * inverse_ratio)


class PriorStepGraph(StepGraph):
    """The same without z: x, step -> x_next."""

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        return super().forward(x, None, step)


class ConditioningGraph(nn.Module):
    """z [N, D] -> conditioning [N, 2, M]: 1 + z_s and z_b of every norm that reads z, float32 in every export."""

    def __init__(self, model: PDAE | DiffAE) -> None:
        super().__init__()
        unet = unet_of(model)
        label = unet.label_emb if isinstance(unet, PDAEDecoder) else nn.Identity()
        self.label, tables = as_dtype(label, torch.float32), _conditioned(unet)
        self.width = sum(table.width for table in tables)
        # Rows of shifts are 0 where z only scales.
        rows = [[v if len(v) > t.width else torch.cat([v, torch.zeros_like(v)]) for v in t.z] for t in tables]
        # All scales, then all shifts; the 1 of 1 + z_s joins the bias.
        weight, bias = (torch.cat([part[i].chunk(2)[half] for half in (0, 1) for part in rows]) for i in (0, 1))
        bias = torch.cat([bias[: self.width] + 1, bias[self.width :]])
        self.weight, self.bias = (nn.Parameter(v, requires_grad=False) for v in (weight, bias))

    def forward(self, z: Tensor) -> Tensor:
        return F.linear(F.silu(self.label(z)), self.weight, self.bias).reshape(-1, 2, self.width)


class EncoderGraph(nn.Module):
    """x0 [N, C, H, W] -> z [N, D]."""

    def __init__(self, model: PDAE | DiffAE, dtype: torch.dtype, form: str) -> None:
        super().__init__()
        self.dtype, encoder = dtype, model.encoder
        if isinstance(model, DiffAE):
            layers = [*itertools.chain(*encoder.input_blocks, encoder.middle_block, encoder.out), nn.Flatten()]
        else:
            layers = encoder.encoder
        self.layers = nn.ModuleList(traced(layer, dtype, form) for layer in layers)

    def forward(self, x0: Tensor) -> Tensor:
        h = x0.to(self.dtype)
        for layer in self.layers:
            h = layer(h)
            if isinstance(layer, nn.SiLU):
                h = h.to(self.dtype)
        return h.float()


class FeatureGraph(nn.Module):
    """x [N, C, H, W], t int64 [N] and of a Diff-AE conditioning [N, 2, M] -> the maps of the middle block and of the
    first ``outputs`` output blocks, float32. Any time may be asked for, so the time's tables are computed inside."""

    def __init__(
        self, model: PDAE | DiffAE | Prior, outputs: int, dtype: torch.dtype, form: str, label: int | None = None
    ) -> None:
        super().__init__()
        unet = unet_of(model)
        self.unet, self.dtype, self.centres = [unet], dtype, unet.config.center_input_sample
        self.label = None if label is None else torch.tensor([label])
        unet.check_labels(self.label)
        parts = [list(unet.input_blocks), [unet.middle_block, *unet.output_blocks[:outputs]]]
        self.parts = nn.ModuleList(TracedStages(part, dtype, form) for part in parts)
        blocks = [[block for stage in part for block in resblocks(stage)] for part in parts]
        self.tables = [AffineTable(part) for part in blocks if part]
        # Conditioning has the columns of all norms that read z: those of the trunk, then the decoder's, first to last.
        self.reads_z = unet.z_width is not None

    def _affines(self, t: Tensor, conditioning: Tensor | None) -> list[list[Affine]]:
        emb, first, found = time_embeddings(self.unet[0], t, self.label), 0, []
        for table in self.tables:
            affine = table.affine(table.at_times(emb))
            if self.reads_z:
                scale, shift = conditioning[:, :, first : first + table.width].unbind(1)
                affine = Affine(scale * affine.multiplier, scale * affine.addend + shift, affine.offset)
                first += table.width
            found.append([affine.columns(columns) for columns in table.columns])
        return [*found, []] if len(found) == 1 else found

    def forward(self, x: Tensor, t: Tensor, conditioning: Tensor | None = None) -> tuple[Tensor, ...]:
        (of_trunk, of_decoder), (trunk, decoder) = self._affines(t, conditioning), self.parts
        h, skips, maps = (2 * x - 1 if self.centres else x).to(self.dtype), [], []
        for i in range(len(trunk.stages)):
            h = trunk.run(i, h, of_trunk)
            skips.append(h)
        for i in range(len(decoder.stages)):
            h = decoder.run(i, torch.cat([h, skips.pop()], dim=1) if i else h, of_decoder)
            maps.append(h.float())
        return tuple(maps)


def build_graphs(
    model: PDAE | DiffAE | Prior,
    schedule: Schedule,
    steps: int,
    encode_steps: int,
    dtype: torch.dtype,
    form: str,
    label: int | None = None,
    features: int | None = None,
) -> dict[str, nn.Module]:
    """The modules of an export by the names of their graphs (see manifest.GRAPHS); weights are copied.

    A class-conditional network is exported for one ``label``; UserError without. ``features``: also the maps of the
    middle block and of so many output blocks.
    """
    with torch.no_grad():
        graphs: dict[str, nn.Module] = {}
        if isinstance(model, Autoencoder):
            graphs["encoder"] = EncoderGraph(model, dtype, form)
            graphs["conditioning"] = ConditioningGraph(model)
        step = StepGraph if isinstance(model, Autoencoder) else PriorStepGraph
        networks = TracedNetworks(model, dtype, form, label)
        graphs["decode_step"] = step(networks, schedule.decoding(steps))
        graphs["invert_step"] = step(networks, schedule.inversion(encode_steps))
        if features is not None:
            graphs["features"] = FeatureGraph(model, features, dtype, form, label)
    return {name: graph.eval() for name, graph in graphs.items()}


def conditioning_width(model: PDAE | DiffAE | Prior) -> int | None:
    """M, the columns of conditioning; None for a prior."""
    tables = _conditioned(unet_of(model))
    return sum(table.width for table in tables) if tables else None
