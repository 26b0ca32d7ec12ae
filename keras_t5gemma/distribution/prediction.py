"""Forward passes of models: safe to stop, from threads, and across processes."""

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_t5gemma import _compat
from keras_t5gemma.distribution import mesh

_LOCKS: Any = weakref.WeakKeyDictionary()  # Of models, for Keras's loops over data.
_LOCKS_LOCK = threading.Lock()


@contextlib.contextmanager
def exclusive_loop(model: keras.Model, lent: bool = True) -> Iterator[None]:
    """Context of a loop of Keras over data: one at a time, and safe to stop.

    Keras keeps the state of a loop on the model, and on JAX takes its arrays away.

    Args:
        model: a Keras model.
        lent: see `_compat.kept_arrays`.
    """
    with _LOCKS_LOCK:
        lock = _LOCKS.setdefault(model, threading.RLock())
    with lock, _compat.kept_arrays(model, lent):
        yield


class SafeInference:
    """Mixin before a Keras model whose `evaluate` and `predict` can be stopped.

    After an exception in a callback or between batches, a KeyboardInterrupt included,
    the model is as before. On JAX Keras would leave it without arrays.
    """

    jit_compile: Any
    run_eagerly: bool
    steps_per_execution: int
    metrics_variables: Any
    test_function: Any
    predict_function: Any
    test_step: Any
    predict_step: Any

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """`keras.Model.evaluate`, one call at a time in a process.

        Args:
            *args: those of Keras.
            **kwargs: those of Keras.

        Returns:
            The loss and the metrics.
        """
        with exclusive_loop(self):  # type: ignore[arg-type]
            return super().evaluate(*args, **kwargs)  # type: ignore[misc]

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """`keras.Model.predict`, one call at a time in a process.

        Args:
            *args: those of Keras.
            **kwargs: those of Keras.

        Returns:
            The outputs, as NumPy arrays.
        """
        with exclusive_loop(self):  # type: ignore[arg-type]
            return super().predict(*args, **kwargs)  # type: ignore[misc]

    def make_test_function(self, force: bool = False) -> Any:
        """Keras's; on JAX one that does not donate the arrays of the model."""
        if not self._is_jitted():
            return super().make_test_function(force)  # type: ignore[misc]
        if self.test_function is None or force:
            out = None
            if keras.distribution.distribution() is not None:
                metrics = [v.value.sharding for v in self.metrics_variables]
                out = (None, (None, None, metrics))

            def changes(state, data):
                logs, (*weights, metrics) = self.test_step(state, data)
                return logs, (*map(_changed, weights, state), metrics)

            compiled = self._jitted(changes, out)

            def step(state, data):
                logs, (*changed, metrics) = compiled(state, data)
                return logs, (*map(_with_changes, state, changed), metrics)

            self.test_function = self._over_batches(step, lambda logs: logs[-1])

    def make_predict_function(self, force: bool = False) -> Any:
        """Keras's; on JAX one that does not donate the arrays of the model."""
        if not self._is_jitted():
            return super().make_predict_function(force)  # type: ignore[misc]
        if self.predict_function is None or force:

            def changes(state, data):
                outputs, others = self.predict_step(state, data)
                return outputs, _changed(others, state[1])

            compiled = self._jitted(changes)

            def step(state, data):
                outputs, changed = compiled(state, data)
                return outputs, (state[0], _with_changes(state[1], changed))

            self.predict_function = self._over_batches(step, _concatenate)

    def _is_jitted(self):
        is_jax = keras.config.backend() == "jax"
        return is_jax and self.jit_compile and not self.run_eagerly

    @staticmethod
    def _jitted(step, out_shardings=None):
        import jax

        # To JAX a model's method is always the same function: it would reuse a program
        # of an earlier `compile`.
        return jax.jit(functools.partial(step), out_shardings=out_shardings)

    def _over_batches(self, step, join):
        def run(state, iterator):
            results = []
            for _ in range(self.steps_per_execution):
                try:
                    data = next(iterator)
                except StopIteration:
                    if not results:
                        raise
                    break
                result, state = step(state, data)
                results.append(result)
            return join(results), state

        return run


def _changed(values, before):
    """Values with `None` for those that are as before.

    A program that returns its arguments copies them: of an int8 model all weights.
    """
    pairs = zip(values, before, strict=True)
    return [None if value is old else value for value, old in pairs]


def _with_changes(values, changed):
    pairs = zip(values, changed, strict=True)
    return [value if new is None else new for value, new in pairs]


def _concatenate(outputs):
    if len(outputs) == 1:
        return outputs[0]
    return keras.tree.map_structure(lambda *parts: ops.concatenate(parts), *outputs)


