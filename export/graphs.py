"""The modules that are traced into graphs: the model by the engine's exact rewrites, in plain torch operations.

Time tables are constants, every adaptive norm is one affine, all projections of z are one graph of their own that runs
once per image, and the DDIM update is part of the step. No custom operator is used, so none can leak into a graph.
Networks compute in ``dtype``; norms, SiLU, softmax, tables, conditioning, state and update are float32 always.

The engine's own blocks can be traced with other norms and convolutions, but give a fifth more nodes and run 7% slower
under ONNX Runtime: a slice of the affine for every norm and channels-last attention are free in PyTorch only.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import NORM_GROUPS
from ..engine.rewrites import AffineTable, resblocks, time_embeddings
from ..kernels import ddim_coefficients
from ..models import PDAE, Prior
from ..models.layers import AttentionBlock, ResBlock, Stage
from ..models.unet import PDAEDecoder, UNet
from ..schedule import Schedule, Trajectory

NORMS = ("group", "instance")


class Norm(nn.Module):
    """float32 GN(x) * multiplier + addend; x [N, C, H, W] of any dtype.

    The affine is [C], or [N, C] when it differs between images. ``form`` "group" is one GroupNormalization node;
    "instance" is InstanceNormalization over [N, groups, *], which some runtimes compute faster and, where the mean is
    far from zero, more precisely.
    """

    def __init__(self, channels: int, form: str) -> None:
        super().__init__()
        self.form = form
        self.register_buffer("ones", torch.ones(channels), persistent=False)
        self.register_buffer("zeros", torch.zeros(channels), persistent=False)

    def forward(self, x: Tensor, multiplier: Tensor, addend: Tensor) -> Tensor:
        x = x.float()
        if self.form == "group":
            if multiplier.ndim == 1:
                return F.group_norm(x, NORM_GROUPS, multiplier, addend)
            normal = F.group_norm(x, NORM_GROUPS, self.ones, self.zeros)
        else:
            normal = F.instance_norm(x.reshape(x.shape[0], NORM_GROUPS, -1)).reshape(x.shape)
        return normal * multiplier[..., None, None] + addend[..., None, None]


class FixedNorm(Norm):
    """A Norm whose affine is the layer's own."""

    def __init__(self, layer: nn.GroupNorm, form: str) -> None:
        super().__init__(layer.num_channels, form)
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
        self.dtype, self.resample = dtype, block._resample
        self.norm_in = FixedNorm(block.in_layers[0], form)
        self.conv_in = as_dtype(block.in_layers[2], dtype)
        self.norm_out = Norm(block.out_layers[0].num_channels, form)
        self.conv_out = as_dtype(block.out_layers[3], dtype)
        self.skip = as_dtype(block.skip_connection, dtype)

    def forward(self, x: Tensor, affine: tuple[Tensor, Tensor]) -> Tensor:
        h = F.silu(self.norm_in(x)).to(self.dtype)
        h = self.conv_in(self.resample(h))
        h = self.conv_out(F.silu(self.norm_out(h, *affine)).to(self.dtype))
        return self.skip(self.resample(x)) + h


class TracedAttention(nn.Module):
    """The attention block with its projections as 1x1 convolutions and explicit products.

    Explicit because opset 23's Attention is refused by TensorRT for RTX, and attention is a few per cent of the work.
    """

    def __init__(self, block: AttentionBlock, dtype: torch.dtype, form: str) -> None:
        super().__init__()
        self.dtype, self.heads, self.split_heads = dtype, block.heads, block.split_heads
        self.norm = FixedNorm(block.norm, form)
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
        return x + self.proj(h.transpose(-1, -2).reshape(B, C, H, W))


def traced(layer: nn.Module, dtype: torch.dtype, form: str) -> nn.Module:
    """What stands for ``layer`` of a network in ``dtype``."""
    if isinstance(layer, ResBlock):
        return TracedResidual(layer, dtype, form)
    if isinstance(layer, AttentionBlock):
        return TracedAttention(layer, dtype, form)
    return FixedNorm(layer, form) if isinstance(layer, nn.GroupNorm) else as_dtype(layer, dtype)


