"""ty.RmsNorm with arrays, alone and with its collectives, against one process in float64 and derivatives by complex steps."""
import numpy as np
import pytest

import tokenyard as ty
from support import FRAMEWORKS, is_of, make, numbers, on_ranks

HIDDEN, RANKS, EPSILON = 8, 3, 1e-3


def drawn(seed, *shape):
    """Multiples of 1/8: exact in every type."""
    return np.round(np.random.default_rng(seed).normal(size=shape) * 8) / 8


def by_hand(r, weight):
    return r * weight / np.sqrt((r * r).mean(-1, keepdims=True) + EPSILON)


def derivatives(r, weight, d_out, d_residual):
    """Of sum(out d_out + r d_residual): in r and in weight."""
    step = 1e-20

    def loss(r, weight):
        return (by_hand(r, weight) * d_out + r * d_residual).sum()

    d_r, d_weight = np.zeros(r.shape), np.zeros(weight.shape)
    for at in np.ndindex(r.shape):
        moved = r.astype(complex)
        moved[at] += 1j * step
        d_r[at] = loss(moved, weight).imag / step
    for at in range(len(weight)):
        moved = weight.astype(complex)
        moved[at] += 1j * step
        d_weight[at] = loss(r, moved).imag / step
    return d_r, d_weight


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_alone(framework, dtype):
    x, residual, bias, weight, d_out, d_residual = (drawn(seed, *shape) for seed, shape in enumerate(((4, HIDDEN), (4, HIDDEN), (HIDDEN,), (HIDDEN,), (4, HIDDEN), (4, HIDDEN))))
    norm = ty.RmsNorm(make(weight, "float32", framework), EPSILON)
    here = {"dtype": dtype} if framework == "numpy" else {}
    normed = norm(make(x, dtype, framework), make(residual, dtype, framework), bias=make(bias, dtype, framework), **here)
    r = x + bias + residual
    near = dict(rtol=1e-5, atol=1e-6) if dtype == "float32" else dict(rtol=1e-2, atol=1e-2)
    assert is_of(normed.out, framework) and normed.tokens == 4
    np.testing.assert_allclose(numbers(normed.residual, dtype), r, **near)
    np.testing.assert_allclose(numbers(normed.out, dtype), by_hand(r, weight), **near)
    np.testing.assert_allclose(numbers(normed.inverse), 1 / np.sqrt((r * r).mean(-1) + EPSILON), rtol=1e-2)
    d_x, d_weight = norm.backward(normed, make(d_out, dtype, framework), make(d_residual, dtype, framework), **here)
    expected = derivatives(numbers(normed.residual, dtype), weight, d_out, d_residual)
    np.testing.assert_allclose(numbers(d_x, dtype), expected[0], **near)
    np.testing.assert_allclose(numbers(d_weight), expected[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("tokens", [0, 2, 7])
def test_with_its_collectives(framework, tokens):
    partial = [drawn(10 + rank, tokens, HIDDEN) for rank in range(RANKS)]
    residual, weight = drawn(20, tokens, HIDDEN), drawn(21, HIDDEN)
    d_next = [drawn(30 + rank, tokens, HIDDEN) for rank in range(RANKS)]
    r = sum(partial) + residual
    d_rows, d_weight = derivatives(r, weight, sum(d_next), np.zeros(r.shape))
    slices = np.array_split(np.arange(tokens), RANKS)

    def body(world):
        collectives, mine = ty.Collectives(world), slices[world.rank]
        norm = ty.RmsNorm(make(weight, "float32", framework), EPSILON)
        first = norm.reduce_scatter(collectives, make(partial[world.rank], "float32", framework), make(residual[mine], "float32", framework))
        np.testing.assert_allclose(numbers(first.residual), r[mine], rtol=1e-5)
        np.testing.assert_allclose(numbers(first.out), by_hand(r, weight)[mine], rtol=1e-4, atol=1e-6)
        second = norm.all_gather(collectives, first.residual, tokens)
        np.testing.assert_allclose(numbers(second.out), by_hand(r, weight), rtol=1e-4, atol=1e-6)
        d_slice, d_mine = norm.all_gather_backward(collectives, second, make(d_next[world.rank], "float32", framework))
        np.testing.assert_allclose(numbers(d_slice), d_rows[mine], rtol=1e-4, atol=1e-4)
        of_out = make(sum(d_next)[mine], "float32", framework)
        d_partial, d_residual, d_again = norm.reduce_scatter_backward(collectives, first, of_out)
        np.testing.assert_allclose(numbers(d_partial), d_rows, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(numbers(d_residual), d_rows[mine], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(numbers(d_again), numbers(d_mine), rtol=1e-5, atol=1e-6)
        return numbers(d_mine)

    np.testing.assert_allclose(sum(on_ranks(body, RANKS)), d_weight, rtol=1e-4, atol=1e-4)


def test_says_what_does_not_fit():
    norm = ty.RmsNorm(np.ones(HIDDEN, np.float32))
    with pytest.raises(ty.UsageError, match=r"residual is \[1, 8\] float32; expected"):
        norm(np.ones((2, HIDDEN), np.float32), np.ones((1, HIDDEN), np.float32))
    with pytest.raises(ty.UsageError, match="use one dtype"):
        norm(np.ones((2, HIDDEN), np.float32), np.ones((2, HIDDEN), np.float16))
