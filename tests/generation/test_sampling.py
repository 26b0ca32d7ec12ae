"""The tokens that may come next, against sorting and against statistics."""

import keras
import numpy as np
import pytest
from helpers.models import numpy

from keras_t5gemma.generation.options import GenerationOptions
from keras_t5gemma.generation.sampling import process, sample, top_candidates

DRAWS = [23, 24, 37, 0, 3, 3, 31, 5, 15, 30]


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


def draw(logits, options, index=3, rows=4000):
    """Tokens of many rows with these logits `(V,)`, each with its own seed."""
    options = GenerationOptions(**options)
    seeds = np.random.default_rng(0).integers(0, 2**31, rows)
    state = {
        "seeds": keras.ops.convert_to_tensor(seeds.astype("int32")),
        "index": keras.ops.convert_to_tensor(index, "int32"),
        "traced_args": options.traced_args(),
    }
    logits = keras.ops.convert_to_tensor(np.tile(logits, (rows, 1)).astype("float32"))
    return numpy(sample(logits, state, options))


def assert_frequencies(count, probabilities):
    """Chi-squared within 5 of its standard deviations."""
    assert not count[probabilities == 0].any()
    expected = count.sum() * probabilities
    often = expected > 5
    assert often.any()
    chi_squared = ((count - expected)[often] ** 2 / expected[often]).sum()
    freedom = max(often.sum() - 1, 1)
    assert chi_squared < freedom + 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize(
    ("options", "kept", "size"),
    [
        ({"temperature": 1.0}, 40, 40),
        ({"temperature": 2.0}, 40, 40),
        ({"top_k": 5}, 5, 40),
        ({"top_p": 0.7}, None, 40),
        ({"top_p": 0.7, "top_k": 5}, None, 40),
        ({"top_p": 1.0}, 40, 40),
        ({"top_p": 1e-6}, 1, 40),
        ({"top_p": 0.7}, None, 2048),
    ],
)
def test_samples_follow_the_distribution(options, kept, size):
    """The expected frequencies are computed here, by sorting."""
    logits = np.random.default_rng(1).normal(0, 1.5, size)
    logits = np.round(logits, 3) if size == 40 else logits
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
    count = np.bincount(draw(logits, options), minlength=size)
    assert_frequencies(count, probabilities)


def test_draws_are_the_same_on_every_backend():
    """Numbers of this generator, so that a change of it does not go unseen."""
    draws = draw(np.zeros(40), {"temperature": 1.0})
    assert draws[:10].tolist() == DRAWS
    again = draw(np.zeros(40), {"top_p": 0.5})
    assert again.tolist() == draws.tolist()  # Of equal ones none is outside.
    # What a row draws at one position says nothing of the next.
    following = draw(np.zeros(40), {"temperature": 1.0}, index=4)
    pairs = np.bincount(draws // 5 * 8 + following // 5, minlength=64)
    assert_frequencies(pairs, np.full(64, 1 / 64))


def test_a_row_without_numbers_ends():
    draw(np.full(40, np.nan), {"top_p": 0.9})


@pytest.mark.skipif(keras.config.backend() != "torch", reason="operations of PyTorch")
def test_processing_takes_no_loop_over_the_tokens_of_an_answer():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += 1
            return function(*args, **kwargs or {})

    options = GenerationOptions(repetition_penalty=1.5, no_repeat_ngram_size=2)
    counts = []
    for length in (8, 64):
        state = {
            "token_ids": keras.ops.ones((3, length), "int32"),
            "index": keras.ops.convert_to_tensor(4),
            "prompt_lengths": keras.ops.ones((3,), "int32"),
            "traced_args": {"repetition_penalty": 1.5},
        }
        with Counter() as counter:
            process(keras.ops.ones((3, 16)), state, options)
        counts.append(counter.count)
    assert counts[0] == counts[1]
