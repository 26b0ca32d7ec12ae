"""Gradients of attention with dropout, whose weights may be computed twice."""

import keras
import numpy as np
import pytest
from helpers.models import numpy
from keras import ops

from keras_t5gemma.modeling.attention import Attention
from keras_t5gemma.modeling.dropout import ReplayableSeedGenerator


@pytest.fixture
def layer():
    layer = Attention(16, 4, 2, 8, 0.3, soft_cap=5.0, dropout=0.4)
    layer.build((2, 6, 16), (2, 6, 16))
    rng = np.random.default_rng(0)
    for variable in layer.variables:
        variable.assign(rng.normal(0, 0.4, variable.shape))
    return layer


def loss(layer, x):
    seeds = ReplayableSeedGenerator(ops.convert_to_tensor([3, 5], "uint32"))
    first, _ = layer(x, x, seeds=seeds)
    second, _ = layer(first, first, seeds=seeds)
    return ops.sum(ops.square(second))


def gradient(layer, x, compiled):
    """Of the loss by `x`."""
    backend = keras.config.backend()
    if backend == "jax":
        import jax

        return jax.grad(lambda x: loss(layer, x))(x)
    if backend == "torch":
        x = x.clone().requires_grad_(True)
        loss(layer, x).backward()
        return x.grad
    import tensorflow as tf

    def function(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = loss(layer, x)
        return tape.gradient(value, x)

    return (tf.function(function, **compiled) if compiled else function)(x)


@pytest.mark.parametrize("compiled", [{}, {"reduce_retracing": True}])
def test_gradient_is_that_of_the_same_dropped_weights(layer, compiled):
    """Against finite differences, eagerly and compiled."""
    rng = np.random.default_rng(1)
    x, direction = rng.normal(size=(2, 2, 6, 16)).astype("float32")
    slope = numpy(gradient(layer, ops.convert_to_tensor(x), compiled))
    step = 1e-3
    above, below = (
        float(numpy(loss(layer, ops.convert_to_tensor(x + sign * step * direction))))
        for sign in (1, -1)
    )
    expected = (above - below) / (2 * step)
    assert (slope * direction).sum() == pytest.approx(expected, rel=1e-2)


@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="TensorFlow's tape")
def test_second_derivative_on_tensorflow(layer):
    import tensorflow as tf

    x = tf.random.stateless_normal((2, 6, 16), [1, 2])
    direction = tf.random.stateless_normal((2, 6, 16), [3, 4])

    def along(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = loss(layer, x)
        return tf.reduce_sum(tape.gradient(value, x) * direction)

    with tf.GradientTape() as tape:
        tape.watch(x)
        value = along(x)
    slope = tape.gradient(value, x)
    step = 1e-3
    expected = (along(x + step * direction) - along(x - step * direction)) / (2 * step)
    found = tf.reduce_sum(slope * direction)
    assert float(found) == pytest.approx(float(expected), rel=1e-2)
