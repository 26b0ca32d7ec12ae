"""The plain attention, and values with gradients on any backend."""

import keras
import numpy as np
from keras import ops

from helpers.models import numpy


def plain_attention(query, key, value, visibility, soft_cap=None):
    """By the definition: all logits at once, float32."""
    batch, length, heads, size = query.shape
    shape = (batch, length, key.shape[1], heads // key.shape[1], size)
    query = ops.reshape(query, shape)
    logits = ops.cast(ops.einsum("BTKGH,BKSH->BKGTS", query, key), "float32")
    if soft_cap is not None:
        logits = soft_cap * ops.tanh(logits / soft_cap)
    mask = visibility.mask()[:, None, None]
    weights = ops.softmax(ops.where(mask, logits, -1e30), axis=-1)
    weights = ops.cast(ops.where(mask, weights, 0.0), value.dtype)
    output = ops.einsum("BKGTS,BKSH->BTKGH", weights, value)
    return ops.reshape(output, (batch, length, heads, size))


def random_arrays(batch, queries, keys, heads, kv_heads, size, seed=0):
    """Query, key, value, and the gradient of the output: float32 NumPy."""
    rng = np.random.default_rng(seed)
    shapes = (batch, queries, heads, size), *[(batch, kv_heads, keys, size)] * 2
    return [rng.normal(size=s).astype("float32") for s in (*shapes, shapes[0])]


def values_and_gradients(functions, arrays, upstream):
    """Of each function of `arrays`: its output, and gradients of `sum(out upstream)`.

    All are compiled as one program.

    Returns:
        A list of lists of float32 NumPy arrays.
    """
    backend = keras.config.backend()
    arrays = [ops.convert_to_tensor(x) for x in arrays]
    upstream = ops.convert_to_tensor(upstream)

    def weighted(output):
        return ops.sum(ops.cast(output, "float32") * upstream)

    if backend == "jax":
        import jax

        def one(function, *arrays):
            def total(*arrays):
                output = function(*arrays)
                return weighted(output), output

            places = tuple(range(len(arrays)))
            (_, output), found = jax.value_and_grad(total, places, True)(*arrays)
            return [output, *found]

        found = jax.jit(lambda *a: [one(f, *a) for f in functions])(*arrays)
    elif backend == "tensorflow":
        import tensorflow as tf

        @tf.function(autograph=False)
        def run(*arrays):
            found = []
            for function in functions:
                with tf.GradientTape() as tape:
                    tape.watch(arrays)
                    output = function(*arrays)
                    total = weighted(output)
                found.append([output, *tape.gradient(total, arrays)])
            return found

        found = run(*arrays)
    else:
        import torch

        found = []
        for function in functions:
            leaves = [x.detach().requires_grad_() for x in arrays]
            output = function(*leaves)
            gradients = torch.autograd.grad(weighted(output), leaves)
            found.append([output.detach(), *gradients])
    return [[numpy(x) for x in group] for group in found]
