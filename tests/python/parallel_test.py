"""ty.parallel: the solver's answers, who is who, and worlds and placements made from them."""
import itertools
import json
import os
import subprocess

import numpy as np
import pytest

import tokenyard as ty
from support import on_ranks

SIZES = ("nnodes", "device_count", "dp", "tp", "ep", "cp", "outer_dp", "attn_dp", "attn_tp", "attn_cp", "mlp_tp")


@pytest.mark.parametrize("request_, answer", [
    (dict(tp=8, ep=8), dict(attn_tp=8, device_count=8)),
    (dict(dp=8, ep=8), dict(attn_dp=8)),
    (dict(tp=2, dp=4, ep=8), dict(attn_dp=4, attn_tp=2)),
    (dict(tp=8, ep=4), dict(attn_tp=8, mlp_tp=2)),
    (dict(tp=4, cp=2, ep=8), dict(attn_tp=4, attn_cp=2, mlp_tp=1)),
    (dict(dp=1, ep=16, nnodes=2), dict(attn_dp=1, attn_tp=16)),
    (dict(dp=16, ep=16, nnodes=2), dict(attn_dp=16, attn_tp=1)),
    (dict(dp=2, ep=8, device_count=16), dict(attn_dp=2, attn_tp=8, mlp_tp=2)),
    (dict(dp=2, ep=8, device_count=16, outer_dp=2), dict(attn_dp=1, attn_tp=8, mlp_tp=1)),
])
def test_known_answers(request_, answer):
    config = ty.parallel.solve(**request_)
    for name, value in {**request_, **answer}.items():
        assert getattr(config, name) == value, name
    assert ty.parallel.Config(**{name: getattr(config, name) for name in SIZES}) == config


@pytest.mark.parametrize("request_, text", [
    (dict(tp=1, ep=8, dp=1), "device_count"),
    (dict(ep=0), r"ep = 0; every size is in 1\.\.65535"),
    (dict(nnodes=2, transport="shm"), "transport shm does not leave a host, and nnodes = 2"),
    (dict(tp=8, nnodes=3), "nnodes"),
    (dict(tp="8"), "tp = '8' is a str; expected a whole number"),
    (dict(tp=2, transport="pigeon"), "pigeon"),
])
def test_impossible_requests(request_, text):
    with pytest.raises(ty.UsageError, match=text):
        ty.parallel.solve(**request_)


def test_a_config_is_checked():
    with pytest.raises(ty.UsageError, match="device_count"):
        ty.parallel.Config(device_count=8, dp=1, tp=1, ep=8, attn_dp=1)
    with pytest.raises(ty.UsageError, match="rank = 4; this configuration has ranks 0..3"):
        ty.parallel.solve(tp=4).coordinates(4)
    with pytest.raises(ty.UsageError, match="sub-world moe; expected attention"):
        ty.parallel.solve(tp=4).sub_world_size("moe")


def test_the_ranks_table():
    """Every rank is at one place, for attention and for the experts, the last coordinate fastest."""
    tried = 0
    for outer_dp, attn_dp, attn_tp, attn_cp, ep in itertools.product((1, 3), (1, 2), (1, 2, 4), (1, 2), (1, 2, 4)):
        mlp_tp, rest = divmod(attn_dp * attn_tp * attn_cp, ep)
        if rest or mlp_tp == 0 or max(attn_tp, mlp_tp) % min(attn_tp, mlp_tp):
            continue
        tried += 1
        config = ty.parallel.solve(device_count=outer_dp * ep * mlp_tp, dp=outer_dp * attn_dp, tp=max(attn_tp, mlp_tp), ep=ep, cp=attn_cp,
                                   outer_dp=outer_dp, attn_dp=attn_dp, attn_tp=attn_tp, attn_cp=attn_cp, mlp_tp=mlp_tp)
        for sizes in (("outer_dp", "attn_dp", "attn_tp", "attn_cp"), ("outer_dp", "ep", "mlp_tp")):
            table = [tuple(getattr(at, name.removesuffix("_dp") if name == "outer_dp" else name) for name in sizes) for at in config.ranks]
            assert table == list(np.ndindex(*(getattr(config, name) for name in sizes)))
        assert [at.rank for at in config.ranks] == list(range(config.device_count))
    assert tried > 50


