"""Train and generate on 8 simulated devices and on one; run by test_distribution.py.

Prints one JSON object: for each case what it got, beside the same on one device.
"""

import dataclasses
import json
import math
import re

import jax
import keras
import keras_hub
import numpy as np
from keras.src.backend.jax.trainer import _distribute_data

import keras_t5gemma as kt
from helpers.models import SENTENCES, make_proto, one_block_config
from helpers.teacher import make_teacher
from keras_t5gemma.distribution.distribute import bytes_per_device
from keras_t5gemma.planning import costs

STEPS, ROWS, VOCABULARY, WIDTH = 10, 8, 2048, 256
PARTS = ["encoder", "decoder", "cross_attention", "mlp", "embeddings"]
CASES = {
    "full fsdp 8x1": ("fsdp", 8, 1, False),
    "full fsdp 4x2": ("fsdp", 4, 2, False),
    "full tensor 2x4": ("tensor", 2, 4, False),
    "full tensor 1x8": ("tensor", 1, 8, False),
    "full data 8x1": ("data", 8, 1, False),
    "lora tensor 1x8": ("tensor", 1, 8, True),
    "lora fsdp 2x4": ("fsdp", 2, 4, True),
    "lora tensor 4x2": ("tensor", 4, 2, True),
}
# Whose compiled step is read.
READ = ("full fsdp 8x1", "full fsdp 4x2", "full tensor 2x4")


def make_model(with_lora):
    keras.utils.set_random_seed(0)
    encoder, decoder = (
        kt.StackConfig(1, WIDTH, 1024, 8, kv, 16, sliding_window=8) for kv in (8, 2)
    )
    config = kt.T5GemmaConfig(encoder, decoder, vocabulary_size=VOCABULARY)
    backbone, random = kt.Backbone(config), np.random.default_rng(0)
    fill(backbone.weights, random)
    model = kt.Seq2SeqLM(backbone)
    if with_lora:
        model.enable_lora(4, parts=PARTS)
        fill(backbone.trainable_variables, random)
    model.compile(optimizer=keras.optimizers.SGD(0.05, momentum=0.9))
    return model


def fill(variables, random, std=0.05):
    for variable in variables:
        scale = 0.3 if variable.path.endswith("scale") else std
        variable.assign(random.normal(0, scale, variable.shape).astype("float32"))


def packed_batches():
    """Two texts in every row, weights of all sizes."""
    random = np.random.default_rng(0)
    rows = STEPS * ROWS

    def ids(length):
        return random.integers(4, VOCABULARY, (rows, length), "int32")

    def numbers(first, second):
        return np.tile(np.repeat([1, 2], [first, second]), (rows, 1)).astype("int32")

    x = {
        "encoder_token_ids": ids(20),
        "encoder_padding_mask": numbers(12, 8),
        "decoder_token_ids": ids(12),
        "decoder_padding_mask": numbers(7, 5),
    }
    return x, ids(12), random.random((rows, 12)).astype("float32")


