"""Approximations that reuse work: exact where nothing is reused, else what the modules give when they do the same."""

import dataclasses

import pytest
import torch

from golden_rule import relative
from helpers import ON_DEVICE, images, noise, tiny_pdae, tiny_prior
from pdae_fast import PDAE, PDAEConfig, Pipeline, UNetConfig, UserError, metrics, presets
from pdae_fast.data import load_image
from pdae_fast.data.bundled import SAMPLES
from pdae_fast.engine import build_plan, graphs
from pdae_fast.engine.cost import equivalents, network_costs
from pdae_fast.engine.fused import FusedPlan
from pdae_fast.engine.reuse import Workload, Workloads
from pdae_fast.models.unet import Features
from pdae_fast.samplers import Reuse, ddim
from pdae_fast.samplers.inversion import invert_implicit
from pdae_fast.samplers.solvers import SOLVERS
from pdae_fast.schedule import build_schedule

CPU = torch.device("cpu")
UNET = UNetConfig(
    input_channel=1,
    base_channel=32,
    channel_multiplier=(1, 2),
    num_residual_blocks_of_a_block=1,
    attention_resolutions=(2,),
    num_heads=4,
)
CONFIG = PDAEConfig(image_size=32, latent_dim=8, encoder_channel=32, unet=UNET)
STEPS = 7
SPECS = (
    *("gradient:2", "gradient:3", "trunk:2", "trunk:3", "deep:2", "deep:3:1", "deep:2:3", "trunk:2,gradient:3"),
    *(
        "gradient:4,deep:2",
        "gradient:3,deep:2:1",
        "gradient:off",
        "window:200-700",
        "gradient:2,window:300-1000",
        "deep:3,window:0-500",
    ),
)


@pytest.fixture(scope="module")
def model():
    return tiny_pdae(CONFIG)


@pytest.fixture(scope="module")
def plan(model):
    return FusedPlan(model, CPU, torch.float32)


@pytest.fixture(scope="module")
def schedule(model):
    return build_schedule(model.config.schedule)


def decoding(plan, spec, schedule, x_T, z, weights=None, steps=STEPS, stop_percent=0.0):
    plan = plan.reusing(Reuse.parse(spec))
    return ddim.ddim(plan.field(z, weights), x_T, schedule, steps, stop_percent=stop_percent), plan


# -- the same approximations by the modules --------------------------------------------------------------------------


def _decode(middle, blocks, head, features, emb_z, cut):
    """(output, the map before the last ``cut`` stages)."""
    h = middle(features.h, features.emb, emb_z)
    deep = h
    for i, (block, skip) in enumerate(zip(blocks, reversed(features.skips), strict=True)):
        if i == len(blocks) - cut:
            deep = h
        h = block(torch.cat([h, skip], dim=1), features.emb, emb_z)
    return head(h), deep


def _outer(h, blocks, head, skips, emb, emb_z):
    for block, skip in zip(blocks[len(blocks) - len(skips) :], reversed(skips), strict=True):
        h = block(torch.cat([h, skip], dim=1), emb, emb_z)
    return head(h)


