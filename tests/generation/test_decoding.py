"""What one may ask of the decoding loop, against plain loops and transformers."""

import keras
import numpy as np
import pytest
from helpers.models import numpy, tiny_config, tiny_model
from helpers.oracles import (
    SOURCES,
    generated_ids,
    greedy_oracle,
    plain_log_probs,
    plain_logits,
)

import keras_t5gemma as kt
from keras_t5gemma.generation import beam, decoding, requests
from keras_t5gemma.generation.batch_shapes import Costs
from keras_t5gemma.generation.generator import _write
from keras_t5gemma.generation.options import GenerationOptions
from keras_t5gemma.modeling import kv_cache

LENGTH = 16
FULL = {"max_length": LENGTH, "stop_token_ids": None}


def test_sampling_by_seed_whatever_the_batch(shared_model):
    options = {**FULL, "temperature": 0.8, "top_p": 0.95}
    texts = shared_model.generate(SOURCES, seed=3, **options)
    assert shared_model.generate(SOURCES, seed=3, **options) == texts
    assert shared_model.generate(SOURCES, seed=3, batch_size=1, **options) == texts
    assert shared_model.generate(SOURCES, seed=4, **options) != texts
    keras.utils.set_random_seed(1)
    drawn = shared_model.generate(SOURCES, **options)
    assert shared_model.generate(SOURCES, **options) != drawn
    keras.utils.set_random_seed(1)
    assert shared_model.generate(SOURCES, **options) == drawn
    many = shared_model.generate(SOURCES, seed=3, num_return_sequences=3, **options)
    assert [len(row) for row in many] == [3, 3, 3]
    assert len({text for row in many for text in row}) > 3


@pytest.mark.one_backend
def test_nearly_no_temperature_is_greedy(shared_model):
    greedy = generated_ids(shared_model, SOURCES, LENGTH)
    assert generated_ids(shared_model, SOURCES, LENGTH, temperature=1e-4) == greedy
    assert generated_ids(shared_model, SOURCES, LENGTH, top_k=1) == greedy
    assert generated_ids(shared_model, SOURCES, LENGTH, return_scores=True) == greedy


def test_scores_are_those_of_score(shared_model):
    for options in (
        {},
        {"top_k": 20, "temperature": 2.0, "seed": 1},
        {"repetition_penalty": 1.5},
        {"num_beams": 2, "repetition_penalty": 1.5},
    ):
        out = shared_model.generate(
            SOURCES, max_length=LENGTH, return_scores=True, **options
        )
        for i, source in enumerate(SOURCES):
            ids = out["token_ids"][i].tolist()
            rows = [[2, *ids[:n]] for n in range(len(ids))]
            expected = plain_log_probs(shared_model, source, rows, LENGTH, LENGTH)
            expected = expected[np.arange(len(ids)), ids]
            assert np.abs(out["token_log_probs"][i] - expected).max() < 1e-4
            assert abs(out["log_prob"][i] - expected.sum()) < 1e-3
    single = shared_model.generate(SOURCES[0], max_length=LENGTH, return_scores=True)
    assert isinstance(single["text"], str)
    assert single["token_ids"].shape == single["token_log_probs"].shape


def penalised_oracle(model, source, options, length=LENGTH, stops=(1, 107)):
    """Greedy with penalties, as their definitions say, by the plain forward pass."""
    ids = [2]
    while len(ids) < length:
        logits = plain_logits(model, source, [ids], length)[0]
        penalty = options.get("repetition_penalty", 1.0)
        for token in set(ids):
            logits[token] *= penalty if logits[token] < 0 else 1 / penalty
        n = options.get("no_repeat_ngram_size", 0)
        for i in range(n - 1, len(ids) if n else 0):
            if len(ids) >= n and ids[i - n + 1 : i] == ids[len(ids) - n + 1 :]:
                logits[ids[i]] = -np.inf
        if len(ids) - 1 < options.get("min_new_tokens", 0):
            logits[list(stops)] = -np.inf
        logits[list(options.get("banned_token_ids", ()))] = -np.inf
        forced = options.get("forced_token_ids", {})
        ids.append(forced.get(len(ids) - 1, int(logits.argmax())))
        if ids[-1] in stops:
            break
    return ids


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.8},
        {"no_repeat_ngram_size": 1},
        {"forced_token_ids": {0: 9, 3: 300}},
        {"min_new_tokens": 9},
        {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "min_new_tokens": 4},
    ],
    ids=str,
)
def test_penalties_by_their_definitions(shared_model, options):
    # Ids that greedy decoding writes end it, or are banned: something has to change.
    plain = generated_ids(shared_model, SOURCES, LENGTH, stop_token_ids=None)
    stops = tuple({row[3] for row in plain}) if "min_new_tokens" in options else (1,)
    if "forced_token_ids" in options:
        banned = {row[2] for row in plain} - {9, 300}
        options = {**options, "banned_token_ids": tuple(banned)}
    rows = generated_ids(shared_model, SOURCES, LENGTH, stop_token_ids=stops, **options)
    before = generated_ids(shared_model, SOURCES, LENGTH, stop_token_ids=stops)
    assert rows == [
        penalised_oracle(shared_model, s, options, stops=stops) for s in SOURCES
    ]
    assert rows != before


