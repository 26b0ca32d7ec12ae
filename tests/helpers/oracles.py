"""Plain decoding loops without a cache, to compare generation with."""

import keras
import numpy as np

SOURCES = ["The quick brown fox", "A board", "Fonts of the old kind, in text"]


STOPS = (1, 107)


def plain_logits(model, source, rows, length, count=None):
    """Logits of the next token of each row, by the whole forward pass.

    Args:
        model: a `Seq2SeqLM`.
        source: a string.
        rows: lists of decoder ids.
        length: what they are padded to, and
        count: their number likewise, so that a compiling backend compiles once.
    """
    encoder = model.preprocessor.generate_preprocess(source)
    padded = np.zeros((count or len(rows), length), "int32")
    for i, ids in enumerate(rows):
        padded[i, : len(ids)] = ids
    inputs = {
        "encoder_token_ids": encoder["encoder_token_ids"].repeat(len(padded), 0),
        "encoder_padding_mask": encoder["encoder_padding_mask"].repeat(len(padded), 0),
        "decoder_token_ids": padded,
        "decoder_padding_mask": np.ones_like(padded),
    }
    logits = np.asarray(keras.Model.predict_on_batch(model, inputs))
    ends = [len(ids) - 1 for ids in rows]
    return logits[np.arange(len(rows)), ends].astype("float64")


def plain_log_probs(*args):
    """`plain_logits`, normalized."""
    logits = plain_logits(*args)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def greedy_oracle(model, source, length, prompt=(), stops=STOPS):
    """The plain loop: the whole forward pass for every token."""
    ids = [2, *prompt]
    while len(ids) < length:
        ids.append(int(plain_logits(model, source, [ids], length)[0].argmax()))
        if ids[-1] in stops:
            break
    return ids


def generated_ids(model, sources, length, **kwargs):
    """Ids of each row, stop id included, from the arrays interface."""
    arrays = model.preprocessor.generate_preprocess(sources, length)
    out = model.generate(arrays, max_length=length, **kwargs)
    rows = zip(out["decoder_token_ids"], out["decoder_padding_mask"], strict=True)
    return [ids[mask.astype(bool)].tolist() for ids, mask in rows]
