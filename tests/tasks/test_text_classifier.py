"""Classes of texts: names in and out, every kind of label, and what is refused."""

import dataclasses

import keras
import keras_hub
import numpy as np
import pytest
from helpers.models import enlarge, max_difference, numpy, one_block_config

import keras_t5gemma as kt

NAMES = ["game", "library", "tool"]
TEXTS = [
    "a game of chess for two",
    "read files, and write files",
    "shows pictures",
    "play cards with a computer",
    "sound functions",
    "copies folders",
]
LABELS = ["game", "library", "tool", "game", "library", "tool"]


def make_encoder(tokenizer, length=24):
    keras.utils.set_random_seed(0)
    backbone = kt.Backbone(dataclasses.replace(one_block_config(), decoder=None))
    enlarge(backbone, 3)
    return backbone, kt.Seq2SeqLMPreprocessor(tokenizer, length, 8)


def make_classifier(tokenizer, length=24, **kwargs):
    if not {"num_classes", "kind"} & set(kwargs):
        kwargs.setdefault("class_names", NAMES)
    return kt.TextClassifier(*make_encoder(tokenizer, length), **kwargs)


def train(classifier, y, x=TEXTS, rate=1e-2, epochs=12, **kwargs):
    classifier.compile(keras.optimizers.Adam(rate))
    data = {"batch_size": 4, "epochs": epochs, "verbose": 0}
    return classifier.fit(x, y, **data, **kwargs).history


@pytest.mark.one_backend
def test_names_are_learned_and_come_back(tokenizer, tmp_path):
    classifier = make_classifier(tokenizer, dropout=0.1)
    history = train(classifier, LABELS, validation_data=(TEXTS, LABELS))
    assert history["loss"][-1] < 0.5 * history["loss"][0]
    assert history["val_accuracy"][-1] == 1
    assert classifier.classify(TEXTS) == LABELS
    shares = classifier.predict(TEXTS)
    assert shares.shape == (6, 3) and shares.dtype == np.float32
    assert max_difference(shares.sum(1), np.ones(6)) < 1e-5
    for text, row in zip(TEXTS, shares, strict=True):  # Whatever it is batched with.
        assert max_difference(classifier.predict([text])[0], row) < 1e-5
    classifier.save_to_preset(tmp_path)
    again = kt.TextClassifier.from_preset(tmp_path)
    assert again.class_names == NAMES and again.dropout == 0.1
    assert np.array_equal(again.predict(TEXTS), shares)
    tower = kt.Backbone.from_preset(tmp_path)
    assert tower.decoder is None
    other = kt.TextClassifier.from_preset(tmp_path, num_classes=5)  # A new head.
    assert other.class_names is None and other.dropout == 0.1
    assert other.predict(TEXTS).shape == (6, 5)


def test_the_head_reads_the_last_token(tokenizer):
    classifier = make_classifier(tokenizer)
    ids = classifier.preprocessor.tokenizer.tokenize(TEXTS[0])
    x = np.array([ids]), np.ones((1, len(ids)))
    last = numpy(classifier.backbone.encode(*x))[0, -1]
    kernel, bias = map(numpy, classifier.get_layer("classes").weights)
    logits = last @ kernel + bias
    expected = np.exp(logits) / np.exp(logits).sum()
    assert max_difference(classifier.predict(TEXTS[:1])[0], expected) < 1e-5


@pytest.mark.one_backend
def test_numbers_as_classes(tokenizer):
    classifier = make_classifier(tokenizer, num_classes=3)
    numbers = [NAMES.index(label) for label in LABELS]
    train(classifier, np.array(numbers))
    assert classifier.classify(TEXTS) == numbers
    result = classifier.evaluate(TEXTS, numbers, return_dict=True, verbose=0)
    assert result["accuracy"] == 1


@pytest.mark.one_backend
def test_several_labels(tokenizer):
    classifier = make_classifier(tokenizer, class_names=NAMES, kind="multi_label")
    y = [["game"], ["library", "tool"], [], ["game", "tool"], ["library"], ["tool"]]
    history = train(classifier, y, epochs=25)
    assert history["accuracy"][-1] > 0.95
    assert classifier.classify(TEXTS) == y
    ones = np.array([[name in row for name in NAMES] for row in y], "float32")
    assert max_difference(classifier._labels(list(ones)), classifier._labels(y)) == 0
    assert not classifier.classify(TEXTS, threshold=1.0)[0]
    with pytest.raises(ValueError, match="`threshold` must be .* at most 1"):
        classifier.classify(TEXTS, threshold=5)


