"""How the steps of a task are compiled, on each backend."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import keras

from keras_t5gemma import _compat
from keras_t5gemma.modeling.blockwise_attention import uses_blocks
from keras_t5gemma.modeling.layer_iteration import iter_layers
from keras_t5gemma.utils.backends import on_cpu

# Programs of a step on TensorFlow for batches of long texts, one a shape.
_MOST_PROGRAMS = 32


class CompiledTraining:
    """Keras's compiled steps, in less memory.

    On JAX, for training:

    - Arrays of the variables can be donated to it.
    - It is traced again by every `make_train_function(force=True)`.
    - On a CPU, XLA orders its operations for memory.

    On TensorFlow, for training, evaluation and prediction: see `_StepOfShapes`. On
    PyTorch they are not compiled, also with `jit_compile=True`, which is for decoding:
    Inductor takes minutes for a step, and fails for the fused Adam.
    """

    train_function: Any
    test_function: Any
    predict_function: Any
    train_step: Any
    test_step: Any
    predict_step: Any
    run_eagerly: Any
    jit_compile: Any
    trainable_variables: Any
    optimizer: Any
    distribute_strategy: Any

    def make_train_function(self, force: bool = False) -> Any:
        """As Keras's.

        Args:
            force: make it again if there is one.
        """
        make = self._uncompiled(super().make_train_function)  # type: ignore[misc]
        is_made = self.train_function is not None
        if is_made and not force:
            return make(force)
        if keras.config.backend() != "jax":
            if keras.config.backend() == "tensorflow":
                self._build_optimizer()
            make(force)
            self.train_function = _of_shapes(self, self.train_step, self.train_function)
            return self.train_function
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

    def _build_optimizer(self):
        """Make its variables: TensorFlow traces a step that makes some twice."""
        variables = self.trainable_variables
        is_whole = variables and all(layer.built for layer in iter_layers(self))
        if is_whole and not self.optimizer.built:
            with self.distribute_strategy.scope():
                self.optimizer.build(variables)

    def make_test_function(self, force: bool = False) -> Any:
        """As Keras's; see `make_train_function`."""
        is_made = self.test_function is not None
        self._uncompiled(super().make_test_function)(force)  # type: ignore[misc]
        if force or not is_made:
            step, made = self.test_step, self.test_function
            self.test_function = _of_shapes(self, step, made)
        return self.test_function

    def make_predict_function(self, force: bool = False) -> Any:
        """As Keras's; see `make_train_function`."""
        is_made = self.predict_function is not None
        self._uncompiled(super().make_predict_function)(force)  # type: ignore[misc]
        if force or not is_made:
            step, made = self.predict_step, self.predict_function
            self.predict_function = _of_shapes(self, step, made)
        return self.predict_function

    def _uncompiled(self, make):
        """Keras's `make`; on PyTorch it makes a function that is not compiled."""

        def without_compiler(force):
            wanted, self.jit_compile = self.jit_compile, False
            try:
                return make(force)
            finally:
                self.jit_compile = wanted

        return without_compiler if keras.config.backend() == "torch" else make


def _of_shapes(model, step, function):
    """Keras's `function` of a `step`; on TensorFlow one that knows long shapes."""
    if keras.config.backend() != "tensorflow" or model.run_eagerly:
        return function
    import tensorflow as tf

    has_strategy = tf.distribute.has_strategy()
    if has_strategy or model.distribute_strategy is not tf.distribute.get_strategy():
        return function
    if model.steps_per_execution > 1:
        return function
    return _StepOfShapes(step, function, model.jit_compile)


class _StepOfShapes:
    """A step on TensorFlow whose program for long texts knows their lengths.

    Keras traces one program for batches of all lengths, unknown in it. Attention of
    unknown lengths cannot be computed in blocks, see `attention_mask`. So batches that
    need blocks have a program for each of their shapes, up to `_MOST_PROGRAMS`; others
    share one, as with Keras.

    Args:
        step: of the model: function of a batch.
        function: Keras's compiled function of it; called with an iterator over batches,
            or for prediction with a list of them.
        jit_compile: of the model.
    """

    def __init__(self, step: Callable, function: Callable, jit_compile: bool):
        import tensorflow as tf

        self.function = function
        self.cpu = on_cpu(None)  # Of any tensor on TensorFlow.
        # Two: one function would use its program of unknown shapes for all.
        self.exact, self.relaxed = (
            tf.function(step, jit_compile=jit_compile, autograph=False)
            for _ in range(2)
        )
        self.shapes: set[tuple] = set()
        self.is_full = False

    def __call__(self, batches: Any) -> Any:
        import tensorflow as tf

        if isinstance(batches, list):
            is_long = self._needs_program(batches[0])
            return self.exact(batches[0]) if is_long else self.function(batches)
        if not isinstance(batches, tf.data.Iterator):
            batch = next(batches)
            is_long = self._needs_program(batch)
            return self.exact(batch) if is_long else self.function([batch])
        spec = batches.element_spec
        leaves = keras.tree.flatten(spec)
        is_plain = all(isinstance(leaf, tf.TensorSpec) for leaf in leaves)
        is_plain = is_plain and all(leaf.shape.rank is not None for leaf in leaves)
        if not is_plain or not self._may_be_long(spec):
            return self.function(batches)
        batch = next(batches)
        # Concrete functions: calls of others warn of each program they trace.
        if None in _lengths(spec) and self._needs_program(batch):
            return self.exact.get_concrete_function(batch)(batch)
        return self.relaxed.get_concrete_function(spec)(batch)

    def _needs_program(self, batch):
        """Whether a batch is long, and may have a program for its shapes."""
        if not self._may_be_long(batch):
            return False
        leaves = keras.tree.flatten(batch)
        shapes = tuple(tuple(getattr(leaf, "shape", ())) for leaf in leaves)
        if shapes not in self.shapes and len(self.shapes) == _MOST_PROGRAMS:
            if not self.is_full:
                self.is_full = True
                warnings.warn(
                    f"Long batches came in more than {_MOST_PROGRAMS} shapes, each of "
                    "which TensorFlow compiles a program for. Batches of other shapes "
                    "share a program that holds all queries x keys of attention: pad "
                    "texts to fewer lengths.",
                    stacklevel=3,
                )
            return False
        self.shapes.add(shapes)
        return True

    def _may_be_long(self, batch):
        """Whether the inputs of a batch, or of its signature, need blocks."""
        return any(n is None or uses_blocks(n, n, self.cpu) for n in _lengths(batch))


def _lengths(batch):
    """Those of the inputs of a batch, or of its signature: `None` if unknown."""
    # A subclass may have a step of more than x, y and sample weights.
    x = batch[0] if isinstance(batch, tuple | list) else batch
    shapes = [getattr(leaf, "shape", ()) for leaf in keras.tree.flatten(x)]
    return [shape[1] for shape in shapes if len(shape) > 1]


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
