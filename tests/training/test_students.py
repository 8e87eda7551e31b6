"""Distillation and recognition as tasks of the trainer: what is read, what is trained, and that they resume exactly."""

import signal

import numpy as np
import pytest
import torch

import killing
import student_toy
from helpers import resumed_equals_whole
from pdae_fast import Student, UserError
from pdae_fast.training import Trainer, TrainSettings
from pdae_fast.training.recognition import (
    Labelled,
    TaskTruth,
    choose_labels,
    evaluate,
    find_truth,
    measure,
    task_loss,
)
from pdae_fast.training.students import Choice, RecogniseTask, describe_policy, with_head
from student_toy import Pictures, student, student_task, truth


def trainer(out, task, data, steps=6, **options):
    settings = TrainSettings(task.name, "x", steps, 4, lr=1e-3, seed=3, flip=False)
    return Trainer(task, data, settings, out, log_every=1, save_every=2, quiet=True, **options)


CHOOSE = [
    ("0", "dense", {}),
    ("uniform", "pooled", {}),
    ("all", "dense+attention", {}),
    ("policy", "dense", {"estimator": "exact"}),
    ("policy", "relations", {"estimator": "reinforce"}),
]


@pytest.mark.parametrize(("choose", "loss", "bandit"), CHOOSE)
def test_a_killed_distillation_resumes_bit_for_bit(tmp_path, choose, loss, bandit):
    known = truth() if choose == "policy" else None

    def make(out):
        return trainer(out, *student_task(choose, loss, 2, known, **bandit))

    resumed_equals_whole(tmp_path, make)
    saved = torch.load(tmp_path / "parted" / "checkpoint.pt", weights_only=True)
    assert saved["record"]["--choose"] == ("fixed" if choose == "0" else choose)
    whole = Student.from_pretrained(tmp_path / "whole")
    # What helped it learn is in the checkpoint and not in the student.
    assert whole.config == student_toy.CONFIG and any(name.startswith("student.") for name in saved["model"])
    assert ("policy.decide.1.weight" in saved["model"]) == (choose == "policy")


@pytest.mark.parametrize("task", ["classes", "points", "parts"])
def test_a_killed_recognition_resumes_bit_for_bit(tmp_path, task):
    def make(out):
        return trainer(
            out, RecogniseTask(with_head(student(), truth(task)), truth(task)), Labelled(Pictures(), truth(task))
        )

    resumed_equals_whole(tmp_path, make)
    assert Student.from_pretrained(tmp_path / "whole").config.labels == ("a", "b", "c")


def test_sigkill_at_any_save_loses_no_finished_step(tmp_path):
    def run(out):
        made = trainer(out, *student_task("policy", known=truth()))
        if (out / "checkpoint.pt").exists():
            made.resume()
        made.run()
        return 0

    assert killing.run(lambda: run(tmp_path / "whole")).status == 0
    changes = killing.run(lambda: run(tmp_path / "counted")).changes
    ended = killing.run(lambda: run(tmp_path / "killed"), at=changes * 2 // 3)
    assert ended.status == -signal.SIGKILL
    assert killing.run(lambda: run(tmp_path / "killed")).status == 0
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "killed"))
    assert a == b


