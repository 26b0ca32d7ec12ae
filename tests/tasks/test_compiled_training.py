"""On JAX every task compiles its training step with XLA's order for little memory."""

import keras
import pytest

import keras_t5gemma as kt
from keras_t5gemma import _compat

pytestmark = pytest.mark.skipif(
    keras.config.backend() != "jax", reason="JAX compiles the step"
)


def test_options_of_the_compiler(model, monkeypatch):
    encoder = kt.Backbone(kt.T5GemmaConfig(model.backbone.config.encoder, None, 480))
    classifier = kt.TextClassifier(encoder, model.preprocessor, num_classes=2)
    classifier.compile("sgd")
    model.compile("sgd")
    found = []
    compile_step = _compat.make_jax_train_function

    def record(task, step, options):
        found.append(options)
        compile_step(task, step, options)

    monkeypatch.setattr(_compat, "make_jax_train_function", record)
    model.fit(["a"], ["b"], batch_size=1, verbose=0)
    classifier.fit(["a", "b"], [0, 1], batch_size=2, verbose=0)
    order = {"xla_cpu_enable_concurrency_optimized_scheduler": False}
    assert found == [order if keras_on_cpu() else None] * 2


def keras_on_cpu():
    import jax

    return jax.default_backend() == "cpu"