class Emulation:
    """A field that does to the modules what a spec says, written apart from the plan: by the number of the step."""

    def __init__(self, model, z, reuse):
        self.unet, self.reuse, self.step, self.t = model.decoder, reuse, -1, None
        self.emb_z = self.unet.label_emb(z)
        self.cut = reuse.outer or self.unet.config.num_residual_blocks_of_a_block + 1
        self.features = self.gradient = self.deep = self.deep_gradient = None
        self.gradient_step = self.key_step = 0

    @torch.no_grad()
    def __call__(self, x, t, use_gradient):
        unet, reuse = self.unet, self.reuse
        wanted = use_gradient and (reuse.window is None or reuse.window[0] <= t < reuse.window[1])
        g_parts = unet.shift_middle_block, unet.shift_output_blocks, unet.shift_out
        e_parts = unet.middle_block, unet.output_blocks, unet.out
        if t != self.t:  # a step; further evaluations at its time are like its first
            self.step, self.t, period = self.step + 1, t, max(reuse.deep, reuse.trunk)
            self.due = self.gradient is None or self.step - self.gradient_step >= reuse.gradient
            self.key = self.features is None or self.step - self.key_step >= period
            if reuse.deep > 1 and wanted and self.due and self.deep_gradient is None:
                self.key = True
        due, key = self.due, self.key
        t_batch = torch.full((len(x),), t)
        emb = unet.trunk(x, t_batch).emb
        if key:
            self.features, self.key_step = unet.trunk(x, t_batch), self.step
        elif reuse.trunk > 1:
            self.features = Features(self.features.h, self.features.skips, emb)
        if key or reuse.trunk > 1:
            eps, self.deep = _decode(*e_parts, self.features, None, self.cut)
            if wanted and due:
                self.gradient, self.deep_gradient = _decode(*g_parts, self.features, self.emb_z, self.cut)
                self.gradient_step = self.step
            elif key:
                self.deep_gradient = None
        else:
            h, skips = x, []
            for block in unet.input_blocks[: self.cut]:
                h = block(h, emb)
                skips.append(h)
            eps = _outer(self.deep, *e_parts[1:], skips, emb, None)
            if wanted and due:
                self.gradient = _outer(self.deep_gradient, *g_parts[1:], skips, emb, self.emb_z)
                self.gradient_step = self.step
        return eps, self.gradient if wanted else None


@pytest.mark.parametrize("spec", SPECS)
def test_the_plan_computes_what_the_modules_do_with_the_same_reuse(model, plan, schedule, spec):
    x_T, z = noise(2, *model.image_shape), noise(2, 8, seed=1)
    expected = ddim.ddim(Emulation(model, z, Reuse.parse(spec)), x_T, schedule, STEPS)
    found, _ = decoding(plan, spec, schedule, x_T, z)
    assert relative(found, expected) < 1e-4
    exact, _ = decoding(plan, "none", schedule, x_T, z)
    assert relative(found, exact) > 1e-3  # it is an approximation: the emulation is not the plain field


@pytest.mark.parametrize("spec", ["gradient:3", "deep:2", "trunk:2", "gradient:4,deep:2", "window:200-700"])
def test_on_the_device_with_one_graph_for_every_kind_of_step(model, schedule, monkeypatch, spec):
    """The path of CUDA: a static copy of what is kept, every kind of step captured once (here: replayed by running)."""
    x_T, z = noise(3, *model.image_shape), noise(3, 8, seed=1)
    plan = FusedPlan(model, CPU, torch.float32, ON_DEVICE)
    plan.options, plan.graph_pool = dataclasses.replace(plan.options, graphs=True), object()

    def capture(step, reset, device, pool):
        for _ in range(graphs.WARM_UP_STEPS):
            reset(), step()
        return type("Replay", (), {"replay": staticmethod(step)})

    monkeypatch.setattr(graphs, "capture", capture)
    approximate = plan.reusing(Reuse.parse(spec))
    expected = ddim.ddim(Emulation(model, z, Reuse.parse(spec)), x_T, schedule, STEPS)
    for B in (3, 2):  # the second uses the buffers, and what the first left in them, of the first
        found = ddim.ddim(approximate.field(z[:B]), x_T[:B], schedule, STEPS)
        assert relative(found, expected[:B]) < 1e-4
    (trajectory,) = approximate._trajectories.values()
    assert set(trajectory.graphs) == set(trajectory.workloads) and 2 <= len(trajectory.graphs) <= 4
    pointers = {name: value.data_ptr() for name, value in trajectory.kept._values.items()}
    ddim.ddim(approximate.field(-z), x_T, schedule, STEPS)
    assert pointers == {name: value.data_ptr() for name, value in trajectory.kept._values.items()}


@pytest.mark.parametrize(
    "spec", ["gradient:1", "trunk:1", "deep:1:2", "window:0-1000", "gradient:1,trunk:1", "none", ""]
)
def test_every_step_a_key_step_is_exact(model, plan, schedule, spec):
    x_T, z = noise(2, *model.image_shape), noise(2, 8, seed=1)
    assert torch.equal(decoding(plan, spec, schedule, x_T, z)[0], ddim.ddim(plan.field(z), x_T, schedule, STEPS))


