"""Speculative decoding: proposed tokens, verified several a pass.

Summaries and corrections repeat what was read. After each pass the last tokens of a row
are looked up in its source and in what it has written; the tokens that followed there
are proposed (prompt lookup decoding), or those that a small model drafts (`drafting`).
One pass of the decoder over them and the last token verifies all.

A proposed token is accepted when it is the one that plain decoding chooses there, so
answers do not change. That includes sampling, whose noise is a function of the row's
seed and the position (`sampling.sample`): the answer to a seed is the same, token for
token, with and without speculation. Rejection sampling (arXiv 2211.17192) keeps the
distribution alone. A copied token is accepted with the same probability in both; one
that a model drafts at random slightly less often than there. As the draft draws with
the noise of the same position, both models often choose alike (arXiv 2408.07978).

Answers are identical in float32. A pass over several positions may round otherwise than
a pass over one: in bfloat16, and in int8 where activations are rounded to 8 bits, this
seldom decides between two tokens that are about as likely, as the batch size does in
plain decoding.

Rows accept different numbers of tokens, so `index` is `(R,)` in the state. The cache
has spare slots, and the next pass overwrites the keys of rejected tokens.

Below, R are rows, L the decoder's length, C the length of the text that is searched,
k the number of proposed tokens, T = k + 1 the positions of a pass.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from keras import ops

from keras_t5gemma.distribution import mesh
from keras_t5gemma.generation import decoding
from keras_t5gemma.generation.options import GenerationOptions
from keras_t5gemma.generation.sampling import process, sample, top_candidates
from keras_t5gemma.modeling.inference import inference
from keras_t5gemma.utils.types import Tensor

LENGTHS = (0, 3, 7)  # Numbers of proposed tokens; each is a program.
_NGRAM = 3


def start(
    backbone: Any,
    inputs: dict,
    options: GenerationOptions,
    read: Callable = decoding.read_source,
) -> dict:
    """See `decoding.start`; each row has its index, and the source to copy from."""
    state = decoding.start(backbone, inputs, options, max(LENGTHS), read)
    rows = state["token_ids"].shape[0]
    state["index"] = ops.broadcast_to(state["index"], (rows,))
    state["counts"] = ops.zeros((4,), "int32")
    if options.speculate == "source":
        mask = ops.cast(inputs["encoder_padding_mask"], "bool")
        source = ops.where(mask, ops.cast(inputs["encoder_token_ids"], "int32"), -1)
        state["source"] = ops.repeat(source, rows // source.shape[0], axis=0)
    return state


def copy(state: dict, k: int, xp: Any = ops) -> tuple[Tensor, dict]:
    """Propose tokens from the source and the answer; see `propose`.

    Args:
        state: of the loop.
        k: number of tokens. With 0 one is proposed, to learn whether it would be
            accepted.
        xp: the namespace of the state's arrays, `keras.ops` or `numpy`.

    Returns:
        `(ids, state)`, int32 `(R, max(k, 1))`; from the first negative one on nothing
        is proposed.
    """
    rest = (state["token_ids"], state["index"], max(k, 1), xp)
    return propose(state["source"], *rest), state


def advance(
    step: Callable,
    state: dict,
    limit: Tensor,
    passes: Tensor,
    k: int,
    options: GenerationOptions,
    known_tokens: int | None = None,
    proposer: Callable = copy,
) -> dict:
    """Generate up to position `limit` or beyond, in at most `passes` passes.

    Args:
        step: from `plain_step`.
        state: from `start`, or from the previous call.
        limit: scalar int; generation ends when each row has that length or is done.
        passes: scalar int.
        k: number of proposed tokens.
        options: a `GenerationOptions` without beams.
        known_tokens: see `decoding.advance`.
        proposer: function of `(state, k, xp)`, see `copy`.

    Returns:
        The state. Its `counts` are the row passes, the tokens written in them, and of
        the proposed tokens those accepted and those tried.
    """

    def unfinished(state, left):
        waits = ops.logical_and(state["index"] < limit, ops.logical_not(state["done"]))
        return ops.logical_and(left > 0, ops.any(waits))

    def body(state, left):
        state = verify(step, state, k, options, known_tokens, proposer)
        return state, left - 1

    return ops.while_loop(unfinished, body, (state, passes))[0]


def advance_on_host(
    step: Callable,
    state: dict,
    limit: int,
    passes: int,
    k: int,
    options: GenerationOptions,
    known_tokens: int | None = None,
    proposer: Callable = copy,
) -> dict:
    """`advance` for a backend without a compiler.

    The bookkeeping is in NumPy, where operations on small arrays cost least, and a pass
    has no more positions than tokens were proposed. The arrays of the state stay there.
    """
    kept = ("cache", "draft_cache", "traced_args")
    state = {
        name: value if name in kept else mesh.to_numpy(value)
        for name, value in state.items()
    }
    while passes > 0 and np.any((state["index"] < limit) & ~state["done"]):
        state = verify(step, state, k, options, known_tokens, proposer, np)
        passes -= 1
    return state


def verify(
    step: Callable,
    state: dict,
    k: int,
    options: GenerationOptions,
    known_tokens: int | None = None,
    proposer: Callable = copy,
    xp: Any = ops,
) -> dict:
    """One pass: propose tokens, and write those that plain decoding would write.

    Args:
        step: from `plain_step`.
        state: of the loop.
        k: number of proposed tokens.
        options: a `GenerationOptions`.
        known_tokens: see `decoding.advance`.
        proposer: see `advance`.
        xp: the namespace of the state's arrays, `keras.ops` or `numpy`.

    Returns:
        The state.
    """
    draft, state = proposer(state, k, xp)
    token_ids, index, done = state["token_ids"], state["index"], state["done"]
    length, prompt = token_ids.shape[1], state["prompt_lengths"][:, None]
    places = index[:, None] + xp.arange(max(k, 1), dtype="int32")[None]  # R k
    draft = xp.where(places < prompt, at(token_ids, places, xp), draft)
    if xp is np:
        proposed = np.cumsum(draft < 0, axis=1) == 0
        k = min(k, int(proposed[~done].sum(axis=1).max(initial=0)))
    columns = max(k, 1)  # With k = 0 the first is tried, but not accepted.
    tokens = xp.concatenate([at(token_ids, index[:, None] - 1, xp), draft[:, :k]], 1)
    tokens = xp.where(tokens < 0, 0, tokens)  # R T
    logits, cache = step(tokens, state["cache"], index - 1, not options.is_greedy)
    chosen, log_probs = choose(logits, state, tokens, options, known_tokens, xp)
    steps = xp.arange(k + 1, dtype="int32")[None]
    places = index[:, None] + steps  # R T
    chosen = xp.where(places < prompt, at(token_ids, places, xp), chosen)

    wrong = xp.where(draft[:, :columns] == chosen[:, :columns], 0, 1)
    run = xp.sum(xp.where(xp.cumsum(wrong, axis=1) == 0, 1, 0), axis=1)  # R
    stop_ids = state["traced_args"]["stop_ids"]
    if xp is np:
        stop_ids = mesh.to_numpy(stop_ids)
    stops = xp.any(chosen[..., None] == stop_ids[:, None], axis=-1) & (places >= prompt)
    before = xp.cumsum(xp.where(stops, 1, 0), axis=1) - xp.where(stops, 1, 0)
    keep = (steps <= run[:, None]) & (before == 0) & (places < state["max_length"])
    keep = keep & ~done[:, None]
    count = xp.sum(xp.where(keep, 1, 0), axis=1)  # R

    offset = xp.arange(length, dtype="int32")[None] - index[:, None]  # R L
    inside = (offset >= 0) & (offset < count[:, None])

    def write(old, new):
        return xp.where(inside, at(new, offset, xp), old)

    if log_probs is not None:
        scores = write(state["token_log_probs"], log_probs)
        state = {**state, "token_log_probs": scores}
    active = (count > 0) & (index >= prompt[:, 0])
    tried = xp.where(run < columns, run + 1, columns)
    counts = [xp.sum(xp.where(active, x, 0)) for x in (1, count, run, tried)]
    counts = xp.stack(counts)
    return {
        **state,
        "cache": cache,
        "token_ids": write(token_ids, chosen),
        "index": index + _int32(count, xp),
        "done": done | xp.any(keep & stops, axis=1),
        "counts": state["counts"] + _int32(counts, xp),
    }


def propose(
    source: Tensor, token_ids: Tensor, index: Tensor, k: int, xp: Any = ops
) -> Tensor:
    """Tokens that followed an earlier copy of the last ones: int32 `(R, k)`.

    The longest n-gram counts, of up to three tokens; among equal ones the first of the
    source, then of the answer. At the start of an answer the source's start is
    proposed. A copy in the answer that ends before k tokens is repeated.

        source  the old board is old      answer  the board is    proposed  old

    Args:
        source: int32 `(R, S)`, negative where padded.
        token_ids: int32 `(R, L)`, of which the first `index` are written.
        index: int32 `(R,)`.
        k: number of tokens.
        xp: the namespace of the arrays.

    Returns:
        Ids; from the first negative one on nothing is proposed.
    """
    text = xp.concatenate([token_ids[:, :1], source, token_ids], axis=1)  # R C
    size = 1 + source.shape[1]
    end = size + index[:, None]
    places = xp.arange(text.shape[1], dtype="int32")[None]
    matches = (places + 1 < end) & (places != size - 1)
    score = 0
    for back in range(_NGRAM):
        last = at(token_ids, index[:, None] - 1 - back, xp)
        earlier = xp.concatenate([text[:, :back], text[:, : text.shape[1] - back]], 1)
        matches = matches & (earlier == last)
        score = score + xp.where(matches, 1, 0)
    best = _int32(xp.argmax(score, axis=1), xp)[:, None]  # The first of equal ones.
    steps = xp.arange(k, dtype="int32")[None]
    in_answer = best >= size
    steps = xp.where(in_answer, steps % xp.where(in_answer, end - 1 - best, 1), steps)
    following = best + 1 + steps
    found = (at(score, best, xp) > 0) & (in_answer | (following < size))
    return xp.where(found, at(text, following, xp), -1)


def at(array: Tensor, places: Tensor, xp: Any = ops) -> Tensor:
    """`array[r, places[r, i]]` of `(R, L)` and `(R, n)`.

    Places outside are moved to the nearest inside.
    """
    places = xp.minimum(xp.maximum(places, 0), array.shape[1] - 1)
    if xp is np:  # Several times faster than the function.
        return array[np.arange(len(array))[:, None], places]
    return xp.take_along_axis(array, places, axis=1)


def _int32(x, xp):
    return x.astype("int32") if xp is np else ops.cast(x, "int32")


def choose(
    logits: Tensor,
    state: dict,
    tokens: Tensor,
    options: GenerationOptions,
    known_tokens: int | None,
    xp: Any = ops,
) -> tuple[Tensor, Tensor | None]:
    """The next tokens, and their log-probabilities if wanted, `(R, T)` each.

    Args:
        logits: `(R T, V)`.
        state: of the loop.
        tokens: int `(R, T)`, the last token and the proposed ones.
        options: a `GenerationOptions`.
        known_tokens: see `decoding.advance`.
        xp: the namespace of the state's arrays.
    """
    rows, positions = tokens.shape
    log_probs = None
    if options.is_greedy:
        chosen = top_candidates(logits[:, :known_tokens], 1)[1]
    else:
        # Every position is a row, whose text has the proposed tokens before it.
        token_ids, index = state["token_ids"], state["index"][:, None]
        length = token_ids.shape[1]
        offset = xp.arange(length, dtype="int32")[None] - index + 1  # R L
        inside = (offset >= 0) & (offset < positions)
        token_ids = xp.where(inside, at(tokens, offset, xp), token_ids)
        index = index + xp.arange(positions, dtype="int32")[None]
        texts = {
            "token_ids": xp.repeat(token_ids, positions, axis=0),
            "index": xp.reshape(xp.clip(index, 0, length - 1), (-1,)),
        }
        for name in ("prompt_lengths", "seeds"):
            texts[name] = xp.repeat(state[name], positions, axis=0)
        texts = {name: ops.convert_to_tensor(value) for name, value in texts.items()}
        texts["traced_args"] = state["traced_args"]
        logits = ops.cast(logits, "float32")
        scores = process(logits[:, :known_tokens], texts, options)
        if options.is_sampling:
            chosen = sample(scores, texts, options)[:, None]
        else:
            chosen = top_candidates(scores, 1)[1]
        if options.return_scores:
            log_probs = ops.take_along_axis(logits, chosen, axis=1)
            log_probs = log_probs - ops.logsumexp(logits, axis=1, keepdims=True)
            log_probs = ops.reshape(log_probs, (rows, positions))
    chosen = ops.reshape(chosen, (rows, positions))
    if xp is np:
        chosen = mesh.to_numpy(chosen)
        log_probs = None if log_probs is None else mesh.to_numpy(log_probs)
    return chosen, log_probs


def plain_step(backbone: Any) -> Callable:
    """The step of `advance` through the layers of the model.

    A function from `(tokens (R, T), cache, index (R,), capped)`, the tokens from
    position `index` of each row on, to `(logits (R T, V), cache)`.
    """

    @inference()
    def step(tokens, cache, index, capped):
        hidden, cache = backbone.decode(tokens, cache=cache, index=index)
        hidden = ops.reshape(hidden, (-1, hidden.shape[-1]))
        return backbone.next_logits(hidden, capped), cache

    return step
