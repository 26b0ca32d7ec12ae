"""From the logits of one position to the tokens that may come next.

Rows R are answers being written, V the vocabulary, L the decoder's length.
"""

import keras
from keras import ops

_NEVER = -1e30
_CHUNKS = 512


def process(logits, state, options, stop_ids):
    """Penalties and bans, in the order of transformers.

    Args:
        logits: float32 `(R, V)`, or log-probabilities.
        state: of the decoding loop: `token_ids` `(R, L)`, of which the first `index`
            are written, `prompt_lengths` `(R,)`, `knobs`.
        options: a `GenerationOptions`.
        stop_ids: tuple of ids, or `None`.

    Returns:
        `(R, V)`.
    """
    token_ids, index, knobs = state["token_ids"], state["index"], state["knobs"]
    size = logits.shape[1]
    if options.repetition_penalty != 1.0:
        written = ops.arange(token_ids.shape[1])[None] < index
        seen = _mark(token_ids, written, size)
        penalty = knobs["repetition_penalty"]
        punished = ops.where(logits < 0, logits * penalty, logits / penalty)
        logits = ops.where(seen, punished, logits)
    if options.no_repeat_ngram_size:
        completes = _completes_ngram(token_ids, index, options.no_repeat_ngram_size)
        logits = ops.where(_mark(token_ids, completes, size), _NEVER, logits)
    count = index - state["prompt_lengths"]  # Tokens of the answer so far, R.
    if options.min_new_tokens and stop_ids:
        too_early = (count < knobs["min_new_tokens"])[:, None]
        banned = ops.logical_and(too_early, _is_one_of(stop_ids, size))
        logits = ops.where(banned, _NEVER, logits)
    if options.banned_token_ids:
        logits = ops.where(_is_one_of(options.banned_token_ids, size), _NEVER, logits)
    for place, token in options.forced_token_ids:
        others = ops.arange(size)[None] != token
        forbidden = ops.logical_and((count == place)[:, None], others)
        logits = ops.where(forbidden, _NEVER, logits)
    return logits


def _mark(token_ids, keep, size):
    """Boolean `(R, V)`: the ids of `token_ids` `(R, L)` where `keep` is True."""
    rows, length = token_ids.shape
    keep = ops.broadcast_to(keep, (rows, length))
    row = ops.broadcast_to(ops.arange(rows)[:, None], (rows, length))
    places = ops.reshape(ops.stack([row, token_ids], axis=-1), (rows * length, 2))
    weights = ops.reshape(ops.cast(keep, "float32"), (rows * length,))
    return ops.scatter(ops.cast(places, "int32"), weights, (rows, size)) > 0


def _completes_ngram(token_ids, index, n):
    """Boolean `(R, L)`: tokens that the last n - 1 were followed by before."""
    length = token_ids.shape[1]
    positions = ops.arange(length)[None]
    follows = ops.logical_and(positions >= n - 1, positions < index)
    for back in range(1, n):
        earlier = ops.roll(token_ids, back, axis=1)
        last = ops.take(token_ids, ops.maximum(index - back, 0), axis=1)
        follows = ops.logical_and(follows, earlier == last[:, None])
    return ops.logical_and(follows, index >= n)


def _is_one_of(ids, size):
    """Boolean `(1, V)`."""
    places = ops.convert_to_tensor([[i] for i in ids], "int32")
    marks = ops.scatter(places, ops.ones((len(ids),), "float32"), (size,))
    return marks[None] > 0


def top_candidates(values, k):
    """The k largest values of each row, largest first.

    A large row is cut into chunks: the k largest values lie in the k chunks with the
    largest maxima, which costs one pass where sorting costs many.

    Args:
        values: `(R, V)`.
        k: how many.

    Returns:
        `(values, places)`: `(R, k)`, and int32 `(R, k)`. Of equal values the lowest
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


def sample(logits, state, options):
    """One token a row, drawn from the distribution that the options describe.

    Args:
        logits: float32 `(R, V)`.
        state: of the decoding loop: `seeds` `(R,)`, `index`, `knobs`.
        options: a `GenerationOptions`.

    Returns:
        int32 `(R,)`.
    """
    knobs = state["knobs"]
    logits = logits / knobs["temperature"]
    places = ops.arange(logits.shape[1])[None]
    if options.top_k is not None:
        logits, places = top_candidates(logits, options.top_k)
    if options.top_p is not None:
        logits = _keep_nucleus(logits, knobs["top_p"])
    # The largest of the logits with Gumbel noise is a draw from their softmax.
    uniform = _uniform(state["seeds"][:, None], state["index"], places)
    noisy = logits - ops.log(-ops.log(uniform))
    best = top_candidates(noisy, 1)[1]
    if options.top_k is not None:
        best = ops.take_along_axis(places, best, axis=1)
    return best[:, 0]


def _keep_nucleus(logits, top_p):
    """Only the fewest, largest logits whose probability reaches `top_p`.

    Their threshold is found by halving: no sorting of the vocabulary.
    """
    largest = ops.max(logits, axis=-1, keepdims=True)
    weights = ops.exp(logits - largest)
    needed = top_p * ops.sum(weights, axis=-1, keepdims=True)

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        mass = ops.sum(ops.where(logits >= middle, weights, 0.0), -1, keepdims=True)
        enough = mass >= needed
        return ops.where(enough, middle, low), ops.where(enough, high, middle)

    # What lies 60 below the largest weighs nothing, banned tokens included.
    low, _ = ops.fori_loop(0, 32, halve, (largest - 60.0, largest))
    low = ops.where(top_p < 1, low, largest - 60.0)
    return ops.where(logits >= low, logits, _NEVER)


def _uniform(seeds, index, places):
    """Numbers in (0, 1), each from its row's seed, position and place alone.

    A counter-based generator: what a row draws does not depend on the rows beside it,
    nor on the backend. The mixing is Chris Wellons' "lowbias32" permutation.
    """
    key = _mix(seeds ^ _mix(ops.cast(index, "int32") + 1))
    bits = _mix(ops.cast(places, "int32") ^ key)
    bits = ops.bitwise_and(ops.right_shift(bits, 9), 2**23 - 1)
    return (ops.cast(bits, "float32") + 0.5) / 2**23  # Exact: never 0, never 1.


def _mix(x):
    """A permutation of the int32 numbers that looks random."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32), (16, 1)):
        high = ops.right_shift(x, shift)  # Keeps the sign: clear what it brought in.
        x = ops.bitwise_xor(x, ops.bitwise_and(high, 2 ** (32 - shift) - 1))
        x = x * factor
    return x