def test_one_source_with_several_prompts_is_read_once(shared_model, monkeypatch):
    prompts_ = ["The old board", "", "fox", "A small tool"]
    together = {"encoder_text": SOURCES[0], "decoder_text": prompts_}
    apart = {"encoder_text": [SOURCES[0]] * 4, "decoder_text": prompts_}
    read = []
    encoder = type(shared_model.backbone.encoder)
    call = encoder.call

    def count(self, token_ids, *args, **kwargs):
        read.append(token_ids.shape[0])
        return call(self, token_ids, *args, **kwargs)

    monkeypatch.setattr(encoder, "call", count)
    shared_model._generator().engines.clear()
    for options in ({}, {"num_beams": 2, "num_return_sequences": 2}):
        expected = shared_model.generate(apart, max_length=LENGTH, **options)
        read.clear()
        assert shared_model.generate(together, LENGTH, **options) == expected
        assert set(read) == {1}
    with pytest.raises(ValueError, match="more than the `max_length` of 2"):
        shared_model.generate(together, 2)


def test_prompts_of_unequal_length_in_one_batch(shared_model, monkeypatch):
    """Prompts of 9 to 16 tokens, past the window, in a batch of beams or of greedy."""
    rng = np.random.default_rng(0)
    tokens = [rng.integers(110, 480, n).tolist() for n in (9, 12, 15, 8)]
    sources = [*SOURCES, "A board of old"]
    inputs = shared_model.preprocessor.generate_preprocess(sources, 24)
    ids, mask = requests.pad([[2, *row] for row in tokens], 24)
    inputs |= {"decoder_token_ids": ids, "decoder_padding_mask": mask}
    kwargs = {"max_length": 24, "stop_token_ids": None}
    sizes = []
    batches = requests.batches

    def spy(*args):
        for rows, arrays in batches(*args):
            sizes.append(len(rows))
            yield rows, arrays

    monkeypatch.setattr("keras_t5gemma.generation.generator.batches", spy)
    for options in ({}, {"num_beams": 2}):
        together = shared_model.generate(inputs, **kwargs, **options)
        assert 4 in sizes
        for i in range(4):
            one = {k: v[i : i + 1] for k, v in inputs.items()}
            alone = shared_model.generate(one, **kwargs, **options)
            for name, array in alone.items():
                assert array[0].tolist() == together[name][i].tolist()
            assert array[0].sum() == 24
            row = together["decoder_token_ids"][i].tolist()
            assert row[: len(tokens[i]) + 1] == [2, *tokens[i]]
            if not options:
                assert row == greedy_oracle(shared_model, sources[i], 24, tokens[i], ())


def test_a_stop_in_the_prompt_does_not_stop(shared_model):
    arrays = shared_model.preprocessor.generate_preprocess(["A board"], LENGTH)
    arrays["decoder_token_ids"][0, 1:3] = (107, 300)
    arrays["decoder_padding_mask"][0, 1:3] = 1
    out = shared_model.generate(arrays, max_length=LENGTH, stop_token_ids=(107,))
    assert out["decoder_padding_mask"].sum() > 4
    assert out["decoder_token_ids"][0, :3].tolist() == [2, 107, 300]


