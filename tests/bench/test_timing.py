"""Who takes turns with whom, and what the numbers made of it are."""

import pytest
import torch

from bench.timing import Alternation, Spread, clock, pedantic, rounds_within, spread

CPU = torch.device("cpu")


def scripted(**seconds):
    """(alternation, log of calls): every function takes the seconds that are next in its list."""
    log = []
    left = {name: iter(values) for name, values in seconds.items()}

    def function(name):
        return lambda: log.append(name) or name

    def fake_clock(f, _device):
        name = f()
        return next(left[name]), name

    return Alternation({name: function(name) for name in seconds}, CPU, fake_clock), log


def test_spread_interpolates():
    assert spread([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == Spread(3.5, 2.0, 5.0, 6)
    assert spread([7.0]) == Spread(7.0, 7.0, 7.0, 1)
    assert spread([1.0, 3.0]).scaled(10) == Spread(20.0, 14.0, 26.0, 2)
    with pytest.raises(ValueError, match="no samples"):
        spread([])


def test_sides_take_turns_and_the_order_is_reversed_every_other_round():
    alternation, log = scripted(a=[1] * 4, b=[1] * 4)
    alternation.run(4)
    assert log == ["a", "b", "b", "a", "a", "b", "b", "a"]


def test_the_first_calls_are_no_samples():
    alternation, log = scripted(a=[100, 1, 2, 3], b=[50, 2, 4, 9])
    results, seconds = alternation.first()
    assert results == {"a": "a", "b": "b"} and seconds == 150 and log == ["a", "b", "a", "b"]
    alternation.run(3)
    assert alternation.samples == {"a": [1, 2, 3], "b": [2, 4, 9]}


def test_ratio_is_that_of_medians_and_its_spread_that_of_pairs():
    # A machine that is ten times slower in the third round slows both sides: pairs do not see it.
    alternation, _ = scripted(base=[4, 4, 40, 4, 4], own=[2, 2, 20, 2, 1])
    alternation.run(5)
    ratio = alternation.ratio("own", "base")
    assert ratio.median == 2 and ratio.count == 5
    assert ratio.low == 2 and ratio.high == pytest.approx(2 + 0.2 * 2)
    assert alternation.ratio("base", "own").median == 0.5


def test_a_budget_ends_the_rounds_but_never_before_the_third():
    alternation, log = scripted(a=[1] * 50)
    alternation.run(50, seconds=0.0)
    assert len(log) == 3


def test_rounds_within_a_budget():
    assert [rounds_within(30, s) for s in (0.0, 1.0, 2.0, 100.0)] == [25, 25, 15, 3]


def test_the_clock_waits_for_the_function():
    seconds, result = clock(lambda: sum(range(200_000)), CPU)
    assert seconds > 1e-4 and result == sum(range(200_000))


class Benchmark:
    """What pytest-benchmark does with `pedantic`, as far as it concerns the order of calls."""

    def __init__(self, disabled):
        self.disabled = disabled

    def pedantic(self, target, setup, rounds, iterations, warmup_rounds):
        assert iterations == 1 and warmup_rounds == 0
        for _ in range(1 if self.disabled else rounds):
            assert setup() is None  # anything else would be taken for the target's arguments
            target()


@pytest.mark.parametrize("disabled", [False, True])
def test_the_others_take_their_turns_before_each_timed_call(disabled):
    alternation, log = scripted(base=[4] * 3, own=[2] * 3)
    assert pedantic(Benchmark(disabled), alternation, rounds=3) is not disabled
    assert log == ["base", "own"] * (1 if disabled else 3)
    assert alternation.ratio("own", "base").median == 2
