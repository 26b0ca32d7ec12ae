"""Rotary position embedding, half-split pairs (arXiv 2104.09864)."""

from keras import ops

from keras_t5gemma.utils.types import Tensor


def rotary_angles(
    positions: Tensor, head_dim: int, base: float
) -> tuple[Tensor, Tensor]:
    """Sine and cosine for every position and frequency.

    Args:
        positions: int `(T,)` or `(B, T)`.
        head_dim: H, even.
        base: base of the geometric frequencies.

    Returns:
        `(sin, cos)`, float32 `(..., T, H / 2)`.
    """
    exponent = ops.arange(0, head_dim, 2, dtype="float32") / float(head_dim)
    frequency = ops.power(float(base), -exponent)  # H/2
    angle = ops.cast(positions, "float32")[..., None] * frequency
    return ops.sin(angle), ops.cos(angle)


def apply_rotary(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pairs `(x[i], x[i + H/2])` of each head.

    Args:
        x: `(B, T, heads, H)`.
        angles: from `rotary_angles`, of the positions of `x`.

    Returns:
        Same shape and dtype as `x`; computed in float32.
    """
    sin, cos = (a[..., None, :] for a in angles)  # T 1 H/2
    first, second = ops.split(ops.cast(x, "float32"), 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return ops.cast(ops.concatenate(rotated, axis=-1), x.dtype)
