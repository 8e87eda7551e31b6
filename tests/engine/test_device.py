"""Which device is meant, and how much memory it has left; with a runtime that has two GPUs, where there are none."""

import pytest
import torch

from fake_cuda import FakeCuda
from helpers import ON_DEVICE, image_folder, tiny_pdae
from pdae_fast import cli, reconstruct, train
from pdae_fast.engine import build, graphs
from pdae_fast.engine import device as devices
from pdae_fast.engine.device import available_memory, one_at_a_time, resolve_device
from pdae_fast.engine.fused import FusedPlan
from pdae_fast.engine.plan import Plan
from pdae_fast.errors import UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def cuda(monkeypatch):
    return FakeCuda(monkeypatch)


def test_a_gpu_has_its_index(cuda):
    assert resolve_device("cuda") == resolve_device("auto") == torch.device("cuda", 0)
    torch.cuda.set_device(1)
    assert resolve_device("cuda") == resolve_device("auto") == resolve_device(torch.device("cuda:1"))
    assert resolve_device("cuda:0") == torch.device("cuda", 0)
    torch.cuda.set_device(resolve_device("cuda"))  # refuses a device without one
    with pytest.raises(ValueError, match="specified index"):
        torch.cuda.set_device(torch.device("cuda"))
    with pytest.raises(UserError, match="there are 2 CUDA devices"):
        resolve_device("cuda:2")


def test_a_plan_knows_the_index_of_its_gpu(cuda, monkeypatch):
    """Which graphs need to end a capture that failed, whatever a caller names."""
    given = []

    def plan(model, device, *_, **__):
        given.append(device)
        raise UserError("no such device here")

    for kind in ("Plan", "FusedPlan"):
        monkeypatch.setattr(build, kind, plan)
    torch.cuda.set_device(1)
    for name in ("eager", "fused"):
        with pytest.raises(UserError):
            build.build_plan(tiny_pdae(), torch.device("cuda"), torch.float32, name, options=ON_DEVICE)
    assert given == [torch.device("cuda", 1)] * 2


@pytest.mark.parametrize(
    "said, expected",
    [
        ("Cannot re-initialize CUDA in forked subprocess. To use", "cuda cannot be used in a forked process"),
        ("CUDA driver initialization failed\nmore", "device 'cuda' cannot be used: CUDA driver initialization failed$"),
    ],
)
def test_a_driver_that_refuses(cuda, monkeypatch, said, expected):
    def current_device():
        raise RuntimeError(said)

    monkeypatch.setattr(torch.cuda, "current_device", current_device)
    with pytest.raises(UserError, match=expected):
        resolve_device("auto")


def test_what_pytorch_holds_and_lends_to_nobody_is_free(cuda, monkeypatch):
    segments = [
        {"device": 0, "total_size": 500, "allocated_size": 200, "segment_pool_id": (0, 0)},
        {"device": 0, "total_size": 300, "allocated_size": 100, "segment_pool_id": (0, 7)},  # of a captured graph
        {"device": 1, "total_size": 900, "allocated_size": 0, "segment_pool_id": (0, 8)},
    ]
    for name, value in {"mem_get_info": (1000, 5000), "memory_reserved": 800, "memory_allocated": 300}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    assert available_memory(torch.device("cuda", 0)) == 1000 + 300


# -- branches that only a GPU takes ------------------------------------------------------------------------------------


def test_what_another_stream_launched_is_waited_for(cuda, monkeypatch):
    monkeypatch.setattr(devices, "_last_stream", {})
    first, second = torch.cuda.Stream(GPU), torch.cuda.Stream(GPU)
    for stream, expected in ((first, []), (first, []), (second, [first]), (first, [second])):
        stream.waited.clear()
        with torch.cuda.stream(stream), one_at_a_time(GPU), one_at_a_time(GPU):
            assert stream.waited == expected


@pytest.mark.parametrize("dtype, precision", [(torch.float32, "ieee"), (torch.bfloat16, "tf32")])
def test_convolutions_are_as_exact_as_the_plans_dtype(cuda, dtype, precision):
    plan, cudnn = Plan(tiny_pdae(), CPU, dtype), torch.backends.cudnn
    plan.device, before = GPU, (cudnn.benchmark, cudnn.conv.fp32_precision)
    assert before[1] == "tf32"
    with plan.precision():
        assert (cudnn.benchmark, cudnn.conv.fp32_precision) == (plan.tunes, precision)
    assert (cudnn.benchmark, cudnn.conv.fp32_precision) == before


def test_two_decoders_on_two_streams(cuda, monkeypatch):
    """eps on the side stream, which waits for the trunk and is waited for; a large batch stays on one."""
    model = tiny_pdae()
    plan, plain = (FusedPlan(model, CPU, torch.float32, ON_DEVICE) for _ in range(2))
    plan._side, ran = graphs.new_stream(GPU), {}
    for name in ("_decode_eps", "_decode_gradient"):
        true = getattr(plan, name)

        def decode(*arguments, name=name, true=true):
            ran[name] = cuda.current
            return true(*arguments)

        monkeypatch.setattr(plan, name, decode)
    x, z = torch.randn(2, 1, 32, 32), torch.randn(2, 16)
    found, expected = (p.field(z)(x, 300, True) for p in (plan, plain))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert ran == {"_decode_eps": plan._side, "_decode_gradient": cuda.default}
    assert plan._side.waited == [cuda.default] and cuda.default.waited == [plan._side]
    monkeypatch.setattr("pdae_fast.engine.networks.PARALLEL_PIXELS", 2 * 32 * 32 - 1)
    plan.field(z)(x, 300, True)
    assert set(ran.values()) == {cuda.default} and len(plan._side.waited) == 1


@pytest.mark.parametrize("native", [False, True])
def test_who_asks_for_half_precision_hears_that_it_is_slow(tmp_path, capsys, monkeypatch, native):
    """Where the processor has no instructions for it."""
    devices.has_native_bfloat16.cache_clear()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": native}, raising=False)
    data, model = image_folder(tmp_path / "data", 2, 8), tmp_path / "model"
    tiny_pdae().save_pretrained(model)
    step = ["--steps", "1", "--device", "cpu"]
    reconstruction = ["--model", str(model), "--input", str(data), "--dtype", "bfloat16", "--out", str(tmp_path / "r")]
    training = ["pdae", "--init-from", str(model), "--data", str(data), "--amp", "bfloat16", "--batch-size", "1"]
    try:
        for main, argv in ((reconstruct.main, reconstruction), (train.main, [*training, "--out", str(tmp_path / "t")])):
            assert cli.run(main, [*argv, *step]) == 0
            said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
            assert [line.startswith("note: bfloat16 is slow on ") for line in said] == [True] * (not native)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: False)
        reconstruction[reconstruction.index("bfloat16")] = "float16"
        assert cli.run(reconstruct.main, [*reconstruction, *step]) == 0
        assert capsys.readouterr().err.startswith("note: float16 is slow on ")
    finally:
        devices.has_native_bfloat16.cache_clear()
