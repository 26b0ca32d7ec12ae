"""The tokens that may come next, against sorting and against statistics."""

import keras
import numpy as np
import pytest
from conftest import numpy

from keras_t5gemma.generation.logits import _CHUNKS, sample, top_candidates
from keras_t5gemma.generation.options import GenerationOptions

DRAWS = [219, 525, 649, 673, 979]


def test_top_candidates_equal_a_sort():
    rng = np.random.default_rng(0)
    size = (3, 64 * 512)
    for k in (1, 1, 2, 7, 100):
        # With k = 1 many are equal: on PyTorch only then is their order defined.
        values = rng.integers(0, 3000, size) if k == 1 else rng.random(size)
        values = values.astype("float32")
        top, places = top_candidates(keras.ops.convert_to_tensor(values), k)
        order = np.argsort(-values, axis=1, kind="stable")[:, :k]
        assert numpy(places).tolist() == order.tolist()
        assert np.array_equal(numpy(top), np.take_along_axis(values, order, axis=1))
    small = keras.ops.convert_to_tensor(values[:, :100])
    assert numpy(top_candidates(small, 1)[1])[:, 0].tolist() == (
        values[:, :100].argmax(1).tolist()
    )


def draw(logits, options, rows=4000, index=3):
    options = GenerationOptions(**options)
    state = {
        "seeds": keras.ops.convert_to_tensor(
            np.random.default_rng(0).integers(0, 2**31, rows).astype("int32")
        ),
        "index": keras.ops.convert_to_tensor(index, "int32"),
        "knobs": options.knobs(),
    }
    logits = keras.ops.convert_to_tensor(np.tile(logits, (rows, 1)).astype("float32"))
    return numpy(sample(logits, state, options))


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"temperature": 1.0}, 40),
        ({"temperature": 2.0}, 40),
        ({"top_k": 5}, 5),
        ({"top_p": 0.7}, None),
        ({"top_p": 0.7, "top_k": 30}, None),
        ({"top_p": 1.0}, 40),
        ({"top_p": 1e-6}, 1),
    ],
)
def test_samples_follow_the_distribution(options, kept):
    """The expected frequencies are computed here, by sorting."""
    logits = np.random.default_rng(1).normal(0, 1.5, 40)
    logits = np.round(logits, 3)
    scaled = logits / options.get("temperature", 1.0)
    probabilities = np.exp(scaled) / np.exp(scaled).sum()
    order = np.argsort(-probabilities)
    if "top_k" in options:
        probabilities[order[options["top_k"] :]] = 0
        probabilities /= probabilities.sum()
    if "top_p" in options:
        before = np.cumsum(probabilities[order]) - probabilities[order]
        probabilities[order[before >= options["top_p"]]] = 0
        probabilities /= probabilities.sum()
    if kept is not None:
        assert (probabilities > 0).sum() == kept
    count = np.bincount(draw(logits, options), minlength=40)
    assert not count[probabilities == 0].any()
    expected = 4000 * probabilities
    big = expected > 5
    chi_squared = ((count - expected) ** 2 / np.maximum(expected, 1e-9))[big].sum()
    freedom = max(big.sum() - 1, 1)
    assert chi_squared < freedom + 5 * np.sqrt(2 * freedom)


def test_draws_are_the_same_on_every_backend():
    """Numbers of this generator, so that a change of it does not go unseen."""
    got = draw(np.zeros(1000), {"temperature": 1.0}, rows=5)
    assert got.tolist() == DRAWS
    other = draw(np.zeros(1000), {"temperature": 1.0}, rows=5, index=4)
    assert (got != other).all()


def test_bisection_is_used_on_large_rows():
    """`top_p` alone, on a row that is cut into chunks."""
    assert _CHUNKS == 512
    logits = np.random.default_rng(0).normal(0, 4, 64 * 512)
    probabilities = np.exp(logits) / np.exp(logits).sum()
    order = np.argsort(-probabilities)
    kept = order[: int((np.cumsum(probabilities[order]) < 0.5).sum()) + 1]
    assert set(draw(logits, {"top_p": 0.5}, rows=300)) <= set(kept)
