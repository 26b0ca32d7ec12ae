"""One message for each kind of argument check."""

import re

import numpy as np
import pytest

from keras_t5gemma.utils.checks import number, one_of, whole_number

pytestmark = pytest.mark.one_backend


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3)])
def test_whole_numbers_become_python_ints(value):
    found = whole_number(value, "rows", 1, 3)
    assert found == 3 and type(found) is int


@pytest.mark.parametrize("value", [0, 4, 2.0, True, np.float32(2), "2", None])
def test_what_is_no_whole_number_in_the_range(value):
    message = f"`rows` must be a whole number from 1 to 3; got {value!r}."
    with pytest.raises(ValueError, match=re.escape(message)):
        whole_number(value, "rows", 1, 3)


def test_what_else_is_accepted_is_named():
    with pytest.raises(ValueError, match="`freq` must be 'epoch' or a whole number"):
        whole_number(0, "freq", 1, other="'epoch'")
    with pytest.raises(ValueError, match="`cap` must be None or a number above 0;"):
        number(0, "cap", above=0, other="None")


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.float64(0.5)])
def test_numbers_become_python_floats(value):
    found = number(value, "share", above=0, at_most=0.5)
    assert found == 0.5 and type(found) is float
    assert type(number(1, "share")) is float


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, "1", None])
def test_what_is_no_finite_number(value):
    with pytest.raises(ValueError, match="`share` must be a number; got"):
        number(value, "share")


@pytest.mark.parametrize(
    "bounds, inside, outside, words",
    [
        ({"above": 0}, 0.1, 0, "above 0"),
        ({"at_least": 0}, 0, -0.1, "at least 0"),
        ({"at_most": 1}, 1, 1.1, "at most 1"),
        ({"below": 1}, 0.9, 1, "below 1"),
        ({"at_least": 0, "below": 1}, 0, 1, "at least 0 and below 1"),
    ],
)
def test_bounds(bounds, inside, outside, words):
    assert number(inside, "share", **bounds) == inside
    message = f"`share` must be a number {words}; got {outside}."
    with pytest.raises(ValueError, match=re.escape(message)):
        number(outside, "share", **bounds)


def test_choices():
    assert one_of("b", "kind", ("a", "b")) == "b"
    with pytest.raises(ValueError, match="`kind` must be one of 'a', None; got 'c'"):
        one_of("c", "kind", ("a", None))
