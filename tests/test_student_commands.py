"""`train student`, `train recognise` and the export of a student as a user runs them."""

import json
import shutil

import numpy as np
import pytest
import torch

import idx_files
import student_toy
from helpers import image_folder, tiny_pdae, tiny_prior
from pdae_fast import Student, StudentConfig, cli, train
from pdae_fast.data import open_dataset
from pdae_fast.data.bundled import bundled_path
from pdae_fast.engine import plan

SMALL = ("--steps", 4, "--batch-size", 4, "--warmup", 1, "--log-every", 1, "--device", "cpu", "--quiet")
TINY = ("--width", 8)


def run(*argv):
    try:
        return cli.run(train.main, [str(a) for a in argv])
    except SystemExit as stop:
        return stop.code


def refused(capsys, *argv):
    """The one line that a refused command prints."""
    capsys.readouterr()
    assert run(*argv) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1 and printed.err.startswith("error: "), printed.err
    return printed.err


@pytest.fixture
def data(tmp_path):
    """30 training and 30 test images of three classes."""
    folder = idx_files.write_set(tmp_path / "data", count=30)
    for name in ("train", "t10k"):
        (folder / f"{name}-labels-idx1-ubyte.gz").unlink(missing_ok=True)
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(idx_files.idx_bytes((np.arange(30) % 3).astype(np.uint8)))
    return folder


@pytest.fixture
def teacher(tmp_path):
    tiny_pdae().save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.fixture
def computed(monkeypatch):
    calls = []
    real = plan.Plan.features
    monkeypatch.setattr(plan.Plan, "features", lambda self, *a, **k: calls.append(1) or real(self, *a, **k))
    return calls


def test_from_a_teacher_to_a_student_that_predicts(tmp_path, data, teacher, computed, capsys):
    out, taught = tmp_path / "student", tmp_path / "taught"
    shared = ("student", "--data", data, "--init-from", teacher, *TINY, *SMALL)
    assert run(*shared, "--out", out) == 0
    assert {p.name for p in out.iterdir()} == {
        "config.json", "model.safetensors", "checkpoint.pt", "train.json", "log.jsonl",
    }  # fmt: skip
    settings = json.loads((out / "train.json").read_text())
    assert settings["init_from"] == str(teacher) and settings["--choose"] == "fixed" and settings["--times"] == [0]
    (kept,) = (tmp_path / "latents").glob("features-*")
    made = len(computed)
    assert run(*shared, "--out", tmp_path / "again", "--cached-only") == 0 and len(computed) == made
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()
    student = Student.from_pretrained(out)
    images = torch.stack([open_dataset(data, 32, 1)[i].image for i in range(3)])
    # As deep as the teacher's middle block.
    assert [tuple(m.shape[1:]) for m in student.features(images)] == [(8, 16, 16)]

    teach = ("recognise", "--data", data, "--init-from", out, "--task", "classes", "--labels", 9)
    assert run(*teach, "--out", taught, *SMALL[:-1]) == 0
    assert json.loads((taught / "train.json").read_text())["--head-first"] == 0.5
    report = json.loads((taught / "metrics.json").read_text())
    printed = capsys.readouterr().out
    assert report["part"] == "held out" and f"accuracy {report['accuracy']:.4f}\n30 images" in printed
    found = Student.from_pretrained(taught)
    predicted = found.predict(images)
    assert predicted.shape == (3, 3) and torch.allclose(predicted.sum(1), torch.ones(3))
    test = open_dataset(data, 32, 1, "test")
    said = found.predict(torch.stack([test[i].image for i in range(30)])).argmax(1).numpy()
    assert report["accuracy"] == pytest.approx((said == test.labels).mean())
    assert run(*teach, "--out", tmp_path / "frozen", "--freeze", *SMALL) == 0
    kept = Student.from_pretrained(tmp_path / "frozen").trunk.stem.weight
    assert torch.equal(kept, student.trunk.stem.weight)
    assert run(*teach, "--out", tmp_path / "scratch", "--scratch", "--freeze", *SMALL) == 0
    assert not torch.equal(Student.from_pretrained(tmp_path / "scratch").trunk.stem.weight, student.trunk.stem.weight)
    assert "--head-first" not in json.loads((tmp_path / "scratch" / "train.json").read_text())
    assert run(*teach, "--out", taught, *SMALL, "--resume") == 0
    assert run(*teach, "--out", taught, *SMALL, "--resume", "--head-first", 0) == 2


@pytest.mark.parametrize("estimator", ["exact", "reinforce"])
def test_a_policy_is_described(tmp_path, data, teacher, estimator, capsys):
    out = tmp_path / "student"
    options = ("--choose", "policy", "--task", "classes", "--times", 0, 40, 300, "--estimator", estimator)
    assert run("student", "--data", data, "--init-from", teacher, "--out", out, *TINY, *options, "--labels", 6,
               "--loss", "pooled", "--noised", "--target", "decoder", *SMALL[:-1]) == 2  # fmt: skip
    assert "the student has none of these beyond one" in capsys.readouterr().err  # one level alone
    assert run("student", "--data", data, "--init-from", teacher, "--out", out, *TINY, *options, "--labels", 6,
               "--loss", "pooled", "--noised", *SMALL[:-1]) == 0  # fmt: skip
    report = json.loads((out / "metrics.json").read_text())
    assert [*report["probability"]] == ["0", "40", "300"] and sum(report["probability"].values()) == pytest.approx(1)
    assert "reward on the labelled images: policy" in capsys.readouterr().out


