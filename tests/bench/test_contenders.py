"""The comparison itself: same numbers on both sides, or no speed."""

import pytest
import torch

from bench import contenders, networks
from bench.baseline import Baseline
from bench.compiled import CompiledBaseline
from bench.operations import operations, prepare, row
from bench.timing import Alternation
from pdae_fast.samplers.ddim import ddim_step

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def case():
    return networks.case("tiny", 2, CPU)


def test_weights_follow_the_golden_rule():
    from golden_rule import fill

    model = networks.PDAE(networks.TINY)
    fill(model.decoder)
    built = networks.build("tiny").decoder.state_dict()
    assert all(torch.equal(value, built[key]) for key, value in model.decoder.state_dict().items())


def test_flops_are_counted_without_computing(case):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        Baseline(case.model).step(case.x, 499, 489, case.z)
    assert case.flops == counter.get_total_flops() > 1e9


def test_the_baseline_is_the_published_step(case):
    """Against the reference modules and Algorithm 3 as the samplers write it."""
    t, t_next = contenders.CHECKED
    baseline = Baseline(case.model)
    with torch.no_grad():
        eps, gradient = case.model(case.x, torch.full((2,), t), case.z)
    expected = ddim_step(case.x, eps, gradient, *(float(baseline.alpha_bar[i]) for i in (t, t_next)))
    assert contenders.relative(baseline.step(case.x, t, t_next, case.z), expected) < 1e-5


def test_a_trajectory_of_the_baseline_is_one_of_the_samplers(case):
    side = contenders.PlanSide(case, "eager-float32")
    expected = contenders.baseline_trajectory(Baseline(case.model), case, 3)
    assert contenders.relative(side.trajectory(3), expected) < 1e-4
    assert side.check_trajectory(3) < 1e-6


def test_rows_compare_with_the_baseline(case):
    rows = contenders.measure(case, ["fused-float32"], rounds=3, peaks={"float32": 1e10})
    assert [r["contender"] for r in rows] == ["baseline", "fused-float32"]
    base, own = rows
    assert base["ratio"] == 1 and own["ratio"] == pytest.approx(base["median_s"] / own["median_s"])
    assert own["images_per_s"] == pytest.approx(2 / own["median_s"])
    assert own["peak_fraction"] == pytest.approx(case.flops / own["median_s"] / 1e10)
    assert own["error"] < 1e-5 and own["rounds"] == 3


def test_wrong_numbers_get_no_speed(case, monkeypatch):
    """Without G the step is still a plausible image, and after a short step nearly the right one."""
    original = contenders.PlanSide.step

    def without_gradient(side, *times):
        field = side.field
        side.field = lambda x, t, use_gradient: (field(x, t, use_gradient)[0], None)
        try:
            return original(side, *times)
        finally:
            side.field = field

    monkeypatch.setattr(contenders.PlanSide, "step", without_gradient)
    ran = []
    monkeypatch.setattr(Alternation, "run", lambda *a, **k: ran.append(a))
    for name in ("fused-float32", "fused-bfloat16"):
        with pytest.raises(contenders.WrongNumbers, match="no speed is reported"):
            contenders.measure(case, [name], rounds=3)
    assert not ran


def test_a_visit_goes_on_without_what_fails(case):
    failures = {}
    rows = contenders.measure(
        case, ["fused-float32", "magic-float32"], rounds=3, peaks={"float32": 1e10}, failures=failures
    )
    assert [r["contender"] for r in rows] == ["baseline", "fused-float32"]
    assert list(failures) == ["magic-float32"] and "'magic' is not known" in str(failures["magic-float32"])


def test_a_nan_is_wrong():
    with pytest.raises(contenders.WrongNumbers):
        contenders.check("x", float("nan"), 1.0)


def test_captured_steps_are_compared_with_single_ones(case):
    side = contenders.PlanSide(case, "fused-float32")
    side.trajectory = lambda steps: side.plain_trajectory(steps) * 1.01
    with pytest.raises(contenders.WrongNumbers, match="3 steps at once"):
        side.check_trajectory(3)


def test_the_compiled_opponent_runs_the_baseline_in_bfloat16(case, monkeypatch):
    """The wrapping, with the compiler taken out: dtype, layout, and float32 state."""
    calls = []
    monkeypatch.setattr(torch, "compile", lambda f, **options: calls.append(options) or f)
    opponent = CompiledBaseline(case.model)
    weight = opponent.decoder.input_blocks[1][0].in_layers[2].weight
    assert weight.dtype == torch.bfloat16 and weight.is_contiguous(memory_format=torch.channels_last)
    found = opponent.step(case.x, *contenders.CHECKED, case.z)
    error = contenders.relative(found, Baseline(case.model).step(case.x, *contenders.CHECKED, case.z))
    assert found.dtype == torch.float32 and 1e-4 < error < contenders.TOLERANCE["bfloat16"]
    assert calls == [{"mode": "max-autotune", "dynamic": False}] and opponent.seconds > 0


@pytest.mark.parametrize("operation", list(operations(2, tiny=True)), ids=lambda o: f"{o.name} {o.shape}")
def test_operations_agree_and_count_their_bytes(operation):
    alternation, calls, *errors = prepare(operation, CPU, sweep_bytes=operation.moved)
    alternation.run(3)
    found = row(operation, alternation, calls, tuple(errors), bandwidth=1e9)
    values = operation.draw(torch.Generator().manual_seed(0))
    images = [v for k, v in values.items() if k in ("x", "x2", "h", "residual", "eps", "gradient")]
    output = 0 if operation.name == "channel_stats" else operation.ours(**values).nbytes
    assert found["moved_bytes"] == sum(v.nbytes for v in images) + output
    assert found["copy_fraction"] == pytest.approx(operation.moved / found["median_s"] / 1e9)


def test_a_wrong_operation_gets_no_speed():
    import dataclasses

    operation = next(iter(operations(1, tiny=True)))
    wrong = dataclasses.replace(operation, ours=lambda **values: operation.ours(**values) * 1.02)
    with pytest.raises(contenders.WrongNumbers, match="no speed is reported"):
        prepare(wrong, CPU, sweep_bytes=1)