class Losses(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.found = []

    def on_train_batch_end(self, batch, logs=None):
        self.found.append(logs["loss"])


def run(with_lora):
    model, losses = make_model(with_lora), Losses()
    x, y, weights = packed_batches()
    written = model.generate(
        {"encoder_token_ids": x["encoder_token_ids"][:3]}, 8, stop_token_ids=None
    )
    model.fit(
        x,
        y,
        sample_weight=weights,
        batch_size=ROWS,
        shuffle=False,
        verbose=0,
        callbacks=[losses],
    )
    weights = [np.array(v.value) for v in model.trainable_variables]
    momentum = [np.array(v.value) for v in model.optimizer.variables[2:]]
    return model, losses.found, weights, momentum, written["decoder_token_ids"]


def difference(arrays, expected):
    """The largest, relative to the largest number of each array."""
    pairs = zip(arrays, expected, strict=True)
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


def compiled_step(model, batch):
    """The text of the compiled training step."""
    batch = _distribute_data(batch)
    state = model._get_jax_state(
        trainable_variables=True,
        non_trainable_variables=True,
        optimizer_variables=True,
        metrics_variables=True,
    )
    shardings = (None, model._get_state_sharding_spec())
    # As Keras compiles it, so that what `fit` has compiled is read from the cache.
    step = jax.jit(model.train_step, donate_argnums=0, out_shardings=shardings)
    return step.lower(state, batch).compile().as_text()


def collectives(text):
    """`(kind, shape)` of all communication in a compiled program."""
    kinds = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"
    found = re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", text)
    return [
        (kind, tuple(map(int, shape.split(","))))
        for result, kind in found
        for shape in re.findall(r"f32\[([\d,]+)\]", result)
    ]


def communication(strategy, rematerialize):
    """Bytes a device receives in a step of a large batch: compiled, and planned."""
    random, rows = np.random.default_rng(0), 64
    x = {}
    for side, length in (("encoder", 256), ("decoder", 128)):
        ids = random.integers(4, VOCABULARY, (rows, length), "int32")
        x |= {f"{side}_token_ids": ids, f"{side}_padding_mask": np.ones_like(ids)}
    labels = x["decoder_token_ids"]
    batch = (x, labels, np.ones(labels.shape, "float32"))
    with kt.distribute(strategy):
        model = make_model(False)
        optimizer = keras.optimizers.SGD(0.05, momentum=0.9)
        model.compile(optimizer=optimizer, rematerialize=rematerialize)
        model._symbolic_build(data_batch=batch)
        received = {}
        for kind, shape in collectives(compiled_step(model, batch)):
            times = 2 if kind == "all-reduce" else 1
            bytes_received = times * 4 * math.prod(shape) * 7 / 8
            received[kind] = received.get(kind, 0) + bytes_received
    job = costs.Job(
        model.backbone.config,
        8,
        10**12,
        rows,
        (256, 128),
        optimizer,
        dtype="float32",
        rematerialize=rematerialize,
    )
    sizes = (1, 8) if strategy == "tensor" else (8, 1)
    mesh = dict(zip(("data", "model"), sizes, strict=True))
    return received, costs.evaluate(job, mesh, strategy).communication


def _first(array):
    return array[:ROWS]


def repeated(model):
    """Paths of variables above 1 MB that a device holds all of."""
    return [
        v.path
        for v in model.variables
        if v.value.nbytes > 1e6
        and v.value.addressable_shards[0].data.nbytes == v.value.nbytes
    ]


def text_model(tokenizer):
    keras.utils.set_random_seed(0)
    backbone = kt.Backbone(one_block_config())
    fill(backbone.weights, np.random.default_rng(0), 0.2)
    return kt.Seq2SeqLM(backbone, kt.Seq2SeqLMPreprocessor(tokenizer, 24, 16))


class OwnSampler(keras_hub.samplers.BeamSampler):
    """One that the package does not know, and runs as KerasHub does."""


def use(model):
    """Texts in numbers that no mesh divides, through all that a task does."""
    sources, targets = SENTENCES, SENTENCES[::-1]
    prompts = {"encoder_text": sources[0], "decoder_text": ["A", "The"]}
    texts = [
        model.generate(sources[:3]),
        model.generate(sources, batch_size=3),
        model.generate(prompts, num_beams=2),
        "".join(model.stream(sources[0])),
    ]
    scores = model.score(sources[:3], targets[:3])["log_prob"]
    logits = model.predict(sources[:3], targets[:3], verbose=0)
    model.compile(sampler=OwnSampler(num_beams=2))
    texts.append(model.generate(sources[:3], 8))
    model.compile(optimizer=keras.optimizers.SGD(0.1))
    losses = []
    for batching in ("packed", "fixed"):
        args = {"batch_size": 4, "batching": batching, "verbose": 0}
        losses += model.fit(sources, targets, **args).history["loss"]
    batches = [(sources[:3], targets[:3]), (sources[3:], targets[3:])]
    losses += model.fit(batches, verbose=0).history["loss"]
    return texts, scores, logits, losses


def use_encoder(tokenizer):
    """Numbers of the tasks of an encoder alone, before and after a training."""
    keras.utils.set_random_seed(0)
    config = dataclasses.replace(one_block_config(), decoder=None)
    preprocessor = kt.Seq2SeqLMPreprocessor(tokenizer, 24, 8)
    found, texts = [], 2 * SENTENCES
    for make, options, labels in (
        (kt.TextEmbedder, {"lexical_dim": 16}, texts[1:9]),
        (kt.TextClassifier, {"num_classes": 2}, [0, 1] * 4),
    ):
        model = make(kt.Backbone(config), preprocessor, **options)
        fill(model.backbone.weights, np.random.default_rng(0), 0.2)
        fill(model.layers[-1].weights, np.random.default_rng(1), 0.2)
        cache = {"gradient_cache_rows": 4} if make is kt.TextEmbedder else {}
        model.compile(keras.optimizers.SGD(0.1), **cache)
        read = model.embed if cache else model.predict
        found.append(read(SENTENCES[:3]))
        args = {"batch_size": 8, "shuffle": False, "epochs": 2, "verbose": 0}
        history = model.fit(texts[:8], labels, **args).history["loss"]
        found += [np.array(history), read(SENTENCES[:3])]
    return found


def learn_from_teachers(tokenizer):
    """Losses of texts with a teacher's whole distribution, and a few choices of it."""
    objective, losses = kt.objectives.PrefixLM(), []
    preprocessor = kt.Seq2SeqLMPreprocessor(tokenizer, 24, 16, objective=objective)
    for options in ({}, {"top_k": 4, "temperature": 2.0}):
        model = kt.Seq2SeqLM(text_model(tokenizer).backbone, preprocessor)
        loss = kt.Distillation(make_teacher(), **options)
        model.compile(keras.optimizers.SGD(0.1), loss=loss)
        args = {"batch_size": 4, "epochs": 2, "verbose": 0}
        losses += model.fit(2 * SENTENCES, **args).history["loss"]
    return losses


def refused(tokenizer):
    """What the errors say that come before anything is computed."""
    model = text_model(tokenizer)
    model.compile()
    x, y, weights = packed_batches()
    rows = {name: array[:7] % 480 for name, array in x.items()}
    stack = kt.StackConfig(1, 12, 32, 3, 3, 4)
    odd = kt.T5GemmaConfig(one_block_config().encoder, stack, vocabulary_size=480)
    for act in (
        lambda: model.fit(SENTENCES, SENTENCES, batch_size=6),
        lambda: model.fit(rows, y[:7] % 480, sample_weight=weights[:7], batch_size=4),
        lambda: kt.Backbone(odd),
    ):
        try:
            act()
        except ValueError as error:
            yield str(error)


def on_text():
    tokenizer = kt.Tokenizer(make_proto())
    texts, scores, logits, losses = use(text_model(tokenizer))
    alone = use_encoder(tokenizer)
    taught = learn_from_teachers(tokenizer)
    with kt.distribute("fsdp", data=4, model=2):
        found = use(text_model(tokenizer))
        encoder = use_encoder(tokenizer)
        losses += taught
        found[3].extend(learn_from_teachers(tokenizer))
        errors = list(refused(tokenizer))
    return {
        "same_texts": [a == b for a, b in zip(found[0], texts, strict=True)],
        "score": difference([np.array(found[1])], [np.array(scores)]),
        "predict": difference([found[2]], [logits]),
        "fit": [abs(a / b - 1) for a, b in zip(found[3], losses, strict=True)],
        "encoder": difference(encoder, alone),
        "learned": difference(alone[2], alone[0]),
        "errors": errors,
    }


def main():
    alone = {with_lora: run(with_lora) for with_lora in (False, True)}
    report = {
        "text": on_text(),
        "communication": {
            name: communication(*case)
            for name, case in {
                "fsdp": ("fsdp", False),
                "fsdp, rematerialized": ("fsdp", True),
                "data": ("data", False),
                "tensor": ("tensor", False),
            }.items()
        },
    }
    for name, (strategy, data, model_axis, with_lora) in CASES.items():
        _, losses, weights, momentum, written = alone[with_lora]
        with kt.distribute(strategy, data=data, model=model_axis):
            model, *got = run(with_lora)
            report[name] = {
                "loss": difference([np.array(got[0])], [np.array(losses)]),
                "weights": difference(got[1], weights),
                "gradients": difference(got[2], momentum),
                "moved": difference(got[1], [np.array(v) for v in _start(with_lora)]),
                "same_tokens": bool((got[3] == written).all()),
                "bytes": bytes_per_device(model.variables),
                "optimizer_bytes": bytes_per_device(model.optimizer.variables),
                "all_bytes": sum(v.value.nbytes for v in model.variables),
                "all_optimizer_bytes": sum(
                    v.value.nbytes for v in model.optimizer.variables
                ),
                "repeated": repeated(model),
            }
            if name in READ:
                batch = tuple(keras.tree.map_structure(_first, packed_batches()))
                text = compiled_step(model, batch)
                report[name]["collectives"] = collectives(text)
    print("REPORT", json.dumps(report))


def _start(with_lora):
    return [v.value for v in make_model(with_lora).trainable_variables]


if __name__ == "__main__":
    main()
