"""What one captured step launches and moves on a GPU, counted without one: `python -m bench.budget`.

The fused plan runs on meta tensors, which have shapes and no values, with the functions that its ops run for CUDA
tensors; their launches are collected instead of queued. Bytes are those that have to move: every tensor that a launch
reads once, and every one that it writes; caches may hold some of them. Launches of the framework's operators are one an
operator, and another for the bias of a convolution.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
from collections import Counter
from collections.abc import Iterator
from typing import TypeVar
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pdae_fast import PDAE, presets
from pdae_fast.engine import Rewrites, float8
from pdae_fast.engine import plan as plans
from pdae_fast.engine.fused import FusedPlan
from pdae_fast.engine.networks import Conditioning
from pdae_fast.engine.trajectory import DeviceTrajectory
from pdae_fast.kernels._launch import Launch
from pdae_fast.models import Autoencoder, Prior, unet_of
from pdae_fast.samplers.ddim import Weights
from pdae_fast.schedule import build_schedule

from .networks import CONFIGS

M = TypeVar("M", bound=Autoencoder | Prior)
META = torch.device("meta")
# cuDNN's convolution into memory that it is given, which PyTorch does not know how to run without values.
OF_META = torch.library.Library("aten", "IMPL", "Meta")
OF_META.impl("cudnn_convolution.out", lambda x, weight, *_, out: out)
# What a GPU runs, but for graphs and streams, which change no launch.
ON_A_GPU = Rewrites(
    packed_weights=False, phase_upsample=False, kernels=True, split_skips=True, shared_statistics=True,
    folded_biases=True, shared_products=True, stacked_decoders=True, fused_update=True,
)  # fmt: skip
OPS = {
    "add_projected": ("add_projected",),
    "convolution": ("convolution_into",),
    "add_upsample": ("add_upsample", "upsample_add", "residual_add", "add_with_stats"),
    "ddim_update": ("ddim_update",),
    "float8": ("conv_float8", "group_norm_float8"),
    "head_convolution": ("head_convolution",),
    "group_norm": ("group_norm", "channel_stats", "group_norm_apply", "partial_stats"),
}


@contextlib.contextmanager
def cuda_functions(run, obstacle: str | None = None) -> Iterator[None]:
    """The project's ops run their CUDA functions whatever the device: ``run`` takes the launches, or with an
    ``obstacle`` to Triton (and to cuDNN) they go through the framework."""
    with contextlib.ExitStack() as stack:
        for name, ops in OPS.items():
            module = importlib.import_module(f"pdae_fast.kernels.{name}")
            found = {"run": run, "_has_cudnn": lambda: obstacle is None}
            found |= dict.fromkeys(("fallback_reason", "float8_obstacle"), lambda *_: obstacle)
            for function in found.keys() & vars(module).keys():
                stack.enter_context(mock.patch.object(module, function, found[function]))
            for op in ops:
                stack.enter_context(mock.patch.object(module, f"_{op}", getattr(module, f"_{op}_cuda")))
        yield


def meta_plan(model: PDAE, dtype: torch.dtype = torch.bfloat16, options: Rewrites = ON_A_GPU) -> FusedPlan:
    """A plan without values; ``model`` may have none either."""

    def owned(model, device, dtype, *_):
        return model.to(device, dtype).eval().requires_grad_(False)

    with mock.patch.object(plans, "owned", owned):
        plan = FusedPlan(model, META, dtype, options)
    return plan


def meta_trajectory(
    plan: FusedPlan, batch: int, steps: int = 10, codes: int | None = 1, weights: Weights = ()
) -> DeviceTrajectory:
    """``batch`` images with G of one z each, of a mixture of several, or without (None); by DDIM, or the linear method
    of ``weights``."""
    D, conditioning = getattr(plan.model.config, "latent_dim", None), None
    if codes is not None:
        shape = (batch, D) if codes == 1 else (codes, batch, D)
        shares = None if codes == 1 else torch.empty(codes, batch, device=META)
        conditioning = plan.conditioning(torch.empty(shape, device=META), shares)
    assert conditioning is None or isinstance(conditioning, Conditioning)
    schedule = build_schedule(plan.model.config.schedule)
    with torch.inference_mode():
        return DeviceTrajectory(plan, batch, conditioning, schedule.decoding(steps), 1.0, weights)


@dataclasses.dataclass
class Budget:
    """Launches of one step by kind, and the bytes that they move, by kind too."""

    launches: Counter[str] = dataclasses.field(default_factory=Counter)
    moved: Counter[str] = dataclasses.field(default_factory=Counter)

    def add(self, kind: str, tensors: list[Tensor], launches: int = 1) -> None:
        self.launches[kind] += launches
        # What is passed twice is read once; a view counts as what it shows.
        self.moved[kind] += sum({id(t): t.numel() * t.element_size() for t in tensors}.values())

    @property
    def nodes(self) -> int:
        return sum(self.launches.values())

    @property
    def bytes(self) -> int:
        return sum(self.moved.values())


KINDS = {"cudnn_convolution": "conv2d"}
PRODUCTS = ("mm", "bmm", "addmm", "addmm_", "baddbmm_", "linear", "scaled_dot_product_attention")


class Counting(TorchDispatchMode):
    """Operators of the framework that launch: those that write to an argument, or answer in memory of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.budget = Budget()

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        out = function(*args, **(kwargs or {}))
        if name == "conv2d" and any(t.is_contiguous(memory_format=torch.channels_last) for t in args[:2]):
            out = torch.empty_like(out, memory_format=torch.channels_last)  # as cuDNN answers
        elif name == "scaled_dot_product_attention":
            out = torch.empty_like(args[0])  # in the order of q's axes, as the kernels for CUDA do
        given, made = ([t for t in tree_leaves(v) if isinstance(t, Tensor)] for v in ((args, kwargs or {}), out))
        memory = {t.untyped_storage()._cdata for t in given}
        is_new = any(t.untyped_storage()._cdata not in memory for t in made)
        if function._schema.is_mutable or (is_new and "empty" not in name):
            self.budget.add("product" if name in PRODUCTS else KINDS.get(name, name), [*given, *made])
            if name == "conv2d" and len(args) > 2 and args[2] is not None:
                self.budget.add("bias of a convolution", [*made, *made])
        return out

    def run(self, launches: list[Launch]) -> None:
        for launch in launches:
            # An absent bias is another tensor that is never read.
            absent = ("x_bias",) if launch.constants.get("HAS_BIAS") is False else ()
            read = [v for k, v in launch.arguments.items() if isinstance(v, Tensor) and k not in absent]
            self.budget.add(launch.kernel.fn.__name__, read)


