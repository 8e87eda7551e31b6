"""Against NumPy and SciPy in float64, written with a full 2-D window, and against closed forms."""

import json
import math

import numpy as np
import pytest
import torch

from pdae_fast.metrics import mse, psnr, ssim

SHAPES = [(2, 3, 32, 32), (1, 1, 28, 41), (2, 3, 7, 16), (1, 2, 1, 1)]


def pair(shape, noise=0.3, seed=0):
    """Images that overshoot [-1, 1], as a decoder does, and noisy copies."""
    generator = torch.Generator().manual_seed(seed)
    smooth = torch.nn.functional.avg_pool2d(torch.randn(shape, generator=generator), 3, 1, 1) * 2
    return smooth, smooth + noise * torch.randn(shape, generator=generator)


def unit(x):
    return (x.double().numpy() + 1) / 2


def window_2d():
    y, x = np.mgrid[-5:6, -5:6]
    window = np.exp(-(x**2 + y**2) / (2 * 1.5**2))
    return window / window.sum()


def ssim_map_scipy(a, b):
    """[H, W] float64 in [0, 1] -> SSIM at every pixel, borders padded with zeros."""
    signal = pytest.importorskip("scipy.signal")

    def blur(x):
        return signal.convolve2d(x, window_2d(), mode="same", boundary="fill", fillvalue=0)

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a**2) - mean_a**2, blur(b**2) - mean_b**2
    cov = blur(a * b) - mean_a * mean_b
    c1, c2 = 1e-4, 9e-4
    return (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))


@pytest.mark.parametrize("shape", SHAPES)
def test_ssim_against_scipy(shape):
    a, b = pair(shape)
    expected = [
        np.mean([ssim_map_scipy(unit(a[i, c]), unit(b[i, c])) for c in range(shape[1])]) for i in range(shape[0])
    ]
    np.testing.assert_allclose(ssim(a, b).numpy(), expected, rtol=0, atol=1e-12)


def test_ssim_of_constants_in_closed_form():
    """For constants a and b the blurred images are a s and b s, s being the part of the window inside."""
    a, b, size = 0.8, 0.35, 20
    taps = np.exp(-(np.arange(-5, 6) ** 2) / 4.5)
    taps /= taps.sum()
    inside = np.array([sum(taps[k + 5] for k in range(-5, 6) if 0 <= i + k < size) for i in range(size)])
    s = np.outer(inside, inside)
    c1, c2 = 1e-4, 9e-4
    values = (2 * a * b * s**2 + c1) / ((a**2 + b**2) * s**2 + c1)
    values = values * (2 * a * b * (s - s**2) + c2) / ((a**2 + b**2) * (s - s**2) + c2)
    got = ssim(torch.full((1, 3, size, size), 2 * a - 1), torch.full((1, 3, size, size), 2 * b - 1))
    assert got.item() == pytest.approx(values.mean(), abs=1e-6)
    # In the middle of a large image it is the luminance term alone.
    assert values[10, 10] == pytest.approx((2 * a * b + c1) / (a**2 + b**2 + c1), abs=1e-12)


def test_ssim_inside_against_torchmetrics():
    reference = pytest.importorskip("torchmetrics.functional.image").structural_similarity_index_measure
    a, b = pair((1, 1, 40, 40))
    _, full = reference((a.double() + 1) / 2, (b.double() + 1) / 2, data_range=1.0, return_full_image=True)
    # Its borders are mirrored. Take ours out of the mean, with SciPy's map, and compare what is left.
    border = ssim_map_scipy(unit(a[0, 0]), unit(b[0, 0]))
    border[5:-5, 5:-5] = 0
    inside = ssim(a, b).item() * 40**2 - border.sum()
    assert inside / 30**2 == pytest.approx(full[0, 0, 5:-5, 5:-5].mean().item(), abs=1e-6)


def test_ssim_of_equal_images_is_one():
    a, _ = pair((3, 3, 16, 16))
    torch.testing.assert_close(ssim(a, a), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-12)


def test_mse_and_psnr():
    a, b = pair((4, 3, 9, 11))
    expected = ((unit(a) - unit(b)) ** 2).reshape(4, -1).mean(1)
    np.testing.assert_allclose(mse(a, b).numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(psnr(a, b).numpy(), 10 * np.log10(1 / expected), rtol=1e-12)


def test_closed_forms():
    a = torch.zeros(2, 3, 8, 8)
    # 0.2 apart in [-1, 1] is 0.1 in [0, 1]: squared 0.01, 20 dB. Black against white: 1, 0 dB.
    assert mse(a, a + 0.2).tolist() == pytest.approx([0.01] * 2, rel=1e-6)
    assert psnr(a, a + 0.2).tolist() == pytest.approx([20.0] * 2, abs=1e-5)
    assert psnr(a - 1, a + 1).tolist() == [0.0, 0.0] and mse(a - 1, a + 1).tolist() == [1.0, 1.0]


def test_identical_images_have_infinite_psnr():
    a = torch.zeros(1, 1, 4, 4)
    assert math.isinf(psnr(a, a).item()) and psnr(a, a).item() > 0 and mse(a, a).item() == 0
    with pytest.raises(ValueError):  # why the caller must replace it
        json.dumps(psnr(a, a).item(), allow_nan=False)


@pytest.mark.parametrize("metric", [ssim, mse, psnr])
def test_each_image_on_its_own(metric):
    a, b = pair((5, 3, 16, 16))
    b[2] = a[2] * 0.5
    whole = metric(a, b)
    assert whole.shape == (5,) and whole.dtype == torch.float64
    for i in range(5):
        torch.testing.assert_close(metric(a[i : i + 1], b[i : i + 1])[0], whole[i], rtol=0, atol=1e-12)


def test_images_are_neither_clamped_nor_rounded():
    a = torch.ones(1, 1, 16, 16)
    assert mse(a, a + 0.5).item() > 0.05 and ssim(a, a + 0.5).item() < 0.99
    assert 0 < mse(a, a + 1e-4).item() < 1e-8


def test_low_precision_inputs_are_computed_in_high():
    a, b = pair((1, 3, 16, 16))
    a, b = a.bfloat16(), b.bfloat16()
    assert ssim(a, b).item() == ssim(a.double(), b.double()).item()


@pytest.mark.parametrize("metric", [ssim, mse, psnr])
def test_shapes_are_checked(metric):
    a = torch.zeros(2, 3, 8, 8)
    for b in (a[:1], a[:, :1], a[0]):
        with pytest.raises(ValueError, match="one shape"):
            metric(a, b)
    with pytest.raises(ValueError):
        metric(a[0], a[0])
