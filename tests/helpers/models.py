"""Tiny models and a tiny vocabulary, through the real code paths."""

import io

import keras
import numpy as np
import sentencepiece

import keras_t5gemma as kt

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "A small tool that shows the free space of a disk.",
    "Library to read and write tables of numbers.",
    "Games for two players, with a board and ten stones.",
    "Fonts of the old kind, in three weights.",
    "Documentation of the server, in plain text.",
]


CONTROLS = [
    "<mask>",
    "<2mass>",
    "[@BOS@]",
    *(f"<unused{i}>" for i in range(99)),
    "<start_of_turn>",
    "<end_of_turn>",
]


def make_proto(kind="control_symbols", vocab_size=480):
    """A SentencePiece model with Gemma's ids, trained on the sentences above."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        minloglevel=2,
        **{kind: CONTROLS},
    )
    return model.getvalue()


def tiny_config(vocabulary_size=480, **kwargs):
    """Unequal towers, grouped heads, a window that short texts outgrow."""
    return kt.T5GemmaConfig(
        kt.StackConfig(3, 32, 64, 4, 2, 8, sliding_window=8),
        kt.StackConfig(2, 24, 48, 4, 1, 8, sliding_window=8),
        vocabulary_size=vocabulary_size,
        **kwargs,
    )


def one_block_config(**kwargs):
    """For tests of what is around the network: it compiles in half the time."""
    stack = kt.StackConfig(1, 16, 32, 2, 1, 8, sliding_window=8)
    return kt.T5GemmaConfig(stack, stack, 480, **kwargs)


def enlarge(model, factor=12.0):
    """The same weights on every backend, large enough that soft caps bite."""
    rng = np.random.default_rng(0)
    for variable in model.weights:
        std = 0.3 if variable.path.endswith("scale") else 0.02 * factor
        if variable.path.endswith("embeddings"):
            std /= 3  # Or a token would always be followed by itself.
        variable.assign(rng.normal(0, std, variable.shape).astype("float32"))
    return model


def tiny_model(tokenizer, dtype="float32", config=None, **kwargs):
    preprocessor = kt.Seq2SeqLMPreprocessor(tokenizer, 24, 16, **kwargs)
    backbone = kt.Backbone(config or tiny_config(), dtype=dtype)
    enlarge(backbone)
    return kt.Seq2SeqLM(backbone, preprocessor)


def forward(model, inputs):
    """`model(inputs)`; JAX compiles one program instead of one an operation."""
    if keras.config.backend() != "jax":
        return model(inputs)
    import jax

    variables = model.trainable_variables, model.non_trainable_variables
    values = [[v.value for v in group] for group in variables]
    call = jax.jit(lambda *args: model.stateless_call(*args)[0])
    return call(*values, inputs)


def random_inputs(batch=2, source=20, target=14, vocabulary=480, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "encoder_token_ids": rng.integers(4, vocabulary, (batch, source), "int32"),
        "encoder_padding_mask": np.ones((batch, source), "int32"),
        "decoder_token_ids": rng.integers(4, vocabulary, (batch, target), "int32"),
        "decoder_padding_mask": np.ones((batch, target), "int32"),
    }


def numpy(x):
    """Any backend's tensor as float32 or int numpy."""
    if "float" in keras.backend.standardize_dtype(x.dtype):
        x = keras.ops.cast(x, "float32")
    return keras.ops.convert_to_numpy(x)


def max_difference(a, b):
    return float(np.abs(np.asarray(numpy(a)) - np.asarray(numpy(b))).max())
