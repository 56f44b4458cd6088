"""Timing of DeepEP's test programs: by the clock, with the device at rest before and after."""
import time

import torch


def _settle():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def bench(fn, num_warmups: int = 50, num_tests: int = 50, post_fn=None, flush_l2: bool = True):
    """(mean, least, most) seconds of fn()."""
    for _ in range(num_warmups):
        fn()
    times = []
    for _ in range(num_tests):
        _settle()
        begin = time.perf_counter()
        fn()
        _settle()
        times.append(time.perf_counter() - begin)
        if post_fn is not None:
            post_fn()
    times = times[1:] or times
    return sum(times) / len(times), min(times), max(times)


def bench_kineto(fn, kernel_names, num_tests: int = 30, suppress_kineto_output: bool = False, trace_path=None, flush_l2: bool = True,
                 barrier_comm_profiling: bool = False, num_kernels_per_period: int = 1, barrier=None):
    """Seconds of each kernel name; here all of them share the time of fn(). With two kernels per period a list of both halves."""
    seconds = bench(fn, 2, num_tests)[0]
    names = (kernel_names,) if isinstance(kernel_names, str) else kernel_names
    share = seconds / len(names)
    results = [share if num_kernels_per_period == 1 else [share / num_kernels_per_period] * num_kernels_per_period for _ in names]
    return results[0] if isinstance(kernel_names, str) else tuple(results)
