"""Answers in pieces, and answers that are cut short."""

import time

import pytest
from helpers.oracles import SOURCES, generated_ids

LENGTH = 16
FULL = {"max_length": LENGTH, "stop_token_ids": None}


def test_stream_joins_to_what_generate_returns(shared_model):
    for options in ({}, {"top_k": 40, "temperature": 3.0, "seed": 5}):
        for text in (*SOURCES, {"encoder_text": "A", "decoder_text": "The fox"}):
            whole = shared_model.generate(
                text, max_length=LENGTH, strip_prompt=True, **options
            )
            pieces = list(shared_model.stream(text, max_length=LENGTH, **options))
            assert "".join(pieces) == whole
            assert all(pieces)
            assert len(pieces) > 1
    with pytest.raises(ValueError, match="`stream` needs.*one answer.*num_beams=2"):
        shared_model.stream("a", num_beams=2)
    for text in (["a"], {"encoder_text": "a", "decoder_text": ["The", "fox"]}):
        with pytest.raises(ValueError, match="`text` must be one string"):
            shared_model.stream(text)


def test_stream_keeps_characters_whole(shared_model):
    """Bytes of a character are several tokens of this vocabulary."""
    tokenizer = shared_model.preprocessor.tokenizer
    ids = tokenizer.tokenize("né €9")
    assert len(ids) > len("né €9")
    forced = {**FULL, "forced_token_ids": ids}
    pieces = list(shared_model.stream("a", **forced))
    assert "".join(pieces).startswith("né €9")
    assert "€" in "".join(pieces[: len(ids)])
    assert not any("\ufffd" in piece for piece in pieces[:4])


def test_max_time_returns_what_is_there(shared_model):
    whole = generated_ids(shared_model, SOURCES, LENGTH, stop_token_ids=None)
    for options in ({}, {"num_beams": 2}):
        rows = generated_ids(
            shared_model,
            SOURCES,
            LENGTH,
            stop_token_ids=None,
            max_time=1e-6,
            batch_size=2,
            **options,
        )
        assert all(len(row) < LENGTH for row in rows)
        assert [row[0] for row in rows] == [2, 2, 2]
    options = {"stop_token_ids": None, "max_time": 1e-6}
    assert len(list(shared_model.stream(SOURCES[0], LENGTH, **options))) <= 1
    start = time.monotonic()
    rows = generated_ids(
        shared_model, SOURCES, LENGTH, stop_token_ids=None, max_time=600
    )
    assert time.monotonic() - start < 300
    assert rows == whole


def test_an_interrupt_leaves_the_model_usable(shared_model, monkeypatch):
    expected = shared_model.generate(SOURCES, LENGTH)
    stream = shared_model.stream(SOURCES[0], LENGTH)
    next(stream)
    stream.close()

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("keras_t5gemma.generation.generator.results", interrupt)
        with pytest.raises(KeyboardInterrupt):
            shared_model.generate(SOURCES, LENGTH)
    assert shared_model.generate(SOURCES, LENGTH) == expected
