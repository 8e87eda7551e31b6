"""Image similarity as the released PDAE evaluation computes it: SSIM, MSE and PSNR, one value per image.

Images come in [-1, 1] and are mapped to [0, 1] by (x + 1) / 2. They are neither clamped nor rounded to
8 bits first: a decoder that overshoots pays for it. Everything is computed and returned in float64
(float32 on devices without it), because SSIM subtracts E[x]^2 from E[x^2].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW = 11
SIGMA = 1.5
C1 = 0.01**2
C2 = 0.03**2


def mse(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared error on [0, 1].

    a, b: [B, C, H, W] in [-1, 1], equal shapes (else ValueError). Returns [B].
    """
    a, b = _unit_range(a, b)
    return (a - b).square().mean(dim=(1, 2, 3))


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB for a data range of 1: -10 log10(mse).

    a, b: [B, C, H, W] in [-1, 1], equal shapes (else ValueError). Returns [B]; identical images give inf,
    which JSON cannot hold: whoever writes it to a file must replace it.
    """
    return -10 * mse(a, b).log10()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) on [0, 1].

    Every channel on its own with an 11x11 Gaussian window, sigma 1.5, C1 = 0.01^2, C2 = 0.03^2; the borders
    are zero-padded by 5, so the map is as large as the image; the mean over C, H and W is returned. The
    padding changes the value near the borders: implementations that crop them give other numbers.

    a, b: [B, C, H, W] in [-1, 1], equal shapes (else ValueError), any size from 1x1. Returns [B].
    """
    a, b = _unit_range(a, b)
    mean_a, mean_b = _blur(a), _blur(b)
    var_a = _blur(a * a) - mean_a.square()
    var_b = _blur(b * b) - mean_b.square()
    cov = _blur(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + C1) / (mean_a.square() + mean_b.square() + C1)
    structure = (2 * cov + C2) / (var_a + var_b + C2)
    return (luminance * structure).mean(dim=(1, 2, 3))


METRICS = {"ssim": ssim, "psnr": psnr, "mse": mse}


def _unit_range(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(f"expected two [B, C, H, W] of one shape, not {list(a.shape)} and {list(b.shape)}")
    dtype = torch.float32 if a.device.type == "mps" else torch.float64
    return (a.to(dtype) + 1) / 2, (b.to(dtype) + 1) / 2


def _blur(x: Tensor) -> Tensor:
    """Weighted mean under the window at every pixel, zeros outside. The 2-D Gaussian is the product of two
    1-D ones, and so is zero padding, so two passes of 11 taps equal one of 121."""
    distance = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    taps = torch.exp(-distance.square() / (2 * SIGMA**2))
    taps = (taps / taps.sum()).to(x)
    planes = x.reshape(-1, 1, *x.shape[2:])
    planes = F.conv2d(planes, taps.view(1, 1, WINDOW, 1), padding=(WINDOW // 2, 0))
    planes = F.conv2d(planes, taps.view(1, 1, 1, WINDOW), padding=(0, WINDOW // 2))
    return planes.view_as(x)
