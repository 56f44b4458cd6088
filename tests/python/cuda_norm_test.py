"""ty.RmsNorm on CUDA tensors beside the same on the CPU."""
import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

import tokenyard as ty  # noqa: E402
from cuda_test import gpu_of  # noqa: E402
from support import on_ranks  # noqa: E402

HIDDEN, TOKENS = 96, 7


def drawn(seed, *shape, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def expect_same(there, here):
    for found, wanted in zip(there, here):
        if torch.is_tensor(found):
            assert found.is_cuda and found.dtype == wanted.dtype
            torch.testing.assert_close(found.cpu(), wanted, rtol=2e-2, atol=2e-2)


def on_both(call):
    """The results of call(move): on the GPU and on the CPU."""
    there, here = call(lambda tensor: tensor.cuda()), call(lambda tensor: tensor)
    expect_same(there, here)
    return there, here


def test_alone():
    x, residual, bias, weight, d_out = drawn(1, 5, HIDDEN), drawn(2, 5, HIDDEN), drawn(3, HIDDEN), drawn(4, HIDDEN, dtype=torch.float32), drawn(5, 5, HIDDEN)
    forward = lambda move: ty.RmsNorm(move(weight), 1e-3)(move(x), move(residual), bias=move(bias))
    there, here = on_both(forward)
    assert torch.equal(there.residual.cpu(), here.residual)
    on_both(lambda move: ty.RmsNorm(move(weight), 1e-3).backward(there if move(x).is_cuda else here, move(d_out)))
    with pytest.raises(ty.UsageError, match="x is on the CPU and the norm's weight on cuda:"):
        ty.RmsNorm(weight.cuda())(x)


def test_with_its_collectives():
    weight = drawn(4, HIDDEN, dtype=torch.float32)

    def body(world):
        gpu_of(world)
        torch.empty(1 << 18, device="cuda").zero_()  # torch's memory and kernel are there before anybody waits for a peer
        torch.cuda.synchronize()
        world.barrier()
        collectives = {device: ty.Collectives(world, device=device) for device in ("cuda", "cpu")}
        of = lambda tensor: collectives[tensor.device.type]
        x, d_next = drawn(10 + world.rank, TOKENS, HIDDEN), drawn(20 + world.rank, TOKENS, HIDDEN)
        scattered = on_both(lambda move: ty.RmsNorm(move(weight), 1e-3).reduce_scatter(of(move(x)), move(x)))
        rows = scattered[1].out
        gathered = on_both(lambda move: ty.RmsNorm(move(weight), 1e-3).all_gather(of(move(x)), move(rows), TOKENS))
        side = lambda pair, move: pair[0 if move(x).is_cuda else 1]
        on_both(lambda move: ty.RmsNorm(move(weight), 1e-3).all_gather_backward(of(move(x)), side(gathered, move), move(d_next)))
        on_both(lambda move: ty.RmsNorm(move(weight), 1e-3).reduce_scatter_backward(of(move(x)), side(scattered, move), move(rows)))
        collectives["cuda"].wait()
        world.barrier()

    on_ranks(body, 2)
