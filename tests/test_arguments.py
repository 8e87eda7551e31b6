"""What users hand over: one clear line, or the same as the plain form."""

import decimal
import fractions
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hostile
from helpers import TINY_FULL, images, tiny_pdae
from pdae_fast import Pipeline, Recipe, UserError
from pdae_fast.arguments import ImageRangeWarning, as_images, as_indices, as_int, as_number, as_seed
from pdae_fast.tensors import as_image_tensor, as_tensor


@pytest.fixture(scope="module")
def pipe():
    return Pipeline(tiny_pdae(TINY_FULL), steps=2, device="cpu", dtype="float32")


NO_NUMBERS = (
    None,
    1.0,
    2.5,
    "3",
    True,
    np.True_,
    np.float32(1),
    float("nan"),
    [1],
    torch.tensor(1.0),
    torch.tensor(True),
)


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_no_whole_numbers(pipe, value):
    for call in (
        lambda: as_int("n", value),
        lambda: as_seed(value),
        lambda: Recipe(steps=value),
        lambda: pipe.schedule.decoding(value),
        lambda: pipe.decode(count=1, seed=value),
        lambda: pipe.sample(value),
        lambda: pipe.sample(1, seed=value),
        lambda: pipe.sample(1, first=value),
        lambda: pipe.decode(count=1, indices=[value]),
    ):
        with pytest.raises(UserError, match="whole number") as error:
            call()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "number", [np.int64(3), np.uint8(3), np.array(3), torch.tensor(3)], ids=lambda v: type(v).__name__
)
def test_whole_numbers_of_other_types(pipe, number):
    assert as_int("n", number) == 3 and type(as_int("n", number)) is int
    assert Recipe(steps=number) == Recipe(steps=3)
    assert Pipeline(pipe.model, steps=number, batch_size=number, device="cpu").batch_size == 3
    expected = pipe.decode(count=3, seed=3)
    assert torch.equal(pipe.decode(count=number, seed=number), expected)
    assert torch.equal(pipe.sample(2, seed=number, first=number), pipe.sample(2, seed=3, first=3))
    for indices in ([0, 1, 2], np.arange(3), torch.arange(3), iter(range(3))):
        assert torch.equal(pipe.decode(indices=indices, seed=3), expected)


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64, np.uint64(2**64 - 1)])
def test_seeds(pipe, seed):
    for call in (pipe.sample, lambda n, seed: pipe.decode(count=n, seed=seed)):
        with pytest.raises(UserError, match=r"seed must be between 0 and 9223372036854775807, not"):
            call(1, seed=seed)
    assert pipe.sample(1, seed=2**63 - 1).shape == (1, 1, 32, 32)


