"""How pairs fill batches, and that a row of several pairs is as good as rows of one."""

import itertools

import keras
import numpy as np
import pytest
from helpers.models import SENTENCES, enlarge, max_difference, numpy, tiny_config

import keras_t5gemma as kt
from keras_t5gemma.data import packing
from keras_t5gemma.data.pair_dataset import PairDataset

LIMITS = (40, 32)


def lengths(count=60, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 41, count), rng.integers(1, 33, count)


def positions(sources, targets, widths):
    level = packing.levels(sources, targets, widths)
    return sum(sum(widths[i]) for i in level)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_widths_pad_least(count):
    sources, targets = lengths()
    widths = packing.choose_widths(sources, targets, LIMITS, count)
    grid = list(itertools.product((8, 16, 24, 32, 40), (8, 16, 24, 32)))
    least = min(
        positions(sources, targets, [*chain, LIMITS])
        for chain in itertools.combinations(grid, count - 1)
        if all(a[1] <= b[1] for a, b in itertools.pairwise(chain))
    )
    assert len(widths) <= count and widths[-1] == LIMITS
    assert positions(sources, targets, widths) == least


def test_widths_are_those_that_occur():
    short = np.array([3, 9, 17]), np.array([2, 2, 2])
    assert packing.choose_widths(*short, LIMITS, 4) == [(8, 8), (16, 8), (24, 8)]
    assert packing.choose_widths(*short, (20, 5), 1) == [(20, 5)]
    assert packing.choose_widths(np.zeros(2, int), np.ones(2, int), LIMITS, 4) == [
        (8, 8)
    ]


def test_many_lengths_are_thinned_out():
    sources = np.arange(4000)
    targets = np.full(4000, 5)
    widths = packing.choose_widths(sources, targets, (4000, 8), 4)
    # Four equal parts are best: each pads by half of its quarter.
    best = 4000 * (1000 + 2000 + 3000 + 4000) / 4 + 4000 * 8
    assert widths[-1] == (4000, 8)
    assert positions(sources, targets, widths) < 1.02 * best


def test_first_fit():
    sources, targets = lengths(300)
    rows = packing.first_fit(sources, targets, LIMITS)
    room, expected = [], []
    for pair in zip(sources, targets, strict=True):
        fits = (i for i, free in enumerate(room) if all(np.less_equal(pair, free)))
        row = next(fits, len(room))
        if row == len(room):
            room.append(LIMITS)
        room[row] = np.subtract(room[row], pair)
        expected.append(row)
    assert rows.tolist() == expected
    assert max(expected) < 0.9 * 300


def test_left_over_rows_go_to_the_next_level():
    level = np.array([0, 1, 0, 2, 0, 1, 2, 2])
    order = np.array([7, 6, 5, 4, 3, 2, 1, 0])
    batches = packing.batches_by_level(order, level, 3, 3)
    assert batches.tolist() == [[4, 2, 0], [5, 1, 7], [6, 3, -1]]


@pytest.fixture(scope="module")
def model(tokenizer):
    keras.utils.set_random_seed(0)
    preprocessor = kt.Seq2SeqLMPreprocessor(tokenizer, 64, 32)
    model = kt.Seq2SeqLM(kt.Backbone(tiny_config()), preprocessor)
    enlarge(model.backbone, 4.0)
    # So large a step that what it changes is the gradient.
    model.compile(optimizer=keras.optimizers.SGD(1.0))
    return model


# Longer than the window of 8, shorter, and without anything to read.
PAIRS = {
    "encoder_text": [*SENTENCES[:3], "a", ""],
    "decoder_text": ["A fox", SENTENCES[1], "numbers", "", "b"],
}


@pytest.fixture(scope="module")
def batches(model):
    """One batch each, with the same pairs: a pair a row, and several."""
    weights = [1.0, 0.5, 2.0, 1.0, 1.0]
    with (
        pytest.warns(UserWarning, match="2 of 10 sources are empty"),
        pytest.warns(UserWarning, match="2 of 10 targets are empty"),
        model.preprocessor.report_truncation(empty=True),
    ):
        plain, packed = (
            PairDataset(model.preprocessor, PAIRS, weights, 5, batching=batching)
            for batching in ("fixed", "packed")
        )
    return plain, packed


def logits_of(model, x):
    return numpy(keras.Model.predict_on_batch(model, x))


def segments(batches, x, values, side):
    """What `values` hold for each pair, by its number among all pairs."""
    found = {}
    for row, pack in enumerate(batches.packs):
        for number, pair in enumerate(pack, 1):
            mine = x[f"{side}_padding_mask"][row] == number
            found[int(pair)] = values[row][mine]
    return found


def test_packed_logits_equal_unpacked(model, batches):
    logits, rows = [], []
    for data in batches:
        x, labels, weights = data[0]
        logits.append(segments(data, x, logits_of(model, x), "decoder"))
        rows.append(segments(data, x, np.stack([labels, weights], -1), "decoder"))
    assert len(batches[1].packs) == 2 < len(logits[1]) == 5
    for pair in range(5):
        assert (rows[0][pair] == rows[1][pair]).all()
        assert max_difference(logits[0][pair], logits[1][pair]) < 1e-4


def test_pairs_in_a_row_do_not_see_each_other(model, batches):
    packed = batches[1]
    x = packed[0][0]
    before = segments(packed, x, logits_of(model, x), "decoder")
    changed = {key: value.copy() for key, value in x.items()}
    pair = packed.packs[0][1]
    for side in ("encoder", "decoder"):
        mine = (np.arange(len(packed[0][1])) == 0)[:, None] & (
            x[f"{side}_padding_mask"] == 2
        )
        changed[f"{side}_token_ids"][mine] = 5
    after = segments(packed, x, logits_of(model, changed), "decoder")
    for other in range(5):
        same = max_difference(before[other], after[other]) == 0
        assert same == (other != pair)


def test_packed_loss_and_gradient_equal_unpacked(model, batches):
    start = [numpy(v).copy() for v in model.trainable_variables]
    results = []
    for data in batches:
        for variable, value in zip(model.trainable_variables, start, strict=True):
            variable.assign(value)
        x, y, weights = data[0]
        loss = keras.Model.train_on_batch(model, x, y, weights)[0]
        after = [numpy(v) for v in model.trainable_variables]
        results.append((float(loss), after))
    (loss, plain), (packed_loss, packed) = results
    for variable, value in zip(model.trainable_variables, start, strict=True):
        variable.assign(value)
    assert abs(packed_loss / loss - 1) < 1e-5
    for before, a, b in zip(start, plain, packed, strict=True):
        size = np.abs(a - before).max()
        assert size > 0 and np.abs(a - b).max() < 1e-4 * size + 1e-6
