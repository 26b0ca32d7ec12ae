"""Integer products of activations and int8 weights, for inference on a CPU.

Each row of the activations is rounded to 8 bits with its own scale, so that its result
does not depend on other rows. Outside `inference` layers multiply with dequantized
weights: rounding has no gradient.
"""

import functools

import keras
from keras import ops

from keras_t5gemma import _compat
from keras_t5gemma.modeling.inference import is_inference
from keras_t5gemma.utils.backends import on_cpu
from keras_t5gemma.utils.types import Tensor

_FEW_ROWS = 15


def is_fast(x: Tensor) -> bool:
    """Whether `int8_product` may be used, and is faster than a float product.

    Args:
        x: the activations.
    """
    if not is_inference() or keras.distribution.distribution() is not None:
        return False
    if getattr(x, "requires_grad", False):  # On PyTorch; rounding has no gradient.
        return False
    return on_cpu(x) and _has_kernels()


@functools.cache
def _has_kernels():
    kernels = {"torch": _compat.torch_has_int8_products, "jax": xla_has_kernels}
    has = kernels.get(keras.config.backend())
    return has is not None and has()


def xla_has_kernels() -> bool:
    """Whether this XLA compiles products of int8 to kernels of the YNNPACK library.

    Other versions widen the weights to 32 bits in memory and multiply in plain loops.
    """
    import jax

    def product(a, b):
        return jax.lax.dot(a, b, preferred_element_type="int32")

    shapes = [jax.ShapeDtypeStruct(shape, "int8") for shape in ((8, 512), (512, 512))]
    program = jax.jit(product).lower(*shapes).compile().as_text()
    return "ynn_fusion" in (program or "")


def int8_product(x: Tensor, weight: Tensor, scale: Tensor, axis: int) -> Tensor:
    """`x @ (weight / scale)`, with rows of `x` rounded to 8 bits.

    Args:
        x: float `(..., in)`.
        weight: int8 `(in, out)`, or `(out, in)`.
        scale: float `(out,)`.
        axis: of `weight` that is "in", 0 or 1.

    Returns:
        `(..., out)` in the dtype of `x`.
    """
    product = _torch_product if keras.config.backend() == "torch" else _xla_product
    scale = ops.cast(scale, "float32")
    out = product(x.reshape((-1, x.shape[-1])), weight, scale, axis)
    return ops.cast(out.reshape((*x.shape[:-1], -1)), x.dtype)


def _torch_product(rows, weight, scale, axis):
    return torch_product_of_rounded(
        *torch_rounded(rows), weight if axis == 0 else weight.t(), scale
    )


def torch_rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows `(R, in)` as int8, and the step of each, float32 `(R, 1)`."""
    rows = rows.float()
    step = rows.abs().amax(1, keepdim=True).clamp_min_(1e-30).div_(127)
    return (rows / step).round_().char(), step


def torch_product_of_rounded(
    rounded: Tensor, step: Tensor, weight: Tensor, scale: Tensor
) -> Tensor:
    """`(step rounded) @ (weight / scale)` of int8 `(R, in)` and `(in, out)`."""
    sums = _compat.torch_int8_product(rounded, weight)
    return sums.float().mul_(step).div_(scale)


def _xla_product(rows, weight, scale, axis):
    from jax import lax

    count = rows.shape[0]
    rows = ops.cast(rows, "float32")
    step = ops.max(ops.abs(rows), axis=-1, keepdims=True)
    step = ops.maximum(step, 1e-30) / 127.0
    rounded = ops.cast(ops.round(rows / step), "int8")

    def product(left, right, right_axis):
        axes = ((1,), (right_axis,)), ((), ())
        return lax.dot_general(left, right, axes, preferred_element_type="int32")

    # XLA computes products with a vector in 32 bits: it gets a matrix of two.
    if count == 1 and axis == 1 and weight.shape[0] % 2 == 0:
        # Two rows of the weights are one row here, which takes two thirds of the time.
        pairs = ops.reshape(weight, (-1, 2 * weight.shape[1]))
        zeros = ops.zeros_like(rounded)
        vectors = [ops.concatenate(v, 1) for v in ((rounded, zeros), (zeros, rounded))]
        sums = product(pairs, ops.concatenate(vectors), 1)
        return ops.cast(ops.reshape(sums, (1, -1)), "float32") * (step / scale)
    if count == 1:
        rounded = ops.pad(rounded, ((0, 1), (0, 0)))
    if axis == 0 or count > _FEW_ROWS:
        sums = product(rounded, weight, axis)[:count]
        return ops.cast(sums, "float32") * (step / scale)
    # With the weight first, XLA reads its rows as they lie, without packing them. They
    # are scaled before they are transposed: XLA would exchange the factors otherwise.
    sums = ops.cast(product(weight, rounded, 1)[:, :count], "float32")
    return (sums * (step.T / scale[:, None])).T
