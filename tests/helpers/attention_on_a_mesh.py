"""Attention in blocks on 8 simulated devices and on one; run by a test.

Prints the largest difference, and the communication of the compiled program.
"""

import json
import re

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from helpers.attention import random_arrays
from keras_t5gemma.modeling.blockwise_attention import attend
from keras_t5gemma.modeling.masks import Visibility

*ARRAYS, _ = random_arrays(8, 64, 64, 4, 2, 8)
SEGMENTS = np.array([[1] * 40 + [2] * (24 - i) + [0] * i for i in range(8)], "int32")
SPLITS = [("data", None, "model"), ("data", "model"), ("data", "model"), ("data",)]


def step(query, key, value, segments):
    def total(*arrays):
        visibility = Visibility(segments, segments, window=20)
        return (attend(*arrays, visibility, 2.0, blocks=(8, 16)) ** 2).sum()

    return jax.grad(total, (0, 1, 2))(query, key, value)


mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
layouts = [NamedSharding(mesh, PartitionSpec(*axes)) for axes in SPLITS]
arrays = list(map(jax.device_put, [*ARRAYS, SEGMENTS], layouts))
compiled = jax.jit(step).lower(*arrays).compile()
pairs = zip(compiled(*arrays), jax.jit(step)(*ARRAYS, SEGMENTS), strict=True)
kinds = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"
found = re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", compiled.as_text())
difference = max(float(np.abs(np.array(a) - np.array(b)).max()) for a, b in pairs)
print("REPORT", json.dumps({"difference": difference, "communication": found}))
