"""JAX's splash attention on TPUs: fused kernels for blockwise attention.

Not run so far on a TPU; a test runs it in JAX's interpreter of TPU kernels.
"""

import importlib.util
from typing import Any

import keras

from keras_t5gemma.modeling.masks import Visibility
from keras_t5gemma.utils.types import Tensor

_LANES = 128  # Of a TPU: head sizes and lengths are padded to a multiple.
_MODULE = "jax.experimental.pallas.ops.tpu.splash_attention"


def unavailable(query: Tensor, key: Tensor, has_dropout: bool) -> str | None:
    """Why the kernel cannot compute this attention; `None` if it can.

    Args:
        query: `(B, T, N, H)`.
        key: `(B, K, S, H)`.
        has_dropout: whether attention weights are dropped.
    """
    if keras.config.backend() != "jax":
        return "splash attention needs JAX on a TPU"
    import jax

    if jax.default_backend() != "tpu":
        return "splash attention needs JAX on a TPU"
    if has_dropout:
        return "splash attention has no dropout"
    if jax.device_count() > 1:
        return "splash attention is not split over several devices"
    if importlib.util.find_spec(_MODULE) is None:
        return "this JAX has no splash attention"
    return None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visibility: Visibility,
    soft_cap: float | None,
    interpret: bool = False,
) -> Tensor:
    """See `blockwise_attention.attend`; `interpret` runs it without a TPU, in tests."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length, size = query.shape[1], query.shape[3]
    query, key, value = (
        _padded(_padded(x, 2), 3) for x in (jnp.swapaxes(query, 1, 2), key, value)
    )
    queries, keys = (_padded(x, 1) for x in (visibility.queries, visibility.keys))
    shape = queries.shape[1], keys.shape[1]
    masks = splash.MultiHeadMask([_mask(splash, shape, visibility)] * query.shape[1])
    kernel = splash.make_splash_mha_single_device(
        masks, attn_logits_soft_cap=soft_cap, interpret=interpret
    )
    groups = query.shape[1] // key.shape[1]
    key, value = (jnp.repeat(x, groups, axis=1) for x in (key, value))

    def one_row(query, key, value, queries, keys):
        return kernel(query, key, value, splash.SegmentIds(queries, keys))

    output = jax.vmap(one_row)(query, key, value, queries, keys)
    output = jnp.where(_sees_some(queries, keys)[:, None, :, None], output, 0)
    return jnp.swapaxes(output[:, :, :length, :size], 1, 2)


def _mask(splash: Any, shape: tuple[int, int], visibility: Visibility) -> Any:
    behind, ahead = visibility.reach
    if behind is None:
        return splash.CausalMask(shape) if ahead == 0 else splash.FullMask(shape)
    return splash.LocalMask(shape, window_size=(behind, ahead), offset=0)


def _sees_some(queries, keys):
    """Whether the segment of a query has keys; the kernel needs one, padding too."""
    import jax
    import jax.numpy as jnp

    def one_row(queries, keys):
        ordered = jnp.sort(keys)
        place = jnp.searchsorted(ordered, queries)
        return (ordered[place] == queries) & (queries > 0)

    return jax.vmap(one_row)(queries, keys)


def _padded(x, axis):
    import jax.numpy as jnp

    pads = [(0, 0)] * x.ndim
    pads[axis] = (0, -x.shape[axis] % _LANES)
    return jnp.pad(x, pads)
