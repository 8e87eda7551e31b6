"""How a step is executed: options that change its speed and memory, and no more than the rounding of its result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..engine.graphs import CaptureError, Pool, capture
from ..errors import UserError
from ..kernels import group_norm
from ..models.layers import ResBlock, Stage
from ..models.unet import Features, PDAEDecoder, UNet
from .settings import ON_IMAGES
from .tasks import PDAETask, Task

STEP_HELP = {
    "compile": "compile the step with torch.compile; the first step then takes minutes, on the CPU too",
    "fused_adam": "Adam as one operation over all weights",
    "frozen_bfloat16": "pdae: the frozen half runs on a bfloat16 copy of its weights, whatever --amp says",
    "channels_last": "keep images and weights channels-last",
    "checkpointing": "compute activations again in the backward pass instead of keeping them: slower, less memory",
    "fused_norms": "GroupNorm, its affines and SiLU as one operation (a Triton kernel on a GPU)",
    "cuda_graph": "GPU: capture forward, backward and Adam once and replay them",
}
UNET_ONLY = ("frozen_bfloat16", "channels_last", "checkpointing", "fused_norms")


@dataclass(frozen=True)
class StepOptions:
    """All off: the plain step. STEP_HELP says what each is. They are no settings of the run: it may be resumed with
    others, as it may be on another device, and is bit for bit the same only with the same ones."""

    compile: bool = False
    fused_adam: bool = False
    frozen_bfloat16: bool = False
    channels_last: bool = False
    checkpointing: bool = False
    fused_norms: bool = False
    cuda_graph: bool = False

    def check(self, task: str, device: torch.device, processes: int = 1) -> None:
        """UserError for an option that ``task`` does not have, or that cannot run here."""

        def refuse(name: str, reason: str) -> None:
            raise UserError(f"--{name.replace('_', '-')} {reason}")

        for name in UNET_ONLY:
            if getattr(self, name) and task not in ON_IMAGES:
                refuse(name, f"is for the U-Net, which train {task} does not train")
        if self.frozen_bfloat16 and task != "pdae":
            refuse("frozen_bfloat16", f"needs a frozen half, which train {task} does not have")
        if self.cuda_graph:
            if device.type != "cuda":
                refuse("cuda_graph", f"needs a CUDA device, not {device.type}")
            if processes > 1:
                refuse("cuda_graph", f"is for one process, not {processes}")
            if self.checkpointing:
                refuse("cuda_graph", "cannot be combined with --checkpointing, which reads the random state")

    def chosen(self) -> list[str]:
        return [field.name for field in dataclasses.fields(self) if getattr(self, field.name)]


# -- the forward pass ----------------------------------------------------------------------------------------------


def arrange(task: Task, options: StepOptions) -> None:
    """Lay out the weights of ``task``; before anything refers to them or copies them."""
    if options.channels_last:
        task.model.to(memory_format=torch.channels_last)


def move(tensors: tuple[Tensor, ...], device: torch.device, options: StepOptions) -> tuple[Tensor, ...]:
    """The arguments of ``task`` on ``device`` in the layout of its weights."""
    moved = (v.to(device, non_blocking=True) for v in tensors)
    if not options.channels_last:
        return tuple(moved)
    return tuple(v.contiguous(memory_format=torch.channels_last) if v.ndim == 4 else v for v in moved)


def build_forward(task: Task, options: StepOptions) -> Callable[..., Tensor]:
    """``task`` as ``options`` want it run. Its weights must be final: copies of the frozen ones are made here."""
    if options.frozen_bfloat16 and isinstance(task, PDAETask):
        task.frozen = FrozenHalf(task.model.decoder, options.channels_last)
    if options.fused_norms:
        fuse_norms(task)
    if options.checkpointing:
        for module in task.model.modules():
            if type(module) is Stage and any(p.requires_grad for p in module.parameters()):
                module.__class__ = CheckpointedStage
    return torch.compile(task, dynamic=False) if options.compile else task


class FrozenHalf(nn.Module):
    """Trunk and eps-decoder of ``decoder`` on a bfloat16 copy of their weights.

    Autocast converts frozen weights again in every pass; here they were converted once.
    """

    def __init__(self, decoder: PDAEDecoder, channels_last: bool = False) -> None:
        super().__init__()
        with torch.device("meta"):
            self.unet = UNet(decoder.config)
        own = decoder.state_dict()
        # A copy of its own also where the decoder is bfloat16 already: it must not follow the training.
        state = {name: own[name].to(torch.bfloat16, copy=True) for name in self.unet.state_dict()}
        self.unet.load_state_dict(state, assign=True)
        self.unet.requires_grad_(False)
        if channels_last:
            self.unet.to(memory_format=torch.channels_last)
        self.eval()  # no dropout; PDAETask.train() leaves it so

    @torch.no_grad()
    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> tuple[Features, Tensor]:
        """x_t [B, C, H, W], t int64 [B], y as in UNet -> features (bfloat16 under autocast, else float32) and the
        network's output, float32."""
        wide = not torch.is_autocast_enabled(x_t.device.type)
        with torch.autocast(x_t.device.type, enabled=False):
            features = self.unet.trunk(x_t, t, y)
            out = self.unet.decode(features)
        if wide:
            features = features._replace(
                h=features.h.float(), skips=tuple(skip.float() for skip in features.skips), emb=features.emb.float()
            )
        return features, out.float()


