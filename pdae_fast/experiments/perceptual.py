"""LPIPS and ST-LPIPS by their authors' packages, where package and weights are on this machine; nothing is downloaded.

Either is a name in a report only when it is exactly that metric: where it cannot be computed the report says why, and
no other network stands in for it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError

Metric = Callable[[Tensor, Tensor], Tensor]
# Names under which torchvision keeps AlexNet's ImageNet weights in torch.hub's folder, newest first.
ALEXNET_FILES = ("alexnet-owt-7be5be79.pth", "alexnet-owt-4df8aa71.pth")


class NotAvailable(Exception):
    """A metric that cannot be computed here; the text says why and what would help."""


def lpips(device: torch.device, alexnet: str | Path | None = None) -> Metric:
    """LPIPS 0.1 with AlexNet (Zhang et al. 2018): f(a, b) of [B, 1 or 3, H, W] in [-1, 1] gives [B].

    alexnet: a file with torchvision's AlexNet weights; by default where torchvision would have put them. Raises
    NotAvailable without package or weights, UserError for a file that holds something else.
    """
    try:
        import lpips as package
    except Exception as error:  # torchvision built for another torch fails with more than ImportError
        raise NotAvailable(f"the package lpips cannot be imported ({_line(error)}); see docs/evaluate.md") from None
    if alexnet is None:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        found = [folder / name for name in ALEXNET_FILES if (folder / name).is_file()]
        if not found:
            raise NotAvailable(f"no AlexNet weights: neither --alexnet FILE nor {folder / ALEXNET_FILES[0]}")
        alexnet = found[0]
    # pnet_rand: otherwise the package would download the trunk.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torchvision, about how the package calls it
        net = package.LPIPS(net="alex", pnet_rand=True, verbose=False).eval().requires_grad_(False)
    trunk = net.net
    weights = _read(alexnet)
    wanted = {name: f"features.{name.split('.', 1)[1]}" for name in trunk.state_dict()}
    if any(key not in weights or weights[key].shape != trunk.state_dict()[name].shape for name, key in wanted.items()):
        raise UserError(f"{alexnet} does not hold torchvision's AlexNet (features.0.weight ... features.10.bias)")
    trunk.load_state_dict({name: weights[key] for name, key in wanted.items()})
    return _on(net, device)


def st_lpips(device: torch.device) -> Metric:
    """Shift-tolerant LPIPS with AlexNet (Ghildyal and Liu 2022), whose package brings its weights; as `lpips`."""
    try:
        from stlpips_pytorch import stlpips
    except Exception as error:
        raise NotAvailable(
            f"the package stlpips_pytorch cannot be imported ({_line(error)}); see docs/evaluate.md"
        ) from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = stlpips.LPIPS(net="alex", variant="shift_tolerant", verbose=False)
    return _on(net.eval().requires_grad_(False), device)


def _on(net: torch.nn.Module, device: torch.device) -> Metric:
    net = net.to(device)

    @torch.inference_mode()
    def metric(a: Tensor, b: Tensor) -> Tensor:
        a, b = (x.float().expand(-1, 3, -1, -1).to(device) for x in (a, b))
        return net(a, b).flatten().double().cpu()

    return metric


def _read(path: str | Path) -> dict[str, Tensor]:
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:  # torch names damaged files in many ways
        raise UserError(f"{path}: not a file of weights ({_line(error)})") from None
    return weights if isinstance(weights, dict) else {}


def _line(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:120]
