import gzip
import json

import keras
import numpy as np
import pytest
from helpers.models import SENTENCES, tiny_model

import keras_t5gemma as kt
from keras_t5gemma.data.document_dataset import DocumentDataset, cut
from keras_t5gemma.data.objectives import UL2, PrefixLM

# Long, short, one token and none. The first is cut into pieces.
TEXTS = [" ".join(SENTENCES), *SENTENCES, "a", ""] * 3


def make(tokenizer, objective=None, lengths=(24, 20)):
    if objective is None:
        objective = UL2.from_tokenizer(tokenizer)
    return kt.Seq2SeqLMPreprocessor(tokenizer, *lengths, objective=objective)


def pairs(batches):
    """Every packed pair of an epoch, as `(source, decoder input, target)` ids."""
    found = []
    for i in range(batches.num_batches):
        x, labels, weights = batches[i]
        for row in range(len(labels)):
            masks = [x[f"{side}_padding_mask"][row] for side in ("encoder", "decoder")]
            assert ((masks[1] > 0) == (weights[row] > 0)).all()
            for number in range(1, masks[1].max() + 1):
                here = masks[1] == number
                found.append(
                    (
                        x["encoder_token_ids"][row][masks[0] == number].tolist(),
                        x["decoder_token_ids"][row][here].tolist(),
                        labels[row][here].tolist(),
                    )
                )
    return found