class TracedStages(nn.Module):
    """A run of stages (a trunk, or a middle block with its output blocks); affines come in the order of its blocks."""

    def __init__(self, stages: Iterable[Stage], dtype: torch.dtype, form: str) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.ModuleList(traced(layer, dtype, form) for layer in stage) for stage in stages)

    def run(self, index: int, x: Tensor, affines: list[tuple[Tensor, Tensor]]) -> Tensor:
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

    def forward(self, skips: list[Tensor], affines: list[tuple[Tensor, Tensor]]) -> Tensor:
        h = self.run(0, skips[-1], affines)
        for i, skip in enumerate(reversed(skips), start=1):
            h = self.run(i, torch.cat([h, skip], dim=1), affines)
        return self.head(F.silu(self.norm(h)).to(self.head.weight.dtype)).float()


def _tables(unet: UNet) -> tuple[AffineTable, AffineTable, AffineTable | None]:
    """Those of the trunk, of the eps-decoder and of the G-decoder."""
    stages = [[*unet.input_blocks], [unet.middle_block, *unet.output_blocks]]
    if isinstance(unet, PDAEDecoder):
        stages.append([unet.shift_middle_block, *unet.shift_output_blocks])
    tables = [AffineTable([b for stage in part for b in resblocks(stage)]) for part in stages]
    return (*tables, None) if len(tables) == 2 else tuple(tables)


def _widths(table: AffineTable) -> list[int]:
    return [columns.stop - columns.start for columns in table.columns]


class TracedNetworks(nn.Module):
    """Trunk, eps-decoder and (of a PDAE) G-decoder, with everything of theirs that does not depend on a schedule."""

    def __init__(self, model: PDAE | Prior, dtype: torch.dtype, form: str) -> None:
        super().__init__()
        unet = model.decoder if isinstance(model, PDAE) else model.unet
        channels = unet.config.input_channel
        self.unet, self.dtype, self.tables = [unet], dtype, [table for table in _tables(unet) if table is not None]
        self.trunk = TracedStages(unet.input_blocks, dtype, form)
        self.eps = TracedDecoder(unet.middle_block, unet.output_blocks, unet.out, channels, dtype, form)
        self.gradient = None
        if isinstance(unet, PDAEDecoder):
            blocks = unet.shift_middle_block, unet.shift_output_blocks, unet.shift_out
            self.gradient = TracedDecoder(*blocks, channels, dtype, form)

    def affines(self, times: list[int]) -> list[tuple[Tensor, Tensor]]:
        """Multipliers and addends [S, sum C] of the three parts at ``times``, from the weights as they were."""
        emb = time_embeddings(self.unet[0], torch.tensor(times))
        return [table.at_times(emb) for table in self.tables]


