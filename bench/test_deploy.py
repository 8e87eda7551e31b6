"""One decoding step of exported graphs against the engine's fused plan and the published computation, on the CPU.

`pytest bench/test_deploy.py --benchmark-only`. Every side gets the same images, codes and number of threads; all take
turns in one process. With one thread it is processor time that is measured, so that whatever else the machine does
counts for nothing; with several it is the clock. Exporting is not timed. Needs `pip install "pdae_fast[onnx]"`;
OpenVINO joins where it is installed.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from bench.baseline import Baseline
from bench.contenders import TOLERANCE, PlanSide, check, relative
from bench.machine import worth_timing
from bench.networks import build, case
from bench.tables import RUN
from bench.timing import Alternation, clock, pedantic, rounds_within
from pdae_fast.export.runtime import Session
from pdae_fast.schedule import build_schedule

for name in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(name)

from pdae_fast.export.onnx import ExportSettings, export_onnx  # noqa: E402

CPU = torch.device("cpu")
NETWORKS = ("fashion32", "celeba64", "ffhq128")
ENGINE = ("fused-float32", "fused-bfloat16")
# Exports by the ending of a contender's name.
EXPORTS = {
    "float32": ExportSettings(steps=5),
    "float32-instance": ExportSettings(steps=5, norm="instance"),
    "bfloat16": ExportSettings(steps=5, dtype="bfloat16"),
}
CONTENDERS = (
    "onnxruntime-float32",
    "onnxruntime-float32-instance",
    "openvino-float32",
    "openvino-float32-instance",
    "openvino-bfloat16",
)
# Five steps from 999 to 0: the last of them is long, so that what the network says decides the result.
CHECKED, TIMED = 4, 2
SECONDS = 30.0


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Directories by network and export, made when first asked for."""
    made = {}

    def get(network: str, kind: str):
        if (network, kind) not in made:
            out = tmp_path_factory.mktemp("deploy") / f"{network}-{kind}"
            export_onnx(build(network), out, EXPORTS[kind])
            made[network, kind] = out
        return made[network, kind]

    return get


PROBE = """
import sys
import numpy as np
from pdae_fast.export.runtime import Session
directory, backend, batch = sys.argv[1:]
s = Session(directory, backend, threads=1)
shapes = (s.manifest["latent_dim"],), s.manifest["image_shape"]
z, x = (np.zeros((int(batch), *shape), np.float32) for shape in shapes)
conditioning = s.backend.run("conditioning", {"z": z})["conditioning"]
s.backend.run("decode_step", {"x": x, "conditioning": conditioning, "step": np.zeros(1, np.int64)})
"""


def runs(directory, backend: str, batch: int) -> bool:
    """Whether ``backend`` survives the graphs, tried in a process of its own: one version of OpenVINO crashed."""
    arguments = [sys.executable, "-c", PROBE, str(directory), backend, str(batch)]
    return subprocess.run(arguments, capture_output=True).returncode == 0


def processor_clock(function, device):
    """As bench.timing.clock, in processor time of this process."""
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


class Exported:
    """One exported directory on one backend, as a side of the comparison."""

    def __init__(self, c, name: str, directory) -> None:
        backend, _, kind = name.partition("-")
        self.tolerance = TOLERANCE[kind.partition("-")[0]]
        session = Session(directory, backend, threads=torch.get_num_threads())
        self.run = session.backend.run
        conditioning = self.run("conditioning", {"z": c.z.numpy()})["conditioning"]
        self.inputs = {"x": c.x.numpy(), "conditioning": conditioning}

    def step(self, index: int = TIMED) -> torch.Tensor:
        out = self.run("decode_step", {**self.inputs, "step": np.array([index], np.int64)})
        return torch.from_numpy(out["x_next"])


@pytest.mark.parametrize("batch", [1, 8], ids=lambda b: f"batch{b}")
@pytest.mark.parametrize("network", NETWORKS)
def test_deploy(benchmark, exports, network, batch):
    c = case(network, batch, CPU)
    trajectory = build_schedule(c.model.config.schedule).decoding(5)
    following = [*(step.t for step in trajectory[1:]), 0]
    times = [(step.t, t) for step, t in zip(trajectory, following, strict=True)]
    baseline = Baseline(c.model, CPU)
    expected = baseline.step(c.x, *times[CHECKED], c.z)
    sides, errors = {}, {"baseline": 0.0}
    for name in worth_timing(ENGINE, CPU):
        side = PlanSide(c, name)
        errors[name] = check(name, relative(side.step(*times[CHECKED]), expected), side.tolerance)
        sides[name] = lambda side=side: side.step(*times[TIMED])
    for name in worth_timing(CONTENDERS, CPU):
        backend, _, kind = name.partition("-")
        if importlib.util.find_spec(backend) is None:
            continue
        directory = exports(network, kind)
        if backend == "openvino" and not runs(directory, backend, batch):
            RUN.add("deploy", network=network, batch=batch, contender=f"{name} (failed)")
            continue
        side = Exported(c, name, directory)
        errors[name] = check(name, relative(side.step(CHECKED), expected), side.tolerance)
        sides[name] = side.step
    sides = {"baseline": lambda: baseline.step(c.x, *times[TIMED], c.z), **sides}
    alternation = Alternation(sides, CPU, processor_clock if torch.get_num_threads() == 1 else clock)
    _, one_round = alternation.first()
    if not pedantic(benchmark, alternation, rounds_within(SECONDS, one_round)):
        return
    for name in alternation.functions:
        spread, over, engine = (
            alternation.spread(name),
            alternation.ratio(name, "baseline"),
            alternation.ratio(name, "fused-float32"),
        )
        row = {
            "network": network,
            "batch": batch,
            "contender": name,
            "median_s": spread.median,
            "spread_s": [spread.low, spread.high],
            "ratio": over.median,
            "ratio_spread": [over.low, over.high],
            "ratio_to_fused_float32": engine.median,
            "ratio_to_fused_spread": [engine.low, engine.high],
            "error": errors[name],
            "rounds": over.count,
        }
        RUN.add("deploy", **row)
        benchmark.extra_info[name] = row["ratio"]