def test_json_is_the_answer():
    config = ty.parallel.solve(tp=8, ep=4, nnodes=2)
    told = json.loads(config.to_json())
    assert {name: told[name] for name in SIZES} == {name: getattr(config, name) for name in SIZES}
    assert told["ranks"] == [at._asdict() for at in config.ranks]
    assert told["ranks"][5]["node"] == 1


@pytest.mark.skipif("TOKENYARD_COMMAND" not in os.environ, reason="TOKENYARD_COMMAND does not name the command line")
@pytest.mark.parametrize("request_", [dict(tp=8, ep=4, nnodes=2), dict(dp=2, ep=8, device_count=16, outer_dp=2)])
def test_json_of_the_command_line(request_):
    options = [part for name, value in request_.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    done = subprocess.run([os.environ["TOKENYARD_COMMAND"], "parallel", *options, "--json", "-"], capture_output=True, text=True, check=True)
    told, ours = json.loads(done.stdout), json.loads(ty.parallel.solve(**request_).to_json())
    for rank, entry in enumerate(ours["ranks"]):
        assert entry.items() <= told["ranks"][rank].items()  # and what it holds
    del told["ranks"], ours["ranks"]
    assert ours.items() <= told.items()


def test_sub_worlds_of_the_answer():
    config = ty.parallel.solve(ep=2, tp=2, outer_dp=2, dp=4, device_count=8)
    assert (config.ep, config.mlp_tp, config.outer_dp) == (2, 2, 2)

    def rank_main(world):
        found = {}
        for kind in ("attention", "ep", "tp", "ep_tp", "outer"):
            part = config.sub_world(world, kind)
            assert part.size == config.sub_world_size(kind)
            found[kind] = [int.from_bytes(told, "little") for told in part.all_gather(world.rank.to_bytes(4, "little"))]
        return found

    for rank, found in enumerate(on_ranks(rank_main, 8)):
        at = config.coordinates(rank)
        ranks = {
            "ep": [r.rank for r in config.ranks if (r.outer, r.mlp_tp) == (at.outer, at.mlp_tp)],
            "tp": [r.rank for r in config.ranks if (r.outer, r.ep) == (at.outer, at.ep)],
            "ep_tp": [r.rank for r in config.ranks if r.outer == at.outer],
            "outer": [r.rank for r in config.ranks if (r.ep, r.mlp_tp) == (at.ep, at.mlp_tp)],
            "attention": [r.rank for r in config.ranks if (r.outer, r.attn_dp) == (at.outer, at.attn_dp)],
        }
        assert found == ranks


def test_outer_replicas_are_independent_exchanges():
    """outer_dp = 2 on 4 ranks: each half exchanges among itself, with other numbers of calls."""
    config = ty.parallel.solve(ep=2, outer_dp=2, dp=4)
    assert config.device_count == 4

    def rank_main(world):
        part, outer = config.sub_world(world, "ep_tp"), config.coordinates(world.rank).outer
        exchange = ty.Exchange(part, config.placement(4), hidden_size=4, top_k=1, max_tokens_per_rank=2, dtype="float32", timeout_ms=20_000)
        x = np.full((2, 4), world.rank + 1, np.float32)
        for _ in range(1 + outer):
            received = exchange.dispatch(x, np.array([[0], [3]]))
            senders = sorted(received.rows[:, 0].tolist())
            out = exchange.combine(received.rows, received.handle)
        assert np.array_equal(out, x)
        return senders

    assert on_ranks(rank_main, 4) == [[1.0, 2.0]] * 2 + [[3.0, 4.0]] * 2
