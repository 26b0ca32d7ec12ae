"""On JAX every task compiles its training step with XLA's order for little memory."""

import keras
import pytest
from helpers.models import random_inputs

import keras_t5gemma as kt
from keras_t5gemma import _compat

pytestmark = pytest.mark.skipif(
    keras.config.backend() != "jax", reason="JAX compiles the step"
)


@pytest.fixture
def passed(monkeypatch):
    """The options that each training step was compiled with."""
    found = []
    compile_step = _compat.make_jax_train_function

    def record(task, step, options):
        found.append(options)
        compile_step(task, step, options)

    monkeypatch.setattr(_compat, "make_jax_train_function", record)
    return found


def test_tasks_pass_the_options_and_they_save_memory(model, passed):
    import jax

    encoder = kt.Backbone(kt.T5GemmaConfig(model.backbone.config.encoder, None, 480))
    classifier = kt.TextClassifier(encoder, model.preprocessor, num_classes=2)
    classifier.compile("sgd")
    model.compile("sgd")
    model.fit(["a"], ["b"], batch_size=1, verbose=0)
    classifier.fit(["a", "b"], [0, 1], batch_size=2, verbose=0)
    assert len(passed) == 2 and passed[0] == passed[1]
    if jax.default_backend() != "cpu":
        assert passed == [None, None]
        return
    variables = [v.value for v in model.trainable_variables]
    others = [v.value for v in model.non_trainable_variables]

    def loss(variables, others, inputs):
        return (model.stateless_call(variables, others, inputs)[0] ** 2).mean()

    def temporary_bytes(options):
        step = jax.jit(jax.grad(loss), compiler_options=options)
        arguments = variables, others, random_inputs(4, source=64, target=32)
        compiled = step.lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(passed[0]) < 0.95 * temporary_bytes(None)