@pytest.mark.one_backend
def test_regression(tokenizer):
    classifier = make_classifier(tokenizer, kind="regression", pooling="mean")
    y = [0.5, -1.0, 2.0, 0.0, 1.0, -0.5]
    history = train(classifier, y, epochs=60)
    assert history["loss"][-1] < 0.1 * history["loss"][0]
    values = classifier.predict(TEXTS)
    assert values.shape == (6,) and np.abs(values - y).max() < 0.5
    with pytest.raises(ValueError, match="has no classes: use `predict`"):
        classifier.classify(TEXTS)


@pytest.mark.one_backend
def test_pairs_of_texts(tokenizer):
    classifier = make_classifier(tokenizer, length=20, num_classes=2)
    split = classifier.preprocessor.tokenizer.tokenize
    a, b = "a game", "of cards and more cards"
    with pytest.warns(UserWarning, match="1 of 2 encoder texts were longer than 20"):
        data = classifier._data({"text": [a, a], "text_pair": [3 * b, "x"]}, [0, 1])[
            "x"
        ]
    first, second = data.sources[0].tolist(), data.sources[1].tolist()
    whole = [*split(a), *split("\n"), *split(3 * b)]
    assert first == whole[:20]  # The longer one is cut.
    assert second == [*split(a), *split("\n"), *split("x")]
    pairs = [("chess", "a game"), ("chess", "a tool"), ("cards", "a game")]
    train(classifier, [1, 0, 1], pairs, epochs=15)
    assert classifier.classify(pairs) == [1, 0, 1]
    assert classifier.classify({"text": ["chess"], "text_pair": ["a game"]}) == [1]


