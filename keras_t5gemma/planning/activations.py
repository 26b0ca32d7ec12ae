"""Memory of a training step and of decoding caches, on top of the weights.

Axis names are those of `modeling/attention.py`. Elements that a block keeps for its
backward pass, c bytes each in the compute dtype:

    a sub-layer     3 B T D               its input, its normalized input, its output
    attention       2 B T N H + 2 B S K H queries, attended values; keys, values
                    B N T S               soft-capped logits and softmax, 4 bytes each,
                                          and the weights in a compute dtype below 4
      in blocks     B T N H + B N T       instead of these, for long sequences: output
                                          before it is transposed; log-sum-exp, 4 bytes
    feed-forward    3 B T F               gate, up, and the gated product
    embedding       2 B T D               rows, and the rows scaled
    final norm      B T D

The mesh axis "data" splits B; "model" splits N and F, and K where it divides.

The backward pass runs from the last block to the first. It frees what a block kept, and
adds the block's gradients; `peak` follows it. Masks, row statistics and dropout masks
are left out.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from keras_t5gemma.config import SLIDING, StackConfig, T5GemmaConfig
from keras_t5gemma.modeling.blockwise_attention import block_sizes, uses_blocks
from keras_t5gemma.utils.buckets import (
    LOGITS_ON_ACCELERATOR,
    LOGITS_ON_CPU,
    vocabulary_chunks,
)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of the computation on one device.

    Args:
        batch: B on this device.
        source: encoder length.
        target: decoder length.
        itemsize: c, bytes of the compute dtype.
        split: number of devices over which heads and feed-forward are split.
        learns: whether all weights have gradients, not only adapters on queries and
            values.
        cpu: whether the device is a CPU, whose blocks of logits are smaller.
    """

    batch: int
    source: int
    target: int
    itemsize: int
    split: int = 1
    learns: bool = True
    cpu: bool = False


def _kv_split(stack: StackConfig, split: int) -> int:
    return split if stack.num_key_value_heads % split == 0 else 1


def _attention(stack: StackConfig, s: Shape, queries: int, keys: int) -> float:
    heads = stack.num_query_heads * stack.head_dim / s.split  # N H
    memory = stack.num_key_value_heads * stack.head_dim / _kv_split(stack, s.split)
    states = queries * heads * (2 if s.learns else 1) + 2 * keys * memory
    if uses_blocks(queries, keys, s.cpu):
        log_sum_exp = 4 * stack.num_query_heads / s.split * queries
        return s.batch * (s.itemsize * (states + queries * heads) + log_sum_exp)
    weights = 8 + (s.itemsize if s.itemsize < 4 else 0)
    logits = stack.num_query_heads / s.split * queries * keys * weights
    return s.batch * (s.itemsize * states + logits)


def kept_by_block(
    stack: StackConfig, s: Shape, length: int, memory_length: int | None = None
) -> float:
    """Bytes that one block keeps for the backward pass.

    Args:
        stack: config of its tower.
        s: sizes on the device.
        length: T of its own sequence.
        memory_length: S of the encoder in a decoder block; `None` in an encoder block.
    """
    sub_layers = 2 if memory_length is None else 3
    # The input of frozen feed-forward layers is not needed again.
    widths = 3 * sub_layers - (0 if s.learns else 1)
    feed_forward = (3 if s.learns else 2) * stack.intermediate_dim / s.split
    kept = widths * stack.hidden_dim + feed_forward
    kept = s.batch * length * kept * s.itemsize + _attention(stack, s, length, length)
    if memory_length is not None:
        kept += _attention(stack, s, length, memory_length)
    return kept


def working_of_block(
    stack: StackConfig, s: Shape, length: int, memory_length: int | None = None
) -> float:
    """Bytes of the gradients inside a block, in the backward pass of its attention.

    Two float32 `B N T S`, of logits and softmax; `B T F` and 5 `B T D`. For long
    sequences, three of the logits of a block, and two float32 `B S K H`.
    """
    keys = max(length, memory_length or 0)
    heads = stack.num_query_heads / s.split
    logits = 8 * heads * length * keys
    if uses_blocks(length, keys, s.cpu):
        block = math.prod(block_sizes(math.ceil(heads), s.cpu))
        memory = stack.num_key_value_heads / _kv_split(stack, s.split)
        logits = 12 * heads * block + 8 * keys * memory * stack.head_dim
    rows = stack.intermediate_dim / s.split + 5 * stack.hidden_dim
    return s.batch * (logits + length * rows * s.itemsize)


def logits_chunk(
    config: T5GemmaConfig,
    s: Shape,
    shards: int = 1,
    pieces: int = 1,
) -> float:
    """Bytes of one chunk of the logits: logits, their tanh, their gradient.

    float32 `(B T, V / chunks)` each, with the chunks of `token_losses`. The rows of the
    logit table of a chunk are gathered where its width is split.

    Args:
        config: of the model.
        s: sizes on the device.
        shards: number of devices over which the rows of the table are split.
        pieces: number of devices over which its width is split.
    """
    size, tokens = config.vocabulary_size // shards, s.batch * s.target
    at_once = LOGITS_ON_CPU if s.cpu else LOGITS_ON_ACCELERATOR
    rows = size / vocabulary_chunks(size, tokens, at_once, pieces)
    gathered = 0.0
    if pieces > 1 and config.decoder is not None:
        gathered = rows * config.decoder.hidden_dim * s.itemsize
    return 3 * 4 * tokens * rows + gathered


def cache_bytes(config: T5GemmaConfig, s: Shape) -> float:
    """Bytes of the key/value caches of `modeling/kv_cache.py`.

    A decoder layer has `2 B K T H` for self-attention, T at most its window, and
    `2 B K S H` for cross-attention.
    """
    stack = config.decoder
    if stack is None:
        return 0
    window = min(s.target, stack.sliding_window)
    kinds = stack.layer_types or ()
    own = sum(window if kind == SLIDING else s.target for kind in kinds)
    slots = own + stack.num_layers * s.source
    heads = stack.num_key_value_heads / _kv_split(stack, s.split)
    return 2 * s.batch * heads * slots * stack.head_dim * s.itemsize


@dataclasses.dataclass(frozen=True)
class Part:
    """A block, or an embedding with the final norm, of a training step.

    Args:
        name: as in a variable's path: `"encoder/block_0"`, `"decoder"`.
        kept: bytes for the backward pass.
        entered: bytes of its input, all that is kept with rematerialization.
        working: bytes of its own backward pass.
    """

    name: str
    kept: float
    entered: float
    working: float


def parts_of_step(config: T5GemmaConfig, s: Shape) -> list[Part]:
    """Parts of the model, in forward order."""
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


def peak(
    parts: Sequence[Part],
    gradients: Mapping[str, float],
    copies: Mapping[str, float],
    chunk: float,
    rematerialize: bool,
    holds_all: bool,
) -> int:
    """Peak bytes of a step, on top of weights and optimizer state.

    Args:
        parts: see `parts_of_step`.
        gradients: `{part's name: bytes}` on this device.
        copies: `{part's name: bytes}` of weights cast or gathered for use.
        chunk: see `logits_chunk`.
        rematerialize: whether blocks are recomputed from their input.
        holds_all: whether all gradients exist before the first weight is updated, as
            clipping by the global norm and accumulation need; otherwise each is used
            and freed.
    """
    last = parts[-1].name.split("/")[0]  # The tower of the logit table.
    held = gradients.get(last, 0)  # The gradient of the logit table is the first.
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