def test_rounding_changes_nothing(shared_model, monkeypatch):
    sources = [*SOURCES, "The quick brown fox jumps over the lazy dog"]
    rounded = generated_ids(shared_model, sources, 13)
    name = "keras_t5gemma.generation.generator.Generator._is_compiled"
    monkeypatch.setattr(name, lambda self: False)
    assert generated_ids(shared_model, sources, 13) == rounded
    monkeypatch.setattr(name, lambda self: True)
    assert generated_ids(shared_model, sources, 13) == rounded
    assert rounded == [greedy_oracle(shared_model, s, 13) for s in sources]


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 2}, {"temperature": 1.0, "num_return_sequences": 2, "seed": 3}],
)
def test_what_is_done_is_left_behind(shared_model, monkeypatch, options):
    generator = "keras_t5gemma.generation.generator."
    monkeypatch.setattr(generator + "_TOKENS_PER_CALL", 2)
    monkeypatch.setattr(Costs, "shrinking_pays", lambda self, rows, batches: True)
    left = []

    def select(state, chosen, count):
        left.append((len(chosen), count))
        return decoding.select(state, chosen, count)

    monkeypatch.setattr(generator + "select", select)
    sources = [*SOURCES, "The quick", "brown fox jumps"]
    options = {"stop_token_ids": tuple(range(3, 240)), "return_scores": True, **options}
    together = shared_model.generate(sources, LENGTH, **options)
    assert left
    assert all(size < count for size, count in left)
    monkeypatch.setattr(generator + "_TOKENS_PER_CALL", LENGTH)
    left.clear()
    whole = shared_model.generate(sources, LENGTH, **options)
    assert not left
    assert together["text"] == whole["text"]
    for name in ("token_ids", "token_log_probs"):
        flat = [np.hstack(keras.tree.flatten(o[name])) for o in (together, whole)]
        np.testing.assert_allclose(*flat, atol=1e-4)


def test_rows_that_fill_a_batch_up_are_left_behind():
    """Row 0 is done first, row 3 only fills up: rows 1 and 2 go on alone."""

    class Engine:
        def start(self, inputs):
            return {"row": keras.ops.arange(4)}

        def advance(self, state, limit):
            return {**state, "done": (state["row"] == 0) | (limit > 9)}

    real = np.array([True, True, True, False])
    parts = list(_write(Engine(), {"prefix_count": 0}, real, 32, np.inf, True))
    assert [chosen.tolist() for chosen, _, _ in parts] == [[0, 3], [1, 2]]
    assert [numpy(s["row"]).tolist() for _, s, _ in parts] == [[0, 3], [1, 2]]
    assert [ends.tolist() for _, _, ends in parts] == [[32, 32], [32, 32]]


def test_caches_hold_the_window_and_no_more():
    config = tiny_config()
    backbone = kt.Backbone(config)
    memory = keras.ops.zeros((2, 5, 32))
    cache = backbone.make_cache(memory, np.ones((2, 5), "int32"), 20, rows=6)
    shapes = [tuple(key.shape) for key, _ in cache["self"]]
    assert shapes == [(6, 1, 8, 8), (6, 1, 20, 8)]
    assert {tuple(key.shape) for key, _ in cache["cross"]} == {(2, 1, 5, 8)}


def test_a_source_that_is_done_takes_no_more_beams():
    """Two sources with the same logits, which favour the stop id; one is done."""
    options = GenerationOptions(num_beams=2)
    ops = keras.ops
    state = {
        "token_ids": ops.full((4, 6), 2, "int32"),
        "token_log_probs": ops.zeros((4, 6)),
        "index": ops.convert_to_tensor(1, "int32"),
        "prompt_lengths": ops.ones((4,), "int32"),
        "max_length": ops.convert_to_tensor(6, "int32"),
        "traced_args": {**options.traced_args(), **options.token_lists((1,), 8, 6)},
        "cache": {"self": ()},
    }
    state = beam.start(state, 2)
    state["done"] = ops.convert_to_tensor([True, False])
    logits = ops.convert_to_tensor(np.tile([0.0, 9, 0, 0, 0, 0, 0, 1], (4, 1)))
    state = beam.write(state, logits, options)
    assert numpy(state["finished_ids"])[1, 0, 1] == 1
    scores = numpy(state["finished_scores"])
    expected = 9 - np.log(np.exp(9) + np.exp(1) + 6)
    assert abs(scores[1, 0] - expected) < 1e-5
    assert (np.delete(scores, 2) < -1e29).all()


@pytest.mark.parametrize(("index", "count"), [(0, 3), (0, 6), (5, 1), (5, 4)])
def test_a_ring_keeps_the_last_real_tokens(index, count):
    """Each token is its position; of six new ones `count` are real."""
    ring = np.full(4, -1)
    for position in range(index + count):
        if position == index:
            old = ring.copy()
        ring[position % 4] = position

    def pair(row):
        tensor = keras.ops.convert_to_tensor(row.reshape(1, 1, -1, 1), "float32")
        return tensor, tensor

    new = pair(np.arange(index, index + 6))
    seen, kept = kv_cache.extend(pair(old), *new, index, count)
    for key in kept:
        assert numpy(key).ravel().tolist() == ring.tolist()
    positions = numpy(kv_cache.key_positions(index, 6, 4))
    real = positions >= 0
    assert numpy(seen[0]).ravel()[real].tolist() == positions[real].tolist()
    assert real.sum() == min(index, 4) + 6


