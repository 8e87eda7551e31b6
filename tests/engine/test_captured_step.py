"""What a captured step may not do: read a value on the host, make a host tensor, or copy between devices.

The step of every kind of trajectory runs on meta tensors with the functions that CUDA tensors reach, with the Triton
kernels (their launches are made and put aside) and without them.
"""

import dataclasses
import importlib.util

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.budget import META, ON_A_GPU, cuda_functions, meta_plan, meta_trajectory, rounding
from helpers import TINY, TINY_UNET, tiny_pdae, tiny_prior
from pdae_fast import PDAE, DiffAE, DiffAEConfig, PDAEConfig
from pdae_fast.samplers.reuse import Reuse

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
PLAIN = dataclasses.replace(ON_A_GPU, kernels=False, split_skips=False, shared_statistics=False, folded_biases=False)
REFUSED = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "lift_fresh")
CONFIG = PDAEConfig(
    image_size=32,
    latent_dim=8,
    encoder_channel=32,
    unet=dataclasses.replace(TINY_UNET, channel_multiplier=(1, 2), attention_resolutions=(2,)),
)
LEGACY = dataclasses.replace(
    CONFIG, unet=dataclasses.replace(CONFIG.unet, channel_multiplier=(1, 2), num_residual_blocks_of_a_block=2)
)


class Captured(TorchDispatchMode):
    """Refuses what a capture does, and requires of CUDA's group norm what it asks for."""

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        out = function(*args, **(kwargs or {}))
        if name == "conv2d" and any(t.is_contiguous(memory_format=torch.channels_last) for t in args[:2]):
            out = torch.empty_like(out, memory_format=torch.channels_last)  # as cuDNN answers
        tensors = [t for t in tree_leaves((args, kwargs or {}, out)) if isinstance(t, torch.Tensor)]
        assert name not in REFUSED, f"{name} waits for the device"
        assert all(t.device == META for t in tensors), f"{name} of {[str(t.device) for t in tensors]}"
        if name == "native_group_norm":
            x, weight, bias = args[:3]
            assert x.is_contiguous() and all(v is None or v.dtype == x.dtype for v in (weight, bias))
        if name == "cudnn_convolution":  # it would copy them
            assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (*args[:2], out))
            assert out.shape == torch.nn.functional.conv2d(*args[:2], None, args[3], args[2]).shape
        if name == "group_norm":  # it sees to the layout itself
            x, _, *affine = args[:4]
            assert all(v is None or v.dtype == x.dtype for v in affine)
        return out


def run(plan, obstacle, **choices):
    """Every kind of step of a trajectory, the second time: the first is the warm-up."""
    launches = []
    trajectory = meta_trajectory(plan, 2, **choices)
    with torch.inference_mode(), cuda_functions(launches.extend, obstacle):
        for workload in dict.fromkeys(trajectory.workloads):
            trajectory._step(workload)
        warm = len(launches)
        with Captured():
            for workload in dict.fromkeys(trajectory.workloads):
                trajectory._step(workload)
    assert len(launches) == 2 * warm and (obstacle is None) == bool(warm)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("config", [CONFIG, LEGACY, TINY], ids=["attention", "deeper", "tiny"])
@pytest.mark.parametrize("codes", [1, 3, None], ids=["z", "mixture", "no z"])
def test_with_the_kernels(config, dtype, codes):
    run(meta_plan(PDAE(config), dtype), None, codes=codes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("options", [PLAIN, ON_A_GPU], ids=["framework", "ops without triton"])
@pytest.mark.parametrize("codes", [1, 3, None], ids=["z", "mixture", "no z"])
def test_without_usable_triton(options, dtype, codes):
    run(meta_plan(PDAE(CONFIG), dtype, options), "no triton here", codes=codes)


@pytest.mark.parametrize("obstacle", [pytest.param(None, marks=needs_triton), "no triton here"])
def test_a_linear_method(obstacle):
    """Of four states, at ten steps: what the weights are is nothing to the step."""
    run(meta_plan(PDAE(CONFIG)), obstacle, weights=(((0.5,) * 5,) * 4,) * 10)


@needs_triton
@pytest.mark.parametrize("spec", ["gradient:2", "trunk:2", "deep:2:2", "window:200-700"])
def test_with_approximations(spec):
    run(meta_plan(tiny_pdae()).reusing(Reuse.parse(spec)), None)


@needs_triton
@pytest.mark.parametrize("by_codes", [False, True], ids=["emulated", "codes"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("codes", [1, 3, None], ids=["z", "mixture", "no z"])
def test_in_fp8(dtype, codes, by_codes):
    plan = meta_plan(rounding(PDAE(CONFIG)), dtype, dataclasses.replace(ON_A_GPU, float8=by_codes))
    assert plan.options.float8 == by_codes and plan.options.stacked_decoders
    run(plan, None, codes=codes)


@pytest.mark.parametrize("by_codes", [False, True], ids=["emulated", "codes"])
def test_in_fp8_without_usable_triton(by_codes):
    options = dataclasses.replace(ON_A_GPU, float8=by_codes)
    run(meta_plan(rounding(PDAE(CONFIG)), torch.bfloat16, options), "no triton here")


@needs_triton
@pytest.mark.parametrize("fp8", [False, True], ids=["", "fp8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_diffae(dtype, fp8):
    model = DiffAE(DiffAEConfig(32, 8, dataclasses.replace(CONFIG.unet, time_channel=32), (1, 2)))
    run(meta_plan(rounding(model) if fp8 else model, dtype, dataclasses.replace(ON_A_GPU, float8=fp8)), None)


@needs_triton
def test_a_prior_alone():
    run(meta_plan(tiny_prior()), None, codes=None)


def test_what_is_refused_is_seen():
    x, index, host = torch.empty(3, 2, device=META), torch.zeros((), dtype=torch.int64), torch.ones(2)
    for breach in (
        lambda: host[index],
        lambda: host.sum().item(),
        lambda: x.copy_(torch.ones(3, 2)),
        lambda: torch.ones(1),
    ):
        with pytest.raises((AssertionError, RuntimeError)), Captured():
            breach()
