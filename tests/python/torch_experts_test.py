"""Gradients of grouped products and of the feed-forward against torch's own, expert by expert."""
import pytest

torch = pytest.importorskip("torch")

import tokenyard as ty  # noqa: E402
import tokenyard.torch as tyt  # noqa: E402

COUNTS, HIDDEN, WIDTH = [3, 0, 5, 1], 12, 10
EXPERTS = len(COUNTS)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def random(*shape, seed, dtype):
    return (torch.randint(-64, 65, shape, generator=torch.Generator().manual_seed(seed)) / 64).to(dtype).requires_grad_()


LAYOUTS = ["dense", "padded", "gathered"]


def layout_of(name):
    """(groups, rows, the row of each place or -1, the expert of each place)."""
    if name == "dense":
        return ty.RowGroups.of_counts(COUNTS), 9, list(range(9)), [e for e, count in enumerate(COUNTS) for _ in range(count)]
    if name == "padded":
        places = [0, 1, 2, -1, -1, -1, 6, 7, 8, 9, 10, -1, 12, -1]
        return ty.RowGroups.of_offsets(torch.tensor(COUNTS), torch.tensor([0, 4, 6, 12, 14])), 14, places, [0] * 4 + [1] * 2 + [2] * 6 + [3] * 2
    ids = torch.tensor([[0, 2, -1], [2, 0, 3], [-1, -1, -1], [2, 0, -1], [-1, 2, -1], [2, -1, -1]], dtype=torch.int32)
    pairs = sorted((e, row, k) for row, row_ids in enumerate(ids.tolist()) for k, e in enumerate(row_ids) if e >= 0)
    return ty.RowGroups.gathered(ids, EXPERTS), 6, [row for _, row, _ in pairs], [e for e, _, _ in pairs]


def check(found, expected, inputs, padding):
    """Values and the gradients of a random projection; upstream has NaN in padding, which nobody may look at."""
    tolerance = TOLERANCE[found.dtype]
    scale = max(1.0, float(expected.detach().abs().max()))
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * scale)
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(9)).to(found.dtype)
    poisoned = upstream.clone()
    poisoned[padding] = float("nan")
    upstream[padding] = 0
    inputs = [i for i in inputs if i is not None]
    ours = torch.autograd.grad(found, inputs, poisoned)
    theirs = torch.autograd.grad(expected, inputs, upstream.double())
    for a, b in zip(ours, theirs):
        assert a.dtype == b.dtype
        scale = max(1.0, float(b.abs().max()))
        torch.testing.assert_close(a, b, rtol=2 * tolerance, atol=2 * tolerance * scale)


def plain(x, rows, expert, compute):
    """[P,M] float64: compute(expert, row), 0 in padding."""
    outs = [None if row < 0 else compute(e, x.double()[row]) for row, e in zip(rows, expert)]
    zero = torch.zeros_like(next(out for out in outs if out is not None))
    return torch.stack([zero if out is None else out for out in outs])


def product_of(w, bias):
    """compute(expert, row) of a grouped product, for plain()."""
    return lambda e, row: w[e].double() @ row + bias[e].double()


LIMITS = {"limit": 3.0, "alpha": 1.5}


def feed_forward_of(activation, w13, w2, *biases):
    """compute(expert, row) of a feed-forward, for plain()."""
    def compute(e, row):
        gate, up = w13[e].double() @ row + (0 if biases[0] is None else biases[0][e].double())
        if activation == "silu":
            return w2[e].double() @ (torch.nn.functional.silu(gate) * up)
        gate, up = gate.clamp(max=3), up.clamp(-3, 3)
        return w2[e].double() @ (gate * torch.sigmoid(1.5 * gate) * (up + 1)) + biases[1][e].double()

    return compute


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_grouped_gemm(layout, dtype):
    groups, count, rows, expert = layout_of(layout)
    x, w, bias = random(count, HIDDEN, seed=1, dtype=dtype), random(EXPERTS, 7, HIDDEN, seed=2, dtype=dtype), random(EXPERTS, 7, seed=3, dtype=dtype)
    expected = plain(x, rows, expert, product_of(w, bias))
    check(tyt.grouped_gemm(x, groups, w, bias), expected, (x, w, bias), torch.tensor(rows) < 0)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("activation", ["silu", "clamped"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_feed_forward(layout, activation, dtype):
    groups, count, rows, expert = layout_of(layout)
    x = (2 * random(count, HIDDEN, seed=1, dtype=dtype)).detach().requires_grad_()
    w13, w2 = random(EXPERTS, 2, WIDTH, HIDDEN, seed=2, dtype=dtype), random(EXPERTS, HIDDEN, WIDTH, seed=3, dtype=dtype)
    biases = (random(EXPERTS, 2, WIDTH, seed=4, dtype=dtype), random(EXPERTS, HIDDEN, seed=5, dtype=dtype)) if activation == "clamped" else (None, None)

    y = tyt.feed_forward(x, groups, w13, w2, w13_bias=biases[0], w2_bias=biases[1], activation=activation, **LIMITS)
    check(y, plain(x, rows, expert, feed_forward_of(activation, w13, w2, *biases)), (x, w13, w2, *biases), torch.tensor(rows) < 0)


def test_weights_that_are_not_dense_and_gradients_that_nobody_wants():
    groups = ty.RowGroups.of_counts(COUNTS)
    x, w = random(9, HIDDEN, seed=1, dtype=torch.float32).detach(), random(EXPERTS, HIDDEN, 7, seed=2, dtype=torch.float32)
    y = tyt.grouped_gemm(x, groups, w.transpose(1, 2))
    y.sum().backward()
    expected = plain(x, range(9), [e for e, c in enumerate(COUNTS) for _ in range(c)], lambda e, row: row @ w[e].double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(w.grad[2], x[3:8].sum(0)[:, None].expand(HIDDEN, 7), rtol=1e-5, atol=1e-5)
