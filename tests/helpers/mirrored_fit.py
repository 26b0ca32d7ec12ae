"""Updates of `fit` on one device and on two of a strategy, as a script.

Prints `REPORT` and a JSON object: by task the largest weight change of one step, its
largest difference on two devices, and that of the losses of `evaluate`.
"""

import contextlib
import json

import tensorflow as tf

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0],
    [tf.config.LogicalDeviceConfiguration()] * 2,
)

import keras  # noqa: E402
import numpy as np  # noqa: E402

import keras_t5gemma as kt  # noqa: E402
from helpers.models import SENTENCES, make_proto, one_block_config  # noqa: E402

# The mean of the devices' means is the whole one's for targets of the same length.
SOURCES = [SENTENCES[i] for i in (0, 0, 1, 1)]
TARGETS = ["two", "two", "dog", "dog"]


def preprocessor():
    return kt.Seq2SeqLMPreprocessor(kt.Tokenizer(make_proto()), 16, 8)


def language_model(preprocessor):
    return kt.Seq2SeqLM(kt.Backbone(one_block_config()), preprocessor), TARGETS


def classifier(preprocessor):
    encoder = kt.T5GemmaConfig(one_block_config().encoder, None, 480)
    model = kt.TextClassifier(kt.Backbone(encoder), preprocessor, num_classes=2)
    return model, [0, 0, 1, 1]


def step(make, context):
    """Changes of the weights and the loss after one step of four rows."""
    with context:
        keras.utils.set_random_seed(0)
        model, labels = make(preprocessor())
        model.compile(keras.optimizers.SGD(0.1))
    before = model.get_weights()
    model.fit(SOURCES, labels, batch_size=4, shuffle=False, verbose=0)
    loss = model.evaluate(SOURCES, labels, batch_size=4, verbose=0, return_dict=True)
    pairs = zip(model.get_weights(), before, strict=True)
    return np.concatenate([(a - b).ravel() for a, b in pairs]), loss["loss"]


def main():
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    report = {}
    for make in (language_model, classifier):
        (one, loss), (two, its_loss) = (
            step(make, context)
            for context in (contextlib.nullcontext(), strategy.scope())
        )
        report[make.__name__] = {
            "moved": float(np.abs(one).max()),
            "update": float(np.abs(two - one).max()),
            "loss": abs(loss - its_loss),
        }
    with strategy.scope():
        model = language_model(preprocessor())[0]
        model.compile(keras.optimizers.SGD(0.1, gradient_accumulation_steps=2))
    try:
        model.fit(SOURCES, TARGETS, verbose=0)
    except ValueError as error:
        report["error"] = str(error)
    print("REPORT", json.dumps(report))


if __name__ == "__main__":
    main()