def count(model: PDAE, batch: int, options: Rewrites = ON_A_GPU, weights: Weights = ()) -> Budget:
    """Of a step with G in bfloat16."""
    trajectory, counting = meta_trajectory(meta_plan(model, options=options), batch, weights=weights), Counting()
    with torch.inference_mode(), cuda_functions(counting.run), counting:
        trajectory._step(trajectory.workloads[0])  # what is made once
        counting.budget = Budget()
        trajectory._step(trajectory.workloads[0])
    return counting.budget


def empty_model(network: str, fp8: bool = False) -> PDAE:
    """The preset, bundled or tiny test ``network`` without values; with ``fp8`` its layers round."""
    config = CONFIGS.get(network) or presets.get(network)
    config = config or PDAE.from_pretrained(network).config
    with META:
        model = PDAE(config)
    return rounding(model) if fp8 else model


def rounding(model: M) -> M:
    """``model`` itself, with layers that round to fp8, by no scales of its own."""
    float8.round_layers(unet_of(model), dict.fromkeys(float8.float8_layers(unet_of(model)), 1.0))
    return model


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m bench.budget", description=__doc__.splitlines()[0])
    p.add_argument("--networks", nargs="+", default=["celeba64", "ffhq128"])
    p.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64])
    p.add_argument("--fp8", choices=["emulated", "codes"], help="with layers that round, or that multiply codes")
    args = p.parse_args()
    options = dataclasses.replace(ON_A_GPU, float8=args.fp8 == "codes")
    for network in args.networks:
        for batch in args.batches:
            budget = count(empty_model(network, args.fp8 is not None), batch, options)
            print(f"{network} batch {batch}: {budget.nodes} launches, {budget.bytes / 1e9:.2f} GB")
            for kind, launches in budget.launches.most_common():
                print(f"    {kind:28} {launches:5} {budget.moved[kind] / 1e9:8.3f} GB")


if __name__ == "__main__":
    main()
