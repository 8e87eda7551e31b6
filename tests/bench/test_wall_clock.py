"""What the wall-clock bench times in place of the published computation."""

import torch

from bench.networks import build
from bench.test_wall_clock import SAMPLED, headline, sampled, sides
from helpers import images


def test_the_published_steps_are_those_of_the_headline():
    steps = headline(build("tiny"))
    assert len(steps) == 999 + 100 and steps[0] == (0, 1) and steps[998] == (998, 999) and steps[-1] == (9, 0)
    assert all(t < following for t, following in steps[:999]) and all(t > following for t, following in steps[999:])
    assert sampled(steps, 4) == [steps[0], steps[366], steps[732], steps[-1]]


def test_every_side_runs_and_costs_what_it_says():
    model, x0 = build("tiny"), images(2)
    functions, pipes, steps = sides(model, x0, torch.device("cpu"))
    assert list(functions) == ["published", *pipes] and steps == 1099 and SAMPLED < 10
    assert functions["published"]().shape == x0.shape
    name, pipe = next(iter(pipes.items()))
    found = functions[name]()
    assert torch.equal(found, pipe.reconstruct(x0)) and pipe.equivalents <= 2 * 2 * 40
