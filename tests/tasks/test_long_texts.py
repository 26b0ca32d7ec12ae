"""Long texts: what is read, in which batches, and what training cuts."""

import functools

import keras
import numpy as np
import pytest
from helpers.models import enlarge, one_block_config

import keras_t5gemma as kt
from keras_t5gemma.cli import main
from keras_t5gemma.modeling.towers import Encoder

IS_TORCH = keras.config.backend() == "torch"
POSITIONS = 1000
SHORT = ["a board", "a game of chess", "tables", "fonts", "a server"]


@pytest.fixture(scope="module")
def long(tokenizer):
    """A text of 600 tokens."""
    ids = tokenizer.tokenize("The quick brown fox of a board. ")
    words = tokenizer.detokenize((ids * 100)[:600])
    assert 570 <= len(tokenizer.tokenize(words)) <= 630
    return words


@pytest.fixture(scope="module")
def model(tokenizer):
    config = one_block_config(max_positions=POSITIONS)
    backbone = enlarge(kt.Backbone(config))
    preprocessor = kt.Seq2SeqLMPreprocessor(tokenizer, decoder_sequence_length=8)
    return kt.Seq2SeqLM(backbone, preprocessor)


@pytest.fixture(scope="module")
def encoder(model):
    config = kt.T5GemmaConfig(
        model.backbone.config.encoder, None, 480, max_positions=POSITIONS
    )
    return enlarge(kt.Backbone(config))


@pytest.fixture(scope="module")
def embedder(model, encoder):
    return kt.TextEmbedder(encoder, model.preprocessor)


@pytest.fixture
def shapes(monkeypatch):
    """Shapes of the ids that encoders read; with a compiler one of each program."""
    seen, call = [], Encoder.call

    @functools.wraps(call)
    def spy(self, token_ids, *args, **kwargs):
        seen.append(tuple(token_ids.shape))
        return call(self, token_ids, *args, **kwargs)

    monkeypatch.setattr(Encoder, "call", spy)
    return seen


def test_embed_keeps_a_long_text_apart_from_short_ones(embedder, long, shapes):
    texts = [*SHORT[:3], long, *SHORT[3:]]
    vectors = embedder.embed(texts, batch_size=4)
    if keras.config.backend() != "tensorflow":  # It traces unknown lengths.
        short_width = {width for _, width in shapes if width <= 512}
        assert (1, 600 if IS_TORCH else 768) in shapes
        assert len(shapes) == (3 if IS_TORCH else 2)
    alone = embedder.embed([long])[0]
    np.testing.assert_allclose(vectors[3], alone, atol=1e-5)
    del shapes[:]
    short = embedder.embed(SHORT, batch_size=4)
    if IS_TORCH:
        assert {width for _, width in shapes} == short_width
    else:
        assert not shapes  # The same programs.
    np.testing.assert_allclose(np.delete(vectors, 3, axis=0), short, atol=1e-5)


@pytest.mark.one_backend
def test_long_texts_bound_the_tokens_of_a_batch(embedder, long, shapes):
    half = long[: len(long) // 2]
    embedder.embed([long] * 5 + [half] * 5, batch_size=4)
    assert max(rows * width for rows, width in shapes) <= 4 * 512
    assert sorted(shapes) == [(1, 304), (1, 600), (2, 600), (2, 600), (4, 304)]


@pytest.mark.one_backend
def test_generate_and_stream_read_long_texts(model, long, shapes):
    sources = [SHORT[0], long, *SHORT[1:]]
    answers = model.generate(sources)
    assert len(shapes) == 2 and shapes[0][0] == 1 and 570 <= shapes[0][1] <= 768
    assert shapes[1][0] == len(SHORT) and shapes[1][1] < 64
    assert answers == [model.generate(source) for source in sources]
    assert "".join(model.stream(long)) == model.generate(long, strip_prompt=True)
    del shapes[:]
    prompts = ["a", "b", "c"]  # The source is read once.
    model.generate({"encoder_text": long, "decoder_text": prompts}, batch_size=4)
    assert len(shapes) == 1


@pytest.mark.one_backend
def test_score_reads_long_sources(model, long, shapes):
    sources, targets = [SHORT[0], long, SHORT[1]], ["fox", "a board", "tables"]
    scores = model.score(sources, targets)
    assert shapes == [(1, 768), (2, 512)]
    for i, (source, target) in enumerate(zip(sources, targets, strict=True)):
        single = model.score(source, target)
        assert scores["log_prob"][i] == pytest.approx(single["log_prob"], abs=1e-4)
        assert (scores["token_ids"][i] == single["token_ids"]).all()
    cut = model.score(
        model.preprocessor.tokenizer.detokenize(
            model.preprocessor.tokenizer.tokenize(long)[:512]
        ),
        targets[1],
    )
    assert scores["log_prob"][1] != pytest.approx(cut["log_prob"], abs=1e-4)


@pytest.mark.one_backend
def test_classify_reads_long_texts_and_pairs(encoder, model, long, shapes):
    classifier = kt.TextClassifier(encoder, model.preprocessor, num_classes=2)
    texts = [SHORT[0], long, SHORT[1]]
    together = classifier.predict(texts)
    assert [width for _, width in shapes] == [600, 16]
    alone = [classifier.predict([text])[0] for text in texts]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    del shapes[:]
    classifier.predict({"text": [long], "text_pair": [SHORT[0]]})
    assert [width for _, width in shapes] == [608]
    np.testing.assert_allclose(
        keras.ops.softmax(classifier.predict_on_batch(texts)), together, atol=1e-5
    )


@pytest.mark.one_backend
def test_hidden_states_of_long_texts(embedder, long, shapes):
    texts = [SHORT[0], long, SHORT[1]]
    states, mask = embedder.hidden_states(texts, as_numpy=True)
    length = mask[1].sum()
    assert shapes == [(1, length), (2, mask[[0, 2]].sum(axis=1).max())]
    assert states.shape[:2] == mask.shape == (3, length) and length > 512
    single, _ = embedder.hidden_states([long], as_numpy=True)
    np.testing.assert_allclose(states[1], single[0], atol=1e-5)
    on_device, _ = embedder.hidden_states(texts)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(on_device), states)
    del shapes[:]
    embedder.hidden_states(texts * 2, batch_size=4, pad_to=600)
    assert shapes == [(2, 600)] * 3


