"""What goes in comes out: frameworks, element types, strides."""
import numpy as np
import pytest

import tokenyard as ty
from support import FRAMEWORKS, HIDDEN, is_of, make, make_exchange, numbers, torch

IDS = np.zeros((4, 2), np.int64)
needs_torch = pytest.mark.skipif(torch is None, reason="torch is not installed")


@pytest.fixture(scope="module")
def exchange():
    return make_exchange(ty.World.in_process(1)[0], ty.Placement.uniform(6, 1), max_row_bytes=256, max_scale_bytes=64, depth=4)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8",
                                   "bool", "complex64"])
def test_rows_of_any_numpy_type(exchange, dtype):
    x = np.arange(4 * HIDDEN).reshape(4, HIDDEN).astype(dtype)
    rows = exchange.dispatch(x, IDS).rows
    assert rows.dtype == x.dtype
    np.testing.assert_array_equal(rows, x)


@needs_torch
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "int64", "int16", "int8", "uint8", "bool", "float8_e4m3fn",
                                   "float8_e5m2"])
def test_rows_of_any_torch_type(exchange, dtype):
    x = torch.arange(4 * HIDDEN).reshape(4, HIDDEN).to(getattr(torch, dtype))
    rows = exchange.dispatch(x, torch.from_numpy(IDS)).rows
    assert rows.dtype == x.dtype and isinstance(rows, torch.Tensor)
    assert torch.equal(rows.view(torch.uint8), x.view(torch.uint8))


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_strided_rows_and_ids_of_either_width(exchange, framework):
    wide = make(np.arange(8 * 2 * HIDDEN).reshape(8, 2 * HIDDEN), "float32", framework)
    x = wide[::2, :HIDDEN]
    ids = make(np.zeros((4, 4)), "int32", framework)[:, ::2]
    np.testing.assert_array_equal(numbers(exchange.dispatch(x, ids).rows), numbers(x))


def test_ids_of_one_choice_may_be_flat(exchange):
    out = exchange.dispatch(np.ones((4, HIDDEN), np.float32), np.array([0, 5, -1, 2]), np.ones(4, np.float32))
    assert out.num_rows == 3 and out.local_ids.tolist() == [[0], [5], [2]]


@needs_torch
def test_tensors_that_require_grad_are_read_as_they_are(exchange):
    x = torch.ones(4, HIDDEN, requires_grad=True)
    out = exchange.dispatch(x, torch.from_numpy(IDS))
    assert not out.rows.requires_grad and not exchange.combine(x, out.handle).requires_grad


def test_a_list_is_an_array_too(exchange):
    assert exchange.dispatch([[1.0] * HIDDEN] * 4, IDS.tolist()).rows.dtype == np.float64


def test_metadata_cannot_be_written_by_accident(exchange):
    out = exchange.dispatch(np.ones((4, HIDDEN), np.float32), IDS)
    with pytest.raises(ValueError, match="read-only"):
        out.local_ids[0] = 5
    out.rows[:] = 3  # a lease is for use
    assert (out.rows == 3).all()


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("scale_format", ["float32", "float32_pow2", "ue8m0"])
def test_quantised_dispatch_is_quantise_before_it(exchange, scale_format, framework):
    x = make(np.random.default_rng(3).standard_normal((4, 64)), "float32", framework)
    q, scales = ty.quantise(x, scale_format)
    out = exchange.dispatch(x, make(IDS, "int64", framework), quantise=scale_format)
    assert is_of(q, framework) and q.dtype == out.rows.dtype
    raw = (lambda a: a.view(torch.uint8).numpy()) if framework == "torch" else np.asarray
    np.testing.assert_array_equal(raw(out.rows), raw(q))
    np.testing.assert_array_equal(numbers(out.scales), numbers(scales))
    back = numbers(ty.dequantise(q, scales, "float32", scale_format))
    assert np.abs(back - numbers(x)).max() <= np.abs(numbers(x)).max() / 8


def test_quantise_follows_its_formula():
    x = np.linspace(-3, 3, 256, dtype=np.float32).reshape(1, 256)
    _, scales = ty.quantise(x)
    amax = np.abs(x).reshape(2, 128).max(1)
    np.testing.assert_array_equal(scales, (amax / np.float32(448)).reshape(1, 2))
