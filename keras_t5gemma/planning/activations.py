"""Bytes that a training step and a decoding cache take beside the weights.

Axis names are those of `modeling/attention.py`. What a block keeps for its backward
pass, in elements, c bytes each in the compute dtype:

    a sub-layer     3 B T D               its input, its normalized input, its output
    attention       2 B T N H + 2 B S K H queries, what the values gave; keys, values
                    B N T S               soft-capped logits and softmax, 4 bytes each,
                                          and the weights in a compute dtype below 4
    feed-forward    5 B T F               gate, its tanh, gelu, up, and their product
    embedding       2 B T D               rows, and the rows scaled
    final norm      B T D

Split over the mesh axis "data" is B; over "model" N, F, and K where it divides.

The backward pass goes from the last block to the first. What a block kept is free when
it is done, its gradients come; `peak` follows it. Masks, row statistics and what
dropout keeps are left out.
"""

import dataclasses
import math

from keras_t5gemma.config import SLIDING
from keras_t5gemma.training.chunked_cross_entropy import parts_of_vocabulary

# Most logits at a time, see `token_losses`.
AT_ONCE_ON_ACCELERATOR, AT_ONCE_ON_CPU = 2**24, 2**20


@dataclasses.dataclass(frozen=True)
class Shape:
    """What one device computes with.

    Args:
        batch: B, of this device.
        source: length of the encoder.
        target: length of the decoder.
        itemsize: c, bytes of the compute dtype.
        split: over how many devices heads and feed-forward are split.
        learns: whether the weights get gradients, not just adapters on queries and
            values.
    """

    batch: int
    source: int
    target: int
    itemsize: int
    split: int = 1
    learns: bool = True


def _kv_split(stack, split):
    return split if stack.num_key_value_heads % split == 0 else 1


def _attention(stack, s, queries, keys):
    heads = stack.num_query_heads * stack.head_dim / s.split  # N H
    memory = stack.num_key_value_heads * stack.head_dim / _kv_split(stack, s.split)
    states = queries * heads * (2 if s.learns else 1) + 2 * keys * memory
    weights = 8 + (s.itemsize if s.itemsize < 4 else 0)
    logits = stack.num_query_heads / s.split * queries * keys * weights
    return s.batch * (s.itemsize * states + logits)


def kept_by_block(stack, s, length, memory_length=None):
    """Bytes that one block keeps for the backward pass.

    Args:
        stack: its `StackConfig`.
        s: a `Shape`.
        length: T, of its own sequence.
        memory_length: S, of the encoder's in a decoder block; `None` in an encoder's.
    """
    sub_layers = 2 if memory_length is None else 3
    # The input of frozen feed-forward layers is not needed again.
    widths = 3 * sub_layers - (0 if s.learns else 1)
    feed_forward = (5 if s.learns else 4) * stack.intermediate_dim / s.split
    kept = widths * stack.hidden_dim + feed_forward
    kept = s.batch * length * kept * s.itemsize + _attention(stack, s, length, length)
    if memory_length is not None:
        kept += _attention(stack, s, length, memory_length)
    return kept


def working_of_block(stack, s, length, memory_length=None):
    """Bytes of the gradients inside a block, at the attention of its backward pass.

    Two float32 `B N T S`, of logits and softmax; `B T F` and 5 `B T D`.
    """
    keys = max(length, memory_length or 0)
    logits = 8 * stack.num_query_heads / s.split * length * keys
    rows = stack.intermediate_dim / s.split + 5 * stack.hidden_dim
    return s.batch * (logits + length * rows * s.itemsize)


def logits_chunk(config, s, shards=1, pieces=1, at_once=AT_ONCE_ON_ACCELERATOR):
    """Bytes of the logits that exist at a time: logits, their tanh, their gradient.

    float32 `(B T, V / parts)` each; the parts are those of `token_losses`. The rows of
    the table that they are products with are gathered where its width is split.

    Args:
        config: a `T5GemmaConfig`.
        s: a `Shape`.
        shards: over how many devices the rows of the table are split.
        pieces: over how many its width is.
        at_once: most logits of a part.
    """
    size, tokens = config.vocabulary_size // shards, s.batch * s.target
    rows = size / parts_of_vocabulary(size, tokens, at_once, pieces)
    gathered = rows * config.decoder.hidden_dim * s.itemsize if pieces > 1 else 0
    return 3 * 4 * tokens * rows + gathered


def cache_bytes(config, s):
    """Bytes of the decoding cache of `modeling/kv_cache.py`.

    A decoder layer has `2 B K T H` of its own, T at most its window, and `2 B K S H`
    of the encoder.
    """
    stack = config.decoder
    if stack is None:
        return 0
    own = sum(
        min(s.target, stack.sliding_window) if kind == SLIDING else s.target
        for kind in stack.layer_types
    )
    slots = own + stack.num_layers * s.source
    heads = stack.num_key_value_heads / _kv_split(stack, s.split)
    return 2 * s.batch * heads * slots * stack.head_dim * s.itemsize


@dataclasses.dataclass(frozen=True)
class Part:
    """A block, or an embedding with the final norm, of a training step.

    Args:
        name: as in a variable's path: `"encoder/block_0"`, `"decoder"`.
        kept: bytes for the backward pass.
        entered: of them its input, all that is kept when it is computed anew.
        working: bytes of its own backward pass.
    """

    name: str
    kept: float
    entered: float
    working: float


def parts_of_step(config, s):
    """The `Part`s of the model, in forward order."""
    found = []
    for side in ("encoder", "decoder"):
        stack = getattr(config, side)
        if stack is None:
            continue
        length = s.source if side == "encoder" else s.target
        memory = None if side == "encoder" else s.source
        states = s.batch * length * stack.hidden_dim * s.itemsize  # B T D
        found.append(Part(side, 3 * states, 3 * states, states))
        kept = kept_by_block(stack, s, length, memory)
        working = working_of_block(stack, s, length, memory)
        found += [
            Part(f"{side}/block_{i}", kept, states, working)
            for i in range(stack.num_layers)
        ]
    return found


def peak(parts, gradients, copies, chunk, rematerialize, holds_all):
    """The most bytes that a step holds at a time beside weights and optimizer.

    Args:
        parts: of `parts_of_step`.
        gradients: `{part's name: bytes}` on this device.
        copies: `{part's name: bytes}` of weights cast or gathered to be used.
        chunk: bytes of `logits_chunk`.
        rematerialize: whether blocks are computed anew from their input.
        holds_all: whether all gradients are there before the first weight changes:
            when they are clipped by their global norm, or added up. Otherwise each is
            used and freed.

    Returns:
        Bytes.
    """
    last = parts[-1].name.split("/")[0]  # The tower of the logit table.
    held = gradients.get(last, 0)  # Of the logit table: the first that is known.
    alive = sum(p.entered if rematerialize else p.kept for p in parts)
    if rematerialize:
        alive += copies.get(last, 0)
    else:
        alive += sum(copies.values())
    most = alive + held + chunk
    for part in reversed(parts):
        gradient, copy = gradients.get(part.name, 0), copies.get(part.name, 0)
        if part.name == last:
            copy = 0 if rematerialize else copy
        again = part.kept - part.entered + copy if rematerialize else 0
        most = max(most, alive + held + again + part.working + gradient)
        alive -= part.entered if rematerialize else part.kept + copy
        if holds_all and part.name != last:
            held += gradient
        elif part.name == last and not holds_all:
            held = 0
    return math.ceil(max(most, held))
