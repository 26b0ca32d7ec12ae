"""Compiled steps of tasks: memory on JAX, lengths of long batches on TensorFlow."""

import functools

import keras
import numpy as np
import pytest
from helpers.models import one_block_config, random_inputs

import keras_t5gemma as kt
from keras_t5gemma import _compat
from keras_t5gemma.modeling import blockwise_attention
from keras_t5gemma.modeling.towers import Encoder
from keras_t5gemma.tasks import compiled_training

only_jax = pytest.mark.skipif(
    keras.config.backend() != "jax", reason="JAX compiles the step"
)
only_tensorflow = pytest.mark.skipif(
    keras.config.backend() != "tensorflow", reason="Keras traces unknown lengths there"
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


@only_jax
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


def batch(width):
    x = random_inputs(2, source=width, target=12)
    return x, x["decoder_token_ids"], np.ones((2, 12), "float32")


class Widths(keras.utils.PyDataset):
    """A batch of each width; Keras tells TensorFlow that it is unknown."""

    def __init__(self, *widths):
        super().__init__()
        self.widths = widths

    num_batches = property(lambda self: len(self.widths))

    def __getitem__(self, index):
        return batch(self.widths[index])


@pytest.fixture
def traced(monkeypatch):
    """Widths of the sources of each program; from 20 on attention is in blocks."""
    monkeypatch.setattr(blockwise_attention, "_LONG", 20**2)
    monkeypatch.setattr(blockwise_attention, "block_sizes", lambda *_: (8, 16))
    seen, call = [], Encoder.call

    @functools.wraps(call)
    def spy(self, token_ids, *args, **kwargs):
        seen.append(token_ids.shape[1])
        return call(self, token_ids, *args, **kwargs)

    monkeypatch.setattr(Encoder, "call", spy)
    return seen


@only_tensorflow
def test_programs_for_long_batches_know_their_lengths(traced):
    model = kt.Seq2SeqLM(kt.Backbone(one_block_config()))
    model.compile("sgd")
    del traced[:]
    model.fit(Widths(8, 16, 32, 44, 12), epochs=2, verbose=0, shuffle=False)
    model.train_on_batch(*batch(32))
    assert traced == [None, 32, 44]
    graph = model.train_function.exact.get_concrete_function(batch(44)).graph
    nodes = graph.as_graph_def(add_shapes=True)
    functions = [node for f in nodes.library.function for node in f.node_def]
    lengths = {
        tuple(side.size for side in shape.dim[-2:])
        for node in [*nodes.node, *functions]
        for shape in node.attr["_output_shapes"].list.shape
    }
    assert (8 * 2, 16) in lengths  # Queries of two heads x keys of a block.
    assert not lengths & {(44, 44), (48, 48), (12, 44)}
    del traced[:]
    for width in (16, 32, 12, 44, 32):
        model.predict_on_batch(batch(width)[0])
    assert traced == [16, 32, None, 44]


@only_tensorflow
def test_number_of_programs_for_long_batches_is_bounded(traced, monkeypatch):
    monkeypatch.setattr(compiled_training, "_MOST_PROGRAMS", 1)
    model = kt.Seq2SeqLM(kt.Backbone(one_block_config()))
    model.compile("sgd")
    del traced[:]
    with pytest.warns(UserWarning, match="in more than 1 shapes") as warned:
        model.evaluate(Widths(32, 40, 48, 32), verbose=0)
    assert sum("shapes" in str(w.message) for w in warned) == 1
    assert traced == [32, None]


@only_tensorflow
def test_a_short_last_batch_shares_the_program(traced):
    import tensorflow as tf

    model = kt.Seq2SeqLM(kt.Backbone(one_block_config()))
    model.compile("sgd")
    rows = keras.tree.map_structure(lambda x: np.concatenate([x, x[:1]]), batch(32))
    del traced[:]
    model.evaluate(tf.data.Dataset.from_tensor_slices(rows).batch(2), verbose=0)
    assert traced == [32]


@only_tensorflow
def test_eager_training_is_the_same(traced):
    losses = []
    for run_eagerly in (False, True):
        keras.utils.set_random_seed(0)
        model = kt.Seq2SeqLM(kt.Backbone(one_block_config()))
        model.compile("sgd", run_eagerly=run_eagerly)
        model.fit(Widths(8, 32), verbose=0, shuffle=False)
        losses.append(model.evaluate(Widths(8, 32), verbose=0))
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


@only_tensorflow
def test_steps_of_subclasses_take_more_than_three_parts(traced):
    import tensorflow as tf

    class Weighted(kt.Seq2SeqLM):
        def train_step(self, data):
            x, y, sample_weight, factor = data
            return super().train_step((x, y, factor * sample_weight))

    model = Weighted(kt.Backbone(one_block_config()))
    model.compile("sgd")
    data = tf.data.Dataset.from_tensors((*batch(32), np.float32(0.5)))
    history = keras.Model.fit(model, data, verbose=0, shuffle=False)
    assert np.isfinite(history.history["loss"][0])


@only_tensorflow
def test_only_the_length_of_the_mask_is_known(traced):
    import tensorflow as tf

    model = kt.Seq2SeqLM(kt.Backbone(one_block_config()))
    model.compile("sgd", steps_per_execution=2)
    parts = batch(32)
    spec = keras.tree.map_structure(
        lambda x: tf.TensorSpec([None, None], tf.as_dtype(x.dtype)), parts
    )
    spec[0]["encoder_padding_mask"] = tf.TensorSpec([None, 32], tf.int32)
    data = tf.data.Dataset.from_generator(
        lambda: iter([parts] * 2), output_signature=spec
    ).apply(tf.data.experimental.assert_cardinality(2))
    history = keras.Model.fit(model, data, verbose=0, shuffle=False)
    assert np.isfinite(history.history["loss"][0])


@only_tensorflow
@pytest.mark.parametrize("name", ["fit", "train_on_batch"])
def test_the_first_step_is_traced_once(name, monkeypatch):
    """TensorFlow traces a step again if it makes variables, as of an optimizer."""
    traced = []
    step = kt.Seq2SeqLM.train_step

    def record(self, *args):
        traced.append(self.optimizer.built)
        return step(self, *args)

    monkeypatch.setattr(kt.Seq2SeqLM, "train_step", record)
    model = kt.Seq2SeqLM(kt.Backbone(one_block_config()), preprocessor=None)
    getattr(model, name)(random_inputs(vocabulary=100), np.ones((2, 14), "int32"))
    assert traced == [True]
