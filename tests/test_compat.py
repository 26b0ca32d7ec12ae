"""One test a function of `_compat`, with the library as it is installed.

A test that fails after an upgrade says which private name has gone and what to do.
"""

import importlib
import inspect

import keras
import numpy as np
import pytest
from helpers.models import max_difference, tiny_config

import keras_t5gemma as kt
from keras_t5gemma import _compat

BACKEND = keras.config.backend()
ADAMS = [keras.optimizers.Adam, keras.optimizers.AdamW]


def require(owner, name, advice):
    """Fail with one sentence when a library no longer has a private name."""
    if not hasattr(owner, name):
        owner = getattr(owner, "__name__", type(owner).__name__)
        pytest.fail(f"{owner} has no {name} any more: {advice}", pytrace=False)


def private_module(name, advice):
    """A module of a library, or a failure with one sentence."""
    try:
        return importlib.import_module(name)
    except ImportError:
        pytest.fail(f"There is no module {name} any more: {advice}", pytrace=False)


def only(*backends):
    reason = f"of {' and '.join(backends)} only"
    return pytest.mark.skipif(BACKEND not in backends, reason=reason)


def pending_dense(pending):
    with keras.StatelessScope(initialize_variables=False):
        layer = keras.layers.Dense(3, use_bias=False)
        layer.build((None, 2))
    assert pending == [layer.kernel]
    return layer.kernel


def trained_adam(kind=keras.optimizers.Adam, **kwargs):
    """An optimizer after one step, and its two variables."""
    variables = [keras.Variable(np.full(n, 1.0, "float32")) for n in (2, 3)]
    optimizer = kind(0.1, **kwargs)
    gradients = [
        keras.ops.ones_like(v.value) * (i + 1) for i, v in enumerate(variables)
    ]
    optimizer.apply(gradients, variables)
    return optimizer, variables, gradients


def test_every_function_has_a_test():
    functions = inspect.getmembers(_compat, inspect.isfunction)
    own = {n for n, f in functions if f.__module__ == _compat.__name__}
    assert own and {f"test_{name}" for name in own} <= set(globals())


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


ACCUMULATION = "see how an optimizer with `gradient_accumulation_steps` works now."


def accumulating_adam(**kwargs):
    """An optimizer with one step of two behind it, its variables and gradients."""
    return trained_adam(gradient_accumulation_steps=2, **kwargs)


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


@only("torch")
def test_tensor_version():
    import torch

    tensor = torch.zeros(2)
    require(tensor, "_version", "compare the values, or count assignments.")
    before = _compat.tensor_version(tensor)
    tensor.add_(1)
    assert _compat.tensor_version(tensor) > before


@only("torch")
def test_fused_adam():
    import torch

    require(torch, "_fused_adam_", "give `torch.optim.Adam(fused=True)` the moments.")
    value, m, v = torch.ones(4), torch.full((4,), 0.5), torch.full((4,), 0.25)
    gradient = torch.tensor([1.0, -1.0, 2.0, 0.0])
    expected = torch.nn.Parameter(value.clone())
    public = torch.optim.Adam([expected], lr=0.1, betas=(0.9, 0.99), eps=1e-7)
    public.state[expected] = {
        "step": torch.tensor(2.0),
        "exp_avg": m.clone(),
        "exp_avg_sq": v.clone(),
    }
    expected.grad = gradient.clone()
    public.step()
    _compat.fused_adam(
        [value], [gradient], [m], [v], 3, lr=0.1, beta1=0.9, beta2=0.99, eps=1e-7
    )
    assert torch.allclose(value, expected.detach(), atol=1e-6)
    assert torch.allclose(m, public.state[expected]["exp_avg"])


@only("torch")
def test_has_per_channel_int8():
    import torch

    assert _compat.has_per_channel_int8(), (
        "torch has no _make_per_channel_quantized_tensor any more: int8 models are "
        "decoded through the layers, until `per_channel_int8` makes its tensor by "
        "the public `torch.quantize_per_channel`."
    )
    assert "fbgemm" in torch.backends.quantized.supported_engines


@only("torch")
def test_torch_has_int8_products(monkeypatch):
    import torch

    require(torch.cpu, "_is_vnni_supported", "ask for the flags of the processor.")
    assert _compat.torch_has_int8_products() == torch.cpu._is_vnni_supported()
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert not _compat.torch_has_int8_products()


@only("torch")
def test_torch_int8_product():
    import torch

    require(torch, "_int_mm", "return False in `torch_has_int8_products`.")
    left = torch.full((1, 256), 127, dtype=torch.int8)
    right = torch.full((256, 2), -128, dtype=torch.int8)
    found = _compat.torch_int8_product(left, right)
    assert found.dtype == torch.int32
    assert found.tolist() == [[256 * 127 * -128] * 2]


@only("torch")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_per_channel_int8():
    import torch

    require(
        torch,
        "_make_per_channel_quantized_tensor",
        "make it by the public `torch.quantize_per_channel`, from a float copy.",
    )
    rows = torch.tensor([[1, -2], [3, 127]], dtype=torch.int8)
    scales = torch.tensor([0.5, 2.0], dtype=torch.float64)
    made = _compat.per_channel_int8(rows, scales)
    assert torch.equal(made.dequantize(), rows.float() * scales.float()[:, None])
    assert torch.equal(made.int_repr(), rows)


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


@only("torch")
def test_torch_has_onednn_products(monkeypatch):
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    advice = "find oneDNN's product of two matrices, or return False here."
    require(torch.ops.mkldnn, "_linear_pointwise", advice)
    assert _compat.torch_has_onednn_products() == (capability == "AVX512")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    _compat.torch_has_onednn_products.cache_clear()
    try:
        assert not _compat.torch_has_onednn_products()
    finally:
        _compat.torch_has_onednn_products.cache_clear()


@only("torch")
def test_torch_onednn_product():
    import torch

    x, rows = torch.randn(3, 10, 7), torch.randn(5, 7)
    found = _compat.torch_onednn_product(x, rows)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, x @ rows.t(), atol=1e-5, rtol=1e-5)


@only("torch")
def test_torch_is_tracing():
    import torch

    advice = "find out how PyTorch tells that `torch.func` transforms a function."
    require(torch._C._functorch, "peek_interpreter_stack", advice)
    found = []

    def function(x):
        found.append(_compat.torch_is_tracing())
        return x * 2

    x = torch.ones(2)
    function(x)
    torch.func.vmap(function)(x)
    torch.jit.trace(function, x)
    assert found[:3] == [False, True, True]
    require(torch.autograd.forward_ad, "_current_level", advice)
    with torch.autograd.forward_ad.dual_level():
        assert _compat.torch_is_tracing()
    assert not _compat.torch_is_tracing()


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
