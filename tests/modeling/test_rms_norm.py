"""The norm and its gradients against automatic differentiation and NumPy."""

import numpy as np
import pytest
from helpers.attention import values_and_gradients
from keras import ops

from keras_t5gemma.modeling.rms_norm import rms_norm

EPSILON = 1e-3


def plain(x, scale):
    y = ops.cast(x, "float32")
    y = y / ops.sqrt(ops.mean(y * y, -1, keepdims=True) + EPSILON)
    return ops.cast(y * (1.0 + ops.cast(scale, "float32")), x.dtype)


@pytest.mark.parametrize(("dtype", "error"), [("float32", 3e-6), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("shape", [(5, 16), (2, 3, 16)])
def test_values_and_gradients(shape, dtype, error):
    """Rows of sizes from below `epsilon` to 100."""
    rng = np.random.default_rng(0)
    x, upstream = rng.normal(size=(2, *shape)).astype("float32")
    x *= 10.0 ** np.linspace(-3, 2, shape[-2])[:, None]
    arrays = [ops.cast(x, dtype), ops.cast(rng.normal(size=16), "float32")]
    exact, found = values_and_gradients(
        [plain, lambda x, scale: rms_norm(x, scale, EPSILON)], arrays, upstream
    )
    for expected, got in zip(exact, found, strict=True):
        assert got.shape == expected.shape
        for row, other in zip(
            got.reshape(-1, 16), expected.reshape(-1, 16), strict=True
        ):
            np.testing.assert_allclose(row, other, atol=error * abs(other).max())
    size = np.sqrt((x.astype("float64") ** 2).mean(-1, keepdims=True) + EPSILON)
    if dtype == "float32":
        scale = np.asarray(ops.convert_to_numpy(arrays[1]), "float64")
        np.testing.assert_allclose(found[0], x / size * (1 + scale), rtol=1e-5)