@pytest.mark.one_backend
def test_both_long_texts_keep_half(tokenizer):
    classifier = make_classifier(tokenizer, length=20, num_classes=2)
    long = "word " * 40
    with pytest.warns(UserWarning, match="longer than 20"):
        data = classifier._data([(long, "cards " * 40)], [0])["x"]
    split = classifier.preprocessor.tokenizer.tokenize
    between = split("\n")
    room = 20 - len(between)
    expected = split(long)[: room // 2] + between + split("cards " * 40)
    assert data.sources[0].tolist() == expected[:20]


def test_adapters_and_head_learn(tokenizer):
    classifier = make_classifier(tokenizer)
    classifier.enable_lora(2)
    before = {w.path: numpy(w).copy() for w in classifier.weights}
    train(classifier, LABELS, epochs=2)
    moved = {w.path for w in classifier.weights if (numpy(w) != before[w.path]).any()}
    assert {"classes/kernel", "classes/bias"} < moved
    assert all("lora" in path or "classes" in path for path in moved)


@pytest.mark.one_backend
def test_weights_of_texts(tokenizer):
    results = []
    for x, y, weights in (
        (TEXTS[:4], LABELS[:4], np.array([1, 1, 0, 0], "float32")),
        (TEXTS[:2], LABELS[:2], None),
    ):
        classifier = make_classifier(tokenizer)
        classifier.compile(keras.optimizers.SGD(0.1))
        classifier.fit(
            x, y, batch_size=4, shuffle=False, verbose=0, sample_weight=weights
        )
        results.append([numpy(w).copy() for w in classifier.weights])
    assert max(map(max_difference, *results)) < 1e-6


def test_the_same_head_on_a_decoder_only_model(tokenizer):
    keras.utils.set_random_seed(0)
    gemma = keras_hub.models.GemmaBackbone(
        480, 2, 2, 1, 16, 64, 8, use_post_ffw_norm=True, use_post_attention_norm=True
    )
    preprocessor = kt.Seq2SeqLMPreprocessor(tokenizer, 24, 8)
    classifier = kt.TextClassifier(gemma, preprocessor, NAMES)
    train(classifier, LABELS, epochs=25)
    assert classifier.classify(TEXTS) == LABELS
    shares = classifier.predict(TEXTS)
    for text, row in zip(TEXTS, shares, strict=True):
        assert max_difference(classifier.predict([text])[0], row) < 1e-5
    classifier.enable_lora(2)
    assert any("lora" in v.path for v in classifier.trainable_variables)


@pytest.mark.one_backend
def test_refusals(tokenizer, model):
    with pytest.raises(ValueError, match="`class_names`.*two classes.*'game'"):
        make_classifier(tokenizer, class_names=["game"])
    with pytest.raises(ValueError, match="`num_classes`.*`class_names`.*got None"):
        kt.TextClassifier(*make_encoder(tokenizer))
    with pytest.raises(ValueError, match="a name twice"):
        make_classifier(tokenizer, class_names=["a", "a"])
    message = "`num_classes` must be.*`class_names`, 3; got 2"
    with pytest.raises(ValueError, match=message):
        make_classifier(tokenizer, class_names=NAMES, num_classes=2)
    with pytest.raises(ValueError, match="`kind` must be one of.*'ranking'"):
        make_classifier(tokenizer, kind="ranking")
    with pytest.raises(ValueError, match="encoder alone"):
        kt.TextClassifier(model.backbone, None, NAMES)
    classifier = make_classifier(tokenizer)
    for y, message in (
        (["game", "food"], "labels among .*'library', 'tool'.; got 'food'"),
        (["game"], "same number of rows.*'text': 2, 'labels': 1"),
        (None, "must come with labels"),
    ):
        with pytest.raises(ValueError, match=message):
            classifier.fit(TEXTS[:2], y)
    with pytest.raises(ValueError, match="1 of 2 texts.*empty.*number 1"):
        classifier.fit(["a", ""], ["game", "tool"])
    with pytest.raises(ValueError, match="1 of 1 texts of `text_pair` are empty"):
        classifier.predict([("a", "")])
    with pytest.raises(ValueError, match="1 of 2 texts.*empty.*number 0"):
        classifier.predict(["", "a"])
    with pytest.raises(ValueError, match="`x` must be a list of texts; got 'a text'"):
        classifier.predict("a text")
    with pytest.warns(UserWarning, match="1 of 1 encoder texts were longer than 24"):
        classifier.predict(["word " * 30])
    numbers = make_classifier(tokenizer, num_classes=3)
    with pytest.raises(ValueError, match="labels among 0..2; got 3"):
        numbers.fit(TEXTS[:1], [3])
    values = make_classifier(tokenizer, kind="regression")
    with pytest.raises(ValueError, match="finite numbers; number 1 is nan"):
        values.fit(TEXTS[:2], [1.0, float("nan")])
    with pytest.raises(ValueError, match="'packed'"):
        classifier.fit(TEXTS, LABELS, batching="packed")


@pytest.mark.one_backend
def test_labels_in_columns_and_tables(tokenizer):
    pyarrow = pytest.importorskip("pyarrow")
    single = make_classifier(tokenizer)
    for y in (pyarrow.array(LABELS), pyarrow.table({"y": LABELS}), np.array(LABELS)):
        assert single._labels(y).tolist() == [0, 1, 2, 0, 1, 2]
    several = make_classifier(tokenizer, class_names=NAMES, kind="multi_label")
    table = {"tool": [0, 1], "game": [1, 0], "library": [1, 1]}
    found = several._labels(pyarrow.table(table))
    assert found.tolist() == [[1, 1, 0], [0, 1, 1]]  # By name, not by position.
    del table["tool"]
    with pytest.raises(ValueError, match=r"one column.*'tool'.*got the columns"):
        several._labels(pyarrow.table(table))
    with pytest.raises(ValueError, match=r"`y` must be a list of one label.*'tool'"):
        single._labels(pyarrow.table(table))
    with pytest.raises(ValueError, match=r"`y` must be a list of one label.*got str"):
        single._labels("game")
    numbers = make_classifier(tokenizer, num_classes=2)
    assert numbers._labels([True, np.bool_(False), np.int8(1)]).tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match=r"among 0..1; got 1.0. .*integers"):
        numbers._labels([1.0])
    values = make_classifier(tokenizer, kind="regression")
    for y in (pyarrow.array([1, 2]), range(1, 3), (1, np.float32(2))):
        assert values._labels(y).tolist() == [[1], [2]]
    for y in (["a", "b"], [[1, 2], [3, 4]]):
        with pytest.raises(ValueError, match="`y` must be one number per text"):
            values._labels(y)


@pytest.mark.one_backend
def test_class_weights(tokenizer):
    """A class of weight 0 is not learned, as without its texts."""
    classifier = make_classifier(tokenizer)
    train(classifier, LABELS, class_weight={"tool": 0, "game": np.int64(2)})
    assert "tool" not in classifier.classify(TEXTS)
    found = classifier._label_reader().weights(["tool", "game"], {"tool": 0.5})
    assert found.tolist() == [0.5, 1]
    for weights, message in (
        ({"food": 1}, "labels among .*got 'food'"),
        ({"tool": -1}, r"`class_weight\['tool'\]` must be a number at least 0"),
        ([1, 2, 3], "`class_weight` must be a dict"),
    ):
        for method in (classifier.fit, classifier.train_on_batch):
            with pytest.raises(ValueError, match=message):
                method(TEXTS, LABELS, class_weight=weights)
    with pytest.raises(ValueError, match="`class_weight` needs the labels as `y`"):
        classifier.fit(TEXTS, class_weight={"tool": 0.5})
    with pytest.raises(ValueError, match="`class_weight` must be.*for 'regression'"):
        make_classifier(tokenizer, kind="regression").fit(
            TEXTS, range(6), class_weight={0: 1}
        )