def test_batched_beams_of_keras_hubs_own_loop_equal_single_ones(tokenizer):
    """Trap: its beam search fails for this model with more than one row."""
    import keras_hub

    class Own(keras_hub.samplers.BeamSampler):
        """Another class, so that KerasHub's own loop runs."""

    model = tiny_model(tokenizer)
    stops = tuple(range(3, 60))  # Many, so that rows end at different times.
    model.compile(sampler=Own(num_beams=3))
    singles = [
        generated_ids(model, s, 10, stop_token_ids=stops, batch_size=1)[0]
        for s in SOURCES
    ]
    assert generated_ids(model, SOURCES, 10, stop_token_ids=stops) == singles
    assert len({len(row) for row in singles}) > 1


def test_quantizing_the_backbone_makes_the_old_programs_void(tokenizer):
    model = tiny_model(tokenizer)
    options = {**FULL, "return_scores": True}
    before = model.generate(SOURCES, **options)["log_prob"]
    model.backbone.quantize("int8")
    after = model.generate(SOURCES, **options)["log_prob"]
    assert all(a != b for a, b in zip(before, after, strict=True))
    assert len(model._generator().engines) == 1


def test_a_sampler_for_keras_hub_keeps_working(model):
    import keras_hub

    class Own(keras_hub.samplers.GreedySampler):
        """Another class, so that KerasHub's own loop runs."""

    pairs = {"encoder_text": SOURCES, "decoder_text": ["The old board", "", "fox"]}
    expected = model.generate(pairs, LENGTH)
    model.compile(sampler=Own())
    assert model.generate(pairs, LENGTH) == expected
    with pytest.raises(ValueError, match=r"sampler Own.*not support.*\['num_beams'\]"):
        model.generate(pairs, LENGTH, num_beams=2)
    with pytest.raises(ValueError, match=r"\['draft'\]. Compile.*'auto'.*'top_p'"):
        model.generate(pairs, LENGTH, draft=model)
    with pytest.raises(ValueError, match="`stream`.*got .*Own"):
        model.stream("a", LENGTH)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "`temperature` must be a number above 0; got 0"),
        ({"top_p": 1.5}, "`top_p` must be a number above 0 and at most 1; got 1.5"),
        ({"top_k": 0}, "`top_k` must be a whole number from 1; got 0"),
        ({"top_k": 481}, "`top_k` of 481 is more than the 480 tokens"),
        ({"num_beams": 481}, "`num_beams` of 481 is more than the 480 tokens"),
        ({"num_beams": 2, "top_k": 3}, "`num_beams` must be 1 with.*`top_k`"),
        ({"num_return_sequences": 2}, "at most `num_beams`.*2 answers of 1 beams"),
        ({"num_beams": 2, "num_return_sequences": 3}, "3 answers of 2 beams"),
        ({"banned_token_ids": range(480)}, "must leave one of 480 ids; got all"),
        ({"banned_token_ids": [480]}, r"`banned_token_ids`.*\[0, 480\).*480"),
        ({"forced_token_ids": {9: 3}}, "positions.*beyond the `max_length` of 8"),
        (
            {"forced_token_ids": [3], "banned_token_ids": [3]},
            r"share the ids \[3\]",
        ),
        ({"min_new_tokens": 8}, "`min_new_tokens` of 8"),
        ({"stop_token_ids": (500,)}, r"`stop_token_ids`.*\[0, 480\).*500"),
        ({"repetition_penalty": 0}, "`repetition_penalty` must be a number above 0"),
        ({"max_time": -1}, "`max_time` must be a number above 0; got -1"),
        ({"seed": -1}, "`seed` must be a whole number from 0 to .*; got -1"),
        ({"stop_token_ids": 1}, "`stop_token_ids` must be a list of token ids; got 1"),
        ({"banned_token_ids": "fox"}, "`banned_token_ids` must be a list.*got 'fox'"),
        ({"forced_token_ids": 5}, "`forced_token_ids` must be a list.*got 5"),
        ({"max_new_tokens": 3}, r"Unknown options \['max_new_tokens'\].*`max_length`"),
        ({"do_sample": True}, r"Unknown options \['do_sample'\].*'temperature'"),
    ],
    ids=str,
)
def test_bad_options(shared_model, options, message):
    with pytest.raises(ValueError, match=message):
        shared_model.generate("a", max_length=8, **options)
