"""float32 means float32 whatever the process was told, and its switches are to the letter what they were afterwards."""

import pytest
import torch

from pdae_fast.isolation import cudnn, float32_means_float32

SWITCHES = (
    ("generic", "all"), ("cuda", "all"), ("cuda", "matmul"), ("cuda", "conv"), ("cuda", "rnn"), ("mkldnn", "matmul"),
    ("mkldnn", "conv"),
)  # fmt: skip
CALLERS = {
    "default": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "matmul": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "convolutions off": lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
    "convolutions": lambda: setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee"),
    "of a kind": lambda: setattr(torch.backends.cudnn, "fp32_precision", "tf32"),
    "of all": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
}


def said():
    """What every switch says, also where the older ones refuse to because of the newer ones."""
    found = {at: torch._C._get_fp32_precision_getter(*at) for at in SWITCHES}
    for name, owner in {"matmul": torch.backends.cuda.matmul, "cudnn": torch.backends.cudnn}.items():
        try:
            found[name] = owner.allow_tf32
        except RuntimeError:
            found[name] = "contradiction"
    try:
        found["legacy"] = torch.get_float32_matmul_precision()
    except RuntimeError:
        found["legacy"] = "contradiction"
    flags = torch.backends.cudnn
    return found | {"flags": (flags.enabled, flags.benchmark, flags.deterministic, flags.benchmark_limit)}


def say_nothing():
    """The newer switches as they are when PyTorch starts."""
    for at in (("generic", "all"), ("cuda", "all"), ("mkldnn", "matmul"), ("mkldnn", "conv"), ("cuda", "matmul")):
        torch._C._set_fp32_precision_setter(*at, "none")


@pytest.fixture
def as_it_starts():
    say_nothing()  # whatever an earlier test left: "highest", said aloud, is another state than nothing
    legacy, before = torch.get_float32_matmul_precision(), said()
    allowed, flags = torch.backends.cudnn.allow_tf32, before["flags"]
    yield
    torch.set_float32_matmul_precision(legacy)
    torch.backends.cudnn.allow_tf32 = allowed
    say_nothing()
    torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = flags[:3]
    assert said() == before


@pytest.mark.parametrize("tell", CALLERS.values(), ids=CALLERS)
@pytest.mark.filterwarnings("ignore")
def test_products_are_exact_and_the_callers_settings_come_back(tell, as_it_starts):
    torch.backends.cudnn.deterministic = True
    tell()
    before = said()
    with float32_means_float32(), cudnn(benchmark=True, exact=True):
        with float32_means_float32():  # as a pipeline's call and its plan do
            inside = said()
        assert said() == inside
    assert said() == before
    for switch in ("matmul", "conv"):
        assert inside["cuda", switch] in ("none", "ieee") and inside["mkldnn", switch] in ("none", "ieee")
    # Where these contradict each other, PyTorch refuses every product on CUDA.
    assert inside["matmul"] is False and inside["legacy"] == "highest"
    assert inside["flags"][:3] == (True, True, True)  # deterministic stays what it is


def test_half_precision_leaves_convolutions_alone(as_it_starts):
    before = said()
    with cudnn(benchmark=False, exact=False):
        inside = said()
    assert {**inside, "flags": None} == {**before, "flags": None} and inside["flags"][:2] == (True, False)


@pytest.mark.filterwarnings("ignore")
def test_what_was_inherited_stays_inherited(as_it_starts):
    torch.backends.fp32_precision = "tf32"
    with float32_means_float32():
        pass
    torch.backends.fp32_precision = "none"
    assert torch.backends.cuda.matmul.fp32_precision == torch.backends.mkldnn.matmul.fp32_precision == "none"
