import collections
import doctest
import itertools

import numpy as np
import pytest
from helpers.models import SENTENCES

from keras_t5gemma.data import objectives, span_sampling
from keras_t5gemma.data.objectives import MIXTURES, UL2, PrefixLM, Spans, Suffix
from keras_t5gemma.utils import seeded_random
from keras_t5gemma.utils.ragged import Ragged

pytestmark = pytest.mark.one_backend  # NumPy only.
SENTINELS = range(10_000, 10_400)
MODES = {"[NLU]": 1, "[NLG]": 2, "[S2S]": 3}


def make(name):
    if name in MIXTURES:
        return UL2(name, SENTINELS, MODES if name == "ul2" else None)
    return PrefixLM(name)


def texts(count, seed=0, longest=400):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, longest, count)
    return [rng.integers(100, 9000, n).tolist() for n in lengths]


def rebuild(source, target):
    """The text, by reading the target's spans into the source's sentinels."""
    spans, name = collections.defaultdict(list), None
    for id in target:
        if id in SENTINELS:
            name = id
            assert name not in spans
        spans[name].append(id)
    text = []
    for id in source:
        text += spans.pop(id)[1:] if id in SENTINELS else [id]
    assert set(spans) <= {None}
    return text + spans[None]


@pytest.mark.parametrize("name", ["half", "random", "ul2", "t5gemma2"])
def test_input_and_target_rebuild_the_text(name):
    rows = texts(500)
    objective, seeds = make(name), np.arange(500)
    lengths = np.array([len(row) for row in rows])
    expected = objective.lengths(lengths, seeds)
    places = []
    for epoch in (0, 1):
        sources, targets = objective(rows, seeds, epoch)
        assert (sources.lengths == expected[0]).all()
        assert (targets.lengths == expected[1]).all()
        for i, row in enumerate(rows):
            source = sources[i].tolist()
            if name == "ul2":
                assert source.pop(0) in MODES.values()
            assert rebuild(source, targets[i].tolist()) == row
        places.append(targets.values.tolist())
    assert (places[0] == places[1]) == isinstance(objective, PrefixLM)


def test_a_row_is_drawn_by_its_own_seed():
    rows, objective = texts(50), make("ul2")
    together = objective(rows, np.arange(50))
    for i in (0, 7, 49):
        alone = objective([rows[i]], [i])
        for side, other in zip(together, alone, strict=True):
            assert side[i].tolist() == other[0].tolist()
    other = objective(rows, np.arange(50) + 50)
    assert other[0].values.tolist() != together[0].values.tolist()


@pytest.mark.parametrize("length", [7, 20, 300])
@pytest.mark.parametrize(
    ("mean_length", "rate"), [(3, 0.15), (3, 0.5), (12, 0.5), (1, 0.3)]
)
def test_rate_and_length_of_the_spans(mean_length, rate, length):
    rows = 4000
    objective = UL2([(1, Spans(mean_length, rate))], SENTINELS)
    lengths = np.full(rows, length)
    taken, spans = objective._sizes(lengths, np.arange(rows))[1:]
    if rate * length >= 1:  # Below, one token is always taken out.
        error = 1 / np.sqrt(rows)  # A fraction is rounded up or down.
        assert abs(taken.mean() - rate * length) < 4 * error
    if mean_length <= rate * length and length - taken.max() >= spans.max():
        assert abs(spans.mean() - taken.mean() / mean_length) < 4 / np.sqrt(rows)
    text = Ragged(lengths, np.tile(np.arange(length), rows))
    _, targets = objective(text, np.arange(rows))
    kept = targets.values[targets.values < length]
    # The ends of a text are taken out too. Far from them no place is preferred.
    share = np.bincount(kept, minlength=length) / rows
    assert share.min() > 0
    if length == 300:
        middle = share[100:200]
        assert np.ptp(middle) < 9 * np.sqrt(middle.mean() / rows)


def test_the_mixture_is_drawn_by_its_weights():
    objective = make("t5gemma2")
    kinds = objective._sizes(np.full(16_000, 64), np.arange(16_000))[0]
    counts = np.bincount(kinds)
    expected = np.array([1, 1, 1, 1, 4]) * 2000
    assert ((counts - expected) ** 2 / expected).sum() < 25  # Chi-square, 4 degrees.
    is_suffix = objective.ends_with_the_text(np.arange(16_000))
    assert (is_suffix == (kinds == 4)).all()


def test_short_texts_have_no_fixed_mask():
    objective = UL2([(1, Spans(3, 0.15))], SENTINELS)
    for length in (2, 3, 5):
        rows = [list(range(100, 100 + length))] * 200
        targets = objective(rows, np.arange(200))[1]
        assert {targets[i].tolist()[1] for i in range(200)} == set(rows[0])


