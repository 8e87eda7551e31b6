"""Launches and bytes of one captured step, held to a budget, so that a change shows; counted on meta tensors."""

import dataclasses
import functools

import pytest
import torch

from bench.budget import ON_A_GPU, Budget, Counting, count, cuda_functions, empty_model

# One DDIM step with G in bfloat16: kernels of this project, convolutions, matrix products and attention, launches in
# all, and GB that have to move. A step that needs less may tighten its line; one that needs more has to say why.
BUDGETS = {
    ("celeba64", 1): (100, 93, 25, 240, 0.40),
    ("celeba64", 8): (102, 93, 25, 242, 1.69),
    ("celeba64", 64): (116, 93, 25, 256, 12.28),
    ("ffhq128", 1): (128, 115, 25, 293, 1.26),
    ("ffhq128", 8): (134, 115, 25, 299, 7.97),
    ("ffhq128", 64): (144, 115, 25, 309, 61.83),
    # Layers that multiply codes of fp8, and the three that pool in between and round.
    ("celeba64 by codes", 1): (187, 6, 25, 255, 0.27),
    ("celeba64 by codes", 8): (189, 6, 25, 257, 1.34),
    ("celeba64 by codes", 64): (203, 6, 25, 271, 10.11),
    ("ffhq128 by codes", 1): (236, 7, 25, 313, 0.96),
    ("ffhq128 by codes", 8): (242, 7, 25, 319, 6.53),
    ("ffhq128 by codes", 64): (252, 7, 25, 329, 51.25),
    # Rounding by the framework's operators.
    ("celeba64 emulated", 1): (100, 93, 25, 576, 0.80),
    ("celeba64 emulated", 64): (116, 93, 25, 626, 37.67),
}


@functools.lru_cache(maxsize=1)
def model_of(network):
    name, *fp8 = network.split(maxsplit=1)
    return empty_model(name, bool(fp8))


@pytest.mark.parametrize(("network", "batch"), BUDGETS)
def test_a_step_keeps_to_its_budget(network, batch):
    found = count(model_of(network), batch, dataclasses.replace(ON_A_GPU, float8="codes" in network))
    ours = sum(n for kind, n in found.launches.items() if kind.endswith("_kernel"))
    of = found.launches["conv2d"], found.launches["product"]
    assert (ours, *of, found.nodes, round(found.bytes / 1e9, 2)) == BUDGETS[network, batch]


def test_what_is_counted():
    """One operator each, by hand: a launch that reads and writes, a view, a copy, a bias that is a pass of its own."""
    x = torch.empty(2, 8, 4, 4, device="meta").contiguous(memory_format=torch.channels_last)
    weight, bias = torch.empty(16, 8, 3, 3, device="meta"), torch.empty(16, device="meta")
    cases = [
        (lambda: x + x, {"add": (1, 2 * x.nbytes)}),
        (lambda: x.add_(1), {"add_": (1, x.nbytes)}),
        (lambda: x.permute(0, 2, 3, 1).reshape(-1, 8), {}),
        (lambda: x.reshape(2, -1), {"reshape": (1, 2 * x.nbytes)}),
        (lambda: torch.empty_like(x), {}),
        (lambda: torch.nn.functional.conv2d(x, weight, None, 1, 1), {"conv2d": (1, 3 * x.nbytes + weight.nbytes)}),
        (
            lambda: torch.nn.functional.conv2d(x, weight, bias, 1, 1),
            {"conv2d": (1, 3 * x.nbytes + weight.nbytes + bias.nbytes), "bias of a convolution": (1, 2 * x.nbytes)},
        ),
        (lambda: torch.mm(weight.view(-1, 4), weight.view(4, -1)), {"product": (1, 2 * weight.nbytes + 288 * 288 * 4)}),
    ]
    for run, expected in cases:
        counting = Counting()
        with torch.inference_mode(), counting:
            run()
        found = counting.budget
        assert {kind: (n, found.moved[kind]) for kind, n in found.launches.items()} == expected


def test_launches_of_the_kernels_are_counted_from_their_plans():
    pytest.importorskip("triton")
    from pdae_fast import kernels

    h = torch.empty(2, 8, 4, 4, device="meta", dtype=torch.bfloat16)
    counting = Counting()
    with cuda_functions(counting.run):
        kernels.residual_add(h, h.clone(), torch.empty(8, device="meta"))
    assert counting.budget.launches == {"residual_kernel": 1}
    assert counting.budget.bytes == 3 * h.nbytes + 32
    assert Budget().nodes == 0
