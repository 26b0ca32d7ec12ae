"""Logit processing and sampling of the next token.

R are the rows being generated, V the vocabulary, L the decoder's length.
"""

import keras
from keras import ops

from keras_t5gemma.generation.options import GenerationOptions
from keras_t5gemma.utils.buckets import equal_chunks
from keras_t5gemma.utils.types import Tensor

_NEVER = -1e30
_CHUNKS = 512


def process(logits: Tensor, state: dict, options: GenerationOptions) -> Tensor:
    """Apply penalties, banned and forced ids, in the order of transformers.

    Args:
        logits: float32 `(R, V)`, or log-probabilities.
        state: of the decoding loop: `token_ids` `(R, L)`, of which the first `index`,
            a scalar or `(R,)`, are generated, `prompt_lengths` `(R,)`, `traced_args`
            with `token_lists`.
        options: a `GenerationOptions`.

    Returns:
        `(R, V)`.
    """
    token_ids, index, traced = state["token_ids"], state["index"], state["traced_args"]
    size = logits.shape[1]
    if options.repetition_penalty != 1.0:
        written = ops.arange(token_ids.shape[1])[None] < index[..., None]
        seen = _mark(token_ids, written, size)
        penalty = traced["repetition_penalty"]
        punished = ops.where(logits < 0, logits * penalty, logits / penalty)
        logits = ops.where(seen, punished, logits)
    if options.no_repeat_ngram_size:
        completes = _completes_ngram(token_ids, index, options.no_repeat_ngram_size)
        logits = ops.where(_mark(token_ids, completes, size), _NEVER, logits)
    count = index - state["prompt_lengths"]  # Tokens of the answer so far, R.
    if options.min_new_tokens:
        too_early = (count < traced["min_new_tokens"])[:, None]
        banned = ops.logical_and(too_early, _is_one_of(traced["stop_ids"][0], size))
        logits = ops.where(banned, _NEVER, logits)
    if options.banned_token_ids:
        logits = ops.where(traced["is_banned"][:, :size], _NEVER, logits)
    if options.forced_token_ids:
        # Negative counts are in the prompt, where the result is not used.
        forced = ops.take(traced["forced_ids"][0], ops.maximum(count, 0))[:, None]
        others = ops.arange(size)[None] != forced
        forbidden = ops.logical_and(forced >= 0, others)
        logits = ops.where(forbidden, _NEVER, logits)
    return logits


def _mark(token_ids, keep, size):
    """Boolean `(R, V)`: the ids of `token_ids` `(R, L)` where `keep` is True."""
    rows, length = token_ids.shape
    keep = ops.broadcast_to(keep, (rows, length))
    row = ops.broadcast_to(ops.arange(rows)[:, None], (rows, length))
    places = ops.reshape(ops.stack([row, token_ids], axis=-1), (rows * length, 2))
    weights = ops.reshape(ops.cast(keep, "float32"), (rows * length,))
    return _sums(ops.cast(places, "int32"), weights, (rows, size)) > 0


def _completes_ngram(token_ids, index, n):
    """Boolean `(R, L)`: tokens that followed an earlier copy of the last n - 1."""
    length = token_ids.shape[1]
    if n > length:  # No n-gram fits.
        return ops.zeros(token_ids.shape, "bool")
    positions = ops.arange(length)[None]
    index = index[..., None]  # 1, or R 1
    follows = ops.logical_and(positions >= n - 1, positions < index)
    for back in range(1, n):
        earlier = ops.roll(token_ids, back, axis=1)
        place = ops.broadcast_to(ops.maximum(index - back, 0), (token_ids.shape[0], 1))
        last = ops.take_along_axis(token_ids, place, axis=1)
        follows = ops.logical_and(follows, earlier == last)
    return ops.logical_and(follows, index >= n)


def _sums(places, values, shape):
    """`ops.scatter`, which on PyTorch is a loop in Python over the places."""
    zeros = ops.zeros(shape, values.dtype)
    return ops.scatter_update(zeros, places, values, reduction="add")


def _is_one_of(ids, size):
    """Boolean `(1, V)`; ids outside the vocabulary mark nothing."""
    ids = ops.where(ops.logical_and(ids >= 0, ids < size), ids, size)
    marks = _sums(ids[:, None], ops.ones(ids.shape, "float32"), (size + 1,))
    return marks[None, :size] > 0


