"""What a model gives for a batch, whole, also where several processes hold it."""

import keras
import numpy as np

from keras_t5gemma.distribution import mesh, process_group


def predict(model, arrays, batch_size):
    """`keras.Model.predict` of arrays, of any number of rows.

    Args:
        model: a Keras model whose inputs are a dict.
        arrays: dict of NumPy arrays `(rows, ...)`, the same in all processes.
        batch_size: rows at a time, a number that the mesh divides.

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


def predict_on_batch(model, batch, is_local=False):
    """`keras.Model.predict_on_batch`, which of several processes knows only one.

    Args:
        model: a Keras model whose inputs are a dict.
        batch: dict of NumPy arrays, the same in all processes.
        is_local: it is only the `processes.local_rows` of them.

    Returns:
        A NumPy array, the same in all processes.
    """
    if process_group.process_count() == 1:
        return keras.Model.predict_on_batch(model, batch)
    split = mesh.join_rows if is_local else mesh.split_rows
    return mesh.to_numpy(_compiled(model)(split(batch)))


def _compiled(model):
    variables = tuple(map(id, model.variables))  # Other ones after LoRA, or int8.
    kept = model.__dict__.get("_forward")
    if kept is None or kept[0] != variables:
        kept = (variables, JaxFunction(model, model))
        # Not a part of the model: it is not saved.
        object.__setattr__(model, "_forward", kept)
    return kept[1]


class JaxFunction:
    """A function that reads the variables of a model, compiled.

    Args:
        model: a Keras model on the JAX backend. Make a new function when its set of
            variables changes.
        function: of arrays; it does not change variables.
        donate: whether the first argument may be written over.
    """

    def __init__(self, model, function, donate=False):
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
