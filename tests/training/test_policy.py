"""The policy over times: its two gradients, its draws, and that it finds the best time where it is known."""

import math

import numpy as np
import pytest
import torch

import student_toy
from pdae_fast.training import policy
from pdae_fast.training.policy import Decoder, Policy, bonus, entropy, exact, pick, reinforce
from pdae_fast.training.recognition import task_loss


def gradient(loss, logits):
    (found,) = torch.autograd.grad(loss, logits)
    return found.numpy()


def test_the_exact_gradient_is_its_closed_form_and_the_mean_of_reinforce():
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, generator=random, dtype=torch.float64, requires_grad=True)
    rewards = -torch.rand(2, 3, generator=random, dtype=torch.float64) * 4
    pi, R = logits.detach().softmax(1).numpy(), rewards.numpy()
    found = gradient(exact(logits, rewards), logits)
    # d/dlogit_k of -sum pi R: -pi_k (R_k - sum pi R), over two images.
    np.testing.assert_allclose(found, -pi * (R - (pi * R).sum(1, keepdims=True)) / 2, rtol=1e-12)
    # All nine pairs of actions, each as probable as it is: the expectation itself, no sampling.
    mean = np.zeros_like(found)
    for a in range(3):
        for b in range(3):
            actions = torch.tensor([a, b])
            chosen = rewards.gather(1, actions[:, None])[:, 0]
            mean += pi[0, a] * pi[1, b] * gradient(reinforce(logits, actions, chosen), logits)
    np.testing.assert_allclose(mean, found, rtol=1e-10)
    # And so is the mean over drawn ones, within its error.
    draws = []
    for _ in range(4000):
        actions = pick(logits.detach(), torch.rand(2, generator=random, dtype=torch.float64))
        draws.append(gradient(reinforce(logits, actions, rewards.gather(1, actions[:, None])[:, 0]), logits))
    error = np.std(draws, axis=0) / math.sqrt(len(draws))
    assert (np.abs(np.mean(draws, axis=0) - found) < 4.5 * error).all() and (error > 0).all()


def test_draws_have_the_probabilities_and_follow_from_u_alone():
    logits = torch.log(torch.tensor([[0.2, 0.5, 0.3]])).expand(5, 3)
    assert pick(logits, torch.tensor([0.0, 0.19, 0.21, 0.69, 0.999999])).tolist() == [0, 0, 1, 1, 2]
    u = torch.linspace(0, 0.9999, 1000)
    counts = pick(logits[:1].expand(1000, 3), u).bincount(minlength=3)
    assert counts.tolist() == pytest.approx([200, 500, 300], abs=1)
    assert int(pick(torch.zeros(1, 3), torch.ones(1))) == 2  # rounding of the sum is no fourth time


def test_entropy_and_its_weight():
    p = np.array([[0.25, 0.75], [0.5, 0.5]])
    assert float(entropy(torch.log(torch.from_numpy(p)))) == pytest.approx(-(p * np.log(p)).sum(1).mean(), rel=1e-12)
    weights = [float(bonus(0.1, torch.tensor(n), 100)) for n in (0, 25, 50, 90)]
    assert weights == pytest.approx([0.1, 0.05, 0, 0])


@pytest.mark.parametrize("estimator", policy.ESTIMATORS)
def test_a_policy_finds_the_time_that_is_best_for_the_image(estimator):
    """Dark images are best read at time 0, bright ones at time 2; time 1 is never best."""
    torch.manual_seed(0)
    model, random = Policy(1, 3), torch.Generator().manual_seed(1)
    assert torch.equal(model(torch.randn(2, 1, 32, 32)), torch.zeros(2, 3))  # all times alike at first
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    table = torch.tensor([[-0.1, -1.0, -2.0], [-2.0, -1.0, -0.1]])
    for step in range(150):
        bright = torch.rand(32, generator=random) < 0.5
        x = torch.where(bright, 0.5, -0.5)[:, None, None, None] + torch.randn(32, 1, 32, 32, generator=random) / 10
        rewards, logits = table[bright.long()], model(x)
        if estimator == "exact":
            loss = exact(logits, rewards)
        else:
            actions = pick(logits.detach(), torch.rand(32, generator=random))
            loss = reinforce(logits, actions, rewards.gather(1, actions[:, None])[:, 0])
        loss = loss - bonus(0.1, torch.tensor(step), 150) * entropy(logits)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    with torch.no_grad():
        pi = model(torch.tensor([-0.5, 0.5])[:, None, None, None].expand(2, 1, 32, 32)).softmax(1)
    assert pi[0, 0] > 0.9 and pi[1, 2] > 0.9


def test_decoders_read_what_a_task_asks():
    levels, shapes = [torch.randn(3, 6, 8, 8), torch.randn(3, 5, 16, 16)], [(6, 8, 8), (5, 16, 16)]
    assert Decoder("classes", shapes, 4)(levels).shape == (3, 4)
    assert torch.equal(Decoder("points", shapes, 2)(levels), torch.full((3, 2, 2), 0.5))
    parts = Decoder("parts", shapes, 3)
    assert parts(levels).shape == (3, 3, 16, 16)
    torch.testing.assert_close(
        parts([torch.zeros(3, 6, 8, 8), levels[1]])[0, :, 4, 7],
        parts.read[1].weight[:, :, 0, 0] @ levels[1][0, :, 4, 7] + parts.read[1].bias + parts.read[0].bias,
    )


@pytest.mark.parametrize("task", ["classes", "parts", "points"])
@pytest.mark.parametrize("estimator", policy.ESTIMATORS)
def test_the_task_minimises_these_very_losses(task, estimator):
    truth = student_toy.truth(task)
    learned, data = student_toy.student_task("policy", levels=2, known=truth, estimator=estimator)
    model = learned.model
    with torch.no_grad():
        model.policy.decide[-1].weight.normal_()
    batch = torch.utils.data.default_collate([data[i] for i in range(4)])
    x, *drawn = learned.draw(batch, torch.Generator().manual_seed(0), False)
    loss = learned(x, *drawn)
    levels, (u, v, shown), known = drawn[:2], drawn[2:5], drawn[5:7]
    logits = model.policy(x)
    k = pick(logits, u)
    rows = torch.arange(4)
    kd = model.compare(model.predict(x), [level[rows, k] for level in levels], k)
    rewards = []
    for time in range(3):
        scaled = [
            (level[:, time].float() - getattr(model, f"mean{i}")[time]) / getattr(model, f"std{i}")[time]
            for i, level in enumerate(known)
        ]
        target = truth.values[:4] / (32 if task == "points" else 1) if task != "classes" else truth.values[:4]
        target = truth.values[:4] if task == "parts" else target
        rewards.append(-task_loss(task, model.decoder(scaled), target, truth.scale))
    R = torch.stack(rewards, 1)
    assert torch.equal(shown, x)  # image i has a label itself
    if estimator == "exact":
        value = exact(logits, R.detach()) - (logits.detach().softmax(1) * R).sum(1).mean()
    else:
        a = pick(logits, v)
        value = reinforce(logits, a, R.detach()[rows, a]) - R[rows, a].mean()
    # The task's own pass is counted: the next one weighs the entropy less.
    assert int(model.passes) == 1
    torch.testing.assert_close(loss, kd + value - 0.1 * entropy(logits), rtol=1e-4, atol=1e-5)