@pytest.mark.parametrize("choose", ["0", "uniform", "all"])
def test_without_a_policy_no_label_is_read(tmp_path, choose):
    weights = []
    for shift in (0, 1):
        task, data = student_task(choose)
        data.dataset.labels = np.roll(data.dataset.labels, shift)
        trainer(tmp_path / f"{shift}", task, data, steps=3).run()
        weights.append((tmp_path / f"{shift}" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    # A policy does read them.
    rewarded = []
    for shift in (0, 1):
        known = truth()._replace(values=truth().values.roll(shift))
        run = trainer(tmp_path / f"policy{shift}", *student_task("policy", known=known), steps=3)
        run.run()
        rewarded.append(run.model.decoder.read[0].weight)
    assert not torch.equal(*rewarded)


def test_a_run_of_another_choice_or_teacher_is_not_resumed(tmp_path):
    trainer(tmp_path, *student_task("uniform"), steps=2).run()
    other, data = student_task("uniform")
    other.record["teacher"] = "another"
    with pytest.raises(UserError, match="other teacher than those of the saved run"):
        trainer(tmp_path, other, data).resume()
    with pytest.raises(UserError, match="other --loss"):
        trainer(tmp_path, *student_task("uniform", "pooled")).resume()


def test_frozen_recognition_trains_the_head_alone(tmp_path):
    known = truth()
    start = student()
    model = with_head(start, known)
    task = RecogniseTask(model, known, freeze=True)
    trainer(tmp_path, task, Labelled(Pictures(), known), steps=3).run()
    found = Student.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(v, found[k]) for k, v in start.state_dict().items())
    assert not torch.equal(found["head.read.weight"], with_head(start, known).head.read.weight)


@pytest.mark.parametrize(("first", "slow"), [(0.0, False), (0.5, True), (0.9, True)])
def test_the_head_learns_first_and_then_the_rest_more_slowly(tmp_path, first, slow):
    known = truth("parts")
    model = with_head(student(), known)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    learning = trainer(tmp_path, RecogniseTask(model, known, head_first=first), Labelled(Pictures(), known), steps=8)
    learning.run()
    moved = {k: float((v - start[k]).abs().max()) for k, v in learning.model.state_dict().items()}
    head, rest = (max(v for k, v in moved.items() if k.startswith("head.") == own) for own in (True, False))
    # Eight steps of at most about the rate of 1e-3 each; of the rest none, or half as many of a tenth of it.
    assert head > 2e-3
    assert rest == 0 if first == 0.9 else 1e-4 < rest < 6e-4 if slow else rest > 2e-3
    with pytest.raises(UserError, match="--head-first must be at least 0 and below 1, not 1"):
        RecogniseTask(model, known, head_first=1.0)


def test_a_new_head_takes_the_place_of_the_old_and_points_start_at_their_mean():
    known = truth("points")
    model = with_head(with_head(student(), truth()), known)
    assert model.config.head == "points" and model.config.labels == ("a", "b", "c")
    torch.testing.assert_close(model(Pictures().pixels[:1])[0], known.values.mean(0), rtol=1e-4, atol=1e-3)


def test_a_time_is_chosen_as_asked():
    assert Choice.of("50", None, 1000) == ("fixed", (50,))
    assert Choice.of("policy", None, 1000).times == (0, 25, 50, 100, 200, 400, 700, 900)
    assert Choice.of("all", None, 100).times == (0, 2, 5, 10, 20, 40, 70, 90)
    assert Choice.of("uniform", [5, 7], 1000) == ("uniform", (5, 7))
    for asked, times, message in (
        ("best", None, "neither a time nor one of uniform, policy, all"),
        ("0", [1, 2], "is one already"),
        ("uniform", [3], "at least two different --times"),
        ("policy", [3, 3, 4], "at least two different --times"),
    ):
        with pytest.raises(UserError, match=message):
            Choice.of(asked, times, 1000)


def test_the_policy_is_described_by_its_mean_and_its_rewards():
    known = truth("points").rows([1, 4, 6])
    task, data = student_task("policy", known=known)
    with torch.no_grad():
        task.model.policy.decide[-1].bias.copy_(torch.log(torch.tensor([0.2, 0.3, 0.5])))
        for i, parameter in enumerate(task.model.decoder.parameters()):
            torch.nn.init.normal_(parameter, 0, 0.01, torch.Generator().manual_seed(i))
    found = describe_policy(task.model, task, data)
    assert [*found["probability"].values()] == pytest.approx([0.2, 0.3, 0.5], abs=1e-5)
    p = np.array([0.2, 0.3, 0.5])
    assert found["entropy"] == pytest.approx(-(p * np.log(p)).sum(), rel=1e-4)
    rewards = np.array([*found["reward"]["times"].values()])
    assert found["reward"]["policy"] == pytest.approx(p @ rewards, rel=1e-4)
    assert found["reward"]["uniform"] == pytest.approx(rewards.mean(), rel=1e-4)
    assert found["reward"]["best fixed"] == pytest.approx(rewards.max()) and rewards.max() < 0


# -- labels and measures -----------------------------------------------------------------------------------------------


def test_losses_of_a_task_are_their_formulas():
    random = np.random.default_rng(0)
    logits, labels = random.standard_normal((4, 3)), np.array([0, 2, 1, 1])
    log = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    found = task_loss("classes", torch.from_numpy(logits), torch.from_numpy(labels))
    np.testing.assert_allclose(found, -log[np.arange(4), labels], rtol=1e-12)
    a, b = random.standard_normal((2, 4, 5, 2))
    found = task_loss("points", torch.from_numpy(a), torch.from_numpy(b), 0.25)
    np.testing.assert_allclose(found, ((a - b) ** 2).mean((1, 2)) / 0.25, rtol=1e-12)
    masks = random.integers(0, 3, (2, 8, 8))
    maps = random.standard_normal((2, 3, 4, 4))
    log = maps - np.log(np.exp(maps).sum(1, keepdims=True))
    small = masks[:, 1::2, 1::2]
    expected = [-np.mean([log[i, small[i, y, x], y, x] for y in range(4) for x in range(4)]) for i in range(2)]
    found = task_loss("parts", torch.from_numpy(maps), torch.from_numpy(masks))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_measures_agree_with_their_definitions():
    known = truth()
    assert measure(known, torch.zeros(12, dtype=torch.int64)) == {"accuracy": 4 / 12}
    parts, said = truth("parts"), torch.randint(0, 3, (12, 32, 32), generator=torch.Generator().manual_seed(0))
    parts = parts._replace(labels=["a", "b", "c", "nowhere"])
    found = measure(parts, said)
    for i, name in enumerate("abc"):
        a, b = parts.values == i, said == i
        assert found["iou"][name] == pytest.approx(float((a & b).sum() / (a | b).sum()))
    assert "nowhere" not in found["iou"] and found["miou"] == pytest.approx(np.mean([*found["iou"].values()]))
    assert found["pixels"] == pytest.approx(float((parts.values == said).double().mean()))
    points = truth("points")._replace(labels=["left_eye", "right_eye", "nose"])
    found = measure(points, points.values + torch.tensor([3.0, 4.0]))
    assert found["distance"] == pytest.approx(5) and found["points"]["nose"] == pytest.approx(5)
    eyes = (points.values[:, 0] - points.values[:, 1]).norm(dim=1)
    assert found["nme"] == pytest.approx(float((5 / eyes).mean()))


def test_evaluation_reads_the_images_that_have_a_truth():
    known = truth().rows([0, 4, 7])
    model = with_head(student(), known).eval()
    right = model.predict(Pictures().pixels[[0, 4, 7]]).argmax(1) == known.values
    assert evaluate(model, Pictures(), known, 2) == {"accuracy": float(right.double().mean())}


def test_labels_are_drawn_evenly_and_fewer_are_some_of_more():
    known = TaskTruth("classes", ["a", "b", "c"], torch.tensor([0] * 80 + [1] * 15 + [2] * 5), np.arange(100))
    few, more = choose_labels(known, 9, 4), choose_labels(known, 30, 4)
    assert few.values.bincount().tolist() == [3, 3, 3] and set(few.indices) <= set(more.indices)
    assert more.values.bincount().tolist() == [13, 12, 5] or more.values.bincount().tolist() == [12, 13, 5]
    assert not np.array_equal(choose_labels(known, 9, 5).indices, few.indices)
    assert choose_labels(known, None, 0) is known
    for count, message in ((0, "from 1 to the 100 images"), (101, "not 101"), (1, "all of one class")):
        with pytest.raises(UserError, match=message):
            choose_labels(known, count, 0)


def test_truth_is_found_or_missed_in_one_line(tmp_path):
    data = Pictures()
    found = find_truth("classes", "x", data)
    assert found.labels == ["0", "1", "2"] and found.values.tolist() == [i % 3 for i in range(12)]
    rows = [f"{i:02d},{int(i % 2 == 0)},{int(i % 2)}" for i in range(12)]
    table = tmp_path / "table.csv"
    table.write_text("\n".join(["name,even,odd", *rows]))
    found = find_truth("classes", "x", data, str(table))
    assert found.labels == ["even", "odd"] and found.values.tolist() == [0, 1] * 6
    table.write_text("\n".join(["name,even,odd", *rows[:5], "05,1,1"]))
    with pytest.raises(UserError, match="05 has 2 of the 2 columns positive"):
        find_truth("classes", "x", data, str(table))
    data.labels = np.zeros(12, np.int64)
    with pytest.raises(UserError, match="all 12 images are of one class"):
        find_truth("classes", "x", data)
    data.labels, data.names = None, [f"{'ab'[i % 2]}/{i}" for i in range(12)]
    assert find_truth("classes", "x", data).labels == ["a", "b"]
    data.names = [f"{i}" for i in range(12)]
    with pytest.raises(UserError, match="these images have no classes: give --attributes"):
        find_truth("classes", "x", data)
    with pytest.raises(UserError, match="not a folder of avatars"):
        find_truth("points", str(tmp_path), data)
    with pytest.raises(UserError, match="--attributes and --columns are for --task classes"):
        find_truth("parts", "x", data, str(table))
    with pytest.raises(UserError, match="--task poses is not known"):
        find_truth("poses", "x", data)
