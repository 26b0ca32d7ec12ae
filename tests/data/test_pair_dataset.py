"""Batches of an epoch: what is in them, in which order, from where on."""

import functools

import keras
import numpy as np
import pytest
from helpers.models import SENTENCES, tiny_config

import keras_t5gemma as kt
from keras_t5gemma.data.fit_adapters import fit_arguments
from keras_t5gemma.data.pair_dataset import BATCHINGS, PairDataset
from keras_t5gemma.data.resumable import any_width, follow
from keras_t5gemma.data.text_batches import MappedBatches, StreamBatches, map_batch

WORDS = " ".join(SENTENCES).split()
SOURCES = [" ".join(WORDS[i : i + 1 + i % 9]) for i in range(35)]
TARGETS = [" ".join(WORDS[i : i + i % 4]) or "a" for i in range(35)]
PAIRS = {"encoder_text": SOURCES, "decoder_text": TARGETS}


@pytest.fixture(scope="module")
def preprocessor(tokenizer):
    return kt.Seq2SeqLMPreprocessor(tokenizer, 64, 32)


def epoch(batches, number=0):
    batches.set_epoch(number)
    return [batches[i] for i in range(batches.num_batches)]


def pairs_of(batch):
    """`(source ids, decoder ids, labels, weights)` of every pair in a batch."""
    x, labels, weights = batch
    found = []
    for row in range(len(labels)):
        for number in range(1, 1 + x["decoder_padding_mask"][row].max(initial=0)):
            source = x["encoder_padding_mask"][row] == number
            target = x["decoder_padding_mask"][row] == number
            found.append(
                (
                    tuple(x["encoder_token_ids"][row][source].tolist()),
                    tuple(x["decoder_token_ids"][row][target].tolist()),
                    tuple(labels[row][target].tolist()),
                    tuple(weights[row][target].tolist()),
                )
            )
    return found


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("batching", BATCHINGS)
def test_every_pair_once_an_epoch(preprocessor, batching, shuffle):
    weight = np.arange(35) / 8
    expected = pairs_of(preprocessor(PAIRS, sample_weight=weight))
    batches = PairDataset(preprocessor, PAIRS, weight, 4, shuffle, batching)
    orders = []
    for number in (0, 1):
        rows = []
        for step, batch in enumerate(epoch(batches, number)):
            pairs = pairs_of(batch)
            rows += batches.rows(step)
            assert pairs == [expected[i] for i in batches.rows(step)]
            masks = [batch[0][f"{s}_padding_mask"] for s in ("encoder", "decoder")]
            tokens = sum((mask > 0).sum() for mask in masks)
            assert batches.counts(step) == (tokens, sum(mask.size for mask in masks))
        assert sorted(rows) == list(range(35))
        orders.append(rows)
    assert (orders[0] == orders[1]) == (not shuffle)
    if not shuffle and batching != "packed":
        assert orders[0] == list(range(35))


@pytest.mark.parametrize("shuffle", [True, False])
def test_buckets_have_few_shapes_and_little_padding(preprocessor, shuffle):
    """The bound: four programs, whatever the lengths; no short last batch."""
    fixed, bucketed, packed = (
        PairDataset(preprocessor, PAIRS, None, 1, shuffle, batching)
        for batching in ("fixed", "bucketed", "packed")
    )
    wide = PairDataset(preprocessor, PAIRS, None, 4, shuffle)
    shapes, padding = [], []
    for batches in (fixed, bucketed, packed, wide):
        seen = [epoch(batches, number) for number in range(3)]
        shapes.append(
            {
                (*b[0]["encoder_token_ids"].shape, *b[1].shape)
                for batch in seen
                for b in batch
            }
        )
        counts = np.sum([batches.counts(i) for i in range(batches.num_batches)], 0)
        padding.append(1 - counts[0] / counts[1])
    assert [len(s) for s in shapes] == [1, 4, 1, 1]
    assert {s[0] for s in shapes[3]} == {4} and wide.num_batches == 9
    assert padding[1] < 0.5 * padding[0] and padding[2] < 0.5 * padding[0]


def test_a_batch_is_as_wide_as_its_bucket(preprocessor):
    batches = PairDataset(preprocessor, PAIRS, None, 1, True)
    for x, labels, _ in epoch(batches):
        used = x["encoder_padding_mask"].sum(), x["decoder_padding_mask"].sum()
        fitting = [w for w in batches.widths if used[0] <= w[0] and used[1] <= w[1]]
        assert (x["encoder_token_ids"].shape[1], labels.shape[1]) == fitting[0]


