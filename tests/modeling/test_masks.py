import numpy as np
from helpers.models import numpy
from keras import ops

from keras_t5gemma.modeling.masks import (
    causal_mask,
    padding_mask,
    segment_mask,
    two_sided_mask,
)


def draw(mask):
    return ["".join("1" if seen else "." for seen in row) for row in numpy(mask)]


def test_causal():
    p = ops.arange(4)
    assert draw(causal_mask(p, p)) == ["1...", "11..", "111.", "1111"]


def test_sliding_causal_sees_window_keys_itself_included():
    p = ops.arange(5)
    assert draw(causal_mask(p, p, 2)) == ["1....", "11...", ".11..", "..11.", "...11"]


def test_sliding_causal_of_one_query_into_a_cache():
    assert draw(causal_mask(ops.array([3]), ops.arange(6), 3)) == [".111.."]


def test_two_sided_sees_strictly_less_than_the_window():
    assert draw(two_sided_mask(ops.arange(5), 2)) == [
        "11...",
        "111..",
        ".111.",
        "..111",
        "...11",
    ]


def test_padding_is_a_key_mask():
    mask = padding_mask(np.array([[1, 1, 0], [0, 0, 0]]))
    assert mask.shape == (2, 1, 3)
    assert numpy(mask).tolist() == [[[True, True, False]], [[False] * 3]]


def test_segments_see_themselves_and_nobody_sees_padding():
    queries, keys = np.array([[1, 1, 2, 0]]), np.array([[1, 2, 2, 0]])
    assert draw(segment_mask(queries, keys)[0]) == ["1...", "1...", ".11.", "...."]


def test_plain_masks_of_any_type_are_one_segment():
    for dtype in ("bool", "float32", "int8", "int32"):
        mask = np.array([[1, 1, 0], [0, 0, 0]], dtype)
        expected = [["11.", "11.", "..."], ["..."] * 3]
        assert [draw(row) for row in segment_mask(mask, mask)] == expected
