"""A pipeline in its caller's process: threads, other processes, copies, a model that changes, global settings."""

import contextlib
import copy
import gc
import multiprocessing
import pickle
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from golden_rule import relative
from helpers import ON_DEVICE, TINY_FULL, images, needs_sklearn, tiny_pdae
from pdae_fast import PDAE, Pipeline, UserError, kernels
from pdae_fast.engine.build import build_plan
from pdae_fast.engine.convolution import native_layers
from pdae_fast.engine.options import Rewrites

CPU = torch.device("cpu")
KINDS = {
    "eager": None,
    "default": None,
    "packed": Rewrites(),
    "on the device": ON_DEVICE,
    "lent": Rewrites(fused_update=True),
}


@pytest.fixture(scope="module")
def model():
    return tiny_pdae(TINY_FULL)


def pipeline(model, kind="default", **fields):
    name = "eager" if kind == "eager" else "fused"
    fields = {"steps": 3, "iterations": 0, **fields}
    pipe = Pipeline(model, device="cpu", dtype="float32", plan=name, **fields)
    if KINDS[kind] is not None:
        pipe.plan = build_plan(model, CPU, torch.float32, name, options=KINDS[kind])
    return pipe


@pytest.mark.parametrize("kind", KINDS)
def test_many_threads_get_what_one_gets(model, kind):
    inputs = [images(1 + i % 3, seed=i) for i in range(12)]
    alone = pipeline(model, kind)
    expected = [alone.reconstruct(x) for x in inputs]
    pipe, start = pipeline(model, kind), threading.Barrier(6)

    def run(x):
        with contextlib.suppress(threading.BrokenBarrierError):
            start.wait(timeout=5)  # all of them meet weights that nobody has laid out yet
        return pipe.reconstruct(x)

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(run, inputs))
    # A batch that runs in the buffers of a larger one is rounded otherwise; of two images 1e0 would be mixed up.
    assert max(relative(a, b) for a, b in zip(found, expected, strict=True)) < 1e-3
    assert pipe.evaluations == alone.evaluations


def test_a_call_inside_a_call_has_buffers_of_its_own(model):
    pipe = pipeline(model, "lent")
    x0 = images(2)
    expected, inner = pipe.reconstruct(x0), []

    def tick(_):
        if not inner:
            inner.append(None)
            inner[0] = pipe.reconstruct(x0.flip(0))

    pipe.progress = tick
    torch.testing.assert_close(pipe.reconstruct(x0), expected)
    torch.testing.assert_close(inner[0], expected.flip(0), atol=1e-5, rtol=1e-4)


def _everything(pipe, x0):
    z = pipe.encode(x0)
    x_T = pipe.invert(x0, z)
    return [
        z, x_T, pipe.decode(z, x_T), pipe.sample(2, seed=3), pipe.logits(z), pipe.manipulate(x0, "dark", 0.5),
        pipe.interpolate(x0[0], x0[1], [0.2, 0.7], "trajectory"),
        pipe.decode(z, generator=torch.Generator().manual_seed(1)),
    ]  # fmt: skip


def _data(model):
    for p in model.parameters():
        p.data.mul_(1.5)


CHANGES = {
    "loaded": lambda m: m.load_state_dict({k: v * 1.5 for k, v in m.state_dict().items()}),
    "by .data": _data,  # which no version counter sees
    "moved": lambda m: m.half(),
    "statistics": lambda m: (m.latent_mean.add_(1), m.latent_std.mul_(3)),
    "in place": lambda m: torch.nn.utils.vector_to_parameters(torch.zeros(10**7), m.classifier.parameters()),
    "replaced": lambda m: setattr(m, "encoder", torch.nn.Identity()),
    "gone": lambda m: m.to(torch.device("meta")),
}


