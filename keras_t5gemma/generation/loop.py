"""The decoding loop of one batch, around a KerasHub sampler."""

from keras import ops


def decode_batch(backbone, sampler, inputs, stop_ids=None, model=None):
    """Generate until every row has stopped or the buffer is full.

    Args:
        backbone: a `Backbone`.
        sampler: a `keras_hub.samplers.Sampler`.
        inputs: dict of `encoder_token_ids`, `encoder_padding_mask` `(B, S)`;
            `prefix_token_ids` `(B, P)`, the prompt without its last token, P >= 0
            and the same in every row; `decoder_token_ids` `(B, max length)`, the
            whole prompt followed by 0.
        stop_ids: ids that end a row, or `None` to fill the buffer.
        model: the `keras.Model` whose variables the loop reads.

    Returns:
        int32 `(B, max length)`; after a row's first stop id, 0.
    """
    memory_mask = inputs["encoder_padding_mask"]
    prefix, buffer = inputs["prefix_token_ids"], inputs["decoder_token_ids"]
    prompt_length = ops.shape(prefix)[1] + 1
    memory = backbone.encode(inputs["encoder_token_ids"], memory_mask)
    cache = backbone.make_cache(memory, memory_mask, ops.shape(buffer)[1])
    if prompt_length > 1:
        _, cache = backbone.decode(prefix, cache=cache, index=0)

    def next(prompt, cache, index):
        batch_size = ops.shape(prompt)[0]
        token = ops.slice(prompt, [0, index - 1], [batch_size, 1])
        hidden, cache = backbone.decode(token, cache=cache, index=index - 1)
        logits = backbone.logits(hidden)[:, 0]  # B V
        if stop_ids is not None:
            done = finished(prompt, stop_ids, prompt_length)
            logits = freeze(logits, done)
        return logits, None, cache

    mask = ops.arange(ops.shape(buffer)[1]) < prompt_length
    return sampler(
        next=next,
        prompt=buffer,
        cache=cache,
        index=prompt_length,
        mask=ops.broadcast_to(mask[None], ops.shape(buffer)),
        stop_token_ids=stop_ids,
        model=model,
    )


def finished(token_ids, stop_ids, prompt_length):
    """Which rows hold a stop id after their prompt: boolean `(B,)`."""
    generated = token_ids[:, prompt_length:]
    stops = [ops.any(generated == stop, axis=-1) for stop in stop_ids]
    done = stops[0]
    for stop in stops[1:]:
        done = ops.logical_or(done, stop)
    return done


def freeze(logits, done):
    """Leave finished rows only the padding id, at probability 1.

    KerasHub's beam search goes on extending a finished beam until all beams of
    the whole batch are finished, so that a row's answer depends on its
    neighbours. With this, a finished row or beam keeps its score.
    """
    only_padding = ops.where(ops.arange(ops.shape(logits)[-1]) == 0, 0.0, -1e9)
    only_padding = ops.cast(only_padding, "float32")
    return ops.where(done[:, None], only_padding, ops.cast(logits, "float32"))
