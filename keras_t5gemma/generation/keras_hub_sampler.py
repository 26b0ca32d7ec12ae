"""Decoding with KerasHub samplers, custom ones included."""

from typing import Any

import keras
import numpy as np
from keras import ops, tree

from keras_t5gemma.distribution import mesh
from keras_t5gemma.environment import require_keras_hub
from keras_t5gemma.utils.types import Tensor


class SamplerEngine:
    """The interface of `engine.Engine` around KerasHub's compiled `generate_step`.

    Args:
        task: a `Seq2SeqLM`.
        stop_ids: tuple of ids that end a row, or `None`.
    """

    def __init__(self, task: Any, stop_ids: tuple | None = None) -> None:
        hub = require_keras_hub("A sampler of KerasHub")
        self.function = hub.models.CausalLM.make_generate_function(task)
        self.stop_ids = stop_ids

    def start(self, inputs: dict) -> dict:
        """The arrays of `decoding.start`, for `advance`."""
        return mesh.split_rows(tree.map_structure(ops.convert_to_tensor, inputs))

    def advance(self, inputs: dict, limit: int) -> dict:
        """Generate all tokens: the loop is inside the sampler."""
        token_ids = self.function(inputs, stop_token_ids=self.stop_ids)
        return {
            "token_ids": token_ids,
            "token_log_probs": np.zeros(token_ids.shape, "float32"),
            "done": np.ones(len(token_ids), bool),
        }


def decode_batch(
    backbone: Any,
    sampler: Any,
    inputs: dict,
    stop_ids: tuple | None = None,
    model: keras.Model | None = None,
    known_tokens: int | None = None,
) -> Tensor:
    """Generate until every row has stopped or the buffer is full.

    Args:
        backbone: a `Backbone`.
        sampler: a `keras_hub.samplers.Sampler`.
        inputs: dict of arrays, see `decoding.start`; R = B.
        stop_ids: ids that end a row, or `None` to fill the buffer.
        model: the `keras.Model` whose variables the loop reads.
        known_tokens: see `decoding.advance`.

    Returns:
        int32 `(B, max length)`; a row is filled with 0 after its first stop id.
    """
    mask = inputs["encoder_padding_mask"]
    prefix, buffer = inputs["prefix_token_ids"], inputs["decoder_token_ids"]
    count, lengths = inputs["prefix_count"], inputs["prompt_lengths"]
    encoder_output = backbone.encode(inputs["encoder_token_ids"], mask)
    rows, length = buffer.shape
    cache = backbone.make_cache(encoder_output, mask, length, rows)
    if prefix.shape[1]:
        _, cache = backbone.decode(prefix, cache=cache, index=0, count=count)

    def next(prompt, cache, index):
        token = ops.take(prompt, index - 1, axis=1)[:, None]
        hidden, cache = backbone.decode(token, cache=cache, index=index - 1)
        logits = backbone.next_logits(hidden[:, 0])[:, :known_tokens]  # B V
        if stop_ids is not None:
            # A sampler that repeats rows (beams) keeps the copies adjacent.
            start = ops.repeat(lengths, prompt.shape[0] // lengths.shape[0], axis=0)
            done = finished(prompt, stop_ids, start)
            logits = freeze(logits, done)
        return logits, None, cache

    positions = ops.arange(length)[None]
    return sampler(
        next=next,
        prompt=buffer,
        cache=cache,
        index=count + 1,
        mask=positions < lengths[:, None],
        stop_token_ids=stop_ids,
        model=model,
    )


def finished(token_ids: Tensor, stop_ids: tuple, prompt_lengths: Tensor) -> Tensor:
    """Whether rows have a stop id after their prompts, bool `(B,)`."""
    stops = [token_ids == stop for stop in stop_ids]
    is_stop = stops[0]
    for stop in stops[1:]:
        is_stop = ops.logical_or(is_stop, stop)
    written = ops.arange(token_ids.shape[1])[None] >= prompt_lengths[:, None]
    return ops.any(ops.logical_and(is_stop, written), axis=-1)


def freeze(logits: Tensor, done: Tensor) -> Tensor:
    """Logits that give finished rows the padding id with probability 1.

    KerasHub's beam search extends finished beams until all beams of the batch are
    finished, so that an answer would depend on the other rows. With these logits a
    finished row or beam keeps its score.
    """
    only_padding = ops.where(ops.arange(ops.shape(logits)[-1]) == 0, 0.0, -1e9)
    only_padding = ops.cast(only_padding, "float32")
    return ops.where(done[:, None], only_padding, ops.cast(logits, "float32"))