@pytest.mark.parametrize("kind", ["eager", "default", "lent"])
@pytest.mark.parametrize("used", [True, False])
def test_a_model_that_changes_is_not_seen(kind, used):
    changed, x0 = tiny_pdae(TINY_FULL), images(2)
    expected, pipe = _everything(pipeline(tiny_pdae(TINY_FULL), kind), x0), pipeline(changed, kind)
    if used:
        _everything(pipe, x0)
    for change in CHANGES.values():
        change(changed)
    for a, b in zip(_everything(pipe, x0), expected, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(UserError, match="meta device"):
        Pipeline(changed)


@pytest.mark.parametrize("kind", ["eager", "default"])
def test_the_model_is_left_as_it_was(kind):
    model, calls, x0 = tiny_pdae(TINY_FULL), [], images(2)
    expected = _everything(pipeline(tiny_pdae(TINY_FULL), kind), x0)
    model.train()
    model.decoder.eval()
    model.decoder.out.requires_grad_(False)
    model.encoder.register_forward_hook(lambda *_: calls.append(threading.Lock()))  # and what it holds is not copied
    modes = [m.training for m in model.modules()]
    found = _everything(pipeline(model, kind), x0)
    for a, b in zip(found, expected, strict=True):  # dropout is off
        assert torch.equal(a, b)
    assert [m.training for m in model.modules()] == modes and not calls
    assert all(p.requires_grad != n.startswith("decoder.out.") for n, p in model.named_parameters())
    model.encode(x0)
    assert len(calls) == 1


@pytest.mark.parametrize("plan", ["eager", "fused"])
def test_a_model_that_is_given_away_is_used_where_it_is(plan):
    model, x0 = tiny_pdae(TINY_FULL).train(), images(2)
    expected = _everything(Pipeline(model, steps=3, device="cpu", dtype="float32", plan=plan), x0)
    before = {name: (v.data_ptr(), v.clone()) for name, v in model.state_dict().items()}
    pipe = Pipeline(model, steps=3, device="cpu", dtype="float32", plan=plan, copy=False)
    for given in (pipe, pickle.loads(pickle.dumps(pipe))):
        for a, b in zip(_everything(given, x0), expected, strict=True):
            assert torch.equal(a, b)
    assert model.training and all(p.requires_grad for p in model.parameters())
    own = pipe.plan.model.state_dict()
    for name, v in model.state_dict().items():
        assert v.data_ptr() == own[name].data_ptr() == before[name][0] and torch.equal(v, before[name][1])


@pytest.mark.skipif(not kernels.winograd_status()[0], reason=kernels.winograd_status()[1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_of_a_model_that_is_consumed_are_freed(dtype, no_collection):
    model, x0 = tiny_pdae(TINY_FULL), images(2)
    chosen = {"steps": 3, "device": "cpu", "dtype": dtype}
    expected = _everything(Pipeline(model, **chosen), x0)
    layers = native_layers(model.decoder) if Pipeline(model, **chosen).plan.options.native_convolutions else []
    assert layers or dtype == "bfloat16"
    weights = [weakref.ref(layer.weight.untyped_storage()) for layer in layers]
    pipe = Pipeline(model, consume=True, **chosen)
    for a, b in zip(_everything(pipe, x0), expected, strict=True):
        assert torch.equal(a, b)
    assert not [w for w in weights if w() is not None]
    if layers:
        with pytest.raises(UserError, match="a pipeline took them"):
            Pipeline(model)
        with pytest.raises(UserError, match="cannot be pickled"):
            pickle.dumps(pipe)


@pytest.fixture
def no_collection():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@contextlib.contextmanager
def _set(write, read, value):
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


SETTINGS = {
    "default device": lambda: torch.device("meta"),
    "float64": lambda: _set(torch.set_default_dtype, torch.get_default_dtype, torch.float64),
    "float16": lambda: _set(torch.set_default_dtype, torch.get_default_dtype, torch.float16),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "deterministic": lambda: _set(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled, True),
    "medium precision": lambda: _set(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision, "medium"),
}


def _settings():
    return (
        torch.get_default_device(), torch.get_default_dtype(), torch.is_autocast_enabled("cpu"),
        torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(),
        torch.backends.mkldnn.matmul.fp32_precision, torch.backends.mkldnn.conv.fp32_precision,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["eager", "default", "on the device"])
def test_settings_of_the_process_change_nothing_and_are_not_changed(model, tmp_path, kind):
    model.save_pretrained(tmp_path)
    x0 = images(2)
    expected = _everything(pipeline(model, kind), x0)
    for setting in SETTINGS.values():
        with setting():
            before = _settings()
            loaded = PDAE.from_pretrained(tmp_path)
            found = _everything(pipeline(loaded, kind), x0)
            assert _settings() == before
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b) and a.dtype is torch.float32
            (a * torch.ones((), requires_grad=True)).sum().backward()  # ordinary tensors
        assert all(p.requires_grad and not p.is_inference() for p in loaded.parameters())


def test_a_setting_is_put_aside_while_any_thread_computes():
    from pdae_fast.isolation import float32_means_float32

    conv = torch.backends.mkldnn.conv
    with _set(lambda v: setattr(conv, "fp32_precision", v), lambda: conv.fp32_precision, "bf16"):
        first, second = float32_means_float32(), float32_means_float32()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert conv.fp32_precision == "ieee"
        second.__exit__(None, None, None)
        assert conv.fp32_precision == "bf16"


class _Bar:
    """A progress bar: it cannot be pickled."""

    def __init__(self):
        self.lock = threading.Lock()

    def update(self, n):
        pass


@pytest.mark.parametrize("kind", KINDS)
def test_copies_of_a_used_pipeline(model, kind):
    pipe, x0 = pipeline(model, kind, progress=_Bar().update), images(2)
    expected = pipe.reconstruct(x0)
    for clone in (copy.copy, copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))):
        other = clone(pipe)
        assert other.evaluations == pipe.evaluations
        assert torch.equal(other.reconstruct(x0), expected) and other.plan.describe() == pipe.plan.describe()
        torch.testing.assert_close(other.manipulate(x0, "dark", 0.5), pipe.manipulate(x0, "dark", 0.5))
        assert other.with_recipe(steps=2).reconstruct(x0).shape == x0.shape
    deep = copy.deepcopy(pipe)
    before = pipe.evaluations
    deep.encode(x0)
    assert pipe.evaluations == before != deep.evaluations
    assert torch.equal(copy.deepcopy(model).encode(x0), pickle.loads(pickle.dumps(model)).encode(x0))


