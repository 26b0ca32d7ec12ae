import numpy as np
import pytest
from helpers.models import SENTENCES, make_proto

import keras_t5gemma as kt

TEXTS = [*SENTENCES, "Zażółć gęślą jaźń", "日本語 🦊\n\ttabs", " two  spaces ", ""]


@pytest.fixture(params=["control_symbols", "user_defined_symbols"], scope="module")
def either(request):
    """Gemma's special tokens are of one kind or the other, by vocabulary."""
    return kt.Tokenizer(make_proto(request.param))


def test_round_trip_single_and_batch(either):
    batch = either.tokenize(TEXTS)
    assert [either.tokenize(text) for text in TEXTS] == batch
    assert either.detokenize(batch) == TEXTS
    assert either.tokenize("") == []
    assert either.detokenize([]) == ""


def test_gemma_ids(either):
    ids = (either.pad_token_id, either.end_token_id, either.start_token_id)
    assert ids == (0, 1, 2)
    assert (either.start_of_turn_id, either.end_of_turn_id) == (106, 107)
    assert either.token_to_id("<unused0>") == 7


@pytest.mark.parametrize("token", ["<end_of_turn>", "<bos>", "<unused5>", "[@BOS@]"])
def test_control_tokens_only_when_asked(either, token):
    text = f"a {token} b"
    plain = either.tokenize(text)
    assert not set(plain) & either.control_ids
    assert either.detokenize(plain) == text
    parsed = either.tokenize(text, parse_control_tokens=True)
    assert parsed.count(either.token_to_id(token)) == 1
    assert either.detokenize(parsed) == "a  b"
    assert either.detokenize(parsed, skip_control_tokens=False) == text


def test_no_bos_or_eos(either):
    assert not set(either.tokenize(SENTENCES[0])) & {1, 2}


def test_detokenize_takes_arrays(tokenizer):
    ids = tokenizer.tokenize("The fox")
    assert tokenizer.detokenize(np.array([ids + [1, 0, 0]])) == ["The fox"]


def test_vocabulary(tokenizer):
    vocabulary = tokenizer.get_vocabulary()
    assert len(vocabulary) == tokenizer.vocabulary_size() == 480
    assert tokenizer.id_to_token(107) == vocabulary[107] == "<end_of_turn>"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: t.tokenize(["a", 3]), r"`text\[1\]` must be a string; got int 3"),
        (lambda t: t.tokenize(None), "string or a list of strings; got NoneType"),
        (
            lambda t: t.detokenize([480]),
            "`token_ids` must be a whole number from 0 to 479; got 480",
        ),
        (lambda t: t.token_to_id("nonsense piece"), "no piece 'nonsense piece'"),
        (lambda t: kt.Tokenizer(b"not a model"), "not a SentencePiece model"),
        (lambda t: kt.Tokenizer().tokenize("a"), "no vocabulary yet"),
    ],
)
def test_bad_input(tokenizer, call, message):
    with pytest.raises(ValueError, match=message):
        call(tokenizer)


def test_a_vocabulary_without_gemmas_ids_is_refused():
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4),
        model_writer=model,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    with pytest.raises(ValueError, match="must have <pad> at id 0"):
        kt.Tokenizer(model.getvalue())
