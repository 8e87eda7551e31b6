"""The analyses over t against float64 derivations, direct loops and closed forms."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers import TINY, image_folder, images
from pdae_fast import Pipeline, ScheduleConfig, UserError, analyze, cli
from pdae_fast.data import Sample
from pdae_fast.experiments.analyze import shift, times
from pdae_fast.experiments.analyze.times import Comparison, Point
from pdae_fast.samplers import ddim
from pdae_fast.schedule import Step, build_schedule, q_sample
from pdae_fast.training.objective import pdae_loss

CONFIG = TINY

SCHEDULE = build_schedule(ScheduleConfig())


def random_point(t, shape=(3, 1, 4, 4)):
    """A Point in float64 whose eps and G belong to no model."""
    generator = torch.Generator().manual_seed(t)
    x0, noise, eps, gradient = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4))
    alpha_bar = np.prod(1 - np.linspace(1e-4, 0.02, 1000)[: t + 1])
    return Point(t, x0, alpha_bar**0.5 * x0 + (1 - alpha_bar) ** 0.5 * noise, noise, eps, gradient)


def constants(t):
    """alpha_t, alpha_bar_t, alpha_bar_{t-1}, beta_t of the paper's linear schedule, derived here once more."""
    beta = np.linspace(1e-4, 0.02, 1000)
    bars = np.cumprod(1 - beta)
    return 1 - beta[t], bars[t], bars[t - 1] if t else 1.0, beta[t]