def test_sums_are_drawn_alike():
    rows = 6000
    draws = seeded_random.draws(np.arange(rows), 5, 1)
    parts = span_sampling.compose(
        np.full(rows, 5), np.full(rows, 3), Ragged(np.full(rows, 5), draws)
    )
    found = collections.Counter(map(tuple, parts.values.reshape(-1, 3).tolist()))
    alike = [p for p in itertools.product(range(1, 4), repeat=3) if sum(p) == 5]
    assert set(found) == set(alike)
    expected = rows / len(alike)
    chi_square = sum((n - expected) ** 2 / expected for n in found.values())
    assert chi_square < 25  # 5 degrees of freedom.


def test_draws_are_uniform_and_unrelated():
    draws = seeded_random.draws(np.arange(2000), 50, 3).reshape(2000, 50)
    assert 0 <= draws.min() and draws.max() < 1
    assert abs(draws.mean() - 0.5) < 4 * np.sqrt(1 / 12 / draws.size)
    for a, b in ((draws[:-1], draws[1:]), (draws[:, :-1], draws[:, 1:])):
        correlation = np.corrcoef(a.ravel(), b.ravel())[0, 1]
        assert abs(correlation) < 4 / np.sqrt(a.size)
    other = seeded_random.draws(np.arange(2000), 50, 4).ravel()
    correlation = np.corrcoef(draws.ravel(), other)[0, 1]
    assert abs(correlation) < 4 / np.sqrt(other.size)


def test_prefix_lm_splits_in_the_middle():
    objective = PrefixLM()
    rows = [list(range(n)) for n in (2, 8, 9, 9, 9, 9, 9, 9)]
    sources, _ = objective(rows, np.arange(8))
    assert sources.lengths[:2].tolist() == [1, 4]
    assert set(sources.lengths[2:].tolist()) == {4, 5}
    sources, _ = PrefixLM("random")([list(range(6))] * 500, np.arange(500))
    counts = np.bincount(sources.lengths)
    assert counts[0] == 0 and len(counts) == 6
    assert ((counts[1:] - 100) ** 2 / 100).sum() < 25


@pytest.mark.parametrize("name", ["half", "random", "ul2", "t5gemma2"])
@pytest.mark.parametrize("room", [(16, 16), (256, 64), (64, 200)])
def test_longest_text(name, room):
    objective = make(name)
    longest = objective.longest_text(*room)
    seeds = np.arange(5000)
    lengths = objective.lengths(np.full(5000, longest), seeds)
    assert [a.max() <= b for a, b in zip(lengths, room, strict=True)] == [True, True]
    lengths = objective.lengths(np.full(5000, longest + 1), seeds)
    assert lengths[0].max() > room[0] or lengths[1].max() > room[1]


def test_unused_tokens_are_sentinels_and_modes(tokenizer):
    objective = UL2.from_tokenizer(tokenizer)
    unused = [tokenizer.token_to_id(f"<unused{i}>") for i in range(99)]
    assert objective.sentinels.tolist() == unused[::-1]
    objective = UL2.from_tokenizer(tokenizer, "ul2")
    assert objective.mode_tokens == dict(zip(MODES, unused, strict=False))
    assert objective.sentinels.tolist() == unused[:2:-1]
    ids = tokenizer.tokenize(SENTENCES)
    sources, targets = objective(ids, np.arange(len(ids)))
    assert set(sources.values) & set(unused) and set(targets.values) & set(unused)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Spans(0.5, 0.15), "`mean_length` must be.*at least 1; got 0.5"),
        (lambda: Spans(3, 1.5), "`rate` must be a number above 0 and below 1; got 1.5"),
        (lambda: Suffix(0), "`rate` must be a number above 0 and below 1; got 0"),
        (lambda: PrefixLM("third"), "`split` must be one of.*random.*'third'"),
        (lambda: UL2("t5"), "`mixture` must be one of.*t5gemma2.*'t5'"),
        (lambda: UL2([]), "`mixture` must be one of"),
        (lambda: UL2([(0, Spans(3, 0.1))], [1]), "weight > 0"),
        (lambda: UL2("t5gemma2"), "`sentinels` must not be empty"),
        (lambda: UL2("ul2", [9]), r"`mode_tokens` must have an id for \['\[NLG\]'"),
        (lambda: UL2("ul2", [1], MODES), "must be different ids"),
        (lambda: PrefixLM()([[1, 2], [3]], [0, 1]), "at least 2 tokens; row 1 has 1"),
        (
            lambda: PrefixLM()([[1, 2]], [0, 1]),
            "`seeds` must have 1 numbers, one per row; got 2",
        ),
        (
            lambda: UL2([(1, Spans(1, 0.5))], [9])([list(range(10))], [0]),
            "10 tokens has up to 5 spans, and there are 1 `sentinels`",
        ),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_examples_of_the_docstrings():
    failed, tried = doctest.testmod(objectives)
    assert tried and not failed