@pytest.mark.one_backend
def test_texts_beyond_the_positions_are_truncated(embedder, model, long):
    message = f"1 of 2 encoder texts were longer than {POSITIONS} tokens"
    with pytest.warns(UserWarning, match=message):
        embedder.embed([long * 2, "a"])
    with pytest.warns(UserWarning, match=message):
        model.generate([long * 2, "a"])
    with pytest.warns(UserWarning, match=message):
        model.score([long * 2, "a"], ["a", "b"])
    with pytest.raises(ValueError, match=f"`pad_to` must be at most {POSITIONS}"):
        embedder.hidden_states(["a"], pad_to=POSITIONS + 1)


@pytest.mark.one_backend
def test_a_limit_above_the_positions_warns_once(tokenizer, encoder, long, shapes):
    preprocessor = kt.Seq2SeqLMPreprocessor(tokenizer, 2000)
    embedder = kt.TextEmbedder(encoder, preprocessor)
    with pytest.warns(UserWarning, match="2000.*covered positions up to 1000") as seen:
        for _ in range(2):
            embedder.embed([long * 2])
    assert sum("covered" in str(w.message) for w in seen) == 1
    assert shapes[-1][1] == 1200
    preprocessor.encoder_sequence_length = 1001
    embedder.compile("sgd")
    pair = {"anchor": ["a", "b"], "positive": ["a", "b"]}
    with pytest.warns(UserWarning, match="1001.*covered positions up to 1000") as seen:
        embedder.fit(pair, verbose=0, batch_size=2)
    assert sum("covered" in str(w.message) for w in seen) == 1


@pytest.mark.one_backend
def test_fit_cuts_at_512_tokens_and_says_so(model, long, shapes):
    model.compile("sgd")
    pairs = {"encoder_text": [long, "a", "b"], "decoder_text": ["a", "b", "a"]}
    message = "1 of 3 encoder texts were longer than 512 tokens"
    with pytest.warns(UserWarning, match=message):
        model.fit(pairs, batch_size=3, verbose=0)
    assert {width for _, width in shapes} == {512}


@pytest.mark.one_backend
def test_a_length_set_on_purpose_is_kept(model, tokenizer, long, tmp_path, shapes):
    told = kt.Seq2SeqLMPreprocessor(tokenizer, 512, 8)
    task = kt.Seq2SeqLM(model.backbone, told)
    with pytest.warns(UserWarning, match="longer than 512 tokens"):
        task.generate(long)
    load = kt.Seq2SeqLMPreprocessor.from_preset
    for preprocessor, read in ((told, 512), (model.preprocessor, POSITIONS)):
        kt.Seq2SeqLM(model.backbone, preprocessor).save_to_preset(tmp_path)
        again = load(tmp_path)
        assert again.encoder_sequence_length == 512
        assert again.for_reading(POSITIONS).encoder_sequence_length == read
    ids = again.generate_preprocess(long)["encoder_token_ids"]
    assert ids.shape[1] > 512
    with pytest.raises(ValueError, match="encoder_sequence_length.*from 1"):
        again.encoder_sequence_length = 0


@pytest.mark.one_backend
def test_command_line_reads_long_texts(model, long, tmp_path, shapes, capsys):
    model.save_to_preset(tmp_path)
    arguments = ["--preset", str(tmp_path), "--max-length", "4"]
    assert main.main(["generate", long, *arguments]) == 0
    assert shapes[-1][1] > 512 and "truncated" not in capsys.readouterr().err
