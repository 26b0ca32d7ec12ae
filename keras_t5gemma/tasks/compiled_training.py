"""The compiled training step of a task on JAX."""

import functools
from typing import Any

import keras

from keras_t5gemma import _compat


class CompiledTraining:
    """Keras's compiled training step; on JAX in less memory.

    - Arrays of the variables can be donated to it.
    - It is traced again by every `make_train_function(force=True)`.
    - On a CPU, XLA orders its operations for memory.
    """

    train_function: Any
    run_eagerly: Any
    jit_compile: Any
    trainable_variables: Any

    def make_train_function(self, force: bool = False) -> Any:
        """As Keras's.

        Args:
            force: make it again if there is one.
        """
        make = super().make_train_function  # type: ignore[misc]
        is_made = self.train_function is not None
        if keras.config.backend() != "jax" or (is_made and not force):
            return make(force)
        if not is_made:
            for variable in self.trainable_variables:
                # A loaded array is in NumPy's memory, which JAX cannot donate.
                variable.assign(variable.value.copy())
        eager = self.run_eagerly or not self.jit_compile
        if eager or keras.config.is_nnx_enabled():
            return make(force)
        # A model's method is always the same function to JAX, which would reuse its
        # program although `CrossAttentionWarmUp` needs another.
        step = functools.partial(type(self).train_step, self)  # type: ignore
        return _compat.make_jax_train_function(self, step, _compiler_options())


@functools.cache
def _compiler_options():
    """Options of XLA for a step in little memory.

    By default XLA starts operations on CPUs as early as it can, to run several at
    once, which keeps their results longer: 1.5 times the temporary memory in a step on
    4,096 tokens, in the same time.
    """
    import jax

    if jax.default_backend() != "cpu":
        return None
    options = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    try:
        jax.jit(lambda: 0, compiler_options=options)()
    except jax.errors.JaxRuntimeError:  # Another version of XLA.
        return None
    return options
