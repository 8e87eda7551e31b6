"""The losses of distillation against their formulas in float64 numpy, and what a distiller trains."""

import numpy as np
import pytest
import torch

import student_toy
from helpers import images
from pdae_fast.training.distillation import LOSSES, Distiller, Projection, attention, dense, pooled, relations

SHAPES = ((5, 7, 4, 4), (5, 3, 8, 8))  # images, channels, places


@pytest.fixture
def levels():
    random = np.random.default_rng(0)
    return [[random.standard_normal(shape) for shape in SHAPES] for _ in range(2)]


def loss_of(name, h, z):
    return float(LOSSES[name].compare([torch.from_numpy(v) for v in h], [torch.from_numpy(v) for v in z]))


def smooth_l1(a, b):
    gap = np.abs(a - b)
    return np.where(gap < 1, gap**2 / 2, gap - 0.5).mean()


def test_dense_pooled_and_attention_are_their_formulas(levels):
    h, z = levels
    pairs = list(zip(h, z, strict=True))
    flat = np.mean([((a - b) ** 2).mean() for a, b in pairs])
    means = np.mean([((a.mean((2, 3)) - b.mean((2, 3))) ** 2).mean() for a, b in pairs])

    def where(x):
        energy = (x**2).sum(1).reshape(len(x), -1)
        return energy / (np.sqrt((energy**2).sum(1, keepdims=True)) + 1e-6)

    looked = 1000 * np.mean([((where(a) - where(b)) ** 2).mean() for a, b in pairs])
    expected = {"dense": flat, "pooled": means, "attention": looked, "dense+attention": flat + looked / 10}
    for name, value in expected.items():
        assert loss_of(name, h, z) == pytest.approx(value, rel=1e-12), name
    # The scale of a map is no part of its attention, and a student as wide as nobody else may be compared.
    assert loss_of("attention", [3 * v[:, :2] for v in h], [v[:, :2] for v in h]) == pytest.approx(0, abs=1e-9)


def test_relations_are_distances_and_angles_of_spatial_means(levels):
    h, z = levels

    def of(x):
        x, n = x.mean((2, 3)), len(x)
        d = np.array([[np.sqrt(((a - b) ** 2).sum()) for b in x] for a in x])
        angles = np.zeros((n, n, n))
        for i in range(n):
            for j in range(n):
                for k in range(n):
                    if i not in (j, k):
                        a, b = x[j] - x[i], x[k] - x[i]
                        angles[i, j, k] = a @ b / np.sqrt((a @ a) * (b @ b))
        return d / d[d > 0].mean(), angles

    expected = []
    for a, b in zip(h, z, strict=True):
        (d, angle), (d_z, angle_z) = of(a), of(b)
        expected.append(25 * smooth_l1(d, d_z) + 50 * smooth_l1(angle, angle_z))
    assert loss_of("relations", h, z) == pytest.approx(np.mean(expected), rel=1e-10)


def test_relations_of_equal_images_have_a_finite_gradient():
    h = torch.ones(4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    relations([h], [torch.rand(4, 3, 2, 2, dtype=torch.float64)]).backward()
    assert torch.isfinite(h.grad).all()


def test_a_distiller_standardises_the_teacher_and_is_told_the_time():
    found = student_toy.features(levels=2)
    model = Distiller(student_toy.student(), found.shapes, found.statistics, "dense", told=True)
    with torch.no_grad():
        for read in model.projections:
            read.at.weight.normal_()
        x, (z0, z1) = images(4), (torch.from_numpy(np.array(level[:4, 2])) for level in found.levels)
        h = model.predict(x)
        maps = model.student.maps(x)
        expected = []
        for a, z, read, (mean, std) in zip(maps, (z0, z1), model.projections, found.statistics, strict=True):
            out = np.einsum("bchw,dc->bdhw", a.double().numpy(), read.read.weight[..., 0, 0].double().numpy())
            out += read.read.bias.double().numpy()[:, None, None]
            scale, shift = read.at.weight[2].double().numpy().reshape(2, -1, 1, 1)
            target = (z.double().numpy() - mean[2].numpy()[:, None, None]) / std[2].numpy()[:, None, None]
            expected.append(((out * (1 + scale) + shift - target) ** 2).mean())
        assert float(model.compare(h, [z0, z1], 2)) == pytest.approx(np.mean(expected), rel=1e-5)
    plain = Distiller(student_toy.student(), found.shapes, found.statistics, "dense")
    k = torch.tensor([0, 2, 1, 0])  # a time for each image
    mixed = [torch.stack([torch.from_numpy(np.array(level[i, k[i]])) for i in range(4)]) for level in found.levels]
    with torch.no_grad():
        h = plain.predict(x)
        one = [plain.compare([v[i : i + 1] for v in h], [v[i : i + 1] for v in mixed], int(k[i])) for i in range(4)]
        assert float(plain.compare(h, mixed, k)) == pytest.approx(float(torch.stack(one).mean()), rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("levels", [1, 2])
def test_every_trained_weight_is_reached_and_no_other(loss, levels):
    """Adam has moments of all that is trained or of nothing, and DistributedDataParallel waits for every gradient."""
    found = student_toy.features(levels=levels)
    model = Distiller(student_toy.student(), found.shapes, found.statistics, loss)
    z = [torch.from_numpy(np.array(level[:4, 0])).float() for level in found.levels]
    model.compare(model.predict(images(4)), z, 0).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trained.values())
    assert any(name.startswith("student.pyramid.") for name in trained) == (levels > 1)
    assert LOSSES[loss].projected == any(name.startswith("projections.") for name in trained)


def test_a_code_is_read_from_the_map_averaged_to_four_by_four():
    read, h = Projection(6, (9, 1, 1)), torch.randn(2, 6, 8, 8)
    small = h.reshape(2, 6, 4, 2, 4, 2).mean((3, 5))
    expected = torch.einsum("bcyx,dcyx->bd", small, read.read.weight) + read.read.bias
    torch.testing.assert_close(read(h)[:, :, 0, 0], expected, rtol=1e-4, atol=1e-5)
    larger = Projection(6, (9, 16, 16))
    assert larger(h).shape == (2, 9, 16, 16)


def test_scalars_have_the_losses_sense():
    h = [torch.zeros(2, 1, 2, 2)]
    assert float(dense(h, h)) == float(pooled(h, h)) == float(attention(h, h)) == 0