def test_points_and_parts_of_avatars(tmp_path):
    """Of a folder of a few of the bundled avatars."""
    source, folder = bundled_path("avatars"), tmp_path / "avatars"
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
        for k in range(16):
            shutil.copy(f"{source}/{name}/{k:06d}.png", folder / name)
    for name in ("manifest.json", "landmarks.csv"):
        shutil.copy(f"{source}/{name}", folder)
    start = tmp_path / "start"
    torch.manual_seed(0)
    Student(StudentConfig(width=8)).save_pretrained(start)
    teach = ("recognise", "--data", folder, "--init-from", start, "--holdout", 0.25, "--labels", 8, *SMALL)
    for task, measure in (("points", "distance"), ("parts", "miou")):
        assert run(*teach, "--task", task, "--out", tmp_path / task) == 0
        report = json.loads((tmp_path / task / "metrics.json").read_text())
        assert report[measure] > 0
    images = torch.stack([open_dataset(folder, 64, 3)[i].image for i in range(2)])
    assert Student.from_pretrained(tmp_path / "points").predict(images).shape == (2, 9, 2)
    assert Student.from_pretrained(tmp_path / "parts").predict(images).shape == (2, 64, 64)


def test_mistakes_are_said_in_one_line_before_anything_is_computed(tmp_path, data, teacher, computed, capsys):
    out = tmp_path / "out"
    one = ("student", "--data", data, "--init-from", teacher, "--out", out, *SMALL)
    for options, message in (
        (("--choose", "1000"), "the teacher has no time 1000; expected whole numbers from 0 to 999"),
        (("--choose", "soon"), "neither a time nor one of uniform, policy, all"),
        (("--choose", "all", "--times", 3), "at least two different --times"),
        (("--choose", "policy"), "say which with --task"),
        (("--choose", "policy", "--task", "points"), "not a folder of avatars"),
        (("--choose", "policy", "--task", "classes", "--labels", 40), "--labels must be from 1 to the 30 images"),
        (("--choose", "policy", "--task", "classes", "--labels", 1), "all of one class"),
        (("--choose", "policy", "--task", "classes", "--entropy", "-1"), "--entropy must be a number from 0 up"),
        (("--task", "classes"), "--choose 0 reads no labels"),
        (("--target", "z", "--noised"), "--target z is that of a clean image and no time"),
        (("--target", "z", "--loss", "attention"), "--loss attention compares places"),
        (("--target", "decoder"), "the student has none of these"),
        (("--width", 12), "width must be a multiple of 8"),
        (("--halvings", 7), "cannot be halved 7 times"),
        (("--label", 1), "--label is for a class-conditional teacher"),
        (("--loss", "cosine"), "invalid choice: 'cosine'"),
    ):
        assert message in refused(capsys, *one, *options), options
    prior = tmp_path / "prior"
    tiny_prior().save_pretrained(prior)
    assert "needs an autoencoder" in refused(capsys, *one[:3], "--init-from", prior, *one[5:], "--target", "z")
    assert not computed and not (tmp_path / "latents").exists()

    student = tmp_path / "student"
    assert run(*one[:5], "--out", student, *TINY, *SMALL) == 0
    teach = ("recognise", "--data", data, "--init-from", student, "--out", out, *SMALL)
    pictures = image_folder(tmp_path / "pictures", 8)
    for options, message in (
        ((), "the following arguments are required: --task"),
        (("--task", "parts"), "not a folder of avatars"),
        (("--task", "classes", "--labels", 2, "--data", pictures), "these images have no classes"),
        (("--task", "classes", "--labels", 31), "--labels must be from 1 to the 30 images"),
        (("--task", "classes", "--holdout", 1.5), "holdout must be a fraction"),
        (("--task", "classes", "--init-from", teacher), "is no student"),
    ):
        assert message in refused(capsys, *teach, *options), options
    assert "is a student; expected a diffusion model" in refused(capsys, *one[:3], "--init-from", student, *one[5:])
    labels = data / "train-labels-idx1-ubyte"
    labels.write_bytes(idx_files.idx_bytes(np.zeros(30, np.uint8)))
    assert "all 30 images are of one class" in refused(capsys, *teach, "--task", "classes")
    assert not out.exists()


def test_masks_of_another_size_are_refused(tmp_path, capsys):
    student_toy.student(input_channel=3).save_pretrained(tmp_path / "small")
    error = refused(capsys, "recognise", "--data", "bundled:avatars", "--init-from", tmp_path / "small", "--task",
                    "parts", "--out", tmp_path / "out", *SMALL)  # fmt: skip
    assert "masks of 64 x 64 pixels; the student sees 32 x 32" in error