@pytest.mark.one_backend
def test_halves_in_their_order_are_the_documents(tokenizer):
    preprocessor = make(tokenizer, PrefixLM())
    batches = DocumentDataset(
        preprocessor, {"text": TEXTS}, batch_size=3, batching="packed"
    )
    found = pairs(batches)
    for _, inputs, target in found:
        assert inputs == [tokenizer.start_token_id, *target[:-1]]
    end = tokenizer.end_token_id
    ids = [source + target for source, _, target in found]
    whole = [tokenizer.tokenize(text) for text in TEXTS]
    whole = [row for row in whole if len(row) > 1]
    # A piece that ends its document ends in eos; the others go on.
    assert sum(row[-1] == end for row in ids) == len(whole)
    longest = preprocessor.longest_text()
    assert len(found) == sum(-(-len(row) // longest) for row in whole) > len(whole)
    expected = []
    for row in whole:
        lengths, is_last = cut(np.array([len(row)]), longest)
        ends = np.cumsum(lengths)
        for start, stop, last in zip(ends - lengths, ends, is_last, strict=True):
            expected.append(row[start:stop] + [end] * int(last))
    assert sorted(ids) == sorted(expected)


@pytest.mark.one_backend
def test_epochs_differ_in_places_only(tokenizer):
    batches = DocumentDataset(
        make(tokenizer), {"text": TEXTS}, batch_size=3, batching="packed", shuffle=True
    )
    batches.set_epoch(0)
    first = pairs(batches)
    assert pairs(batches) == first
    batches.set_epoch(1)
    second = pairs(batches)
    assert sorted(first) != sorted(second)

    def sizes(found):
        return sorted((len(source), len(target)) for source, _, target in found)

    assert sizes(first) == sizes(second)
    objective, end = batches.preprocessor.objective, tokenizer.end_token_id
    for source, _, target in first:
        if set(source) & set(objective.sentinels.tolist()):
            assert target[-1] == end and target[0] == objective.sentinels[0]


@pytest.mark.one_backend
def test_pieces():
    lengths, is_last = cut(np.array([2, 10, 11, 21, 5]), 10)
    assert lengths.tolist() == [2, 10, 9, 2, 10, 9, 2, 5]
    assert is_last.tolist() == [True, True, False, True, False, False, True, True]
    lengths, _ = cut(np.arange(2, 200), 7)
    assert lengths.sum() == np.arange(2, 200).sum()
    assert lengths.min() == 2 and lengths.max() == 7


@pytest.mark.one_backend
@pytest.mark.parametrize("batching", [None, "bucketed", "fixed"])
def test_fit_on_plain_text_learns(tokenizer, batching):
    keras.utils.set_random_seed(0)
    model = tiny_model(tokenizer)
    model.preprocessor = make(tokenizer)
    model.compile(optimizer=keras.optimizers.AdamW(1e-2))
    history = model.fit(
        TEXTS,
        validation_data=TEXTS[:3],
        epochs=4,
        batch_size=4,
        batching=batching,
        verbose=0,
    ).history
    assert history["loss"][-1] < history["loss"][0] - 0.2
    assert history["val_loss"][-1] < history["val_loss"][0]


@pytest.mark.one_backend
def test_texts_from_files_and_streams(tokenizer, tmp_path):
    rows = [text for text in TEXTS if text]
    plain = tmp_path / "a.txt.gz"
    plain.write_bytes(gzip.compress("\n\n".join(rows).encode()))
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    model = tiny_model(tokenizer)
    model.preprocessor = make(tokenizer)
    model.compile()
    assert kt.read_texts(plain) == kt.read_texts(lines) == rows
    expected = model.evaluate(rows, verbose=0, return_dict=True)
    for data in (plain, {"text": rows}, [row.encode() for row in rows]):
        found = model.evaluate(data, verbose=0, return_dict=True)
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    with pytest.warns(UserWarning, match="3 of 24 texts were longer than 25 tokens"):
        batches = [rows[:15], rows[15:]]
        model.fit((batch for batch in batches), steps_per_epoch=2, verbose=0)


@pytest.mark.one_backend
def test_lines_of_tensorflow(tokenizer, tmp_path):
    tf = pytest.importorskip("tensorflow")
    rows = SENTENCES[:4]
    (tmp_path / "a.txt").write_text("\n".join(rows))
    model = tiny_model(tokenizer)
    model.preprocessor = make(tokenizer, lengths=(200, 200))
    model.compile()
    expected = model.evaluate(iter([rows[:2], rows[2:]]), steps=2, verbose=0)
    lines = tf.data.TextLineDataset(str(tmp_path / "a.txt")).batch(2)
    for data in (lines, lines.map(lambda text: {"text": text})):
        assert model.evaluate(data, verbose=0) == pytest.approx(expected, rel=1e-6)


@pytest.mark.one_backend
def test_one_batch(tokenizer):
    preprocessor = make(tokenizer, lengths=(200, 200))
    x, labels, weights = preprocessor(TEXTS[:9])
    again = preprocessor({"text": TEXTS[1:9]})
    assert (x["encoder_token_ids"][1:] == again[0]["encoder_token_ids"]).all()
    assert (labels[1:] == again[1]).all()
    assert not weights[7:].any() and weights[:7].any(axis=1).all()
    config = preprocessor.get_config()
    assert "objective" not in config


@pytest.mark.one_backend
def test_a_preset_gets_an_objective_when_it_is_loaded(tokenizer, tmp_path):
    tiny_model(tokenizer).save_to_preset(tmp_path)
    objective = UL2.from_tokenizer(tokenizer)
    preprocessor = kt.Seq2SeqLMPreprocessor.from_preset(tmp_path, objective=objective)
    assert preprocessor.objective is objective
    assert kt.Seq2SeqLMPreprocessor.from_preset(tmp_path).objective is None


@pytest.mark.one_backend
def test_refuses(tokenizer):
    model = tiny_model(tokenizer)
    with pytest.raises(ValueError, match="`objective` must be a PrefixLM or UL2.*ul2"):
        make(tokenizer, "ul2")
    with pytest.raises(ValueError, match="`template` must be None with an"):
        kt.Seq2SeqLMPreprocessor(
            tokenizer, template="instruction", objective=PrefixLM()
        )
    with pytest.raises(ValueError, match="length` 2 and.*are too short"):
        make(tokenizer, lengths=(2, 2))
    model.preprocessor = make(tokenizer)
    model.compile()
    with pytest.raises(ValueError, match="has an objective.*objective = None"):
        model.fit({"encoder_text": ["a"], "decoder_text": ["b"]})
    with pytest.raises(ValueError, match="`y` must be None: the preprocessor's"):
        model.fit(["a"], ["b"])
    with pytest.raises(ValueError, match="a text of two tokens or more"):
        model.fit(["a", ""])
    with pytest.raises(ValueError, match="`x` must be a string or a list.*3"):
        model.fit(iter([3]), steps_per_epoch=1)
    ids = model.preprocessor(TEXTS[1:3])  # Arrays pass.
    model.fit(iter([ids]), steps_per_epoch=1, verbose=0)
    with pytest.raises(ValueError, match="has an objective"):
        model.fit(iter([{"encoder_text": ["a"]}]), steps_per_epoch=1)
    with pytest.raises(ValueError, match=r"in \[0, 480\); got ids from 9 to 480"):
        model.preprocessor.objective = UL2(sentinels=[9, 480])
    assert model.preprocessor.objective is None
