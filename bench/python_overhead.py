"""What a dispatch and a combine from Python cost on top of the same calls of the C++ module: one rank, a token, so that little else is timed.

    PYTHONPATH=build/cpu/python build/.venv/bin/python bench/python_overhead.py bench/results/cpu_python_overhead.json
    PYTHONPATH=build/gpu/python python3 bench/python_overhead.py --device cuda bench/results/gpu_python_overhead.json

With --device cuda a call is timed from its begin until its kernels are enqueued: batches are short, and between them the GPU comes to rest.
"""
import argparse
import json
import sys
import time

import numpy as np

import tokenyard as ty
from tokenyard.exchange import _WORDS

BATCH, REPEATS = {"cpu": 500, "cuda": 20}, {"cpu": 40, "cuda": 200}


def microseconds(call, device):
    """Of one call: the median of batches."""
    times = []
    for _ in range(REPEATS[device]):
        settle(device)
        begin = time.perf_counter()
        for _ in range(BATCH[device]):
            call()
        times.append((time.perf_counter() - begin) / BATCH[device] * 1e6)
    return sorted(times)[REPEATS[device] // 2]


def settle(device):
    if device == "cuda":
        sys.modules["torch"].cuda.synchronize()


def measure(exchange, device, x, ids, weights, **options):
    handle = exchange.dispatch(x, ids, weights, **options).handle
    words = tuple({**_WORDS, **options}.values())
    keep, arguments, _ = exchange._dispatch_call(x, ids, weights, words, None, None, None, None, None, None, None)
    combine_keep, combine_arguments, _ = exchange._combine_call(x, handle)
    found = {
        "dispatch_us": microseconds(lambda: exchange.dispatch(x, ids, weights, **options), device),
        "dispatch_core_us": microseconds(lambda: exchange._core.dispatch(*arguments), device),
        "combine_us": microseconds(lambda: exchange.combine(x, handle), device),
        "combine_core_us": microseconds(lambda: exchange._core.combine(*combine_arguments), device),
    }
    for call in ("dispatch", "combine"):
        found[f"{call}_overhead_us"] = found[f"{call}_us"] - found[f"{call}_core_us"]
    return {name: round(value, 2) for name, value in found.items()}


def make_exchange(device, **options):
    return ty.Exchange(ty.World.in_process(1)[0], ty.Placement.uniform(8, 1), hidden_size=64, top_k=2, max_tokens_per_rank=1, dtype="float32",
                       device=device, **options)


def measure_all(device):
    arrays = np.ones((1, 64), np.float32), np.zeros((1, 2), np.int64), np.ones((1, 2), np.float32)
    if device == "cuda":
        import torch

        tensors = [torch.from_numpy(array).cuda() for array in arrays]
        return {"gpu": torch.cuda.get_device_name(), "torch_version": torch.__version__,
                "torch, throughput, capacity": measure(make_exchange(device), device, *tensors, sizing="capacity"),
                "torch, latency": measure(make_exchange(device, mode="latency"), device, *tensors),
                "torch, latency, copy_out": measure(make_exchange(device, mode="latency"), device, *tensors, copy_out=True)}
    exchange = make_exchange(device)
    results = {"numpy": measure(exchange, device, *arrays)}
    try:
        import torch

        results["torch"] = measure(exchange, device, *map(torch.from_numpy, arrays))
    except ImportError:
        pass
    return results


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("out", nargs="?")
    given = parser.parse_args()
    text = json.dumps({"what": "microseconds per call, median", "python": sys.version.split()[0], **measure_all(given.device)}, indent=2)
    print(text)
    if given.out:
        with open(given.out, "w", encoding="utf-8") as file:
            file.write(text + "\n")


main()
