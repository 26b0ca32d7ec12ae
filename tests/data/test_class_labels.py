"""Labels that may be read in two ways, and values that are none."""

import numpy as np
import pytest

from keras_t5gemma.data.class_labels import LabelReader

pytestmark = pytest.mark.one_backend
NAMES = ["game", "library", "tool"]


class Table(dict):
    """As a data frame."""

    columns = property(dict.keys)


class Missing:
    """As `pandas.NA`."""

    __hash__ = None

    def __eq__(self, other):
        return self

    def __bool__(self):
        raise TypeError("boolean value of NA is ambiguous")


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (
            Table({0: [0, 2], 1: [1, 0], 2: [1, 2]}),
            "zeros and ones in its columns.*row 1",
        ),
        ([[2, 1, 1], [0, 2]], r"`y\[0\]` must have each label once"),
        ([np.array([2, 1, 1])], r"`y\[0\]` must be zeros and ones"),
    ],
)
def test_what_looks_like_labels_is_not_guessed(y, message):
    with pytest.raises(ValueError, match=message):
        LabelReader("multi_label", None, 3).read(y)


def test_rows_of_zeros_and_ones():
    ones = [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    for names in (NAMES, None):
        reader = LabelReader("multi_label", names, 3)
        for cast in (
            list,
            lambda y: [tuple(map(float, row)) for row in y],
            lambda y: [list(map(bool, row)) for row in y],
            lambda y: np.array(y, "bool"),
            lambda y: list(np.array(y, "float32")),
        ):
            assert reader.read(cast(ones)).tolist() == ones
    assert reader.read([[0, 2], [], [np.int64(1)]]).tolist() == ones
    with pytest.raises(ValueError, match=r"`y\[1\]` is \[1, 0, 0\], labels or one"):
        reader.read([[0, 2], [1, 0, 0]])
    with pytest.raises(ValueError, match=r"among 0..2; got 0.5.*integers.*zeros and"):
        reader.read([[0.5, 0, 1]])
    with pytest.raises(ValueError, match=r"`y\[0\]` must be a list of labels.*got 1"):
        reader.read([1, 0, 1])
    two = LabelReader("multi_label", None, 2)
    assert two.read([[0, 1], [1, 0]]).tolist() == [[0, 1], [1, 0]]
    with pytest.raises(ValueError, match="labels or one number per class"):
        two.read([[0, 1], [1]])


def test_rows_of_names_in_arrays():
    reader = LabelReader("multi_label", NAMES, 3)
    assert reader.read([np.array(NAMES)]).tolist() == [[1, 1, 1]]


def test_a_missing_label_is_named():
    with pytest.raises(ValueError, match=r"`y\[1\]` must be labels among"):
        LabelReader("single_label", NAMES, 3).read(["game", Missing()])