class StepGraph(nn.Module):
    """One DDIM step (Algorithm 3; upward: the inversion of section 3.2) of a PDAE or of a prior alone.

    x [N, C, H, W], conditioning [N, 2, M] (not for a prior), step int64 [1] -> x_next [N, C, H, W], all float32.
    ``networks`` may be shared by several steps.
    """

    def __init__(self, networks: TracedNetworks, trajectory: Trajectory) -> None:
        super().__init__()
        self.networks = networks
        self.widths = [w for table in networks.tables[:2] for w in _widths(table)]
        self.widths_z = _widths(networks.tables[2]) if networks.gradient is not None else []
        self.trunk_blocks = len(networks.tables[0].columns)
        affines = networks.affines([step.t for step in trajectory])
        for i, name in enumerate(("multipliers", "addends")):
            self.register_buffer(name, torch.cat([affine[i] for affine in affines], 1).detach(), persistent=False)
        coefficients = ddim_coefficients([s.alpha_bar for s in trajectory], [s.alpha_bar_next for s in trajectory])
        self.register_buffer("coefficients", coefficients[..., None, None, None], persistent=False)

    def _row(self, table: Tensor, step: Tensor) -> Tensor:
        return table.index_select(0, step)[0]

    def forward(self, x: Tensor, conditioning: Tensor | None, step: Tensor) -> Tensor:
        last = [sum(self.widths_z)] if self.widths_z else []
        multipliers = self._row(self.multipliers, step).split([*self.widths, *last])
        addends = self._row(self.addends, step).split([*self.widths, *last])
        affines = list(zip(multipliers[: len(self.widths)], addends[: len(self.widths)], strict=True))
        networks = self.networks
        h, skips, trunk = x.to(networks.dtype), [], affines[: self.trunk_blocks]
        for i in range(len(networks.trunk.stages)):
            h = networks.trunk.run(i, h, trunk)
            skips.append(h)
        eps = networks.eps(skips, affines[self.trunk_blocks :])
        inverse_root, ratio, shift, inverse_ratio, root_next, noise_next = self._row(self.coefficients, step).unbind(0)
        if networks.gradient is not None:
            # Time first, then z: (1 + z_s) (multiplier h + addend) + z_b.
            scale, offset = conditioning.unbind(1)
            both = scale * multipliers[-1], scale * addends[-1] + offset
            pairs = zip(*(wide.split(self.widths_z, dim=1) for wide in both), strict=True)
            eps = eps - shift * networks.gradient(skips, list(pairs))
        scaled = x * inverse_root
        x0 = (scaled - ratio * eps).clamp(-1, 1)
        return root_next * x0 + noise_next * ((scaled - x0) * inverse_ratio)


class PriorStepGraph(StepGraph):
    """The same without z: x, step -> x_next."""

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        return super().forward(x, None, step)


class ConditioningGraph(nn.Module):
    """z [N, D] -> conditioning [N, 2, M]: 1 + z_s and z_b of every adaptive norm of G, float32 in every export."""

    def __init__(self, model: PDAE) -> None:
        super().__init__()
        self.label = as_dtype(model.decoder.label_emb, torch.float32)
        weight, bias = _tables(model.decoder)[2].z
        self.width = len(bias) // 2
        # The 1 of 1 + z_s joins the bias.
        bias = torch.cat([bias[: self.width] + 1, bias[self.width :]])
        self.weight, self.bias = (nn.Parameter(v, requires_grad=False) for v in (weight, bias))

    def forward(self, z: Tensor) -> Tensor:
        return F.linear(F.silu(self.label(z)), self.weight, self.bias).reshape(-1, 2, self.width)


class EncoderGraph(nn.Module):
    """x0 [N, C, H, W] -> z [N, D]."""

    def __init__(self, model: PDAE, dtype: torch.dtype, form: str) -> None:
        super().__init__()
        self.dtype = dtype
        self.layers = nn.ModuleList(traced(layer, dtype, form) for layer in model.encoder.encoder)

    def forward(self, x0: Tensor) -> Tensor:
        h = x0.to(self.dtype)
        for layer in self.layers:
            h = layer(h)
            if isinstance(layer, nn.SiLU):
                h = h.to(self.dtype)
        return h.float()


def build_graphs(
    model: PDAE | Prior, schedule: Schedule, steps: int, encode_steps: int, dtype: torch.dtype, form: str
) -> dict[str, nn.Module]:
    """The modules of an export by the names of their graphs (see manifest.GRAPHS); weights are copied."""
    with torch.no_grad():
        graphs: dict[str, nn.Module] = {}
        if isinstance(model, PDAE):
            graphs["encoder"] = EncoderGraph(model, dtype, form)
            graphs["conditioning"] = ConditioningGraph(model)
        step = StepGraph if isinstance(model, PDAE) else PriorStepGraph
        networks = TracedNetworks(model, dtype, form)
        graphs["decode_step"] = step(networks, schedule.decoding(steps))
        graphs["invert_step"] = step(networks, schedule.inversion(encode_steps))
    return {name: graph.eval() for name, graph in graphs.items()}


def conditioning_width(model: PDAE | Prior) -> int | None:
    """M, the columns of conditioning; None for a prior."""
    return sum(_widths(_tables(model.decoder)[2])) if isinstance(model, PDAE) else None
