"""Batches of texts that users make, for classifiers and embedders."""

import dataclasses

import keras
import numpy as np
import pytest
from helpers.models import one_block_config

import keras_t5gemma as kt
from keras_t5gemma.distribution import mesh

TEXTS = [
    "a game of chess for two",
    "read files, and write files",
    "shows pictures",
    "play cards with a computer and with many others",
    "sound functions",
]
OTHERS = ["board game", "file library", "viewer", "cards", "audio"]
LABELS = [0, 1, 2, 0, 1]
WEIGHTS = [1.0, 2.0, 0.5, 1.0, 0.0]
PARTS = (slice(0, 2), slice(2, 4), slice(4, 5))


def batches_of(*columns):
    return [tuple(column[part] for column in columns) for part in PARTS]


class Numbered(keras.utils.PyDataset):
    """Batches by number."""

    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]


class Again:
    """Batches that can be iterated more than once, and have no length."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def of_tensorflow(batches):
    """A `tf.data.Dataset` of rows, batched."""
    tf = pytest.importorskip("tensorflow")
    columns = [np.concatenate(column) for column in zip(*batches, strict=True)]
    return tf.data.Dataset.from_tensor_slices(tuple(columns)).batch(2)


def of_torch(batches):
    """A `DataLoader`, which makes lists of tuples and tensors."""
    data = pytest.importorskip("torch.utils.data")
    rows = [row for batch in batches for row in zip(*batch, strict=True)]
    return data.DataLoader(rows, batch_size=2)


def endless(batches):
    while True:
        yield from batches


FORMS = [Numbered, of_tensorflow, endless]
FORMS += [
    pytest.param(form, marks=pytest.mark.one_backend) for form in (Again, of_torch)
]


def make(task, tokenizer, **kwargs):
    keras.utils.set_random_seed(0)
    backbone = kt.Backbone(dataclasses.replace(one_block_config(), decoder=None))
    model = task(backbone, kt.Seq2SeqLMPreprocessor(tokenizer, 64, 8), **kwargs)
    model.compile(keras.optimizers.SGD(0.1))
    return model


def losses(model, *data, **kwargs):
    kwargs |= {"shuffle": False, "epochs": 2, "verbose": 0}
    return model.fit(*data, **kwargs).history


@pytest.mark.parametrize("form", FORMS)
def test_a_classifier_learns_from_batches_as_from_lists(tokenizer, form):
    def train(*data, **kwargs):
        return losses(
            make(kt.TextClassifier, tokenizer, num_classes=3), *data, **kwargs
        )

    memory = {"sample_weight": WEIGHTS, "batch_size": 2, "batching": "fixed"}
    expected = train(TEXTS, LABELS, validation_data=(TEXTS, LABELS, WEIGHTS), **memory)
    data = form(batches_of(TEXTS, LABELS, WEIGHTS))
    validation = form(batches_of(TEXTS, LABELS, WEIGHTS))
    steps = {"steps_per_epoch": 3, "validation_steps": 3} if form is endless else {}
    found = train(data, validation_data=validation, **steps)
    assert set(found) >= {"loss", "accuracy"}
    for name in set(found) - {"padding", "tokens_per_second"}:
        values = found[name]
        assert np.allclose(values, expected[name], atol=1e-5), name
    assert abs(expected["loss"][1] - expected["loss"][0]) > 0.01  # It trains.


@pytest.mark.one_backend
@pytest.mark.parametrize("form", [Numbered, Again, of_tensorflow, of_torch])
def test_an_embedder_learns_from_batches_as_from_lists(tokenizer, form):
    def train(*data, **kwargs):
        return losses(make(kt.TextEmbedder, tokenizer), *data, **kwargs)

    memory = {"batch_size": 2, "batching": "fixed"}
    expected = train(TEXTS, OTHERS, **memory)
    found = train(form(batches_of(TEXTS, OTHERS)))
    assert np.allclose(found["loss"], expected["loss"], atol=1e-5)
    named = [
        {"anchor": anchors, "positive": positives}
        for anchors, positives in batches_of(TEXTS, OTHERS)
    ]
    assert train(Numbered(named))["loss"] == found["loss"]


@pytest.mark.one_backend
def test_batches_are_padded_little(tokenizer):
    classifier = make(kt.TextClassifier, tokenizer, num_classes=3)

    def widths(**kwargs):
        data = Numbered(batches_of(TEXTS, LABELS))
        x = classifier._data(data, **kwargs)["x"]
        return [x[i][0]["encoder_token_ids"].shape for i in range(len(data))]

    assert widths() == [(2, 16), (2, 32), (1, 16)]
    assert widths(batching="fixed") == [(2, 64), (2, 64), (1, 64)]
    classifier.preprocessor.encoder_sequence_length = 31  # No multiple of 8.
    assert widths() == [(2, 16), (2, 31), (1, 16)]
    classifier.preprocessor.encoder_sequence_length = 64
    classifier.preprocessor.pad_to_multiple_of = 24
    assert widths() == [(2, 24), (2, 48), (1, 24)]


@pytest.mark.one_backend
def test_evaluate_arrays_and_kinds_of_labels(tokenizer):
    classifier = make(kt.TextClassifier, tokenizer, class_names=["a", "b", "c"])
    names = [classifier.class_names[i] for i in LABELS]
    expected = classifier.evaluate(TEXTS, names, verbose=0)
    data = Again(batches_of(TEXTS, names))
    assert np.allclose(classifier.evaluate(data, verbose=0), expected, atol=1e-5)
    whole = classifier._data(TEXTS, names, batch_size=5, batching="fixed")["x"][0]
    arrays = Again([whole])
    assert np.allclose(classifier.evaluate(arrays, verbose=0), expected, atol=1e-5)
    pairs = [({"text": TEXTS, "text_pair": OTHERS}, names)]
    expected = classifier.evaluate(pairs[0][0], names, verbose=0)
    assert np.allclose(
        classifier.evaluate(Again(pairs), verbose=0), expected, atol=1e-5
    )
    numbers = make(kt.TextClassifier, tokenizer, kind="regression")
    expected = numbers.evaluate(TEXTS, WEIGHTS, verbose=0)
    found = numbers.evaluate(Again(batches_of(TEXTS, WEIGHTS)), verbose=0)
    assert np.allclose(found, expected, atol=1e-5)


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("batch", "kwargs", "message"),
    [
        (("a text", 0), {}, "A batch of `x` must be a batch of strings.*Batch the"),
        ((1, 2, 3, 4), {}, r"In batch 0 of `x`: A batch must be \(x, y\).*got \(1"),
        ((TEXTS,), {}, "`x` must come with labels.*got none with list"),
        (([], []), {}, "In batch 0 of `x`: it is empty"),
        (([("a", "b")], [0]), {}, "Pairs in a batch of `x` must be a dict of two colu"),
        (([TEXTS, OTHERS], [0, 1]), {}, "Pairs in a batch of `x` must be a dict"),
        ((TEXTS, LABELS[:2]), {}, "a batch of `x` must have the same number of rows"),
        ({"text": TEXTS}, {}, "`x` must come with labels.*got none with dict"),
        ((TEXTS, [9] * 5), {}, r"0 of `x`: `y\[0\]` must be labels among 0..2; got 9"),
        ((TEXTS, np.eye(5)), {}, "pass the number of the one"),
        ((TEXTS, LABELS, [1.0]), {}, "0 of `x`: `sample_weight` must have one weight"),
        ((["a", ""], [0, 1]), {}, "1 of 2 texts of `x` are empty"),
        (
            (TEXTS, LABELS),
            {"y": LABELS},
            "`y` must be None for batches",
        ),
        ((TEXTS, LABELS), {"sample_weight": WEIGHTS}, "`sample_weight` needs data in"),
        ((TEXTS, LABELS), {"validation_split": 0.2}, "`validation_split` needs data"),
        (
            (TEXTS, LABELS),
            {"class_weight": {0: 2}},
            "`class_weight` needs data",
        ),
        ((TEXTS, LABELS), {"batching": "packed"}, "`batching` must be 'bucketed' or"),
    ],
)
def test_bad_batches(tokenizer, batch, kwargs, message):
    classifier = make(kt.TextClassifier, tokenizer, num_classes=3)
    with pytest.raises(ValueError, match=message):
        classifier.fit(Numbered([batch]), verbose=0, **kwargs)


@pytest.mark.one_backend
def test_labels_of_other_libraries(tokenizer):
    """`label_mode="int"` gives `(n, 1)` in some, and strings are bytes in `tf.data`."""
    named = make(kt.TextClassifier, tokenizer, class_names=["a", "b", "c"])
    names = np.array(named.class_names)[LABELS]
    expected = named.evaluate(TEXTS, list(names), verbose=0)
    data = of_tensorflow(batches_of(TEXTS, names))
    assert np.allclose(named.evaluate(data, verbose=0), expected, atol=1e-5)
    assert named._labels(names.astype("S")).tolist() == LABELS
    with pytest.raises(ValueError, match="For numbers make the model with `num_cl"):
        named.fit(Numbered(batches_of(TEXTS, LABELS)))
    numbered = make(kt.TextClassifier, tokenizer, num_classes=3)
    assert numbered._labels(np.array(LABELS)[:, None]).tolist() == LABELS
    scalars = [keras.ops.convert_to_tensor(i) for i in LABELS]
    assert numbered._labels(scalars).tolist() == LABELS


@pytest.mark.one_backend
def test_arrays_in_batches_are_checked(tokenizer):
    classifier = make(kt.TextClassifier, tokenizer, num_classes=3)
    x, y, _ = classifier._data(TEXTS, LABELS, batch_size=5, batching="fixed")["x"][0]
    lists = {key: value.tolist() for key, value in x.items()}
    expected = classifier.evaluate(Again([(x, y, np.array(WEIGHTS))]), verbose=0)
    found = classifier.evaluate(Again([(lists, y, WEIGHTS)]), verbose=0)
    assert np.allclose(found, expected)
    with pytest.raises(ValueError, match="`sample_weight` must have one weight for"):
        classifier.evaluate(Again([(x, y, [1.0])]), verbose=0)
    with pytest.raises(ValueError, match="A batch of `x` must have labels"):
        classifier.evaluate(Again([x]), verbose=0)
    embedder = make(kt.TextEmbedder, tokenizer)
    whole = embedder._data(TEXTS, OTHERS, batch_size=5, batching="fixed")["x"][0]
    expected = embedder.evaluate(TEXTS, OTHERS, verbose=0)
    found = embedder.evaluate(Again([whole]), verbose=0)
    assert np.allclose(found, expected, atol=1e-5)


@pytest.mark.one_backend
def test_every_validation_is_of_the_same_batches(tokenizer):
    """Also of an iterator that gives others later, and reuses its batch."""

    def reused():
        batch = {"anchor": None, "positive": None}
        for i in range(100):
            batch["anchor"], batch["positive"] = TEXTS[i % 5 :][:2], OTHERS[i % 5 :][:2]
            yield batch

    embedder = make(kt.TextEmbedder, tokenizer)
    embedder.compile(keras.optimizers.SGD(0.0))
    data = {"validation_data": reused(), "validation_steps": 3}
    found = embedder.fit(TEXTS, OTHERS, epochs=3, verbose=0, **data).history
    batches = [(TEXTS[i : i + 2], OTHERS[i : i + 2]) for i in range(3)]
    expected = embedder.evaluate(Again(batches), verbose=0)[0]
    assert np.allclose(found["val_loss"], expected, atol=1e-6)


@pytest.mark.one_backend
def test_a_mesh_fills_batches_with_empty_rows(tokenizer, monkeypatch):
    """As datasets in memory do: a row twice would be a negative of itself."""
    embedder = make(kt.TextEmbedder, tokenizer)
    monkeypatch.setattr(mesh, "round_up", lambda rows: rows + rows % 2)
    x, labels, weights = embedder._data(Numbered([(TEXTS, OTHERS)]))["x"][0]
    assert weights.tolist() == [1] * 5 + [0] and labels.shape == (6,)
    for name in ("encoder_padding_mask", "positive_padding_mask"):
        assert x[name].shape[0] == 6 and not x[name][5].any() and x[name][4].any()


@pytest.mark.one_backend
def test_workers_do_not_change_the_order(tokenizer):
    """Keras reads the batches of several workers in another order."""

    def train(workers):
        data = Numbered(batches_of(TEXTS, LABELS))
        data.workers = workers
        model = make(kt.TextClassifier, tokenizer, num_classes=3)
        return losses(model, data)["loss"]

    assert train(3) == train(1)


@pytest.mark.one_backend
def test_truncation_is_reported_once(tokenizer):
    classifier = make(kt.TextClassifier, tokenizer, num_classes=3)
    classifier.preprocessor.encoder_sequence_length = 16
    data = Numbered(batches_of([text * 3 for text in TEXTS], LABELS))
    with pytest.warns(UserWarning, match="encoder texts were longer") as found:
        classifier.fit(data, epochs=2, verbose=0)
    assert sum(w.category is UserWarning for w in found) == 1


@pytest.mark.one_backend
def test_iterators_need_steps(tokenizer):
    classifier = make(kt.TextClassifier, tokenizer, num_classes=3)
    short = iter(batches_of(TEXTS, LABELS))
    with pytest.raises(ValueError, match="`validation_data` must have 4 batches; it"):
        classifier.fit(TEXTS, LABELS, validation_data=short, validation_steps=4)
    with pytest.raises(ValueError, match="`x` is empty: it has no batches"):
        classifier.fit(Numbered([]))
    with pytest.raises(ValueError, match="`x` is an iterator.*pass `steps_per_epoch`"):
        classifier.fit(endless(batches_of(TEXTS, LABELS)), verbose=0)
    embedder = make(kt.TextEmbedder, tokenizer)
    embedder.compile(gradient_cache_rows=2)
    with pytest.raises(ValueError, match="`gradient_cache_rows` needs data in memory"):
        embedder.fit(Numbered(batches_of(TEXTS, OTHERS)), verbose=0)
