"""Random states, table and labels for tests of losses, and their gradients."""

import keras
import numpy as np
from keras import ops

from helpers.models import numpy

TOKENS, SIZE, WIDTH = 12, 96, 8


RNG = np.random.default_rng(0)


STATES = RNG.normal(size=(TOKENS, WIDTH)).astype("float32")


TABLE = 4 * RNG.normal(size=(SIZE, WIDTH)).astype("float32")


LABELS = RNG.integers(0, SIZE, TOKENS).astype("int32")


WEIGHTS = (RNG.random(TOKENS) > 0.3).astype("float32")


def value_and_gradients(function, states, table, **options):
    """The results, and the gradients of the weighted sum by states and table, NumPy."""
    backend = keras.config.backend()
    labels = ops.convert_to_tensor(LABELS)
    weights = ops.convert_to_tensor(WEIGHTS)

    def total(states, table):
        results = function(states, table, labels, **options)
        return ops.sum(results[0] * weights), results

    if backend == "jax":
        import jax

        grad = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
        (_, aux), found = grad(states, table)
    elif backend == "tensorflow":
        import tensorflow as tf

        @tf.function(jit_compile=True)
        def run(states, table):
            with tf.GradientTape() as tape:
                tape.watch((states, table))
                loss, aux = total(states, table)
            return aux, tape.gradient(
                loss, (states, table), unconnected_gradients="zero"
            )

        aux, found = run(states, table)
    else:
        import torch

        states, table = (t.detach().requires_grad_() for t in (states, table))
        loss, aux = total(states, table)
        found = torch.autograd.grad(
            loss, (states, table), allow_unused=True, materialize_grads=True
        )
    return [numpy(ops.cast(array, "float32")) for array in (*aux, *found)]