@pytest.mark.parametrize("spec", ["gradient:9", "deep:9:2", "trunk:9", "gradient:2,deep:2"])
def test_a_trajectory_of_one_step_is_exact(model, plan, schedule, spec):
    x_T, z = noise(2, *model.image_shape), noise(2, 8, seed=1)
    found, _ = decoding(plan, spec, schedule, x_T, z, steps=1)
    assert relative(found, ddim.ddim(plan.field(z), x_T, schedule, 1)) < 1e-6


@pytest.mark.parametrize("spec", ["window:300-700", "gradient:off"])
def test_solving_a_step_leaves_out_g_as_its_decoding_does(model, plan, schedule, spec):
    x0, z, reuse = images(2), noise(2, 8, seed=1), Reuse.parse(spec)
    found, expected, exact = (
        invert_implicit(field, x0, schedule.decoding(4), iterations=2)
        for field in (plan.reusing(reuse).field(z), Emulation(model, z, reuse), plan.field(z))
    )
    assert relative(found.x_T, expected.x_T) < 1e-3 < 0.1 * relative(found.x_T, exact.x_T)


@pytest.mark.parametrize("spec", ["gradient:2", "trunk:2", "deep:2", "gradient:3,deep:2", "window:300-700"])
def test_results_do_not_depend_on_batches_or_on_the_calls_before(model, spec):
    x_T, z = noise(5, *model.image_shape), noise(5, 8, seed=1)
    pipes = [Pipeline(model, steps=STEPS, device="cpu", iterations=0, batch_size=size, reuse=spec) for size in (5, 2)]
    whole = pipes[0].decode(z, x_T)
    assert relative(pipes[1].decode(z, x_T), whole) < 1e-5
    pipes[0].decode(-z, -x_T)
    assert relative(pipes[0].decode(z[1:3], x_T[1:3]), whole[1:3]) < 1e-5
    x0 = images(5)
    assert relative(pipes[1].invert(x0, z), pipes[0].invert(x0, z)) < 1e-4


@pytest.mark.parametrize("spec", ["gradient:2", "trunk:2", "deep:2"])
def test_mixtures_of_codes_and_the_prior_alone(model, plan, schedule, spec):
    x_T, z = noise(2, *model.image_shape), noise(2, 8, seed=1)
    # A mixture of a code with itself is that code.
    twice, weights = z[None].expand(3, -1, -1), torch.tensor([[0.2, 0.5], [0.5, 0.1], [0.3, 0.4]])
    found, mixed = decoding(plan, spec, schedule, x_T, twice, weights)
    expected, alone = decoding(plan, spec, schedule, x_T, z)
    assert relative(found, expected) < 1e-4
    assert sum(n for name, n in mixed.evaluations.items() if "gradient" in name) == 3 * sum(
        n for name, n in alone.evaluations.items() if "gradient" in name
    )
    prior = FusedPlan(tiny_prior(model.config), CPU, torch.float32)
    without, counted = decoding(prior, spec, schedule, x_T, None)
    if spec == "gradient:2":
        assert torch.equal(without, decoding(prior, "none", schedule, x_T, None)[0])
    else:
        assert torch.isfinite(without).all() and counted.equivalents() < 2 * STEPS


def test_what_was_not_evaluated_is_not_counted(model, plan, schedule):
    x_T, z = noise(3, *model.image_shape), noise(3, 8, seed=1)
    costs = network_costs(model.config)
    trunk, eps, gradient = (sum(part) / costs.full for part in costs)
    outer = [cost / costs.full for cost in costs.outer(2)]
    expected = {
        "none": ({"trunk": 7, "eps": 7, "gradient": 7}, 7.0),
        "gradient:2": ({"trunk": 7, "eps": 7, "gradient": 4}, 7 - 3 * gradient),
        "trunk:3": ({"trunk": 3, "eps": 7, "gradient": 7}, 7 - 4 * trunk),
        "deep:4": (
            {"trunk": 2, "eps": 2, "gradient": 2, "outer_trunk": 5, "outer_eps": 5, "outer_gradient": 5},
            2 + 5 * sum(outer),
        ),
        "window:0-500": ({"trunk": 7, "eps": 7, "gradient": 3}, 7 - 4 * gradient),
    }
    for spec, (counts, total) in expected.items():
        _, counted = decoding(plan, spec, schedule, x_T, z)
        assert counted.evaluations == {name: 3 * n for name, n in counts.items()}, spec
        assert counted.equivalents() == pytest.approx(3 * total), spec
        assert counted.describe()["reuse"] == spec
    _, counted = decoding(plan, "none", schedule, x_T, None)
    assert counted.equivalents() == pytest.approx(21 * (trunk + eps))