def predict(
    model: keras.Model, arrays: Mapping[str, np.ndarray], batch_size: int
) -> np.ndarray:
    """Like `keras.Model.predict`, for any number of rows on a mesh.

    Args:
        model: a Keras model whose inputs are a dict.
        arrays: `{name: array (rows, ...)}`, the same in all processes.
        batch_size: rows of a batch, a multiple of the mesh axis `"data"`.

    Returns:
        A NumPy array, the same in all processes.
    """
    rows = len(next(iter(arrays.values())))
    arrays = mesh.fill_rows(arrays)
    parts = [
        {name: array[start : start + batch_size] for name, array in arrays.items()}
        for start in range(0, rows, batch_size)
    ]
    return np.concatenate([predict_on_batch(model, part) for part in parts])[:rows]


def predict_on_batch(
    model: keras.Model, batch: Mapping[str, np.ndarray], is_local: bool = False
) -> np.ndarray:
    """Like `keras.Model.predict_on_batch`, for threads and for several processes.

    Keras's supports one process, and on JAX donates the arrays of the model, which
    other threads use.

    Args:
        model: a Keras model whose inputs are a dict.
        batch: `{name: array}`, the same in all processes.
        is_local: the batch holds only the `process_group.local_rows` of this process.

    Returns:
        A NumPy array, the same in all processes.
    """
    if keras.config.backend() != "jax":
        return keras.Model.predict_on_batch(model, batch)
    split = mesh.join_rows if is_local else mesh.split_rows
    return mesh.to_numpy(compiled(model, "call", model)(split(batch)))


def compiled(
    model: keras.layers.Layer, key: Hashable, function: Callable[..., Any]
) -> Any:
    """A compiled function of arrays that reads the variables of a model.

    One program is compiled for each set of array shapes; PyTorch runs the function
    eagerly, without gradients. Threads may call it.

    Args:
        model: a Keras layer or model, on which the compiled function is kept until
            its set of variables changes (LoRA, quantization).
        key: identifies the function; another one under the same key is not compiled.
        function: function of arrays that does not change variables.

    Returns:
        A function of NumPy arrays or tensors, with a method `count`: the number of
        programs traced so far.
    """
    variables = tuple(map(id, model.variables))
    kept = model.__dict__.get("_programs")
    if kept is None or kept[0] != variables:
        kept = (variables, {})
        # Bypasses Keras's tracking: it is not saved with the model.
        object.__setattr__(model, "_programs", kept)
    if key not in kept[1]:
        kinds = {"jax": JaxFunction, "tensorflow": TensorFlowFunction}
        kind: Any = kinds.get(keras.config.backend(), TorchFunction)
        kept[1].setdefault(key, kind(model, function))
    return kept[1][key]


class JaxFunction:
    """A jitted function that reads the variables of a model.

    Args:
        model: a Keras model on the JAX backend. Create a new function when its set of
            variables changes.
        function: function of arrays that does not change variables.
        donate: donate the buffers of the first argument.
    """

    def __init__(
        self,
        model: keras.layers.Layer,
        function: Callable[..., Any],
        donate: bool = False,
    ):
        import jax

        variables = self.variables = model.variables
        self._traces = 0

        def run(values, *args):
            self._traces += 1  # Runs while it is traced only.
            mapping = list(zip(variables, values, strict=True))
            with keras.StatelessScope(state_mapping=mapping):
                return function(*args)

        self._compiled = jax.jit(run, donate_argnums=(1,) if donate else ())

    def __call__(self, *args):
        try:
            values = [v.value for v in self.variables]
        except TypeError as error:  # Keras has taken them out of the variables.
            raise RuntimeError(
                "The model is being trained in another thread, and has no weights "
                "until that ends: call it after `fit`, or in a callback of it."
            ) from error
        return self._compiled(values, *args)

    def count(self):
        """How many programs have been traced so far."""
        return self._traces


class TensorFlowFunction:
    """A function that TensorFlow compiles with XLA; arguments as in `JaxFunction`."""

    def __init__(
        self,
        model: keras.layers.Layer,
        function: Callable[..., Any],
        donate: bool = False,
    ):
        import tensorflow as tf

        # No function has Python conditions on tensors, which AutoGraph would convert.
        self._compiled = tf.function(function, jit_compile=True, autograph=False)

    def __call__(self, *args):
        return self._compiled(*args)

    def count(self):
        """How many programs have been traced so far."""
        return self._compiled.experimental_get_tracing_count()


class TorchFunction:
    """A function that PyTorch runs eagerly; arguments as in `JaxFunction`."""

    def __init__(
        self,
        model: keras.layers.Layer,
        function: Callable[..., Any],
        donate: bool = False,
    ):
        self._function = function

    def __call__(self, *args):
        import torch

        # Not `inference_mode`: a caller may train on what is returned.
        with torch.no_grad():
            return self._function(*map(ops.convert_to_tensor, args))

    def count(self):
        """Nothing is compiled: 0."""
        return 0