def test_validation_takes_the_widths_of_training(preprocessor):
    training = PairDataset(preprocessor, PAIRS, None, 1, True)
    longer = {
        "encoder_text": [*SOURCES, " ".join(WORDS)],
        "decoder_text": [*TARGETS, "a"],
    }
    kwargs = {"batch_size": 1, "like": training}
    with pytest.warns(UserWarning, match="1 of 36 encoder texts"):
        data = fit_arguments(preprocessor, 480, longer, **kwargs)["x"]
    assert data.widths[:3] == training.widths[:3]
    assert data.widths[3] == (64, training.widths[3][1]) != training.widths[3]
    assert len(epoch(data)) == 36


@pytest.mark.parametrize("batching", BATCHINGS)
def test_order_is_of_seed_and_epoch_alone(preprocessor, batching):
    def orders(epochs, **kwargs):
        batches = PairDataset(preprocessor, PAIRS, None, 4, True, batching)
        for key, value in kwargs.items():
            setattr(batches, key, value)
        found = {}
        for number in epochs:
            batches.set_epoch(number)
            found[number] = [batches.rows(i) for i in range(batches.num_batches)]
        return found, batches.seed

    keras.utils.set_random_seed(1)
    first, seed = orders([0, 1, 2])
    assert orders([2, 0], seed=seed)[0] == {2: first[2], 0: first[0]}
    assert orders([0])[0][0] != first[0]
    keras.utils.set_random_seed(1)
    assert orders([1])[0][1] == first[1]


@pytest.mark.parametrize("batching", BATCHINGS)
def test_steps_go_through_all_pairs(preprocessor, batching):
    batches = PairDataset(preprocessor, PAIRS, None, 2, True, batching, steps=3)
    whole = PairDataset(preprocessor, PAIRS, None, 2, True, batching)
    whole.seed = batches.seed
    expected = [whole.rows(i) for i in range(whole.num_batches)]
    seen, number = [], 0
    while len(seen) < len(expected):
        batches.set_epoch(number)
        assert batches.num_batches == 3
        seen += [batches.rows(i) for i in range(3)]
        number += 1
    assert seen[: len(expected)] == expected


@pytest.fixture(scope="module")
def model(preprocessor):
    keras.utils.set_random_seed(0)

    class Counting(kt.Seq2SeqLM):
        traces = 0

        def train_step(self, *args):
            self.traces += 1
            return super().train_step(*args)

    return Counting(kt.Backbone(tiny_config()), preprocessor)


def test_loss_is_the_same_in_all_batches(model):
    """And is the mean over tokens; Keras's is one of batch means."""
    model.compile()
    rng = np.random.default_rng(0)
    options = {"sample_weight": rng.uniform(0.5, 2, 35), "verbose": 0}
    fixed, packed, bucketed = (
        model.evaluate(PAIRS, batch_size=size, batching=batching, **options)
        for size, batching in ((35, "fixed"), (4, "packed"), (8, "bucketed"))
    )
    assert np.allclose(packed, fixed, rtol=1e-5)
    assert np.allclose(bucketed, fixed, rtol=1e-5)


class Rows(keras.callbacks.Callback):
    """The rows of every batch that a `fit` has trained on."""

    def __init__(self, batches):
        super().__init__()
        self.batches = batches
        self.seen = {}

    def on_train_batch_end(self, batch, logs=None):
        self.seen.setdefault(self.batches.epoch, []).append(self.batches.rows(batch))


@pytest.mark.parametrize(
    "early",
    [
        pytest.param(True, id="before_fit", marks=pytest.mark.one_backend),
        pytest.param(False, id="in_fit"),
    ],
)
def test_fit_goes_on_in_the_middle_of_an_epoch(model, early):
    """Through Keras's own loop, which counts the batches of an epoch only once."""
    columns = {key: value[:16] for key, value in PAIRS.items()}
    batches = PairDataset(model.preprocessor, columns, None, 1, True)
    expected = {}
    for number in (1, 2):
        batches.set_epoch(number)
        expected[number] = [batches.rows(i) for i in range(16)]
    expected[1] = expected[1][7:]

    rows = Rows(batches)
    begin = keras.callbacks.LambdaCallback(
        on_train_begin=lambda logs: batches.start_at(1, 7)
    )
    if early:
        batches.start_at(1, 7)
    keras.Model.fit(
        model,
        any_width(batches),
        initial_epoch=1,
        epochs=3,
        callbacks=[follow(batches), rows, *([] if early else [begin])],
        verbose=0,
    )
    assert rows.seen == expected
    assert len(batches.widths) == 2
    if keras.config.backend() != "torch":
        assert 1 <= model.traces <= 2  # At most one for each pair of widths.