def test_costs_are_those_of_the_layers(model):
    """GMAC of the paper's networks, counted by hand from their shapes; and the operators that PyTorch sees."""
    for name, expected in (("celeba64", (2.65, 10.70, 10.70)), ("ffhq128", (18.5, 55.3, 55.3))):
        found = [sum(part) / 1e9 for part in network_costs(presets[name])]
        assert found == pytest.approx(expected, rel=2e-3)
    costs, features = network_costs(model.config), model.decoder.trunk(noise(1, *model.image_shape), torch.tensor([3]))
    pixels, base = 32 * 32, 32
    assert costs.trunk[0] == pixels * 9 * base  # one channel to 32 by a 3x3 convolution
    assert costs.eps[-1] == costs.gradient[-1] == pixels * 9 * base
    # A block's two convolutions, at 32 channels; its time projection has 2 * 32 rows.
    assert costs.trunk[1] == 2 * pixels * 9 * base * base + 4 * base * 2 * base
    assert len(costs.trunk) == len(features.skips) and len(costs.eps) == len(features.skips) + 2
    assert costs.outer(len(costs.trunk)) == (sum(costs.trunk), *(sum(part[1:]) for part in costs[1:]))
    assert equivalents(model, {"encoder": 5, "latent": 2}, 1) == 0


def test_workloads():
    def of(spec, times, use=None):
        workloads = Workloads(Reuse.parse(spec))
        return ["/".join(workloads(t, True if use is None else use[i])) for i, t in enumerate(times)]

    assert of("gradient:2", (9, 5, 5, 1)) == ["all/run", "all/kept", "all/kept", "all/run"]
    assert of("deep:2", (9, 5, 1)) == ["all/run", "outer/run", "all/run"]
    assert of("trunk:3", (1, 5, 7, 9)) == ["all/run", "kept/run", "kept/run", "all/run"]
    # G of an outer step needs the deep map of a key step at which G ran: one is put in.
    assert of("deep:4,window:0-6", (9, 5, 1)) == ["all/none", "all/run", "outer/run"]
    assert of("gradient:3,deep:2", (9, 8, 7, 6, 5)) == ["all/run", "outer/kept", "all/kept", "all/run", "outer/kept"]
    # Several evaluations at one time are of one step, and a sampler may ask for G in only some of them.
    assert of("gradient:2", (9, 9, 5, 5, 1)) == ["all/run", "all/run", "all/kept", "all/kept", "all/run"]
    assert of("deep:2", (9, 9, 5), (True, False, True)) == ["all/run", "outer/none", "all/run"]


def test_a_field_with_reuse_carries_one_trajectory(plan):
    workloads = Workloads(Reuse.parse("gradient:2"))
    assert workloads(9, True) == Workload("all", "run")
    workloads(5, True)
    with pytest.raises(RuntimeError, match="carries one trajectory"):
        workloads(9, True)
    free = Workloads(Reuse.parse("window:0-9"))
    assert [free(t, True).gradient for t in (9, 5, 9)] == ["none", "run", "none"]  # keeps nothing


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("magic:2", "is not understood at 'magic:2'; expected a comma-separated list of gradient:K"),
        ("gradient", "not understood at 'gradient'"),
        ("gradient:x", "not understood at 'gradient:x'"),
        ("gradient:2,", "not understood at ''"),
        ("gradient:0", "period must be at least 1"),
        ("deep:2:-1", "at least 1 outer skip, not -1"),
        ("deep:2:1:1", "not understood"),
        ("deep", "not understood at 'deep'"),
        ("window:5", "not understood"),
        ("window:500-200", "window:500-200 is empty"),
        ("trunk:2,deep:2", "exclude each other"),
        ("gradient:2,gradient:3", "says gradient twice"),
        ("window:0-500,gradient:off", "says window twice"),
    ],
)
def test_bad_specs_are_one_clear_line(spec, words):
    with pytest.raises(UserError, match=words) as error:
        Reuse.parse(spec)
    assert "\n" not in str(error.value)


