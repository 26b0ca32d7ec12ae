"""Decoding with any sampler that is written for KerasHub."""

import numpy as np
from keras import ops, tree

from keras_t5gemma.distribution import mesh


class SamplerEngine:
    """The interface of `engine.Engine` around KerasHub's compiled `generate_step`.

    Args:
        task: a `Seq2SeqLM`.
        stop_ids: tuple of ids that end a row, or `None`.
    """

    def __init__(self, task, stop_ids=None):
        self.function = task.make_generate_function()
        self.stop_ids = stop_ids

    def start(self, inputs):
        """The arrays of `decoding.start`, for `advance`."""
        return mesh.split_rows(tree.map_structure(ops.convert_to_tensor, inputs))

    def advance(self, inputs, limit):
        """All tokens at once: a sampler has a loop of its own."""
        token_ids = self.function(inputs, stop_token_ids=self.stop_ids)
        return {
            "token_ids": token_ids,
            "token_log_probs": np.zeros(token_ids.shape, "float32"),
            "done": np.ones(len(token_ids), bool),
        }


def decode_batch(backbone, sampler, inputs, stop_ids=None, model=None):
    """Generate until every row has stopped or the buffer is full.

    Args:
        backbone: a `Backbone`.
        sampler: a `keras_hub.samplers.Sampler`.
        inputs: dict of arrays, see `decoding.start`; R = B.
        stop_ids: ids that end a row, or `None` to fill the buffer.
        model: the `keras.Model` whose variables the loop reads.

    Returns:
        int32 `(B, max length)`; after a row's first stop id, 0.
    """
    memory_mask = inputs["encoder_padding_mask"]
    prefix, buffer = inputs["prefix_token_ids"], inputs["decoder_token_ids"]
    count, lengths = inputs["prefix_count"], inputs["prompt_lengths"]
    memory = backbone.encode(inputs["encoder_token_ids"], memory_mask)
    cache = backbone.make_cache(memory, memory_mask, buffer.shape[1], buffer.shape[0])
    if prefix.shape[1]:
        _, cache = backbone.decode(prefix, cache=cache, index=0, count=count)

    def next(prompt, cache, index):
        token = ops.take(prompt, index - 1, axis=1)[:, None]
        hidden, cache = backbone.decode(token, cache=cache, index=index - 1)
        logits = backbone.next_logits(hidden[:, 0])  # B V
        if stop_ids is not None:
            # A sampler that repeats rows (beams) keeps them next to each other.
            start = ops.repeat(lengths, prompt.shape[0] // lengths.shape[0], axis=0)
            done = finished(prompt, stop_ids, start)
            logits = freeze(logits, done)
        return logits, None, cache

    positions = ops.arange(buffer.shape[1])[None]
    return sampler(
        next=next,
        prompt=buffer,
        cache=cache,
        index=count + 1,
        mask=positions < lengths[:, None],
        stop_token_ids=stop_ids,
        model=model,
    )


def finished(token_ids, stop_ids, prompt_lengths):
    """Which rows `(B,)` hold a stop id after their prompts of `(B,)` tokens."""
    stops = [token_ids == stop for stop in stop_ids]
    is_stop = stops[0]
    for stop in stops[1:]:
        is_stop = ops.logical_or(is_stop, stop)
    written = ops.arange(token_ids.shape[1])[None] >= prompt_lengths[:, None]
    return ops.any(ops.logical_and(is_stop, written), axis=-1)


def freeze(logits, done):
    """Leave finished rows only the padding id, at probability 1.

    KerasHub's beam search goes on extending a finished beam until all beams of
    the whole batch are finished, so that a row's answer depends on its
    neighbours. With this, a finished row or beam keeps its score.
    """
    only_padding = ops.where(ops.arange(ops.shape(logits)[-1]) == 0, 0.0, -1e9)
    only_padding = ops.cast(only_padding, "float32")
    return ops.where(done[:, None], only_padding, ops.cast(logits, "float32"))
