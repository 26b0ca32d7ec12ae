"""Rounded lengths: few of them, and never below what they hold."""

import doctest

import numpy as np
import pytest

from keras_t5gemma.utils import buckets

pytestmark = pytest.mark.one_backend


def test_examples():
    found = doctest.testmod(buckets)
    assert found.attempted and not found.failed


@pytest.mark.parametrize(
    "halves_from, steps",
    [
        (64, [16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024]),
        (16, [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]),
    ],
)
def test_a_length_takes_the_first_step_that_holds_it(halves_from, steps):
    for length in range(1, 1025):
        first = next(step for step in steps if step >= length)
        assert buckets.bucket(length, halves_from) == first


def test_rounding():
    assert [buckets.power_of_two(n) for n in (0, 1, 2, 3, 5, 8)] == [0, 1, 2, 4, 8, 8]
    assert buckets.round_up(np.array([0, 1, 8, 9]), 8).tolist() == [0, 8, 8, 16]
    assert [buckets.ceil_div(n, 4) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]


def test_chunks_of_the_vocabulary():
    at_once = buckets.LOGITS_ON_ACCELERATOR
    assert buckets.vocabulary_chunks(256_000, 65, at_once) == 1
    assert buckets.vocabulary_chunks(256_000, 66, at_once) == 2
    assert buckets.vocabulary_chunks(256_000, 4096, at_once) == 64
    assert buckets.vocabulary_chunks(256_000, 1, at_once, pieces=3) == 4
    assert buckets.vocabulary_chunks(257, 10**6, at_once) == 1  # It has no divisor.