Z = torch.zeros(1, 16)
BAD = [
    (lambda p: p.decode(Z * float("nan")), "z holds NaN"),
    (lambda p: p.decode(Z.bool()), "z has dtype torch.bool"),
    (lambda p: p.decode([[0.0] * 16]), "z must be a tensor"),
    (lambda p: p.decode(Z, [1]), "x_T has shape list; expected one tensor or array"),
    (lambda p: p.encode([images(1)]), r"x0 has shape list; expected one tensor or array \[B, 1, 32, 32\]: stack"),
    (lambda p: p.encode(None), "x0 has shape NoneType"),
    (lambda p: p.encode(images(1) * 127.5 + 127.5), r"values from .* to 25\d.*; images are in \[-1, 1\]: for 0 to"),
    (lambda p: p.encode(images(1)[:, :, ::2].numpy()), r"\[B, 1, 32, 32\]"),
    (lambda p: p.encode(images(1).numpy().astype(np.int64)), "x0 has dtype int64"),
    (lambda p: p.decode(count=-1), "count must be at least 0"),
    (lambda p: p.decode(indices=[-1]), "indices must be at least 0"),
    (lambda p: p.decode(indices=5), "indices must be whole numbers, not 5"),
    (lambda p: p.decode(indices=torch.tensor(5)), "indices must be whole numbers"),
    (lambda p: p.decode(count=1, generator=np.random.default_rng()), "generator must be a torch.Generator"),
    (lambda p: p.decode(Z, stop_percent="half"), "stop_percent must be a number, not 'half'"),
    (lambda p: p.decode(Z, stop_percent=float("nan")), "stop_percent must be a number between 0 and 1, not nan"),
    (lambda p: p.sample(1, stop_percent=None), "stop_percent must be a number"),
    (lambda p: p.sample(1, latent_steps=0), "steps must be at least 1, not 0"),
    (lambda p: p.interpolate(images(1), images(1), ["a"]), "a weight must be a number, not 'a'"),
    (lambda p: p.interpolate(images(1), images(1), None), "a weight must be a number, not None"),
    (lambda p: p.interpolate(images(1), images(1), [float("nan")]), "a weight must be finite"),
    (lambda p: p.interpolate(images(1), None, [0.5]), "x_b has shape NoneType"),
    (lambda p: p.manipulate(images(1), "dark", None), "scale must be a number, not None"),
    (lambda p: p.manipulate(images(1), 1.0, 1.0), "attribute, where it is not a name, must be a whole number"),
    (lambda p: p.manipulate(images(1), True, 1.0), "must be a whole number, not True"),
    (lambda p: p.manipulate(images(1), -1, 1.0), "expected one of round, dark"),
    (lambda p: p.edit(Z, "dark", torch.zeros(3)), "scale has 3 values; expected one, or one for each of 1 rows"),
    (lambda p: p.blend(None, None, [0.5]), "z must be a tensor"),
    (lambda p: p.with_recipe(solver=None), "solver None is not known"),
    (lambda p: p.with_recipe(solver=[]), r"solver \[\] is not known"),
    (lambda p: p.with_recipe(reuse=3), "reuse 3 is not understood"),
    (lambda p: p.with_recipe(eta="1"), "eta must be a number between 0 and 1, not '1'"),
    (lambda p: p.with_recipe(7), "recipe must be a Recipe"),
    (lambda p: Pipeline(p.model, device=None), "device None is not known; expected auto"),
    (lambda p: Pipeline(p.model, dtype=None), "dtype None is not known"),
    (lambda p: Pipeline(p.model, plan=None), "plan None is not known"),
    (lambda p: Pipeline(p.model, attention=None, device="cpu"), "attention None is not known"),
    (lambda p: Pipeline(p.model, batch_size=2.0), "batch size must be a whole number, not 2.0"),
    (lambda p: Pipeline(p.model, progress="bar"), "progress must be a function or None, not 'bar'"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "words"), BAD, ids=[words[:40] for _, words in BAD])
def test_one_clear_line(pipe, call, words):
    before = pipe.evaluations
    with pytest.raises(UserError, match=words) as error:
        call(pipe)
    assert "\n" not in str(error.value) and pipe.evaluations == before  # before anything is computed


def test_images_of_numpy_are_those_of_torch(pipe):
    eight = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 1), dtype=np.uint8)
    expected = torch.from_numpy(eight).permute(0, 3, 1, 2) / 127.5 - 1
    z = pipe.encode(expected)
    for x in (
        eight,
        eight.transpose(0, 3, 1, 2),
        expected.numpy(),
        expected.permute(0, 2, 3, 1).numpy().astype(np.float64),
    ):
        torch.testing.assert_close(pipe.encode(x), z)
    for x in (eight[0], eight[0, :, :, 0], eight[0].transpose(2, 0, 1)):
        torch.testing.assert_close(pipe.encode(x), z[:1])
    torch.testing.assert_close(pipe.decode(z.numpy(), expected.numpy()), pipe.decode(z, expected))
    # Where three channels could be first or last, they are where the model has them.
    same = np.random.default_rng(0).random((1, 3, 3, 3), dtype=np.float32)
    assert np.array_equal(as_images(same, (3, 3, 3), "x"), same)


def test_a_read_only_array_is_copied():
    """As a file mapped into memory is; a tensor that shares its memory would be undefined behaviour."""
    x, z = images(2).numpy(), np.zeros((2, 16), np.float32)
    for array, take in ((x, lambda x: as_image_tensor(x, (1, 32, 32), "x0")), (z, lambda z: as_tensor(z, "z"))):
        assert np.shares_memory(take(array).numpy(), array)
        array.flags.writeable = False
        assert not np.shares_memory(take(array).numpy(), array) and np.array_equal(take(array).numpy(), array)


@pytest.mark.parametrize("x", [(images(1) + 1) / 2, images(1) * 3], ids=["0 to 1", "beyond"])
def test_an_unusual_range_is_pointed_out(pipe, x):
    with pytest.warns(ImageRangeWarning, match=r"x0 has values from .*; images are in \[-1, 1\]"):
        pipe.encode(x)
    with pytest.warns(ImageRangeWarning):
        pipe.invert(x, pipe.encode(images(1)))


