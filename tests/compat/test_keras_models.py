"""One test a function of `_compat.keras_models`, with the library as it is installed.

A test that fails after an upgrade says which private name has gone and what to do.
"""

import inspect

import keras
import numpy as np
import pytest
from helpers.models import max_difference, tiny_config
from helpers.private_names import BACKEND, only, private_module, require

import keras_t5gemma as kt
from keras_t5gemma import _compat
from keras_t5gemma._compat import keras_models


def pending_dense(pending):
    with keras.StatelessScope(initialize_variables=False):
        layer = keras.layers.Dense(3, use_bias=False)
        layer.build((None, 2))
    assert pending == [layer.kernel]
    return layer.kernel


def test_every_function_has_a_test():
    functions = inspect.getmembers(keras_models, inspect.isfunction)
    own = {n for n, f in functions if f.__module__ == keras_models.__name__}
    public = {name for name in own if not name.startswith("_")}
    assert public and {f"test_{name}" for name in public} <= set(globals())


def test_pending_variables():
    advice = "find out where a StatelessScope keeps unfilled variables now."
    common = private_module("keras.src.backend.common", advice)
    require(common, "global_state", advice)
    require(common.global_state, "get_global_attribute", advice)
    require(common.global_state, "set_global_attribute", advice)
    with _compat.pending_variables() as outer:
        first = pending_dense(outer)
        with _compat.pending_variables() as inner:
            pending_dense(inner)
        assert outer == [first], advice
    with _compat.pending_variables() as again:
        assert again == []


def test_initialize_variable():
    require(
        keras.Variable,
        "_deferred_initialize",
        "read how Keras fills the variables of a StatelessScope at the end of `build`.",
    )
    with _compat.pending_variables() as pending:
        own, given = pending_dense(pending), keras.initializers.Constant(7)
        _compat.initialize_variable(own)
        assert np.abs(keras.ops.convert_to_numpy(own)).max() > 0
    with _compat.pending_variables() as pending:
        other = pending_dense(pending)
        _compat.initialize_variable(other, given)
        assert (keras.ops.convert_to_numpy(other) == 7).all()


@only("jax")
def test_set_variable_value():
    import jax

    with _compat.pending_variables() as pending:
        variable = pending_dense(pending)
    advice = "find the attribute in which a Keras variable keeps its array."
    require(variable, "_value", advice)
    require(variable, "_initializer", advice)
    array = jax.numpy.full((2, 3), 5.0)
    _compat.set_variable_value(variable, array)
    assert variable.value is array


def test_assigned_layout():
    variable = keras.Variable(np.zeros(2, "float32"))
    require(variable, "_layout", "look for a public `Variable.layout`.")
    assert _compat.assigned_layout(variable) is None
    layout = "a backend's layout"
    if BACKEND == "jax":
        import jax

        layout = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    variable = keras.Variable(np.zeros(2, "float32"), layout=layout)
    assert _compat.assigned_layout(variable) is layout
    assert _compat.assigned_layout("no variable") is None


@only("jax")
def test_variable_layout():
    require(
        keras.Variable,
        "_initialize_layout",
        "ask `keras.distribution.distribution().get_variable_layout` for it.",
    )
    mesh = keras.distribution.DeviceMesh(
        (1,), ("data",), keras.distribution.list_devices()[:1]
    )
    with _compat.pending_variables() as pending:
        alone = pending_dense(pending)
    assert _compat.variable_layout(alone) is None
    distribution = keras.distribution.DataParallel(device_mesh=mesh)
    keras.distribution.set_distribution(distribution)
    try:
        with _compat.pending_variables() as pending:
            variable = pending_dense(pending)
            layout = _compat.variable_layout(variable)
    finally:
        keras.distribution.set_distribution(None)
    assert tuple(layout.axes) == (None, None)


@only("torch")
def test_track_parameters():
    require(
        keras.Model,
        "_track_variables",
        "see whether `model.parameters()` of a KerasHub backbone is complete without.",
    )
    model = kt.Backbone(tiny_config())
    assert {p.data_ptr() for p in model.parameters()} == {
        v.value.data_ptr() for v in model.variables
    }
    model.enable_lora(2)
    _compat.track_parameters(model)
    assert len(list(model.parameters())) == len(model.variables)
    with _compat.pending_variables():
        with keras.StatelessScope(initialize_variables=False):
            kt.Backbone(tiny_config())  # Has no values to be tracked.