class CheckpointedStage(Stage):
    """A Stage that keeps its inputs only; dropout repeats its draws."""

    def forward(self, x: Tensor, emb: Tensor | None = None, emb_z: Tensor | None = None) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x, emb, emb_z)
        return checkpoint(super().forward, x, emb, emb_z, use_reentrant=False)


def fuse_norms(module: nn.Module) -> None:
    """Let every ResBlock in ``module`` run its two norms by `pdae_fast.kernels.group_norm`."""
    for part in module.modules():
        if type(part) is ResBlock:
            part.__class__ = TrainedResBlock


class TrainedResBlock(ResBlock):
    """The same function: both affines after the second norm collapse into one, (1 + s_z) (1 + s_t) and
    (1 + s_z) b_t + b_z. Under autocast the norms' results stay in the dtype of their input."""

    def _norm_in(self, x: Tensor) -> Tensor:
        norm = self.in_layers[0]
        return group_norm(x, norm.weight, norm.bias, norm.num_groups, norm.eps, silu=True)

    def _norm_out(self, h: Tensor, emb: Tensor, emb_z: Tensor | None) -> Tensor:
        norm, rows = self.out_layers[0], self.emb_layers(emb)
        if not self.scale_shift:
            h = h + rows[:, :, None, None]
            if self.emb_z_layers is None:
                return group_norm(h, norm.weight, norm.bias, norm.num_groups, norm.eps, silu=True)
            scale, shift = torch.ones_like(rows), torch.zeros_like(rows)
        else:
            scale, shift = rows.chunk(2, dim=1)
            scale = 1 + scale
        if self.emb_z_layers is not None:
            scale_z, *shift_z = self.emb_z_layers(emb_z).split(scale.shape[1], dim=1)
            scale, shift = (1 + scale_z) * scale, (1 + scale_z) * shift
            shift = shift + shift_z[0] if shift_z else shift
        return group_norm(h, norm.weight, norm.bias, norm.num_groups, norm.eps, scale=scale, shift=shift, silu=True)


# -- the optimiser -------------------------------------------------------------------------------------------------


def build_optimizer(
    parts: Sequence[list[nn.Parameter]], lr: float, device: torch.device, options: StepOptions
) -> torch.optim.Adam:
    """Adam as published, betas (0.9, 0.999), eps 1e-8, of parameters whose rates `set_rates` sets part by part."""
    parameters = [{"params": part} for part in parts]
    keywords: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8}
    if options.fused_adam or options.cuda_graph:
        keywords["fused"] = True
    if options.cuda_graph:
        # A captured step reads its rate from the device.
        return torch.optim.Adam(parameters, lr=torch.tensor(lr, device=device), capturable=True, **keywords)
    return torch.optim.Adam(parameters, lr=lr, **keywords)


