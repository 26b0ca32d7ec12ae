"""A small model drafts the tokens that a large one verifies (arXiv 2211.17192).

The draft reads the same source and has a cache that is rolled back by index, like the
one of the target. It chooses tokens by the options of the request, with the noise of
the same positions when they sample, so that both models often choose alike.

R are rows, L is the decoder's length, k the number of proposed tokens.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from keras import ops

from keras_t5gemma.generation.options import GenerationOptions
from keras_t5gemma.generation.requests import Request
from keras_t5gemma.generation.speculative import at, choose


def make_proposer(
    step: Callable, options: GenerationOptions, known_tokens: int | None = None
) -> Callable:
    """The proposals of a draft, for `speculative.verify`.

    Args:
        step: of the draft, from `speculative.plain_step`.
        options: a `GenerationOptions`.
        known_tokens: see `decoding.advance`.

    Returns:
        A function of `(state, k, xp)`, see `speculative.copy`. The state needs a
        `draft_cache` unless k is 0.
    """
    options = dataclasses.replace(options, return_scores=False)
    capped = not options.is_greedy

    def propose(state, k, xp):
        rows, length = state["token_ids"].shape
        index = state["index"]
        if k == 0:
            return xp.full((rows, 1), -1, dtype="int32"), state
        places = xp.arange(length, dtype="int32")[None]
        prompt = state["prompt_lengths"][:, None]

        def write(token_ids, logits, index):
            """Token ids with the one that the draft chooses at `index`."""
            texts = {**state, "token_ids": token_ids, "index": index}
            last = at(token_ids, index[:, None] - 1, xp)
            chosen, _ = choose(logits, texts, last, options, known_tokens, xp)
            is_next = (places == index[:, None]) & (places >= prompt)
            return xp.where(is_next, chosen, token_ids)

        def unfinished(count, token_ids, cache):
            return count < k

        def body(count, token_ids, cache):
            here = index + count - 1
            last = at(token_ids, here[:, None], xp)
            logits, cache = step(last, cache, here, capped)
            return count + 1, write(token_ids, logits, here + 1), cache

        # The draft has not read the last proposed token, which may be accepted: its
        # first pass is over two positions.
        first = xp.maximum(index - 2, 0)
        pair = at(state["token_ids"], first[:, None] + xp.arange(2)[None], xp)
        logits, cache = step(pair, state["draft_cache"], first, capped)
        place = 2 * xp.arange(rows) + index - 1 - first
        logits = ops.take(logits, ops.convert_to_tensor(place), axis=0)
        loop = (xp.ones((), "int32"), write(state["token_ids"], logits, index), cache)
        if xp is np:
            while unfinished(*loop):
                loop = body(*loop)
        else:
            loop = ops.while_loop(unfinished, body, loop)
        steps = xp.arange(k, dtype="int32")[None]
        proposed = at(loop[1], index[:, None] + steps, xp)
        return proposed, {**state, "draft_cache": loop[2]}

    return propose


def relative_cost(draft: Any, target: Any) -> float:
    """Assumed time of a pass of a draft's decoder, as a share of the target's.

    The ratio of their weights in bytes, which a pass has to read.

    Args:
        draft: a `Backbone`.
        target: a `Backbone`.
    """

    def size(backbone):
        return sum(
            math.prod(v.shape) * np.dtype(v.dtype).itemsize
            for v in backbone.decoder.variables
        )

    return size(draft) / size(target)


def check_draft(draft: Any, task: Any, request: Request) -> None:
    """Check that a model can draft for another one.

    Args:
        draft: a `Seq2SeqLM`.
        task: the `Seq2SeqLM` that verifies.
        request: what is to be generated.

    Raises:
        ValueError: for another vocabulary, or fewer positions than are needed.
    """
    own, other = task.backbone.config, draft.backbone.config
    if own.vocabulary_size != other.vocabulary_size:
        raise ValueError(
            f"`draft` must have the vocabulary of the model, {own.vocabulary_size} "
            f"ids; got a model of {other.vocabulary_size}."
        )
    both = (getattr(m.preprocessor, "tokenizer", None) for m in (task, draft))
    if not _same_pieces(*both):
        raise ValueError(
            "`draft` must have the tokenizer of the model; got a model with other "
            "tokens for the same ids."
        )
    is_read = np.asarray(request.arrays["encoder_padding_mask"]).any(axis=0)
    length = np.flatnonzero(is_read).max(initial=0) + 1
    for name, needed in (("source", length), ("`max_length`", request.max_length)):
        if needed > other.max_positions:
            raise ValueError(
                f"`draft` has {other.max_positions} positions, fewer than the {needed} "
                f"of the {name}; use one with more, or shorter texts."
            )


def _same_pieces(first, second):
    """Whether two tokenizers have the same pieces; one that is missing has."""
    if first is None or second is None or first.proto == second.proto:
        return True
    return first.get_vocabulary() == second.get_vocabulary()
