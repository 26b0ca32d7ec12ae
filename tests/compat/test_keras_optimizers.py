"""One test a function of `_compat.keras_optimizers`, with Keras as it is installed.

A test that fails after an upgrade says which private name has gone and what to do.
"""

import inspect

import keras
import numpy as np
import pytest
from helpers.models import max_difference
from helpers.private_names import BACKEND, only, require

from keras_t5gemma import _compat
from keras_t5gemma._compat import keras_optimizers

ADAMS = [keras.optimizers.Adam, keras.optimizers.AdamW]
ACCUMULATION = "see how an optimizer with `gradient_accumulation_steps` works now."


def trained_adam(kind=keras.optimizers.Adam, **kwargs):
    """An optimizer after one step, and its two variables."""
    variables = [keras.Variable(np.full(n, 1.0, "float32")) for n in (2, 3)]
    optimizer = kind(0.1, **kwargs)
    gradients = [
        keras.ops.ones_like(v.value) * (i + 1) for i, v in enumerate(variables)
    ]
    optimizer.apply(gradients, variables)
    return optimizer, variables, gradients


def accumulating_adam(**kwargs):
    """An optimizer with one step of two behind it, its variables and gradients."""
    return trained_adam(gradient_accumulation_steps=2, **kwargs)


def test_every_function_has_a_test():
    functions = inspect.getmembers(keras_optimizers, inspect.isfunction)
    own = {n for n, f in functions if f.__module__ == keras_optimizers.__name__}
    public = {name for name in own if not name.startswith("_")}
    assert public and {f"test_{name}" for name in public} <= set(globals())


def test_of_any_backend():
    """What Keras wrote is read by the public names, inside other configurations too."""
    optimizer = keras.optimizers.AdamW(0.25, weight_decay=0.5)
    config = keras.saving.serialize_keras_object(optimizer)
    if BACKEND == "torch":
        assert config["module"].startswith("keras.src.backend.torch.optimizers."), (
            "Keras writes another module for an optimizer of PyTorch: see which "
            "prefix `of_any_backend` has to replace, or whether none is left."
        )
    for found in (
        _compat.of_any_backend(config),
        _compat.of_any_backend({"inner": [config]})["inner"][0],
    ):
        assert found["module"] == "keras.optimizers"
        assert found["class_name"] == "AdamW"
        loaded = keras.saving.deserialize_keras_object(found)
        assert loaded.get_config() == optimizer.get_config()


def test_is_plain_adam():
    class Other(keras.optimizers.Adam):
        pass

    for kind in ADAMS:
        assert _compat.is_plain_adam(kind()), (
            "Keras's Adam is no Adam to `is_plain_adam` any more: see which class "
            "`type(keras.optimizers.Adam())` is on this backend."
        )
    assert not _compat.is_plain_adam(Other())
    assert not _compat.is_plain_adam(keras.optimizers.Nadam())


@only("torch", "tensorflow")
def test_replace_update():
    optimizer, variables, gradients = trained_adam()
    if BACKEND == "torch":
        require(
            optimizer,
            "_backend_update_step",
            "find what the optimizer calls for all variables at once on PyTorch.",
        )
    seen = []
    _compat.replace_update(optimizer, lambda *args: seen.append(args))
    before = [keras.ops.convert_to_numpy(v) for v in variables]
    optimizer.apply(gradients)
    assert len(seen) == (1 if BACKEND == "torch" else 2)
    for variable, value in zip(variables, before, strict=True):
        assert max_difference(variable, value) == 0


@pytest.mark.parametrize("kind", ADAMS)
def test_adam_moments(kind):
    optimizer, variables, _ = trained_adam(kind)
    advice = "find them among `optimizer.variables` by name."
    for name in ("_get_variable_index", "_momentums", "_velocities"):
        require(optimizer, name, advice)
    first, second = _compat.adam_moments(optimizer, variables[::-1])
    for m, v, gradient in zip(first, second, (2, 1), strict=True):
        assert max_difference(m, 0.1 * gradient * np.ones(m.shape)) < 1e-6
        assert max_difference(v, 0.001 * gradient**2 * np.ones(v.shape)) < 1e-6


def test_moving_averages():
    optimizer, variables, _ = trained_adam(use_ema=True)
    require(
        optimizer,
        "_model_variables_moving_average",
        "find them among `optimizer.variables` by name.",
    )
    averages = _compat.moving_averages(optimizer)
    assert [a.shape for a in averages] == [v.shape for v in variables]
    assert _compat.moving_averages(trained_adam()[0]) == []


def test_replace_accumulation():
    optimizer, variables, gradients = accumulating_adam()
    require(optimizer, "_backend_apply_gradients", ACCUMULATION)
    require(optimizer, "_get_current_learning_rate", ACCUMULATION)
    assert float(optimizer.learning_rate) == pytest.approx(0.1)
    seen = []
    _compat.replace_accumulation(optimizer, lambda *args: seen.append(args))
    assert float(optimizer.learning_rate) == pytest.approx(0.1)
    for _ in range(3):
        optimizer.apply(gradients, variables)
    assert len(seen) == 3 and max_difference(variables[0], np.ones(2)) == 0
    require(optimizer, "_learning_rate", ACCUMULATION)
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([1], [0.5, 0.25])
    optimizer.learning_rate = schedule
    assert int(optimizer.iterations) == 2  # Of four batches.
    assert float(optimizer.learning_rate) == pytest.approx(0.25)