def set_rates(optimizer: torch.optim.Optimizer, rates: Sequence[float]) -> None:
    for group, lr in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Take over moments and step count of ``saved``, but not how they were computed: a run may go on in another way."""
    own = optimizer.state_dict()["param_groups"]
    groups = [
        {**old, **{k: v for k, v in mine.items() if k != "params"}}
        for old, mine in zip(saved["param_groups"], own, strict=True)
    ]
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter).copy_(value)


# -- the whole step, captured --------------------------------------------------------------------------------------

Passes = Callable[[Sequence[tuple[Tensor, ...]]], Tensor]


class GraphedStep:
    """Forward, backward and Adam of one optimiser step as a CUDA graph, replayed with new inputs.

    ``__call__(batches)`` copies them into the captured buffers and replays; returns the losses [accumulate].
    losses: runs forward and backward of all batches of a step and returns their losses; it is captured with the
    optimiser's step by :meth:`build`, or at the first call. The result is overwritten by the next call. What a step
    needs from the host is set before the call: rates are device tensors (see `build_optimizer`), and a replay takes the
    seed and offset of the device's generator as they are then. capture: as `engine.graphs.capture`.
    Raises UserError when the device refuses to capture.
    """

    def __init__(
        self, losses: Passes, optimizer: torch.optim.Optimizer, device: torch.device, capture: Callable = capture
    ) -> None:
        self.losses, self.optimizer, self.device, self._capture = losses, optimizer, device, capture
        self.graph = self.pool = None
        self.inputs: list[tuple[Tensor, ...]] = []
        self.result: Tensor | None = None

    def __call__(self, batches: Sequence[tuple[Tensor, ...]]) -> Tensor:
        self.build(batches)
        for buffers, tensors in zip(self.inputs, batches, strict=True):
            for buffer, tensor in zip(buffers, tensors, strict=True):
                buffer.copy_(tensor, non_blocking=True)
        self.graph.replay()
        return self.result

    def build(self, batches: Sequence[tuple[Tensor, ...]]) -> None:
        """Capture, unless that is done; weights, moments and the next call's result are not changed by it."""
        if self.graph is not None:
            return
        self.inputs = [tuple(v.clone() for v in tensors) for tensors in batches]
        before = self._snapshot()
        self.pool = self.pool or (Pool(self.device) if self.device.type == "cuda" else None)
        try:
            self.graph = self._capture(self._step, lambda: self._restore(before), self.device, self.pool)
        except CaptureError as error:
            raise UserError(f"--cuda-graph: this step cannot be captured ({error}); leave the option out") from None
        # The warm-up trained on the first batches; the run has not.
        self._restore(before)

    def _step(self) -> None:
        # Without gradients at its start the captured backward writes them instead of adding to the last replay's.
        self.optimizer.zero_grad(set_to_none=True)
        self.result = self.losses(self.inputs)
        self.optimizer.step()

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _snapshot(self) -> tuple[list[Tensor], list[dict[str, Any]]]:
        weights = [p.detach().clone() for p in self._parameters()]
        moments = [{k: v.clone() for k, v in self.optimizer.state[p].items()} for p in self._parameters()]
        return weights, moments

    @torch.no_grad()
    def _restore(self, before: tuple[list[Tensor], list[dict[str, Any]]]) -> None:
        """In place: the graph knows weights and moments by their addresses. Moments that did not exist are zeros."""
        for parameter, weight, moments in zip(self._parameters(), *before, strict=True):
            parameter.copy_(weight)
            for name, value in self.optimizer.state[parameter].items():
                if name in moments:
                    value.copy_(moments[name])
                else:
                    value.zero_()