def test_set_dtype_policy():
    layer = keras.layers.Dense(2)
    require(layer, "_dtype_policy", "see whether Keras saves a layer that has a map.")
    policies = keras.dtype_policies.DTypePolicyMap(default_policy="float32")
    layer = keras.layers.Dense(2, dtype=policies)
    _compat.set_dtype_policy(layer, keras.dtype_policies.get("mixed_bfloat16"))
    assert layer.dtype_policy.name == layer.get_config()["dtype"]["config"]["name"]
    assert layer.compute_dtype == "bfloat16" and not len(policies)


def test_mark_as_seeded():
    generator = keras.random.SeedGenerator(3)
    require(
        generator,
        "_initial_seed",
        "find out when `keras.random.dropout` on PyTorch uses the generator now.",
    )

    class Fixed(keras.random.SeedGenerator):
        def __init__(self):
            _compat.mark_as_seeded(self)

        def next(self, ordered=True):
            return keras.ops.convert_to_tensor([1, 2], "uint32")

    x = keras.ops.ones((64,))
    first, second = (keras.random.dropout(x, 0.5, seed=Fixed()) for _ in range(2))
    assert max_difference(first, second) == 0


def test_random_seed():
    advice = "look for a public getter in `keras.utils`."
    rng_utils = private_module("keras.src.utils.rng_utils", advice)
    require(rng_utils, "get_random_seed", advice)
    keras.utils.set_random_seed(41)
    assert _compat.random_seed() == 41


@only("tensorflow")
def test_dataset_adapter():
    import tensorflow as tf

    advice = "find another way to tell `fit` the signature of batches on TensorFlow."
    name = "keras.src.trainers.data_adapters.py_dataset_adapter"
    require(private_module(name, advice), "PyDatasetAdapter", advice)

    class Widening(keras.utils.PyDataset):
        num_batches = 4

        def __getitem__(self, index):
            return np.zeros((2, 3 + index), "float32"), np.zeros(2, "int32")

    signature = (tf.TensorSpec([None, None]), tf.TensorSpec([None], "int32"))
    adapter = _compat.dataset_adapter(Widening(), signature)
    batches = adapter.get_tf_dataset()
    assert batches.element_spec == signature
    assert [x.shape[1] for x, _ in batches.take(4)] == [3, 4, 5, 6]


@only("jax")
@pytest.mark.parametrize("lent", [True, False])
def test_kept_arrays(lent):
    advice = "see how `fit` takes the arrays of variables, and gives them back, on JAX."
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    require(model, "_get_jax_state", advice)
    (kernel, _), arrays = model.weights, [v.value for v in model.weights]
    wanted = {"trainable_variables": True, "purge_model_variables": True}
    with _compat.kept_arrays(model, lent):
        state = model._get_jax_state(**wanted)
        assert (kernel._value is None) != lent, advice
        assert all(a is b for a, b in zip(state[0], arrays, strict=True))
        model._jax_state_synced = False
        model.jax_state_sync()
        assert kernel.value is arrays[0], advice
        with _compat.kept_arrays(model):
            model._get_jax_state(**wanted)
            assert kernel.value is arrays[0]
        model._get_jax_state(**wanted)
        assert (kernel._value is None) != lent
    assert model._jax_state is None and "_get_jax_state" not in model.__dict__


@only("jax")
def test_make_jax_train_function():
    advice = "see how `make_train_function` of Keras compiles the step on JAX."
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    for name in ("_make_function", "_get_state_sharding_spec"):
        require(model, name, advice)
    before = np.array(model.weights[0])
    _compat.make_jax_train_function(model, model.train_step, None)
    made = model.train_function
    model.fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0)
    assert model.train_function is made, advice
    assert max_difference(before, model.weights[0]) > 0


def test_variables_as_stored():
    advice = "find out how Keras reads variables in the compute dtype now."
    backend = private_module("keras.src.backend", advice)
    require(backend, "AutocastScope", advice)
    variable = keras.Variable(np.float32([0.1]), dtype="float32")
    with backend.AutocastScope("bfloat16"):
        assert keras.backend.standardize_dtype(variable.value.dtype) == "bfloat16"
        with _compat.variables_as_stored():
            assert keras.backend.standardize_dtype(variable.value.dtype) == "float32"
        assert keras.backend.standardize_dtype(variable.value.dtype) == "bfloat16"


def test_set_loss_tracker():
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    assert [metric.name for metric in model.metrics] == ["loss"]
    tracker = keras.metrics.Mean("other")
    _compat.set_loss_tracker(model, tracker)
    assert model.metrics == [tracker], "find out where Keras keeps the loss's metric."
    logs = model.evaluate(
        np.ones((2, 3)), np.zeros((2, 1)), verbose=0, return_dict=True
    )
    assert logs == {"other": pytest.approx(float(tracker.result()))}
    assert logs["other"] > 0