@pytest.mark.filterwarnings("error")
def test_a_usual_range_is_not(pipe):
    for x in (images(2), images(2) * 1.3, torch.zeros(1, 1, 32, 32), torch.ones(1, 1, 32, 32), images(0)):
        pipe.encode(x)
    pipe.decode(torch.zeros(1, 16), torch.randn(1, 1, 32, 32) * 3)  # x_T is no image


def test_empty_batches(pipe):
    z = pipe.encode(images(0))
    assert pipe.reconstruct(images(0)).shape == pipe.decode(count=0).shape == (0, 1, 32, 32)
    assert pipe.logits(z).shape == (0, 2) and pipe.manipulate(images(0), "dark", 1.0).shape == (0, 1, 32, 32)
    assert pipe.interpolate(images(1), images(1), []).shape == (0, 1, 32, 32)


def test_the_checks_themselves():
    assert as_number("x", np.float32(0.5), 0, 1) == 0.5 and as_number("x", torch.tensor(2)) == 2.0
    assert as_indices("i", range(3)) == range(3) and as_indices("i", np.array([2, 0])) == [2, 0]
    with pytest.raises(UserError, match="indices must be at least 0, not -1"):
        as_indices("indices", range(-1, 3))
    for value in ("0.5", None, True, 1j, [1.0, 2.0]):
        with pytest.raises(UserError, match="x must be a number"):
            as_number("x", value)


class Odd:
    """Says that it is a number and is none."""

    def __index__(self):
        return 1.5

    __float__ = __int__ = __iter__ = __index__

    def __repr__(self):
        raise RuntimeError


ODD = (
    Odd(), Odd, [Odd()], b"1", bytearray(b"1"), 1j, {1}, print, ..., range(-1, 2), range(10**30), 10**5000, -(10**5000),
    decimal.Decimal("NaN"), decimal.Decimal("sNaN"), decimal.Decimal("1e9999"), fractions.Fraction(1, 3),
    fractions.Fraction(10**400), np.datetime64("NaT"), np.array(["1970"], "M8[s]"), np.zeros(2, "i4,f4"), np.ma.masked,
    np.ma.array([1, 2], mask=[0, 1]), np.array(None), np.array([10**400, None], object), np.array([1 << 70], object),
    np.longdouble("1e4000"), np.full((1, 3, 4, 3), np.nan, np.float32), np.full((1, 3, 4, 3), 1e300),
)  # fmt: skip
arrays = st.builds(
    lambda dtype, shape, fill: np.full(shape, fill, np.float64).astype(dtype),
    st.sampled_from("?bBhHiIqQefdgFDSUO"),
    st.sampled_from([(), (1,), (3,), (0,), (2, 2), (3, 4, 3), (1, 3, 4, 3), (2, 4, 3, 3), (4, 3, 3)]),
    st.sampled_from((0.0, 1.0, 0.5, 3.0)),
)
anything = (
    hostile.values
    | arrays
    | arrays.map(lambda a: torch.tensor(a) if a.dtype.char in "?bBhiqefdFD" else a)
    | st.lists(hostile.scalars | arrays, max_size=3).flatmap(lambda v: st.sampled_from([v, tuple(v), iter(v)]))
    | st.sampled_from(ODD)
)
SHAPE = (3, 4, 3)


@hostile.quick(1000)
@given(anything)
def test_anything_is_a_value_in_range_or_one_line(value):
    check(value)


def test_odd_values_are_values_in_range_or_one_line():
    for value in ODD:
        check(value)


def check(value):
    checks = {
        "int": (lambda: as_int("n", value, -3, 10**6), lambda v: type(v) is int and -3 <= v <= 10**6),
        "least": (lambda: as_int("n", value, 1), lambda v: type(v) is int and v >= 1),
        "seed": (lambda: as_seed(value), lambda v: type(v) is int and 0 <= v < 2**63),
        "number": (lambda: as_number("x", value), lambda v: type(v) is float and np.isfinite(v)),
        "range": (lambda: as_number("x", value, 0, 1), lambda v: type(v) is float and 0 <= v <= 1),
        "indices": (
            lambda: as_indices("i", value),
            lambda v: (v[0] >= 0 if v else True) if isinstance(v, range) else all(type(i) is int and i >= 0 for i in v),
        ),
        "images": (
            lambda: as_images(value, SHAPE, "x"),
            lambda v: v.dtype == np.float32 and v.shape[1:] == SHAPE and np.isfinite(v).all(),
        ),
    }
    for name, (call, valid) in checks.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found = call()
            except UserError as error:
                assert str(error).isprintable() and len(str(error)) < 200, str(error)
            else:
                assert valid(found), (name, found)