def _reconstruct(pipe, x0, queue):
    torch.set_num_threads(1)
    queue.put(pipe.reconstruct(x0).numpy())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes(model, method):
    pipe, x0, context = pipeline(model), images(2), multiprocessing.get_context(method)
    expected, queue = pipe.reconstruct(x0), context.Queue()
    process = context.Process(target=_reconstruct, args=(pipe, x0, queue))
    process.start()
    found = torch.from_numpy(queue.get(timeout=120))
    process.join(60)
    assert process.exitcode == 0
    # Another number of threads rounds otherwise, which random weights amplify.
    assert relative(found, expected) < 1e-2


def _refused(pipe, x0, queue):
    torch.set_num_threads(2)
    try:
        pipe.reconstruct(x0)
    except UserError as error:
        queue.put(str(error))


@pytest.mark.slow
def test_a_forked_process_with_threads_is_refused_and_does_not_hang(model):
    pipe, context = pipeline(model), multiprocessing.get_context("fork")
    pipe.reconstruct(images(1))
    queue = context.Queue()
    process = context.Process(target=_refused, args=(pipe, images(1), queue))
    process.start()
    assert "start it by spawn, or call torch.set_num_threads(1)" in queue.get(timeout=60)
    process.join(60)


@pytest.mark.slow
def test_a_forked_pool_that_reads_a_pipeline_is_refused_and_does_not_hang(model):
    pipe = pipeline(model)
    pipe.encode(images(1))
    context = multiprocessing.get_context("fork")
    with context.Pool(1, torch.set_num_threads, [2]) as pool, pytest.raises(UserError, match="start it by spawn"):
        pool.apply_async(pipe.encode, [images(1)]).get(timeout=30)


@needs_sklearn  # which brings joblib
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["threading", "loky"])
def test_in_the_workers_of_joblib(model, backend, tmp_path):
    joblib = pytest.importorskip("joblib")
    pipe, x0 = pipeline(model), images(4)
    expected = pipe.encode(x0), pipe.reconstruct(x0[:2])
    with joblib.parallel_config(backend, n_jobs=2, inner_max_num_threads=1 if backend == "loky" else None):
        run = joblib.Parallel(max_nbytes=1000, temp_folder=tmp_path)  # arrays above come as files in memory, read-only
        found = run(joblib.delayed(pipe.encode)(x) for x in (x0.numpy(), x0.numpy()))
        reconstructed = run(joblib.delayed(pipe.reconstruct)(x0[:2].numpy()) for _ in range(2))
    for z, x in zip(found, reconstructed, strict=True):
        torch.testing.assert_close(z, expected[0], atol=1e-5, rtol=1e-4)
        assert relative(x, expected[1]) < 1e-2  # another number of threads
    joblib.dump(pipe, tmp_path / "pipe")
    assert torch.equal(joblib.load(tmp_path / "pipe").encode(x0), expected[0])


class _Codes(torch.utils.data.Dataset):
    def __init__(self, pipe):
        self.pipe = pipe

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.pipe.encode(images(1, seed=index))[0]


@pytest.mark.slow
def test_in_the_workers_of_a_loader(model):
    data = _Codes(pipeline(model))
    expected = torch.stack([data[i] for i in range(4)])
    loader = torch.utils.data.DataLoader(data, batch_size=2, num_workers=2)
    torch.testing.assert_close(torch.cat(list(loader)), expected, atol=1e-5, rtol=1e-4)


def _resident():
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.slow
def test_memory_stays_flat_for_changing_batches_and_steps(model):
    pipe = pipeline(model, "lent")

    def work(i):
        pipe.with_recipe(steps=1 + i % 5).reconstruct(images(1 + i % 7, seed=i))
        pipe.decode(count=1 + i % 4, seed=i)

    for i in range(40):  # until every size was seen
        work(i)
    before, end, i = _resident(), time.monotonic() + 40, 0
    while time.monotonic() < end:
        work(i)
        i += 1
    assert i > 20 and _resident() - before < 24 << 20
