"""The decoding loop: read the source, then write token by token.

`start` gives a state, `advance` writes until a position, or until every row is done.
Both are compiled once for the shapes of their arrays; the position is data, so that
writing one token at a time (`stream`) and writing all of them run the same program.

The state is a dict: `token_ids` int32 `(R, L)`, of which the first `index` are
written; `token_log_probs` `(R, L)`; `done`; `cache`; what beam search adds; and, not
changing, `prompt_lengths` and `seeds` `(R,)`, `max_length`, `knobs`.
"""

import keras
import numpy as np
from keras import ops

from keras_t5gemma.distribution import mesh
from keras_t5gemma.generation import beam
from keras_t5gemma.generation.sampling import process, sample, top_candidates


def start(backbone, inputs, options):
    """Encode, fill the cross-attention cache, read the prompts.

    Args:
        backbone: a `Backbone`.
        inputs: dict of `encoder_token_ids`, `encoder_padding_mask` `(B, S)`;
            `decoder_token_ids` `(R, L)`, prompts followed by 0, R a multiple of B;
            `prompt_lengths`, `seeds` `(R,)`; `prefix_token_ids` `(R, P)`, of which
            the first `prefix_count` are in every prompt, before its last token;
            `max_length`, at most L; `knobs` of the options.
        options: a `GenerationOptions`.

    Returns:
        The state.
    """
    mask, prefix = inputs["encoder_padding_mask"], inputs["prefix_token_ids"]
    token_ids = ops.cast(inputs["decoder_token_ids"], "int32")
    rows, length = token_ids.shape
    memory = backbone.encode(inputs["encoder_token_ids"], mask)
    cache = backbone.make_cache(memory, mask, length, rows)
    count = inputs["prefix_count"]
    if prefix.shape[1]:
        _, cache = backbone.decode(prefix, cache=cache, index=0, count=count)
    state = {
        "token_ids": token_ids,
        "token_log_probs": ops.zeros((rows, length), "float32"),
        "index": count + 1,
        "done": ops.zeros((rows,), "bool"),
        "cache": cache,
        **{k: inputs[k] for k in ("prompt_lengths", "seeds", "max_length", "knobs")},
    }
    return beam.start(state, options.num_beams) if options.num_beams > 1 else state


def advance(step, state, limit, options, stop_ids=None):
    """Write until position `limit`, or until every row is done.

    Args:
        step: function of `(token (R,), cache, index, capped)`, the token at position
            `index`, that gives `(logits (R, V), cache)`; see `plain_step`.
        state: of `start`, or of the call before.
        limit: scalar int, at most L.
        options: a `GenerationOptions`.
        stop_ids: tuple of ids that end a row, or `None`.

    Returns:
        The state; after its stop id a row holds 0.
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
        state = write({**state, "cache": cache}, logits, options, stop_ids)
        return ({**state, "index": index + 1},)

    return ops.while_loop(unfinished, body, (state,))[0]


def select(state, chosen, count):
    """The state of some of the rows, each with its beams or samples.

    Args:
        state: of `advance`; its arrays must not be used again.
        chosen: int array, which rows, in the order wanted.
        count: how many rows there are.
    """

    def take(array):
        size = array.shape[0]
        if size < count:  # One source that all rows share.
            return array
        rows = np.arange(size).reshape(count, -1)[chosen]
        return mesh.like(ops.take(array, rows.reshape(-1), axis=0), array)

    whole = ("index", "max_length", "knobs")
    return {
        name: value if name in whole else keras.tree.map_structure(take, value)
        for name, value in state.items()
    }


def plain_step(backbone):
    """The step of `advance` through the model's own layers."""

    def step(token, cache, index, capped):
        hidden, cache = backbone.decode(token[:, None], cache=cache, index=index)
        return backbone.next_logits(hidden[:, 0], capped), cache

    return step


def write_token(state, logits, options, stop_ids):
    """One more token in every row: greedy, or sampled.

    Args:
        state: of the loop.
        logits: `(R, V)`, of position `index`.
        options: a `GenerationOptions`.
        stop_ids: tuple of ids, or `None`.

    Returns:
        The state with that token.
    """
    index, done = state["index"], state["done"]
    if options.is_greedy:
        token = top_candidates(logits, 1)[1][:, 0]
    else:
        logits = ops.cast(logits, "float32")
        scores = process(logits, state, options, stop_ids)
        if options.is_sampling:
            token = sample(scores, state, options)
        else:
            token = top_candidates(scores, 1)[1][:, 0]
    given = ops.take(state["token_ids"], index, axis=1)
    in_prompt = index < state["prompt_lengths"]
    token = ops.where(in_prompt, given, ops.where(done, 0, token))
    if options.return_scores:
        state = {**state, "token_log_probs": _add_scores(state, logits, token)}
    for stop in stop_ids or ():
        stops = ops.logical_and(token == stop, ops.logical_not(in_prompt))
        done = ops.logical_or(done, stops)
    token_ids = ops.slice_update(state["token_ids"], (0, index), token[:, None])
    return {**state, "token_ids": token_ids, "done": done}


def _add_scores(state, logits, token):
    chosen = ops.take_along_axis(logits, token[:, None], axis=1)
    log_prob = chosen - ops.logsumexp(logits, axis=1, keepdims=True)
    return ops.slice_update(state["token_log_probs"], (0, state["index"]), log_prob)
