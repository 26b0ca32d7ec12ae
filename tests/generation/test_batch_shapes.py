"""Array shapes of batches: compilation time against padded work."""

import itertools
import random
import time

import pytest

from keras_t5gemma.generation.batch_shapes import Costs

SHAPES = [(8, 128, 0)] * 3 + [(8, 64, 0)] * 5 + [(8, 16, 0)] * 2 + [(2, 32, 0)]
SHAPES += [(4, 1024, 0), (2, 64, 4), (8, 32, 2)]

pytestmark = pytest.mark.one_backend


def total(costs, batches, used):
    """Estimated time of all batches and programs."""
    program = costs.encoder_program + costs.decoder_program
    work = sum(costs.of_batch(used[shape]) for shape in batches)
    return work + program * len({used[shape] for shape in batches})


def may_replace(large, small):
    fits = all(a >= b for a, b in zip(large, small, strict=True))
    return fits and (large[2] > 0) == (small[2] > 0)


@pytest.mark.parametrize("program", [0.0, 0.3, 1.0, 3.0, 1000.0])
def test_shared_shapes_against_all_choices(program):
    """The chosen ones cost at most a tenth more than the best of all sets of shapes."""
    costs = Costs(1e-3, 0.02, program / 2, program / 2)
    used = costs.shared_shapes(SHAPES)
    assert all(may_replace(large, small) for small, large in used.items())
    kinds = list(dict.fromkeys(SHAPES))
    best = float("inf")
    for count in range(1, len(kinds) + 1):
        for kept in itertools.combinations(kinds, count):
            fits = {s: [k for k in kept if may_replace(k, s)] for s in kinds}
            if all(fits.values()):
                cheapest = {s: min(k, key=costs.of_batch) for s, k in fits.items()}
                best = min(best, total(costs, SHAPES, cheapest))
    assert total(costs, SHAPES, used) <= 1.1 * best
    number = len(set(used.values()))
    assert number == {0.0: len(kinds), 1000.0: 4}.get(program, number)


def cubic_shared_shapes(costs, shapes):
    """The greedy choice of `shared_shapes`, over all pairs in every step."""
    shapes = list(shapes)
    used = {shape: shape for shape in shapes}
    program = costs.encoder_program + costs.decoder_program
    while True:
        kept = set(used.values())
        gains = []
        for small, large in itertools.permutations(kept, 2):
            if may_replace(large, small):
                count = sum(used[shape] == small for shape in shapes)
                added = costs.of_batch(large) - costs.of_batch(small)
                gains.append((program - count * added, small, large))
        if max(gains, default=(0,))[0] <= 0:
            return used
        _, small, large = max(gains)
        used = {a: large if b == small else b for a, b in used.items()}


@pytest.mark.parametrize("program", [0.0, 8.0, 64.0, 1024.0])
def test_shared_shapes_against_all_pairs(program):
    rng = random.Random(0)
    costs = Costs(2**-9, 2**-4, program / 2, program / 2)  # Sums are exact.
    for _ in range(5):
        shapes = [
            (2 ** rng.randrange(5), 16 * rng.randrange(1, 40), rng.choice([0, 0, 1, 4]))
            for _ in range(40)
        ]
        assert costs.shared_shapes(shapes) == cubic_shared_shapes(costs, shapes)


def test_many_shapes_take_no_longer_than_their_squares():
    costs = Costs(1e-4, 1e-3, 0.5, 0.5)
    shapes = [(rows, 8 * length, 0) for rows in range(1, 17) for length in range(40)]
    start = time.process_time()
    assert len(costs.shared_shapes(shapes)) == 640
    assert time.process_time() - start < 15  # 1 s, and minutes for all pairs.


def test_large_models_and_requests_use_more_programs():
    small = Costs(1e-6, 1e-4, 1.0, 1.0)
    large = Costs(1e-2, 1.0, 5.0, 5.0)
    assert len(set(small.shared_shapes(SHAPES).values())) == 4
    assert len(set(large.shared_shapes(SHAPES * 4).values())) > 4
    assert not small.shrinking_pays(rows=32, batches=13)
    assert small.shrinking_pays(rows=32, batches=13_000)
    assert large.shrinking_pays(rows=32, batches=13)