@pytest.mark.parametrize("t", [1, 2, 50, 400, 999])
def test_gap_is_the_distance_of_the_posterior_means(t):
    point = random_point(t)
    alpha, bar, bar_prev, beta = constants(t)
    # q(x_{t-1} | x_t, x0), eq. 7 of DDPM, as a mean of x0 and x_t ...
    first, second = bar_prev**0.5 * beta / (1 - bar), alpha**0.5 * (1 - bar_prev) / (1 - bar)
    posterior = first * point.x0 + second * point.x_t
    # ... the model's, once as the same mean with x0_hat from eps + c_t G, once as DDPM's eq. 11 moved by sigma_t^2 G.
    c_t = -(alpha**0.5) * (1 - bar_prev) / (1 - bar) ** 0.5
    shifted = point.eps + c_t * point.gradient
    by_x0 = first * (point.x_t - (1 - bar) ** 0.5 * shifted) / bar**0.5 + second * point.x_t
    plain = (point.x_t - beta / (1 - bar) ** 0.5 * point.eps) / alpha**0.5
    by_shift = plain + beta * (1 - bar_prev) / (1 - bar) * point.gradient
    found = shift.posterior_mean_gap(SCHEDULE, point)
    for mean in (by_x0, by_shift):
        torch.testing.assert_close(found["with"], (posterior - mean).square().sum((1, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(found["without"], (posterior - plain).square().sum((1, 2, 3)), rtol=1e-6, atol=0)


def test_there_is_no_shift_at_the_last_step():
    found = shift.posterior_mean_gap(SCHEDULE, random_point(0))
    torch.testing.assert_close(found["with"], found["without"], rtol=0, atol=0)
    assert float(shift.shift_size(SCHEDULE, random_point(0))["cosine"].abs().max()) == 0


def test_the_true_noise_leaves_no_gap_and_a_perfect_shift_closes_it():
    point = random_point(300)
    assert float(shift.posterior_mean_gap(SCHEDULE, point._replace(eps=point.noise))["without"].max()) == 0
    perfect = point._replace(gradient=(point.noise - point.eps) / float(SCHEDULE.shift_coef[300]))
    assert float(shift.posterior_mean_gap(SCHEDULE, perfect)["with"].max()) < 1e-25
    size = shift.shift_size(SCHEDULE, perfect)
    torch.testing.assert_close(size["shift"], size["missing"])
    torch.testing.assert_close(size["cosine"], torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("t", [10, 500, 999])
def test_one_step_estimate_is_the_samplers(t):
    point = random_point(t)
    bar = float(SCHEDULE.alpha_bar[t])

    def field(x, time, use_gradient):
        return point.eps, point.gradient if use_gradient else None

    for found, use in zip(shift.one_step(SCHEDULE, point), (False, True), strict=True):
        expected = ddim.estimate_x0(field, point.x_t, Step(t, bar, 1.0, use))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    error = shift.one_step_error(SCHEDULE, point)["with"]
    expected = ((point.x0 - shift.one_step(SCHEDULE, point)[1]) / 2).square().mean((1, 2, 3))
    torch.testing.assert_close(error, expected)


class Images:
    """Random images as a data set."""

    def __init__(self, count):
        self.all, self.names = images(count), [f"{i}" for i in range(count)]

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        return Sample(self.all[index], self.names[index], None)


def test_loss_per_t_is_that_of_a_direct_loop(model):
    data, grid = Images(5), [3, 500, 990]
    pipe = Pipeline(model, device="cpu", plan="eager", batch_size=2)
    found = times.measure(pipe, data, grid, shift.eps_loss, seed=7)
    assert found["with"].shape == (3, 5)
    for i, t in enumerate(grid):
        for k in range(5):
            noise = times.noise_at(7, t, [k], model.image_shape)
            time, x0 = torch.tensor([t]), data.all[k : k + 1]
            with torch.no_grad():
                eps, gradient = model(q_sample(SCHEDULE, x0, time, noise), time, model.encode(x0))
                trained = pdae_loss(model, SCHEDULE, x0, time, noise)
            plain = ((eps - noise) ** 2).mean()
            shifted = ((eps + float(SCHEDULE.shift_coef[t]) * gradient - noise) ** 2).mean()
            assert found["without"][i, k] == pytest.approx(float(plain), rel=1e-4)
            assert found["with"][i, k] == pytest.approx(float(shifted), rel=1e-4)
            weighted = shift.weighted(SCHEDULE, grid, Comparison(grid, found["without"], found["with"]))
            assert weighted.with_shift[i, k] == pytest.approx(float(trained), rel=1e-4)


def test_x_t_has_the_kind_of_noise_that_was_asked_for(model):
    data, seen = Images(3), {}

    def look(schedule, point):
        seen[point.t] = point
        return {"nothing": torch.zeros(len(point.x0))}

    pipe = Pipeline(model, device="cpu", plan="eager", noise="standardised")
    times.measure(pipe, data, [100, 700], look, seed=4)
    for t, point in seen.items():
        draws = times.noise_at(4, t, range(3), model.image_shape).double()
        centred = draws - draws.mean((2, 3), keepdim=True)
        expected = centred / centred.square().mean((2, 3), keepdim=True).sqrt()
        torch.testing.assert_close(point.noise.double(), expected, rtol=1e-5, atol=1e-5)
        bar = constants(t)[1]
        x_t = bar**0.5 * data.all.double() + (1 - bar) ** 0.5 * expected
        torch.testing.assert_close(point.x_t.double(), x_t, rtol=1e-5, atol=1e-5)


def test_measurements_do_not_depend_on_the_batch_or_on_other_times(model):
    data = Images(3)

    def run(batch_size, grid):
        pipe = Pipeline(model, device="cpu", plan="eager", batch_size=batch_size)
        return times.measure(pipe, data, grid, shift.posterior_mean_gap, seed=1)["with"]

    whole = run(3, [100, 700])
    np.testing.assert_allclose(run(1, [100, 700]), whole, rtol=1e-4)
    np.testing.assert_allclose(run(3, [700]), whole[1:], rtol=1e-5)
    assert not np.allclose(times.noise_at(1, 100, [0], (4,)), times.noise_at(1, 700, [0], (4,)))


def test_measurements_that_are_not_finite_are_named(model):
    pipe = Pipeline(model, device="cpu", plan="eager")

    def broken(schedule, point):
        return {"loss": torch.full((len(point.x0),), float("inf") if point.t == 700 else 1.0)}

    with pytest.raises(UserError, match="loss is not finite at t = 700"):
        times.measure(pipe, Images(2), [100, 700], broken)


def test_factors_of_a_comparison():
    grid = [0, 50, 150, 950]
    without = np.array([[4.0, 8.0], [4.0, 8.0], [1.0, 1.0], [2.0, 6.0]])
    with_shift = np.array([[4.0, 8.0], [1.0, 2.0], [1.0, 1.0], [1.0, 3.0]])
    comparison = Comparison(grid, without, with_shift)
    overall = comparison.factor()
    assert overall["factor"] == pytest.approx(without.sum() / with_shift.sum())
    assert overall["typical"] == pytest.approx((1 * 4 * 1 * 2) ** 0.25)
    assert overall["low"] <= overall["factor"] <= overall["high"]
    ranges = comparison.ranges(1000)
    assert [(r["from"], r["to"], r["times"]) for r in ranges] == [(0, 99, 2), (100, 199, 1), (900, 999, 1)]
    assert [r["factor"] for r in ranges] == pytest.approx([24 / 15, 1, 2])
    # The factor is the same for every resample where all images have it.
    assert (ranges[2]["low"], ranges[2]["high"]) == pytest.approx((2, 2))
    row = comparison.rows()[3]
    assert (row["t"], row["without"], row["with"], row["factor"]) == (950, 4, 2, 2)
    assert row["without_standard_error"] == pytest.approx(np.std([2, 6], ddof=1) / 2**0.5)


def test_time_grid():
    assert times.time_grid(1000, 2) == [0, 999]
    grid = times.time_grid(1000, 50)
    assert len(set(grid)) == 50 and grid[0] == 0 and grid[-1] == 999 and set(np.diff(grid)) <= {20, 21}
    assert times.time_grid(10, 10) == list(range(10))
    for count in (1, 1001):
        with pytest.raises(UserError, match="between 2 and 1000"):
            times.time_grid(1000, count)


def test_pictures_of_g_fill_the_range():
    point = SimpleNamespace(gradient=torch.tensor([[[[0.0, 2.0], [-4.0, 1.0]]], [[[0.0, 0.0], [0.0, 0.0]]]]))
    shown = shift.pictures_of_g(point)
    assert shown[0].flatten().tolist() == [0, 0.5, -1, 0.25] and float(shown[1].abs().max()) == 0


# -- as commands ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("data") / "in", 3)


def command(kind, model_dir, folder, out, *more):
    arguments = [kind, "--model", model_dir, "--input", folder, "--out", out, "--device", "cpu", *more]
    return cli.run(analyze.main, [str(a) for a in arguments])


@pytest.mark.parametrize(
    "kind, files",
    [
        ("gap", ["gap.csv", "gap.png"]),
        ("loss", ["loss.csv", "loss.png"]),
        ("one-step", ["one_step.csv", "one_step.png", "grid.png"]),
        ("shift", ["shift.csv", "shift.png", "grid.png"]),
    ],
)
def test_commands_over_t(kind, files, model_dir, folder, tmp_path, capsys):
    more = ["--show", 999, 30] if kind in ("one-step", "shift") else []
    assert command(kind, model_dir, folder, tmp_path / "out", "--times", 4, *more) == 0
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert report["images"] == 3 and report["times"] == [0, 333, 666, 999]
    assert report["network_evaluations_per_image"]["gradient"] == 4
    with open(tmp_path / "out" / files[0]) as file:
        rows = list(csv.DictReader(file))
    assert [int(row["t"]) for row in rows] == [0, 333, 666, 999]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*files, "metrics.json"}
    if kind != "shift":
        assert report["overall"]["factor"] == pytest.approx(report["overall"]["without"] / report["overall"]["with"])
        assert float(rows[1]["factor"]) == pytest.approx(report["at"][1]["factor"])
        assert "geometric mean over t" in capsys.readouterr().out


def test_the_noise_of_x_t_is_reported_and_changes_the_numbers(model_dir, folder, tmp_path, capsys):
    found = {}
    for noise in ("normal", "standardised"):
        assert command("gap", model_dir, folder, tmp_path / noise, "--times", 3, "--noise", noise) == 0
        assert f"{noise} noise" in capsys.readouterr().out
        report = json.loads((tmp_path / noise / "metrics.json").read_text())
        assert report["noise"] == noise
        found[noise] = report["overall"]["without"]
    assert found["normal"] != pytest.approx(found["standardised"], rel=1e-6)


def test_broken_images_are_reported(model_dir, folder, tmp_path):
    bad = tmp_path / "in"
    bad.mkdir()
    (bad / "a.png").write_bytes((folder / "00.png").read_bytes())
    (bad / "b.png").write_bytes(b"not an image")
    assert command("gap", model_dir, bad, tmp_path / "out", "--times", 2, "--quiet") == 0
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert report["images"] == 1 and [b["name"] for b in report["broken"]] == ["b"]
    with open(tmp_path / "out" / "gap.csv") as file:
        # One image has no standard error.
        assert next(csv.DictReader(file))["with_standard_error"] == ""
    assert command("gap", model_dir, bad, tmp_path / "no", "--times", 2, "--on-error", "fail") == 2


@pytest.mark.parametrize(
    "kind, more, line",
    [
        ("gap", ["--times", 1], "--times must be between 2 and 1000, not 1"),
        ("shift", ["--show", 1000], "--show takes times from 0 to 999, not 1000"),
        ("one-step", ["--show", -1], "--show takes times"),
        ("loss", ["--limit", 0], "--limit must be at least 1"),
    ],
)
def test_mistakes_are_one_line(kind, more, line, model_dir, folder, tmp_path, capsys):
    assert command(kind, model_dir, folder, tmp_path / "out", *more) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_unknown_kind_names_the_choices(capsys):
    for argv in (["gaps"], []):
        with pytest.raises(SystemExit) as stop:
            analyze.main(argv)
        assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "critical-stage" in error and "KIND" in error
