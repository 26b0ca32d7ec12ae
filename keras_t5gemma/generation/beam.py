"""Beam search, as transformers defines it.

B sources, k beams each, next to each other: R = B k rows. A beam that ends moves to
its source's finished ones, ranked by log-probability over length to the power of the
length penalty. A source is done when k are finished and the best running one, ranked
at its present length, is no better than the worst of them; from then on nothing of it
changes, so an answer does not depend on its neighbours.
"""

import numpy as np
from keras import ops

from keras_t5gemma.generation.sampling import process, top_candidates

_NEVER = -1e30


def start(state, beams):
    """Add what beam search keeps to a state whose rows are already beams.

    `log_probs` `(B, k)` of the running beams, of which only the first may have
    children at first; `finished_ids`, `finished_log_probs` `(B, k, L)` and
    `finished_scores` `(B, k)`; `done` `(B,)`.
    """
    rows, length = state["token_ids"].shape
    sources = rows // beams
    first = ops.arange(beams) == 0
    log_probs = ops.cast(ops.where(first, 0.0, _NEVER), "float32")
    return {
        **state,
        "done": ops.zeros((sources,), "bool"),
        "log_probs": ops.broadcast_to(log_probs, (sources, beams)),
        "finished_ids": ops.zeros((sources, beams, length), "int32"),
        "finished_log_probs": ops.zeros((sources, beams, length), "float32"),
        "finished_scores": ops.full((sources, beams), _NEVER, "float32"),
    }


def write(state, logits, options, stop_ids):
    """One more token in every beam; see `decoding.write_token`."""
    beams, index, done = options.num_beams, state["index"], state["done"]
    sources = done.shape[0]
    token_ids, raw = state["token_ids"], ops.cast(logits, "float32")
    rows, length = token_ids.shape
    size = raw.shape[1]
    normalizer = ops.logsumexp(raw, axis=1, keepdims=True)
    scores = process(raw - normalizer, state, options, stop_ids)

    # Enough candidates that k go on, however many end.
    keep = min(beams * max(2, 1 + len(stop_ids or ())), size)
    best, ids = (
        ops.reshape(t, (sources, beams * keep)) for t in top_candidates(scores, keep)
    )
    total = ops.repeat(state["log_probs"], keep, axis=1) + best
    total, place = ops.top_k(total, keep)  # B keep
    parent = ops.cast(place // keep, "int32")
    token = ops.take_along_axis(ids, place, axis=1)

    ends = ops.broadcast_to(index + 1 >= state["max_length"], token.shape)
    for stop in stop_ids or ():
        ends = ops.logical_or(ends, token == stop)

    # While a prompt is read the beams stay as they are.
    prompt = ops.reshape(state["prompt_lengths"], (sources, beams))
    in_prompt = index < prompt  # B k
    given = ops.reshape(ops.take(token_ids, index, axis=1), (sources, beams))
    ends = ops.logical_and(ends, ops.logical_not(in_prompt[:, :1]))

    def rows_of(parent):
        return ops.reshape(
            ops.arange(sources)[:, None] * beams + parent, (sources * parent.shape[1],)
        )

    log_prob = ops.take_along_axis(raw - normalizer, ops.reshape(ids, (rows, keep)), 1)
    log_prob = ops.reshape(log_prob, (sources, beams * keep))
    log_prob = ops.take_along_axis(log_prob, place, axis=1)  # B keep, before penalties

    def sequences(parent, token, log_prob):
        chosen = rows_of(parent)
        column = (chosen.shape[0], 1)
        return tuple(
            ops.slice_update(
                ops.take(array, chosen, axis=0), (0, index), ops.reshape(new, column)
            )
            for array, new in (
                (token_ids, token),
                (state["token_log_probs"], log_prob),
            )
        )

    # Those that end now, among the k best, join the finished ones.
    new_length = ops.cast(index + 1 - prompt, "float32")
    new_scores = total[:, :beams] / _power(new_length, state["knobs"])
    may_end = ops.logical_and(ends[:, :beams], ops.logical_not(done)[:, None])
    pool = ops.concatenate(
        [state["finished_scores"], ops.where(may_end, new_scores, _NEVER)], axis=1
    )
    finished_scores, chosen = ops.top_k(pool, beams)
    shape = (sources, beams, length)
    new = sequences(parent[:, :beams], token[:, :beams], log_prob[:, :beams])
    finished_ids, finished_log_probs = [
        ops.take_along_axis(
            ops.concatenate([state[name], ops.reshape(array, shape)], axis=1),
            chosen[..., None],
            axis=1,
        )
        for name, array in zip(("finished_ids", "finished_log_probs"), new, strict=True)
    ]

    # The k best of those that do not end run on.
    running, chosen = ops.top_k(ops.where(ends, _NEVER, total), beams)
    own = ops.broadcast_to(ops.arange(beams, dtype="int32")[None], (sources, beams))
    parent = ops.where(in_prompt, own, ops.take_along_axis(parent, chosen, axis=1))
    token = ops.where(in_prompt, given, ops.take_along_axis(token, chosen, axis=1))
    log_prob = ops.where(in_prompt, 0.0, ops.take_along_axis(log_prob, chosen, axis=1))
    running = ops.where(in_prompt, state["log_probs"], running)
    token_ids, token_log_probs = sequences(parent, token, log_prob)

    at_present = running[:, :1] / _power(new_length[:, :1], state["knobs"])
    improves = at_present > finished_scores[:, -1:]
    done = ops.logical_or(done, ops.logical_not(improves[:, 0]))
    chosen = rows_of(parent)
    own_cache = tuple(
        tuple(ops.take(t, chosen, axis=0) for t in pair)
        for pair in state["cache"]["self"]
    )
    return {
        **state,
        "token_ids": token_ids,
        "token_log_probs": token_log_probs,
        "log_probs": running,
        "finished_ids": finished_ids,
        "finished_log_probs": finished_log_probs,
        "finished_scores": finished_scores,
        "done": done,
        "cache": {**state["cache"], "self": own_cache},
    }


def _power(length, knobs):
    """Length to the power of the length penalty; in a prompt there is no length."""
    return ops.power(ops.maximum(length, 1.0), knobs["length_penalty"])


def results(state, options):
    """The best answers of each source, best first, as NumPy arrays.

    Where fewer have finished than are asked for, `max_time` has ended the search: the
    running ones follow, which are in order already.

    Args:
        state: of the loop, as NumPy arrays.
        options: a `GenerationOptions`.

    Returns:
        `(token_ids, token_log_probs)`: `(B n, L)` each.
    """
    sources, beams, length = state["finished_ids"].shape
    scores = state["finished_scores"]
    is_finished = scores > _NEVER / 2
    rank = np.where(is_finished, -scores, np.inf)
    rank = np.concatenate([rank, np.full_like(rank, -_NEVER)], axis=1)
    best = np.argsort(rank, axis=1, kind="stable")[:, : options.num_return_sequences]
    arrays = []
    for finished, running in (
        ("finished_ids", "token_ids"),
        ("finished_log_probs", "token_log_probs"),
    ):
        running = state[running].reshape(sources, beams, length)
        both = np.concatenate([state[finished], running], axis=1)
        chosen = np.take_along_axis(both, best[..., None], axis=1)
        arrays.append(chosen.reshape(-1, length))
    return tuple(arrays)
