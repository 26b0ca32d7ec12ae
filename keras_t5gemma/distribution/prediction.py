"""Model predictions as whole NumPy arrays, also across several processes."""

from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np

from keras_t5gemma.distribution import mesh, process_group


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
    if process_group.process_count() == 1:
        return model.predict(arrays, batch_size=batch_size, verbose=0)[:rows]
    parts = [
        {name: array[start : start + batch_size] for name, array in arrays.items()}
        for start in range(0, rows, batch_size)
    ]
    return np.concatenate([predict_on_batch(model, part) for part in parts])[:rows]


def predict_on_batch(
    model: keras.Model, batch: Mapping[str, np.ndarray], is_local: bool = False
) -> np.ndarray:
    """Like `keras.Model.predict_on_batch`, which only supports one process.

    Args:
        model: a Keras model whose inputs are a dict.
        batch: `{name: array}`, the same in all processes.
        is_local: the batch holds only the `process_group.local_rows` of this process.

    Returns:
        A NumPy array, the same in all processes.
    """
    if process_group.process_count() == 1:
        return keras.Model.predict_on_batch(model, batch)
    split = mesh.join_rows if is_local else mesh.split_rows
    return mesh.to_numpy(_compiled(model)(split(batch)))


def _compiled(model):
    variables = tuple(map(id, model.variables))  # LoRA and int8 replace variables.
    kept = model.__dict__.get("_forward")
    if kept is None or kept[0] != variables:
        kept = (variables, JaxFunction(model, model))
        # Bypasses Keras's tracking: it is not saved with the model.
        object.__setattr__(model, "_forward", kept)
    return kept[1]


class JaxFunction:
    """A jitted function that reads the variables of a model.

    Args:
        model: a Keras model on the JAX backend. Create a new function when its set of
            variables changes.
        function: function of arrays that does not change variables.
        donate: donate the buffers of the first argument.
    """

    def __init__(
        self, model: keras.Model, function: Callable[..., Any], donate: bool = False
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
        return self._compiled([v.value for v in self.variables], *args)

    def count(self):
        """How many programs have been traced so far."""
        return self._traces