NAMED = ("gradient:2", "trunk:3", "deep:2", "deep:2:1", "window:10-900", "none")


@pytest.mark.parametrize("spec", [*NAMED, "gradient:4,deep:2:3,window:5-7", "gradient:off", "trunk:2,gradient:off"])
def test_specs_say_what_they_are(spec):
    assert str(Reuse.parse(spec)) == spec and Reuse.parse(Reuse.parse(spec)) == Reuse.parse(spec)


def test_what_cannot_run_is_refused(model):
    with pytest.raises(UserError, match="reuse deep:2:9: this network has 4 skips, not 9"):
        Pipeline(model, device="cpu", reuse="deep:2:9")
    with pytest.raises(UserError, match="needs the fused plan; the eager one computes everything anew"):
        Pipeline(model, device="cpu", plan="eager", reuse="gradient:2")
    for settings, words in (({"iterations": 2}, "iterations"), ({"solver": "belm"}, "belm")):
        with pytest.raises(UserError, match=f"{words} cannot run it backward"):
            Pipeline(model, device="cpu", reuse="gradient:2", **settings)
    eager, fused = (
        build_plan(model, CPU, torch.float32, name, reuse=Reuse.parse("window:0-500")) for name in ("eager", "fused")
    )
    x, z = noise(1, *model.image_shape), noise(1, 8, seed=1)
    for t, runs in ((499, True), (500, False)):
        found = [plan.field(z)(x, t, True) for plan in (eager, fused)]
        assert all((gradient is not None) == runs for _, gradient in found)
        assert relative(found[0][0], found[1][0]) < 1e-5
    assert eager.evaluations == fused.evaluations == {"trunk": 2, "eps": 2, "gradient": 1}


def test_a_window_is_inverted_as_it_is_decoded():
    """Solving the steps of the decoder that leaves G out comes back to the image; for another decoder it does not."""
    model = PDAE.from_pretrained("fashion32")
    x0 = load_image(SAMPLES / "test-00001-pullover.png", 32, 1)[None]
    settings = {"steps": 8, "spacing": "quadratic", "iterations": 3, "device": "cpu"}
    pipe, exact = (Pipeline(model, **settings, reuse=spec) for spec in ("window:200-1000", "none"))
    z = pipe.encode(x0)
    x_T = pipe.invert(x0, z)
    own, other = (float(metrics.mse(x0, p.decode(z, x_T))) for p in (pipe, exact))
    assert own < 1e-4 and other > 2 * own
    assert pipe.evaluations["trunk"] == exact.evaluations["trunk"] + 25 and pipe.equivalents < 33


@pytest.mark.parametrize("solver", ["dpm++2m", "unipc3"])
def test_a_solver_does_not_extrapolate_across_the_edge_of_a_window(solver):
    """As with stop_percent, it starts again where G switches: the solver is told so by use_gradient."""
    model, z, x_T = tiny_pdae(), noise(2, 16), noise(2, 1, 32, 32)
    pipe = Pipeline(model, steps=8, device="cpu", dtype="float32", solver=solver, reuse="window:300-1000")
    told = tuple(step._replace(use_gradient=step.t >= 300) for step in pipe.schedule.decoding(8))
    exact = Pipeline(model, steps=8, device="cpu", dtype="float32")
    expected = SOLVERS[solver].decode(exact.plan.field(z), x_T, told)
    torch.testing.assert_close(pipe.decode(z, x_T), expected, atol=1e-4, rtol=1e-4)
