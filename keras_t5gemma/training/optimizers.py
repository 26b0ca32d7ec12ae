"""Optimizers: checks for bfloat16 weights, fused updates without copies."""

import functools
from typing import Any

import keras
from keras import ops

from keras_t5gemma import _compat
from keras_t5gemma.training.accumulation import accumulate_exactly, inner_optimizer
from keras_t5gemma.utils.checks import shown

OPTIMIZERS = {
    "adafactor": keras.optimizers.Adafactor,
    "adamw": keras.optimizers.AdamW,
    "lion": keras.optimizers.Lion,
    "muon": keras.optimizers.Muon,
}
_UPDATES = "keras_t5gemma_updates"  # A collection of a TensorFlow graph.


def prepare_optimizer(optimizer: Any, dtype: str) -> keras.optimizers.Optimizer:
    """The optimizer of `compile`: checked for weights of `dtype`, fused, exact.

    With `gradient_accumulation_steps` see `GradientAccumulation`.

    Args:
        optimizer: a Keras optimizer, its name or config; `"auto"` is Adafactor at
            1e-4, as in the official fine-tuning example.
        dtype: of the weights.

    Raises:
        ValueError: see `check_optimizer`.
    """
    if isinstance(optimizer, str) and optimizer == "auto":
        optimizer = keras.optimizers.Adafactor(1e-4)
    try:
        optimizer = keras.optimizers.get(optimizer)
    except Exception as error:
        raise ValueError(_message(optimizer)) from error
    if optimizer is None:
        raise ValueError(_message(optimizer))
    inner = inner_optimizer(optimizer)
    check_optimizer(inner, dtype)
    update_in_place(inner)
    sum_repeated_rows(inner)
    accumulate_exactly(optimizer)
    return optimizer


def _message(optimizer):
    return (
        "`optimizer` must be a keras.optimizers.Optimizer, its name or its config; got "
        f"{shown(optimizer)}."
    )


def check_optimizer(optimizer: keras.optimizers.Optimizer, dtype: str) -> None:
    """Raise `ValueError` for an Adam whose variance cannot be held in `dtype`.

    In bfloat16, 0.999 rounds to 1: the second moment never changes and the
    weights never move.
    """
    optimizers = keras.optimizers
    adams = (optimizers.Adam, optimizers.Nadam, optimizers.Lamb)
    if dtype != "bfloat16" or not isinstance(optimizer, adams):
        return
    beta_2 = ops.cast(float(optimizer.beta_2), "bfloat16")
    if float(ops.convert_to_numpy(ops.cast(beta_2, "float32"))) >= 1:
        raise ValueError(
            f"{type(optimizer).__name__} with beta_2={optimizer.beta_2} never moves "
            "bfloat16 weights: beta_2 rounds to 1. Load the model with "
            "dtype='mixed_bfloat16', lower beta_2 to 0.99, or use Adafactor, Lion "
            "or Muon."
        )


def check_trainable_dtype(dtype: str) -> None:
    """Raise `ValueError` for weights in float16."""
    if dtype == "float16":
        raise ValueError(
            "A float16 model cannot be trained: its gradients overflow. Load it with "
            "dtype='mixed_float16', 'bfloat16' or 'float32'."
        )


def update_in_place(optimizer: keras.optimizers.Optimizer) -> None:
    """Use the backend's fused kernel for Keras's Adam and AdamW.

    Keras's own step makes several copies of the weights: on PyTorch of all of them, on
    TensorFlow of one variable at a time. On JAX the compiler fuses the step.
    """
    if not _is_fused(optimizer):
        return
    updates = {"torch": _fused_adam_on_torch, "tensorflow": _fused_adam_on_tensorflow}
    update = updates.get(keras.config.backend())
    if update is not None:
        _compat.replace_update(optimizer, functools.partial(update, optimizer))
    if keras.config.backend() == "tensorflow":
        _compat.replace_weight_decay(optimizer, functools.partial(_decay, optimizer))


def sum_repeated_rows(optimizer: keras.optimizers.Optimizer) -> None:
    """Give an optimizer dense gradients on TensorFlow.

    The gradient of a table is `tf.IndexedSlices` there, with a row for each token.
    Keras clips and squares the rows of a repeated token one by one, not their sum.
    `GradientAccumulation` sums them itself.
    """
    accumulates = optimizer.gradient_accumulation_steps
    if keras.config.backend() == "tensorflow" and not accumulates:
        change = functools.partial(_dense_gradients, optimizer)
        _compat.change_gradients(optimizer, change)