def top_candidates(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest values of each row, largest first.

    A large row is cut into chunks: the k largest values are in the k chunks with the
    largest maxima, which costs one pass instead of the several of sorting.

    Args:
        values: `(R, V)`.
        k: number of values.

    Returns:
        `(values, places)`: `(R, k)`, and int32 `(R, k)`. Among equal values the lowest
        place comes first; on PyTorch only with k = 1, otherwise in any order.
    """
    rows, size = values.shape
    if k == 1 and keras.config.backend() == "torch":  # One pass, in any layout.
        places = ops.argmax(values, axis=-1)[:, None]
        return ops.take_along_axis(values, places, axis=1), ops.cast(places, "int32")
    if size % _CHUNKS or size < 64 * _CHUNKS or k > _CHUNKS // 2:
        top, places = ops.top_k(values, k)
        return top, ops.cast(places, "int32")
    width = size // _CHUNKS
    chunks = ops.reshape(values, (rows, _CHUNKS, width))
    best = ops.max(chunks, axis=-1)  # R chunks
    if k == 1:
        chosen = ops.argmax(best, axis=-1)[:, None]
    else:  # In order, so that equal values keep the order of their places.
        chosen = ops.sort(ops.top_k(best, k)[1], axis=-1)
    chosen = ops.cast(chosen, "int32")  # R k
    near = ops.take_along_axis(chunks, chosen[..., None], axis=1)  # R k width
    near = ops.reshape(near, (rows, k * width))
    if k == 1:
        inside = ops.cast(ops.argmax(near, axis=-1), "int32")[:, None]
        return ops.take_along_axis(near, inside, axis=1), chosen * width + inside
    top, inside = ops.top_k(near, k)
    inside = ops.cast(inside, "int32")
    chunk = ops.take_along_axis(chosen, inside // width, axis=1)
    return top, chunk * width + inside % width


def sample(logits: Tensor, state: dict, options: GenerationOptions) -> Tensor:
    """Draw one token per row from the distribution that the options define.

    The noise is the same on every backend and in every batch, but the logits are equal
    only up to rounding: when they differ by e, a share of about e of the draws differs
    (0.5 e to 0.8 e measured, at most a fifth more than with noise on every logit).

    Args:
        logits: float32 `(R, V)`.
        state: of the decoding loop: `seeds` `(R,)`, `index`, a scalar or `(R,)`,
            `traced_args`.
        options: a `GenerationOptions`.

    Returns:
        int32 `(R,)`.
    """
    blocks, ids = equal_chunks(logits.shape[1], _CHUNKS), None
    if options.top_k is not None:
        logits, ids = top_candidates(logits, options.top_k)
        blocks = 1
    rows, size = logits.shape
    logits = logits - ops.max(logits, axis=-1, keepdims=True)
    weights = ops.exp(logits / state["traced_args"]["temperature"])
    weights = ops.reshape(weights, (rows, blocks, size // blocks))
    sums = ops.sum(weights, axis=-1)
    token, weight = _draw(weights, sums, ids, state, 0)
    if options.top_p is not None:
        token = _stay_in_nucleus(token, weight, weights, sums, ids, state)
    return token[:, 0]


def _draw(weights, sums, ids, state, attempt):
    """Draw tokens by the Gumbel-max trick: first a block, then a token in it.

    Two steps need noise for the blocks and for the tokens of one block, instead of for
    all tokens.

    Args:
        weights: `(R, blocks, width)`, not all 0.
        sums: of the blocks, `(R, blocks)`.
        ids: int32 `(R, width)`, ids of the only block; `None` when ids are positions.
        state: of the decoding loop: `seeds`, `index`.
        attempt: number of earlier draws at this position.

    Returns:
        The tokens and their weights, `(R, 1)` each.
    """
    blocks, width = weights.shape[1:]
    # Above the bits of the position.
    counter = state["index"][..., None] + attempt * 2**16

    def noisy_argmax(weights, places):
        uniform = _uniform(state["seeds"][:, None], counter, places)
        noisy = ops.log(weights) - ops.log(-ops.log(uniform))
        return ops.cast(ops.argmax(noisy, axis=-1), "int32")[:, None]

    block = noisy_argmax(sums, -1 - ops.arange(blocks)[None])
    inside = ops.take_along_axis(weights, block[..., None], axis=1)[:, 0]  # R width
    if ids is None:
        ids = block * width + ops.arange(width)[None]
    best = noisy_argmax(inside, ids)
    return tuple(ops.take_along_axis(t, best, axis=1) for t in (ids, inside))


def _stay_in_nucleus(token, weight, weights, sums, ids, state):
    """Nucleus sampling by rejection: draw again for tokens outside the nucleus.

    A token is outside when the more likely ones reach `top_p` without it; then the next
    draw is from those. No sorting is needed, only a pass over the vocabulary per draw,
    of which at most 1 + log(1 / top_p) are expected.
    """
    # Above 0: no token is more likely than the largest, so every row terminates.
    needed = ops.sum(sums, axis=-1, keepdims=True) * state["traced_args"]["top_p"]
    needed = ops.maximum(needed, 1e-30)

    def draw_again(attempt, token, weight, outside):
        likelier = ops.where(weights > weight[..., None], weights, 0.0)
        sums = ops.sum(likelier, axis=-1)
        mass = ops.sum(sums, axis=-1, keepdims=True)
        outside = ops.logical_and(outside, mass >= needed)
        new_token, new_weight = _draw(likelier, sums, ids, state, attempt)
        token = ops.where(outside, new_token, token)
        return attempt + 1, token, ops.where(outside, new_weight, weight), outside

    outside = ops.ones_like(token, "bool")  # Not known yet.
    first = (ops.convert_to_tensor(1, "int32"), token, weight, outside)
    return ops.while_loop(lambda *loop: ops.any(loop[-1]), draw_again, first)[1]


def _uniform(seeds, counter, places):
    """Uniform numbers in (0, 1), a function of seed, counter and place alone.

    A counter-based generator: the draws of a row depend neither on other rows nor on
    the backend. The mixing is Chris Wellons' "lowbias32" permutation.
    """
    key = _mix(seeds ^ _mix(ops.cast(counter, "int32") + 1))
    bits = _mix(ops.cast(places, "int32") ^ key)
    bits = ops.bitwise_and(ops.right_shift(bits, 9), 2**23 - 1)
    return (ops.cast(bits, "float32") + 0.5) / 2**23  # Exact: never 0, never 1.


def _mix(x):
    """A pseudorandom permutation of the int32 numbers."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32), (16, 1)):
        high = ops.right_shift(x, shift)  # Arithmetic: clear the sign bits it adds.
        x = ops.bitwise_xor(x, ops.bitwise_and(high, 2 ** (32 - shift) - 1))
        x = x * factor
    return x
