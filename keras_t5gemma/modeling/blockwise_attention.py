"""Attention in memory that grows with the length, not with its square.

Queries are taken in blocks, and of the keys only the blocks that such a block may see:
a local layer costs length x window, and blocks of padding or of other segments are
skipped. The softmax is exact: a running maximum and sum of each query's exponentials.
The backward pass keeps queries, keys, values, output and the log-sum-exp, and computes
the logits again, block by block (arXiv 2205.14135 and 2307.08691).

Implementations of `attend`, each in a module:

    blockwise_xla      JAX and TensorFlow
    blockwise_torch    PyTorch
    flex_attention     PyTorch on CUDA: fused kernels, compiled by Triton
    splash_attention   JAX on TPUs: fused kernels
"""

import dataclasses
from typing import Any

import keras

from keras_t5gemma.modeling import flex_attention, splash_attention
from keras_t5gemma.modeling.dropout import ReplayableSeedGenerator
from keras_t5gemma.modeling.masks import Visibility
from keras_t5gemma.utils.backends import on_cpu
from keras_t5gemma.utils.buckets import (
    LOGITS_ON_ACCELERATOR,
    LOGITS_ON_CPU,
    power_of_two,
)
from keras_t5gemma.utils.checks import one_of
from keras_t5gemma.utils.types import Tensor

_ACCELERATORS = {"flex": flex_attention, "splash": splash_attention}
KERNELS = ("auto", "portable", "flex", "splash", "plain")
# Queries x keys whose logits are too much memory.
_LONG = 2**20
# Queries x keys from which on blocks are faster on a CPU: see benchmarks/RESULTS.md.
_FASTER_ON_CPU = {"jax": 2**18, "tensorflow": 2**20, "torch": 2**18}
_KEYS = 512
_FEWEST_QUERIES = 64


def uses_blocks(queries: int, keys: int, cpu: bool = False) -> bool:
    """Whether attention of these lengths is computed in blocks.

    Otherwise one product of all queries and keys is faster, and its logits are small.

    Args:
        queries: T.
        keys: S.
        cpu: whether a CPU computes it.
    """
    logits = queries * keys
    is_fast = cpu and logits >= _FASTER_ON_CPU[keras.config.backend()]
    return logits >= _LONG or (is_fast and min(queries, keys) >= _FEWEST_QUERIES)


@dataclasses.dataclass(frozen=True, eq=False)
class BlockwiseMask:
    """A `Visibility` in the place of a boolean mask: attention in blocks.

    Args:
        visibility: which keys a query attends to.
        kernel: see `attend`.
    """

    visibility: Visibility
    kernel: str = "auto"


def attention_mask(visibility: Visibility, kernel: str = "auto") -> Any:
    """A boolean mask `(B, T, S)` for short sequences, else a `BlockwiseMask`.

    Args:
        visibility: which keys a query attends to.
        kernel: see `attend`; `"plain"` always makes the mask.
    """
    queries, keys = (x.shape[1] for x in (visibility.queries, visibility.keys))
    if kernel == "plain":
        return visibility.mask()
    # Exporters of PyTorch have symbols for lengths, and write plain operations.
    # Where TensorFlow traces unknown lengths the mask is made, too: it has no gradient
    # of a choice between the two in a program. `tasks.compiled_training` tells it.
    is_known = isinstance(queries, int) and isinstance(keys, int)
    if keras.config.backend() == "torch":
        import torch

        # It cannot export blocks, which depend on the values of the masks.
        is_known = is_known and not torch.compiler.is_exporting()
    if is_known and uses_blocks(queries, keys, on_cpu(visibility.queries)):
        return BlockwiseMask(visibility, kernel)
    return visibility.mask()


def block_sizes(heads: int, cpu: bool) -> tuple[int, int]:
    """Numbers of queries and keys in a block of all heads of one row.

    On a CPU its logits stay in the cache.
    """
    at_once = LOGITS_ON_CPU if cpu else LOGITS_ON_ACCELERATOR
    keys = _KEYS if cpu else 2 * _KEYS
    queries = _FEWEST_QUERIES
    while 2 * queries * heads * keys <= at_once:
        queries *= 2
    return queries, keys


def check_blocks(blocks: tuple[int, int]) -> None:
    """Raise `ValueError` for a size of blocks that is no power of two."""
    if any(size < 1 or size & (size - 1) for size in blocks):
        raise ValueError(
            "`blocks` must be two powers of two, the queries and the keys in a block; "
            f"got {blocks!r}."
        )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visibility: Visibility,
    soft_cap: float | None = None,
    dropout: float = 0.0,
    seeds: ReplayableSeedGenerator | None = None,
    kernel: str = "auto",
    blocks: tuple[int, int] | None = None,
) -> Tensor:
    """Soft-capped grouped-query attention, block by block.

    Args:
        query: `(B, T, N, H)`, scaled.
        key: `(B, K, S, H)`.
        value: `(B, K, S, H)`.
        visibility: which keys a query attends to. A query that sees none gets 0.
        soft_cap: cap on the logits, or `None`.
        dropout: rate on the attention weights.
        seeds: seeds of dropout, `None` for no dropout.
        kernel: `"auto"`, `"portable"`, or a kernel of an accelerator, `"flex"` or
            `"splash"`; `"auto"` takes one where it computes the same function.
        blocks: numbers of queries and keys in a block, powers of two; `None` chooses.

    Returns:
        `(B, T, N, H)`, in the dtype of the query.

    Raises:
        ValueError: for an unknown kernel, one that cannot run here, or block sizes
            that are no powers of two.
    """
    one_of(kernel, "kernel", [name for name in KERNELS if name != "plain"])
    seed = seeds.next() if seeds is not None and dropout else None
    for name, module in _ACCELERATORS.items():
        if kernel in ("auto", name):
            reason = module.unavailable(query, key, seed is not None)
            if not reason:
                return module.attend(query, key, value, visibility, soft_cap)
            if kernel == name:
                raise ValueError(f"`kernel` {name!r} cannot be used: {reason}.")
    if keras.config.backend() == "torch":
        from keras_t5gemma.modeling import blockwise_torch as portable
    else:
        from keras_t5gemma.modeling import blockwise_xla as portable  # type: ignore
    if blocks is None:
        # Not larger than the lengths, which are padded to them.
        queries, keys = block_sizes(query.shape[2], on_cpu(query))
        # TensorFlow may know those of the visibility alone.
        most = (power_of_two(x.shape[1]) for x in (visibility.queries, visibility.keys))
        blocks = min(queries, next(most)), min(keys, next(most))
    check_blocks(blocks)
    arguments = visibility, soft_cap, dropout, seed, blocks
    return portable.attend(query, key, value, *arguments)


class WithAttentionKernel:
    """The property `attention_kernel` of a model with an encoder and a decoder."""

    @property
    def attention_kernel(self) -> str:
        """How attention of long sequences is computed; not saved with the model.

        `"auto"`, the default, uses the fused kernels of an accelerator where they
        compute the same function, else the portable blockwise version; `"portable"`
        always uses the latter; `"flex"` (PyTorch on CUDA) and `"splash"` (JAX on TPUs)
        raise an error where they cannot be used; `"plain"` is one array of all queries
        x keys. A function that JAX or TensorFlow has compiled keeps what it had.
        """
        return self.encoder.attention_kernel  # type: ignore[attr-defined]

    @attention_kernel.setter
    def attention_kernel(self, kernel: str) -> None:
        one_of(kernel, "attention_kernel", KERNELS)
        for name in ("encoder", "decoder"):
            tower = getattr(self, name)
            if tower is not None:
                tower.attention_kernel = kernel
