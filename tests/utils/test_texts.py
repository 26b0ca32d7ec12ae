"""Containers of text of several libraries, and text that is not valid."""

import numpy as np
import pytest

from keras_t5gemma.utils.texts import as_texts, check_unicode, to_list

pytestmark = pytest.mark.one_backend
TEXTS = ["one", "zwei", "trois"]


def containers():
    pyarrow = pytest.importorskip("pyarrow")
    yield TEXTS
    yield tuple(TEXTS)
    yield np.array(TEXTS)
    yield np.array(TEXTS, object)
    yield [text.encode() for text in TEXTS]
    yield pyarrow.array(TEXTS)
    yield pyarrow.chunked_array([TEXTS[:1], TEXTS[1:]])
    yield pyarrow.table({"text": TEXTS})


def test_containers_become_lists_of_strings():
    for values in containers():
        assert as_texts(values, "x") == TEXTS


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_series_and_frames(library):
    module = pytest.importorskip(library)
    assert as_texts(module.Series(TEXTS), "x") == TEXTS
    assert as_texts(module.DataFrame({"a": TEXTS}), "x") == TEXTS
    with pytest.raises(ValueError, match=r"`x` must be one column.*\['a', 'b'\]"):
        as_texts(module.DataFrame({"a": TEXTS, "b": TEXTS}), "x")


@pytest.mark.parametrize("values", ["one text", b"bytes", 5, None, {"a": 1}, object()])
def test_others_are_refused_by_name(values):
    with pytest.raises(ValueError, match="`x` must be .*a list of strings"):
        to_list(values, "x")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["a", None], r"`x\[1\]` must be a string; got NoneType None. Drop or fill"),
        ([float("nan")], r"`x\[0\]` must be a string; got float nan. Drop or fill"),
        (["a", 5], r"`x\[1\]` must be a string; got int 5"),
        (["a", "b\ud83d"], r"`x\[1\]` is not valid Unicode: character 1 is the lone"),
        ([b"\xff"], r"`x\[0\]` is not UTF-8"),
    ],
)
def test_elements_that_are_not_text(values, message):
    with pytest.raises(ValueError, match=message):
        as_texts(values, "x")


def test_valid_text_passes():
    check_unicode("caf\u00e9 \U0001f600", "x")