def _dense_gradients(optimizer, gradients):
    import tensorflow as tf

    clips = (optimizer.clipnorm, optimizer.global_clipnorm, optimizer.clipvalue)
    is_fused = _is_fused(optimizer) and not tf.distribute.has_strategy()
    if is_fused and not any(clip is not None for clip in clips):
        return gradients  # Each is dense during the update of its variable only.
    return [tf.convert_to_tensor(gradient) for gradient in gradients]


def _is_fused(optimizer):
    """Whether an optimizer is Adam or AdamW: not a subclass, whose step may differ."""
    return _compat.is_plain_adam(optimizer) and not optimizer.amsgrad


def _decay(optimizer, variables):
    """Weight decay on TensorFlow, where the update of a variable contains it."""
    import tensorflow as tf

    if tf.distribute.has_strategy():
        _compat.apply_weight_decay(optimizer, variables)


def _fused_adam_on_torch(optimizer, gradients, variables, learning_rate):
    import torch

    count = int(optimizer.iterations) + 1
    first, second = _compat.adam_moments(optimizer, variables)
    with torch.no_grad():
        _compat.fused_adam(
            [v.value for v in variables],
            list(gradients),
            [v.value for v in first],
            [v.value for v in second],
            count,
            lr=float(learning_rate),
            beta1=optimizer.beta_1,
            beta2=optimizer.beta_2,
            # PyTorch adds it after the bias correction, Keras before.
            eps=optimizer.epsilon / (1 - optimizer.beta_2**count) ** 0.5,
        )


def _fused_adam_on_tensorflow(optimizer, gradient, variable, learning_rate):
    import tensorflow as tf

    if tf.distribute.has_strategy():  # There variables have no handle.
        return type(optimizer).update_step(optimizer, gradient, variable, learning_rate)
    # One variable after another, its gradient first. Else copies of several tables
    # exist at once, also of those that the backward pass still reads.
    before = _last_update()
    with tf.control_dependencies([*before, gradient]):
        if _compat.uses_weight_decay(optimizer, variable):
            decay = tf.cast(optimizer.weight_decay * learning_rate, variable.dtype)
            before = [variable.assign_sub(variable * decay, read_value=False)]
    with tf.control_dependencies([x for x in before if x is not None]):
        update = _apply_adam(optimizer, gradient, variable, learning_rate)
    if not tf.executing_eagerly():
        tf.compat.v1.get_collection_ref(_UPDATES)[:] = [update]


def _last_update():
    """The update before this in the graph that is being made, as a list."""
    import tensorflow as tf

    if tf.executing_eagerly():
        return []
    updates = tf.compat.v1.get_collection(_UPDATES)
    # A branch of a condition has the collections of the graph around it.
    return [x for x in updates if x.graph is tf.compat.v1.get_default_graph()]


def _apply_adam(optimizer, gradient, variable, learning_rate):
    import tensorflow as tf

    count = tf.cast(ops.convert_to_tensor(optimizer.iterations), "float32") + 1
    numbers = {
        "beta1_power": tf.pow(optimizer.beta_1, count),
        "beta2_power": tf.pow(optimizer.beta_2, count),
        "lr": learning_rate,
        "beta1": optimizer.beta_1,
        "beta2": optimizer.beta_2,
        "epsilon": optimizer.epsilon,
    }
    (first,), (second,) = _compat.adam_moments(optimizer, [variable])
    return tf.raw_ops.ResourceApplyAdam(
        var=variable.handle,
        m=first.value.handle,
        v=second.value.handle,
        grad=tf.cast(gradient, variable.dtype),
        **{name: tf.cast(value, variable.dtype) for name, value in numbers.items()},
    )


def separate_averages(optimizer: keras.optimizers.Optimizer) -> None:
    """Copy moving averages after `fit`, so that they share no array with the weights.

    Keras ends with one array for a weight and its average. On JAX the next `fit` would
    donate that array twice, which fails.
    """
    for variable in _compat.moving_averages(optimizer):
        variable.assign(ops.copy(variable.value))