def test_validation_rows_are_not_shuffled_and_fit_uses_them(model):
    data = fit_arguments(
        model.preprocessor, 480, PAIRS, shuffle=True, validation_split=0.2
    )
    assert data["x"].shuffle and len(data["x"].packs) == 28
    held_out = data["held_out"]["x"]
    assert not held_out.shuffle and held_out.rows(0) == list(range(7))
    assert (
        pairs_of(held_out[0])[0]
        == pairs_of(
            model.preprocessor({key: value[28:29] for key, value in PAIRS.items()})
        )[0]
    )


def text_batch(start):
    return {key: value[start : start + 5] for key, value in PAIRS.items()}


class SevenBatches(keras.utils.PyDataset):
    def __len__(self):
        return 7

    def __getitem__(self, index):
        return text_batch(index * 5)


def stream_of_seven():
    return [text_batch(i * 5) for i in range(7)]


def sources(batch):
    return [pair[0] for pair in pairs_of(batch)]


@pytest.mark.parametrize(
    "make",
    [
        lambda convert, steps: MappedBatches(convert, SevenBatches(), steps=steps),
        lambda convert, steps: StreamBatches(
            convert, stream_of_seven(), steps or 7, bool(steps)
        ),
    ],
    ids=["PyDataset", "stream"],
)
@pytest.mark.parametrize("steps", [None, 3])
def test_batches_of_a_user_start_anywhere(preprocessor, make, steps):
    expected = [sources(preprocessor(b)) for b in stream_of_seven()]
    convert = functools.partial(map_batch, preprocessor)
    batches, length = make(convert, steps), steps or 7
    for number in (0, 1, 2):
        first = number * length
        wanted = [expected[i % 7] for i in range(first, first + length)]
        assert [sources(batch) for batch in epoch(batches, number)] == wanted
    x = batches[0][0]
    masks = [x[f"{side}_padding_mask"] for side in ("encoder", "decoder")]
    assert [mask.shape for mask in masks] == [(5, 16), (5, 16)]
    assert batches.counts(0) == (sum((m > 0).sum() for m in masks), 5 * (16 + 16))
    again = make(convert, steps)
    again.start_at(1, 2)
    again[0], again[1]  # Keras looks at the first ones to build.
    assert [sources(b) for b in epoch(again, 1)] == [
        expected[i % 7] for i in range(length + 2, 2 * length)
    ]
    again.on_epoch_begin()
    again.on_epoch_end()
    assert again.num_batches == length


def test_shuffled_batches_of_a_user(preprocessor):
    convert = functools.partial(map_batch, preprocessor)
    batches = MappedBatches(convert, SevenBatches(), shuffle=True)
    orders = [[sources(b)[0] for b in epoch(batches, number)] for number in (0, 1)]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


def test_what_cannot_go_on_says_so(preprocessor):
    batches = PairDataset(preprocessor, PAIRS, batch_size=5)
    with pytest.raises(ValueError, match=r"`batch` must be in \[0, 7\).*got 7"):
        batches.start_at(0, 7)
    with pytest.raises(ValueError, match="`x` is an iterator.*pass `steps_per_epoch`"):
        fit_arguments(preprocessor, 480, (b for b in stream_of_seven()))
    data = (b for b in stream_of_seven())
    generator = fit_arguments(preprocessor, 480, data, steps=7)["x"]
    with pytest.raises(ValueError, match="iterated again; got generator"):
        kt.callbacks.BackupAndRestore("nowhere").restore(None, generator)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batching": "buckets"}, "`batching` must be one of.*'fixed'.*got 'buckets'"),
        ({"batch_size": 2.5}, "`batch_size` must be a whole number.*2.5"),
        ({"steps": 8, "batch_size": 5}, "7 batches of 5 rows, fewer than the 8 steps"),
        ({"sample_weight": [1.0]}, r"one weight for each of the 35 rows.*\(1,\)"),
        (
            {"validation_split": 0.01},
            "`validation_split` 0.01 of 35 rows holds out no row",
        ),
        ({"x": {key: [] for key in PAIRS}}, "same number of rows.*at least"),
        (
            {"x": {key: [] for key in PAIRS}, "name": "validation_data"},
            "`validation_data` must have",
        ),
        ({"x": SevenBatches(), "batching": "packed"}, "packed.*SevenBatches"),
        ({"x": SevenBatches(), "batching": "bad"}, "`batching` must be one of"),
    ],
)
def test_bad_arguments(preprocessor, kwargs, message):
    with pytest.raises(ValueError, match=message):
        fit_arguments(preprocessor, 480, **{"x": PAIRS, **kwargs})
