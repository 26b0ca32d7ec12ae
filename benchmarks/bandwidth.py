"""Memory bandwidth of the machine, the floor of a generation step."""

import functools
import math
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np


def clock(threads):
    """Seconds: CPU time with one thread, which is steadier, else wall time."""
    return time.process_time() if threads == 1 else time.perf_counter()


@functools.cache
def large_array():
    return np.ones(2**27, "int32")  # 512 MB


def read_bandwidth(threads):
    """Bytes per second of maxima over 512 MB, the best of several runs."""
    parts, best = np.array_split(large_array(), threads), math.inf
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            start = clock(threads)
            list(pool.map(np.max, parts))
            best = min(best, clock(threads) - start)
    return large_array().nbytes / best


def copy_bandwidth():
    """Bytes per second that copies of 4 GB on the GPU read and write together."""
    import torch

    source, best = torch.ones(2**30, device="cuda"), math.inf
    target = torch.empty_like(source)
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best
