"""The student: its shapes, what it reads, and that it is saved and known again like the other models."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

import student_toy
from golden_rule import fill
from helpers import images, tiny_pdae, tiny_prior
from pdae_fast import PDAE, DiffAE, Prior, Student, StudentConfig, UserError, convert
from pdae_fast.models import Autoencoder


def test_maps_halve_and_every_finer_one_is_told_of_the_deeper():
    model = student_toy.student(halvings=3).eval()
    x = images(2)
    maps = model.features(x)
    assert [tuple(m.shape) for m in maps] == [(2, 24, 4, 4), (2, 16, 8, 8), (2, 8, 16, 16)]
    assert [tuple(m.shape[1:]) for m in maps] == [
        (w, s, s) for w, s in zip(reversed(model.config.widths), reversed(model.config.sizes), strict=True)
    ]
    assert torch.equal(model.maps(x, 1)[0], maps[0]) and len(model.maps(x, 2)) == 2
    # A far corner reaches the finest map through the deepest one alone.
    changed = x.clone()
    changed[..., :2, :2] += 1
    with torch.no_grad():
        own = model.trunk(changed)[0] - model.trunk(x)[0]
        told = model.maps(changed)[-1] - model.maps(x)[-1]
        model.pyramid.up[0].weight.zero_()
        alone = model.maps(changed)[-1] - model.maps(x)[-1]
    corner = (slice(None), slice(None), 15, 15)
    # GroupNorm alone carries something there; the deeper levels carry more.
    assert told[corner].abs().max() > alone[corner].abs().max() > 0 and own.abs().max() > 0


def test_heads_are_linear_in_the_normalised_map():
    x = images(3)
    classes = student_toy.student(head="classes", labels=("a", "b", "c")).eval()
    with torch.no_grad():
        h = classes.maps(x, 1)[0]
        groups = h.reshape(3, 8, -1)
        normal = (groups - groups.mean(2, keepdim=True)) / (groups.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
        normal = normal.reshape(h.shape)
        logits = (normal * normal.sigmoid()).mean((2, 3)) @ classes.head.read.weight.T + classes.head.read.bias
        torch.testing.assert_close(classes(x), logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(classes.predict(x), logits.softmax(1), rtol=1e-4, atol=1e-5)

    points = student_toy.student(head="points", labels=("eye",)).eval()
    assert torch.equal(points.predict(x), torch.full((3, 1, 2), 16.0))  # the centre, until something is learned
    with torch.no_grad():
        points.head.read.bias.copy_(torch.tensor([0.25, -0.5]))
    torch.testing.assert_close(points.predict(x)[:, 0], torch.tensor([[24.0, 0.0]]).expand(3, 2))

    parts = student_toy.student(head="parts", labels=("a", "b")).eval()
    out = parts(x)
    assert out.shape == (3, 2, 32, 32) and torch.equal(parts.predict(x), out.argmax(1))
    small = parts.head.read(F.silu(parts.head.norm(parts.maps(x)[-1])))
    assert torch.equal(out[:, :, 0, 0], small[:, :, 0, 0])  # bilinear: a corner is that of the small map
    fill(parts.head)  # until something is learned, the deeper maps say nothing
    maps = parts.maps(x)
    layers = [(read[0], read[2], m) for read, m in zip(parts.head.deeper, maps[:-1], strict=True)]
    corner = sum(
        F.silu(F.group_norm(m, n.num_groups, n.weight, n.bias))[:, :, 0, 0] @ r.weight[:, :, 0, 0].T + r.bias
        for n, r, m in [*layers, (parts.head.norm, parts.head.read, maps[-1])]
    )
    torch.testing.assert_close(parts(x)[:, :, 0, 0], corner, rtol=1e-4, atol=1e-5)


def test_it_is_saved_and_known_again_and_is_no_other_model(tmp_path, capsys):
    model = student_toy.student(head="points", labels=("left eye", "nose")).eval()
    model.save_pretrained(tmp_path / "student")
    again = Student.from_pretrained(tmp_path / "student")
    assert again.config == model.config and torch.equal(again.predict(images(2)), model.predict(images(2)))
    tiny_pdae().save_pretrained(tmp_path / "pdae")
    tiny_prior().save_pretrained(tmp_path / "prior")
    for name in ("pdae", "prior", "fashion32"):
        source = tmp_path / name if name != "fashion32" else name
        with pytest.raises(UserError, match="is no student; expected what"):
            Student.from_pretrained(source)
    for kind in (Prior, PDAE, DiffAE, Autoencoder):
        with pytest.raises(UserError, match="is a student"):
            kind.from_pretrained(tmp_path / "student")
    with pytest.raises(UserError, match="is a student"):
        Student.from_pretrained(tmp_path / "student", schedule="cosine")
    assert convert.main([str(tmp_path / "student"), "--out", str(tmp_path / "out")]) == 2
    assert "is a student; expected a diffusion model" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_what_does_not_fit_is_said():
    with pytest.raises(UserError, match=r"images have shape \[2, 3, 32, 32\]; this student expects \[B, 1, 32, 32\]"):
        student_toy.student(head="classes", labels=("a", "b")).predict(torch.zeros(2, 3, 32, 32))
    with pytest.raises(UserError, match="no head"):
        student_toy.student().predict(images(1))
    for changes, message in (
        ({"width": 12}, "multiple of 8"),
        ({"halvings": 6}, "cannot be halved 6 times"),
        ({"head": "poses", "labels": ("a", "b")}, "head 'poses' is not known"),
        ({"head": "classes", "labels": ("a",)}, "at least 2 labels, not 1"),
        ({"labels": ("a", "b")}, "labels go with a head"),
        ({"crop": "left"}, "crop 'left'"),
    ):
        with pytest.raises(UserError, match=message):
            StudentConfig(**{**dataclasses.asdict(student_toy.CONFIG), **changes})