def test_class_weights_of_a_batch(tokenizer):
    """The loss is that of `sample_weight`, with which they are multiplied."""
    classifier = make_classifier(tokenizer)
    classifier.compile(keras.optimizers.SGD(0.0))
    found = classifier.train_on_batch(
        TEXTS[:2], ["game", "tool"], [1, 3], class_weight={"game": 5}, return_dict=True
    )
    weighted = classifier.train_on_batch(
        TEXTS[:2], ["game", "tool"], sample_weight=[5, 3], return_dict=True
    )
    assert found["loss"] == pytest.approx(weighted["loss"], rel=1e-5)


def test_labels_beside_arrays(tokenizer):
    """Names weigh as numbers do, and are labels as in `fit`."""
    classifier = make_classifier(tokenizer)
    classifier.compile(keras.optimizers.SGD(0.0))
    arrays, y, _ = classifier.preprocess_samples(TEXTS[:2], ["game", "tool"])
    number = NAMES.index("game")
    found = [
        classifier.train_on_batch(arrays, labels, class_weight=weights)[0]
        for labels in (y, ["game", "tool"])
        for weights in ({"game": 5.0}, {number: 5.0}, {})
    ]
    np.testing.assert_allclose(found[:3], found[3:], rtol=1e-5)
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)
    assert abs(found[0] - found[2]) > 1e-3
    with pytest.raises(ValueError, match="`class_weight` must be labels.*got 'food'"):
        classifier.train_on_batch(arrays, y, class_weight={"food": 2.0})
    for weights in ({7: 1.0}, {"game": -1.0}, [1.0]):
        with pytest.raises(ValueError, match="`class_weight"):
            classifier.train_on_batch(arrays, y, class_weight=weights)


@pytest.mark.one_backend
def test_a_split_without_rows_is_refused(tokenizer):
    with pytest.raises(
        ValueError, match="`validation_split` 0.01 of 6 rows holds out no"
    ):
        make_classifier(tokenizer).fit(TEXTS, LABELS, validation_split=0.01)


@pytest.mark.one_backend
def test_class_weights_leave_held_out_texts_alone(tokenizer):
    """As in Keras: the validation loss counts all classes alike."""
    classifier = make_classifier(tokenizer)
    labels = ["game", "game", "tool", "tool"]
    expected = classifier.evaluate(
        TEXTS[2:4], labels[2:], sample_weight=[1, 3], verbose=0
    )
    classifier.optimizer.learning_rate = 0.0
    history = classifier.fit(
        TEXTS[:4],
        labels,
        class_weight={"tool": 0.01, "game": 5},
        sample_weight=[1, 1, 1, 3],
        validation_split=0.5,
        verbose=0,
    ).history
    assert history["val_loss"][0] == pytest.approx(expected[0], rel=1e-5)


@pytest.mark.one_backend
def test_single_batches_need_no_labels(tokenizer):
    classifier = make_classifier(tokenizer)
    logits = np.asarray(keras.ops.convert_to_numpy(classifier.predict_on_batch(TEXTS)))
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert np.allclose(shares, classifier.predict(TEXTS), atol=1e-5)
    embedder = kt.TextEmbedder(classifier.backbone, classifier.preprocessor)
    vectors = embedder.embed(TEXTS)
    found = keras.ops.convert_to_numpy(embedder.predict_on_batch(TEXTS))
    assert np.allclose(found, vectors, atol=1e-5)
    assert np.array_equal(embedder.predict(TEXTS), vectors)


@pytest.mark.one_backend
def test_texts_in_columns_and_tables_and_no_texts(tokenizer):
    pyarrow = pytest.importorskip("pyarrow")
    classifier = make_classifier(tokenizer)
    expected = classifier.predict(TEXTS)
    for x in (
        pyarrow.array(TEXTS),
        np.array(TEXTS),
        pyarrow.table({"text": TEXTS, "id": range(6)}),
        {"text": pyarrow.array(TEXTS)},
    ):
        assert np.array_equal(classifier.predict(x), expected)
    expected = classifier.predict([("a", "b"), ("c", "d")])
    assert np.array_equal(classifier.predict((["a", "c"], ["b", "d"])), expected)
    for nothing in ([], (), pyarrow.array([], "string"), {"text": []}):
        found = classifier.predict(nothing)
        assert found.shape == (0, 3) and found.dtype == np.float32
        assert classifier.classify(nothing) == []
    values = make_classifier(tokenizer, kind="regression")
    assert values.predict([]).shape == (0,)
    with pytest.raises(ValueError, match=r"`x\[1\]` must be a string; got NoneType"):
        classifier.predict(["a", None])
