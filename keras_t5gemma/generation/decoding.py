"""The decoding loop: encode the source, then generate token by token.

`start` returns a state, `advance` generates up to a position, or until every row is
done. Both are compiled once per array shape; the position is a traced value, so that
`stream` (one token at a time) and `generate` (all of them) run the same program.

The state is a dict: `token_ids` int32 `(R, L)`, of which the first `index` are
generated; `token_log_probs` `(R, L)`; `done`; `cache`; the arrays of beam search; and
the constants `prompt_lengths` and `seeds` `(R,)`, `max_length`, `traced_args`.
"""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_t5gemma.distribution import mesh
from keras_t5gemma.generation import beam
from keras_t5gemma.generation.options import GenerationOptions
from keras_t5gemma.generation.sampling import process, sample, top_candidates
from keras_t5gemma.modeling.inference import inference
from keras_t5gemma.utils.types import Tensor


def read_source(
    backbone: Any, token_ids: Tensor, padding: Tensor
) -> tuple[Tensor, tuple | None]:
    """Encoder output `(B, S, D)`, through the layers of the model.

    Returns:
        `(encoder output, cross)`; `cross` is that of `Decoder.make_cache`, or `None`
        where it is still to be computed.
    """
    return backbone.encode(token_ids, padding), None


@inference()
def start(
    backbone: Any,
    inputs: dict,
    options: GenerationOptions,
    spare: int = 0,
    read: Callable = read_source,
) -> dict:
    """Encode the sources, fill the cross-attention cache, prefill the prompts.

    Args:
        backbone: a `Backbone`.
        inputs: dict of `encoder_token_ids`, `encoder_padding_mask` `(B, S)`;
            `decoder_token_ids` `(R, L)`, prompts followed by 0, R a multiple of B;
            `prompt_lengths`, `seeds` `(R,)`; `prefix_token_ids` `(R, P)`, of which
            the first `prefix_count` are in every prompt, before its last token;
            `max_length`, at most L; `traced_args` and `token_lists` of the options.
        options: a `GenerationOptions`.
        spare: see `make_self_cache`.
        read: how sources are read, see `read_source`.

    Returns:
        The state.
    """
    mask, prefix = inputs["encoder_padding_mask"], inputs["prefix_token_ids"]
    token_ids = ops.cast(inputs["decoder_token_ids"], "int32")
    rows, length = token_ids.shape
    encoder_output, cross = read(backbone, inputs["encoder_token_ids"], mask)
    cache = backbone.decoder.make_cache(
        encoder_output, mask, length, rows, spare, cross
    )
    count = inputs["prefix_count"]
    constants = ("prompt_lengths", "seeds", "max_length", "traced_args")
    if prefix.shape[1]:
        _, cache = backbone.decode(prefix, cache=cache, index=0, count=count)
    state = {
        "token_ids": token_ids,
        "token_log_probs": ops.zeros((rows, length), "float32"),
        "index": count + 1,
        "done": ops.zeros((rows,), "bool"),
        "cache": cache,
        **{name: inputs[name] for name in constants},
    }
    return beam.start(state, options.num_beams) if options.num_beams > 1 else state


def advance(
    step: Callable,
    state: dict,
    limit: Tensor,
    options: GenerationOptions,
    known_tokens: int | None = None,
) -> dict:
    """Generate up to position `limit`, or until every row is done.

    Args:
        step: function from `(token (R,), cache, index, capped)`, the token at position
            `index`, to `(logits (R, V), cache)`; see `plain_step`.
        state: from `start`, or from the previous call.
        limit: scalar int, at most L.
        options: a `GenerationOptions`.
        known_tokens: only ids below this are generated; `None` for all.

    Returns:
        The state; a row is filled with 0 after its stop id.
    """
    write = beam.write if options.num_beams > 1 else write_token

    def unfinished(state):
        everything = ops.all(state["done"])
        return ops.logical_and(state["index"] < limit, ops.logical_not(everything))

    def body(state):
        index = state["index"]
        last = ops.take(state["token_ids"], index - 1, axis=1)
        capped = not options.is_greedy
        logits, cache = step(last, state["cache"], index - 1, capped)
        state = write({**state, "cache": cache}, logits, options, known_tokens)
        return ({**state, "index": index + 1},)

    return ops.while_loop(unfinished, body, (state,))[0]


def select(state: dict, chosen: np.ndarray, count: int) -> dict:
    """The state of some of the rows, each with its beams or samples.

    Args:
        state: from `advance`; its arrays must not be used again.
        chosen: int array of row numbers, in the order wanted.
        count: number of rows in the state.
    """

    def take(array):
        size = array.shape[0] if len(array.shape) else 0
        if size < count:  # A scalar, or all rows share one source.
            return array
        rows = np.arange(size).reshape(count, -1)[chosen]
        return mesh.like(ops.take(array, rows.reshape(-1), axis=0), array)

    scalars = ("traced_args", "counts")
    return {
        name: value if name in scalars else keras.tree.map_structure(take, value)
        for name, value in state.items()
    }


def plain_step(backbone: Any) -> Callable:
    """The step of `advance` through the layers of the model."""

    @inference()
    def step(token, cache, index, capped):
        hidden, cache = backbone.decode(token[:, None], cache=cache, index=index)
        return backbone.next_logits(hidden[:, 0], capped), cache

    return step


def write_token(
    state: dict,
    logits: Tensor,
    options: GenerationOptions,
    known_tokens: int | None = None,
) -> dict:
    """Append one token to every row, greedily or by sampling.

    Args:
        state: of the decoding loop.
        logits: `(R, V)`, of position `index`.
        options: a `GenerationOptions`.
        known_tokens: see `advance`.

    Returns:
        The state with that token.
    """
    index, done = state["index"], state["done"]
    if options.is_greedy:
        token = top_candidates(logits[:, :known_tokens], 1)[1][:, 0]
    else:
        logits = ops.cast(logits, "float32")
        scores = process(logits[:, :known_tokens], state, options)
        if options.is_sampling:
            token = sample(scores, state, options)
        else:
            token = top_candidates(scores, 1)[1][:, 0]
    given = ops.take(state["token_ids"], index, axis=1)
    in_prompt = index < state["prompt_lengths"]
    token = ops.where(in_prompt, given, ops.where(done, 0, token))
    if options.return_scores:
        state = {**state, "token_log_probs": _add_scores(state, logits, token)}
    stops = ops.any(token[:, None] == state["traced_args"]["stop_ids"], axis=-1)
    stops = ops.logical_and(stops, ops.logical_not(in_prompt))
    done = ops.logical_or(done, stops)
    token_ids = ops.slice_update(state["token_ids"], (0, index), token[:, None])
    return {**state, "token_ids": token_ids, "done": done}


def _add_scores(state, logits, token):
    chosen = ops.take_along_axis(logits, token[:, None], axis=1)
    log_prob = chosen - ops.logsumexp(logits, axis=1, keepdims=True)
    return ops.slice_update(state["token_log_probs"], (0, state["index"]), log_prob)