def test_batch_counter():
    optimizer, _, _ = accumulating_adam()
    require(optimizer, "_iterations", ACCUMULATION)
    assert int(_compat.batch_counter(optimizer)) == 1
    assert int(optimizer.iterations) == 0


def test_optimized_variables():
    optimizer, variables, _ = accumulating_adam()
    require(optimizer, "_trainable_variables", "find what `build` keeps.")
    found = _compat.optimized_variables(optimizer)
    assert [id(v) for v in found] == [id(v) for v in variables]


def test_gradient_accumulators():
    optimizer, variables, gradients = accumulating_adam()
    for name in ("_get_variable_index", "_accumulated_gradients"):
        require(optimizer, name, ACCUMULATION)
    found = _compat.gradient_accumulators(optimizer, variables[::-1])
    for accumulator, gradient in zip(found, gradients[::-1], strict=True):
        assert max_difference(accumulator, gradient) == 0


def test_update_once():
    optimizer, variables, gradients = accumulating_adam(use_ema=True, weight_decay=0.5)
    _compat.update_once(optimizer, gradients, variables)
    for variable, average in zip(
        variables, _compat.moving_averages(optimizer), strict=True
    ):
        # Adam's first update is the learning rate, after 0.05 of weight decay.
        assert max_difference(variable, np.full(variable.shape, 0.85)) < 1e-5
        assert max_difference(variable, average) == 0


def test_replace_apply():
    optimizer, variables, gradients = trained_adam()
    before = keras.ops.convert_to_numpy(variables[0])
    seen = []
    _compat.replace_apply(optimizer, lambda *args: seen.append(args))
    optimizer.apply(gradients, variables)
    assert len(seen) == 1 and max_difference(variables[0], before) == 0
    _compat.replace_apply(optimizer, None)
    optimizer.apply(gradients, variables)
    assert len(seen) == 1 and max_difference(variables[0], before) > 0.01


@pytest.mark.parametrize(
    ("name", "states"), [("adam", 2), ("adamw", 2), ("lion", 1), ("adafactor", 3)]
)
def test_build_with(name, states):
    class Noted:
        shape, dtype, path, name = (2, 3), "float32", "a/kernel", "kernel"
        overwrite_with_gradient = False

    optimizer = keras.optimizers.get(name)
    require(optimizer, "_var_key", "see how an optimizer identifies variables now.")
    made = []

    def add_variable(shape, *args, **kwargs):
        made.append(tuple(shape))
        return Noted()

    def add_variable_from_reference(reference_variable, *args, **kwargs):
        return add_variable(reference_variable.shape)

    _compat.build_with(optimizer, [Noted()], add_variable, add_variable_from_reference)
    assert len(made) == states and optimizer.built


@pytest.mark.parametrize("kind", ADAMS)
def test_replace_weight_decay(kind):
    called = []
    advice = "find the method that applies `weight_decay` before an update."
    require(kind(), "_apply_weight_decay", advice)
    variable = keras.Variable(np.ones(2, "float32"))
    optimizer = kind(0.0, weight_decay=1.0)
    optimizer.build([variable])
    _compat.replace_weight_decay(optimizer, called.append)
    optimizer.apply([keras.ops.ones(2)], [variable])
    assert len(called) == 1


def test_apply_weight_decay():
    variable = keras.Variable(np.ones(2, "float32"))
    optimizer = keras.optimizers.AdamW(0.1, weight_decay=2.0)
    optimizer.build([variable])
    _compat.replace_weight_decay(optimizer, lambda variables: None)
    _compat.apply_weight_decay(optimizer, [variable])
    np.testing.assert_allclose(keras.ops.convert_to_numpy(variable), 0.8, rtol=1e-6)


def test_uses_weight_decay():
    require(
        keras.optimizers.AdamW(),
        "_use_weight_decay",
        "read `exclude_from_weight_decay` of the optimizer yourself.",
    )
    kernel, bias = (keras.Variable(np.ones(2), name=n) for n in ("kernel", "bias"))
    optimizer = keras.optimizers.AdamW(weight_decay=0.1)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    assert _compat.uses_weight_decay(optimizer, kernel)
    assert not _compat.uses_weight_decay(optimizer, bias)
    assert not _compat.uses_weight_decay(keras.optimizers.Adam(), kernel)


def test_change_gradients():
    """Before they are clipped."""
    advice = "see what Keras calls with the gradients in `optimizer.apply` now."
    require(keras.optimizers.SGD, "_backend_apply_gradients", advice)
    variable = keras.Variable(np.zeros(2, "float32"))
    optimizer = keras.optimizers.SGD(1.0, clipvalue=5.0)
    _compat.change_gradients(optimizer, lambda gradients: [10 * g for g in gradients])
    optimizer.apply([keras.ops.convert_to_tensor([0.1, 1.0])], [variable])
    np.testing.assert_allclose(keras.ops.convert_to_numpy(variable.value), [-1.0, -5.0])
