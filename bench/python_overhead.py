"""What a dispatch and a combine from Python cost on top of the same calls of the C++ module: one rank, a token, so that little else is timed.

    PYTHONPATH=build/cpu/python build/.venv/bin/python bench/python_overhead.py bench/results/cpu_python_overhead.json
"""
import json
import sys
import time

import numpy as np

import tokenyard as ty

BATCH, REPEATS = 500, 40


def microseconds(call):
    """Of one call: the median of batches."""
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        for _ in range(BATCH):
            call()
        times.append((time.perf_counter() - begin) / BATCH * 1e6)
    return sorted(times)[REPEATS // 2]


def measure(exchange, x, ids, weights):
    handle = exchange.dispatch(x, ids, weights).handle
    keep, arguments, _ = exchange._dispatch_call(x, ids, weights, layout="token_major", sizing=None, mode=None)
    combine_keep, combine_arguments, _ = exchange._combine_call(x, handle)
    found = {
        "dispatch_us": microseconds(lambda: exchange.dispatch(x, ids, weights)),
        "dispatch_core_us": microseconds(lambda: exchange._core.dispatch(*arguments)),
        "combine_us": microseconds(lambda: exchange.combine(x, handle)),
        "combine_core_us": microseconds(lambda: exchange._core.combine(*combine_arguments)),
    }
    for call in ("dispatch", "combine"):
        found[f"{call}_overhead_us"] = found[f"{call}_us"] - found[f"{call}_core_us"]
    return {name: round(value, 2) for name, value in found.items()}


def main():
    exchange = ty.Exchange(ty.World.in_process(1)[0], ty.Placement.uniform(8, 1), hidden_size=64, top_k=2, max_tokens_per_rank=4, dtype="float32")
    arrays = np.ones((1, 64), np.float32), np.zeros((1, 2), np.int64), np.ones((1, 2), np.float32)
    results = {"numpy": measure(exchange, *arrays)}
    try:
        import torch

        results["torch"] = measure(exchange, *map(torch.from_numpy, arrays))
    except ImportError:
        pass
    text = json.dumps({"what": "microseconds per call, median", "python": sys.version.split()[0], **results}, indent=2)
    print(text)
    if len(sys.argv) > 1:
        with open(sys.argv[1], "w", encoding="utf-8") as file:
            file.write(text + "\n")


main()
