"""The bundled models, trained in calls that end or are killed: the same to the bit as in one call."""

import csv
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import train_bundled
from bench.train_bundled import MORE, RECIPES, Run, main
from helpers import image_folder
from pdae_fast import PDAE, Pipeline, UserError
from pdae_fast.training.arguments import parse

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = image_folder(tmp_path_factory.mktemp("some images"), 32)
    with open(folder / "attributes.csv", "w", newline="") as file:
        csv.writer(file).writerows([["name", "round"], *([f"{i:02d}.png", i % 2] for i in range(32))])
    return folder


def arguments(folder, data, *more):
    return ["--resume", str(folder), "--models", "tiny", "--tiny", str(data), "--device", "cpu", *more]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    main(arguments(folder, data))
    return folder


def test_one_call_makes_a_whole_model(whole, data):
    model = PDAE.from_pretrained(str(whole / "tiny" / "model"))
    pipe = Pipeline(model, steps=2, device="cpu")
    assert pipe.sample(1).shape == (1, 1, 32, 32) and model.config.attributes == ("round",)
    assert pipe.manipulate(torch.zeros(1, 1, 32, 32), "round", 1.0).isfinite().all()
    assert next(model.parameters()).isfinite().all()
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    main(arguments(whole, data))  # nothing is left to do
    assert before == {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}


def test_killed_and_stopped_it_is_the_same_model(whole, data, tmp_path):
    command = [sys.executable, "-m", "bench.train_bundled", *arguments(tmp_path, data)]
    process, run = subprocess.Popen(command, cwd=ROOT), tmp_path / "tiny"
    while not (run / "prior.done").exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(random.uniform(0, 1.5))
    process.kill()
    process.wait()
    assert not (run / "model.done").exists()
    calls = 0
    while not (run / "model.done").exists():  # calls that are too short for all of it, and longer each time
        calls += 1
        try:
            main(arguments(tmp_path, data, "--minutes", str(0.002 * 1.5**calls)))
        except SystemExit as end:
            assert end.code == MORE
    assert calls > 1
    for name in ("model", "g", "classified"):
        files = (folder / "tiny" / name / "model.safetensors" for folder in (whole, tmp_path))
        one, two = (path.read_bytes() for path in files)
        assert one == two


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("model", RECIPES)
def test_every_stage_is_a_command_of_the_project(model, device, tmp_path):
    run = Run(model, tmp_path / "a folder", str(tmp_path / "a folder" / "avatars"), torch.device(device), 2.0)
    stages = list(RECIPES[model](run))
    names = [stage.name for stage in stages]
    assert len(set(names)) == len(names) and names[-4:] == ["classified", "full", "g", "model"]
    made = {"avatars"}
    for stage in stages:
        if stage.words:
            args = parse(stage.words)
            assert Path(args.out) == run.folder / stage.name and args.device == device
            needed = [getattr(args, name, None) for name in ("init_from", "start_from", "architecture", "target")]
            for path in filter(None, needed):
                if path == "features":
                    continue
                if Path(path).parent == run.folder:
                    assert Path(path).name in made
                else:
                    assert path == model  # a preset
        made |= {stage.name, *({"32.json", "tiny.json"} if stage.name == "architecture" else ())}
    assert parse(stages[-2].words).steps == {"fashion32": 10600, "avatars64": 11200, "tiny": 12}[model]


def test_another_run_is_refused(whole, data):
    with pytest.raises(UserError, match="was begun with factor 1.0, not 2.0"):
        main(arguments(whole, data, "--factor", "2"))
    with pytest.raises(UserError, match="must be positive"):
        main(arguments(whole, data, "--minutes", "0"))


def test_the_time_limit_leaves_no_handler_behind():
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)]
    with pytest.raises(train_bundled.Stopped), train_bundled.limited(0.05):
        time.sleep(5)
    assert handlers == [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)]


def test_nothing_on_its_way_takes_the_stop_for_an_error():
    class Loading(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func is torch.Tensor.copy_:
                signal.raise_signal(signal.SIGTERM)
            return super().__torch_function__(func, types, args, kwargs or {})

    layer = torch.nn.Linear(2, 2)
    with pytest.raises(train_bundled.Stopped), train_bundled.limited(60):
        layer.load_state_dict({k: v.clone().as_subclass(Loading) for k, v in layer.state_dict().items()})
