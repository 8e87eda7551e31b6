"""Settings of the caller's process that would change a result: put aside while the project computes, never changed.

Those of a thread (default device, autocast, grad mode, inference mode) are put aside for that thread. Those of the
whole process are put aside while anybody computes, and are the caller's again when the last one is done. The default
dtype is of the whole process and is never set: whoever makes a tensor says its dtype.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any

import torch

from .errors import UserError


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Compute without the thread's default device, autocast, autograd and inference mode; also as a decorator.

    Tensors that are made inside are ordinary ones, which autograd takes, whatever mode the caller is in.
    """
    with torch.inference_mode(False), torch.no_grad(), float32_means_float32():
        yield


@contextlib.contextmanager
def float32_means_float32() -> Iterator[None]:
    """Compute float32 in float32: no autocast, no products of fewer bits; and on the CPU, unless told otherwise."""
    with contextlib.ExitStack() as stack:
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(_EXACT)
        yield


class _ExactProducts:
    """Products of float32 are not rounded while at least one thread is inside. cuDNN's switch: see :func:`cudnn`.

    All switches are left alone where none of them says otherwise, which is how PyTorch starts. Where one does, its
    older switch is moved with the newer ones: it refuses products on CUDA while they contradict each other.
    """

    def __init__(self, forked: bool = False) -> None:
        self.lock, self.inside, self.forked, self.used = threading.Lock(), 0, forked, False
        self.found: list[tuple[Any, str]] = []
        self.legacy = "highest"

    def __enter__(self) -> None:
        if self.forked and torch.get_num_threads() > 1:
            raise UserError(
                "this process was forked from one that had computed, whose threads it lacks: start it by spawn, or "
                "call torch.set_num_threads(1) in it"
            )
        self.used = True
        backends = torch.backends
        owners = (backends.mkldnn.matmul, backends.mkldnn.conv, backends.cuda.matmul)
        with self.lock:
            if not self.inside:
                said = {owner.fp32_precision for owner in (*owners, backends.mkldnn, backends)}
                self.legacy, self.found = _legacy_precision(), []
                if not said <= {"none", "ieee"} or self.legacy != "highest":
                    parents = (backends.mkldnn, backends.mkldnn, backends.cudnn)
                    self.found = [(o, _own(o, parent)) for o, parent in zip(owners, parents, strict=True)]
                    if self.legacy != "highest":
                        torch.set_float32_matmul_precision("highest")
                for owner, _ in self.found:
                    owner.fp32_precision = "ieee"
            self.inside += 1

    def __exit__(self, *exception: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                if self.legacy != "highest":
                    torch.set_float32_matmul_precision(self.legacy)
                for owner, value in self.found:
                    owner.fp32_precision = value


def _legacy_precision() -> str:
    """What `torch.set_float32_matmul_precision` said last; "highest" where the newer switches contradict it."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return "highest"


def _own(owner: Any, parent: Any) -> str:
    """The precision that ``owner`` has of its own; "none" where it is what ``parent`` would give it anyway."""
    found = owner.fp32_precision
    return "none" if found == parent.fp32_precision else found


@contextlib.contextmanager
def cudnn(benchmark: bool, exact: bool) -> Iterator[None]:
    """Convolutions by cuDNN, its algorithms tried out with ``benchmark``, float32 ones not rounded to TF32 with
    ``exact``. Its other switches are the caller's; all are as they were afterwards."""
    switches = torch.backends.cudnn
    before = switches.enabled, switches.benchmark, switches.conv.fp32_precision
    rounds = exact and before[2] not in ("none", "ieee")
    try:
        legacy = switches.allow_tf32 if rounds else None
    except RuntimeError:  # the caller's switches contradict each other: they do afterwards, too
        legacy = None
    try:
        switches.enabled, switches.benchmark = True, benchmark
        if legacy:
            switches.allow_tf32 = False
        if rounds:
            switches.conv.fp32_precision = "ieee"
        yield
    finally:
        switches.enabled, switches.benchmark = before[:2]
        if legacy:
            switches.allow_tf32 = True
        if rounds:
            switches.conv.fp32_precision = before[2]


_EXACT = _ExactProducts()
if hasattr(os, "register_at_fork"):  # a thread that was inside is not in the child
    os.register_at_fork(after_in_child=lambda: _EXACT.__init__(_EXACT.forked or _EXACT.used))
