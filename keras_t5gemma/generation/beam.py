"""Beam search as defined by transformers.

B sources with k beams each, in adjacent rows: R = B k. A beam that ends joins its
source's finished beams, ranked by log-probability over length to the power of the
length penalty. A source is done when k beams are finished and the best running beam,
ranked at its current length, is no better than the worst of them. From then on its
finished beams do not change, so an answer does not depend on the other sources.
"""

import numpy as np
from keras import ops

from keras_t5gemma.generation.options import GenerationOptions
from keras_t5gemma.generation.sampling import process, top_candidates
from keras_t5gemma.utils.types import Tensor

_NEVER = -1e30


def start(state: dict, beams: int) -> dict:
    """Add the arrays of beam search to a state whose rows are already beams.

    `log_probs` `(B, k)` of the running beams, of which only the first counts at the
    start; `finished_ids`, `finished_log_probs` `(B, k, L)` and `finished_scores`
    `(B, k)`; `done` `(B,)`.
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


def write(
    state: dict,
    logits: Tensor,
    options: GenerationOptions,
    known_tokens: int | None = None,
) -> dict:
    """Append one token to every beam; see `decoding.write_token`."""
    beams, index, done = options.num_beams, state["index"], state["done"]
    sources = done.shape[0]
    candidates = _candidates(state, logits, options, known_tokens)
    total, token, _, _ = candidates

    stop_ids = state["traced_args"]["stop_ids"]
    ends = ops.any(token[..., None] == stop_ids, axis=-1)
    ends = ops.logical_or(ends, index + 1 >= state["max_length"])
    # While a prompt is read the beams stay as they are.
    prompt = ops.reshape(state["prompt_lengths"], (sources, beams))
    in_prompt = index < prompt  # B k
    ends = ops.logical_and(ends, ops.logical_not(in_prompt[:, :1]))

    length = ops.cast(index + 1 - prompt, "float32")  # B k, of the answers
    penalty = _length_power(length, state["traced_args"])
    scores = total[:, :beams] / penalty
    may_end = ops.logical_and(ends[:, :beams], ops.logical_not(done)[:, None])
    finished = _finish(state, candidates, ops.where(may_end, scores, _NEVER))
    running = _run_on(state, candidates, ops.where(ends, _NEVER, total), in_prompt)

    best = running["log_probs"][:, :1] / penalty[:, :1]
    improves = best > finished["finished_scores"][:, -1:]
    done = ops.logical_or(done, ops.logical_not(improves[:, 0]))
    return {**state, **finished, **running, "done": done}


def _candidates(state, logits, options, known_tokens):
    """The best continuations of each source's beams, enough that k do not end.

    Returns:
        `(total, token, parent, log_prob)`, `(B, keep)` each, best first: summed
        log-probability, the token, the number of the beam, and the token's
        log-probability before penalties.
    """
    beams, sources = options.num_beams, state["done"].shape[0]
    raw = ops.cast(logits, "float32")
    rows, size = raw[:, :known_tokens].shape
    log_z = ops.logsumexp(raw, axis=1, keepdims=True)
    scores = process((raw - log_z)[:, :known_tokens], state, options)
    keep = min(beams * (1 + state["traced_args"]["stop_ids"].shape[1]), size)
    best, ids = (
        ops.reshape(t, (sources, beams * keep)) for t in top_candidates(scores, keep)
    )
    total = ops.repeat(state["log_probs"], keep, axis=1) + best
    total, place = ops.top_k(total, keep)  # B keep
    parent = ops.cast(place // keep, "int32")
    token = ops.take_along_axis(ids, place, axis=1)
    log_prob = ops.take_along_axis(raw - log_z, ops.reshape(ids, (rows, keep)), 1)
    log_prob = ops.reshape(log_prob, (sources, beams * keep))
    return total, token, parent, ops.take_along_axis(log_prob, place, axis=1)


def _rows_of(parent, beams):
    """Row numbers, flat, of beams `(B, n)`."""
    sources, count = parent.shape
    rows = ops.arange(sources)[:, None] * beams + parent
    return ops.reshape(rows, (sources * count,))


def _extend(state, rows, token, log_prob):
    """`token_ids` and `token_log_probs` of rows, with one more token each."""
    column = (rows.shape[0], 1)
    return [
        ops.slice_update(
            ops.take(state[name], rows, axis=0),
            (0, state["index"]),
            ops.reshape(new, column),
        )
        for name, new in (("token_ids", token), ("token_log_probs", log_prob))
    ]


def _finish(state, candidates, scores):
    """Beams that end now, of `scores` `(B, k)`, join the k best finished ones."""
    _, token, parent, log_prob = candidates
    sources, beams = scores.shape
    pool = ops.concatenate([state["finished_scores"], scores], axis=1)
    finished_scores, chosen = ops.top_k(pool, beams)
    rows = _rows_of(parent[:, :beams], beams)
    new = _extend(state, rows, token[:, :beams], log_prob[:, :beams])
    finished = {"finished_scores": finished_scores}
    for name, array in zip(("finished_ids", "finished_log_probs"), new, strict=True):
        array = ops.reshape(array, (sources, beams, array.shape[1]))
        both = ops.concatenate([state[name], array], axis=1)
        finished[name] = ops.take_along_axis(both, chosen[..., None], axis=1)
    return finished


def _run_on(state, candidates, total, in_prompt):
    """The k best of the candidates that do not end, with their part of the cache."""
    _, token, parent, log_prob = candidates
    sources, beams = in_prompt.shape
    given = ops.take(state["token_ids"], state["index"], axis=1)
    given = ops.reshape(given, (sources, beams))
    running, chosen = ops.top_k(total, beams)
    own = ops.broadcast_to(ops.arange(beams, dtype="int32")[None], (sources, beams))
    parent = ops.where(in_prompt, own, ops.take_along_axis(parent, chosen, axis=1))
    token = ops.where(in_prompt, given, ops.take_along_axis(token, chosen, axis=1))
    log_prob = ops.where(in_prompt, 0.0, ops.take_along_axis(log_prob, chosen, axis=1))
    rows = _rows_of(parent, beams)
    token_ids, token_log_probs = _extend(state, rows, token, log_prob)
    cache = state["cache"]
    reordered = tuple(
        tuple(ops.take(t, rows, axis=0) for t in pair) for pair in cache["self"]
    )
    return {
        "token_ids": token_ids,
        "token_log_probs": token_log_probs,
        "log_probs": ops.where(in_prompt, state["log_probs"], running),
        "cache": {**cache, "self": reordered},
    }


def _length_power(length, traced_args):
    """Length to the power of the length penalty; at least 1, also in a prompt."""
    return ops.power(ops.maximum(length, 1.0), traced_args["length_penalty"])


def results(state: dict, options: GenerationOptions) -> tuple[np.ndarray, ...]:
    """The best answers of each source, best first, as NumPy arrays.

    When `max_time` ends the search with fewer finished beams than answers, the running
    beams follow in their order.

    Args:
        state: of the decoding loop, as NumPy arrays.
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
