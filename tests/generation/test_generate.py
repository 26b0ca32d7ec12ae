import inspect

import keras
import numpy as np
import pytest
from helpers.models import enlarge, forward, numpy, tiny_config, tiny_model
from helpers.oracles import (
    SOURCES,
    generated_ids,
    greedy_oracle,
    plain_log_probs,
)

import keras_t5gemma as kt


def test_greedy_equals_the_plain_loop_past_the_window(shared_model):
    rows = generated_ids(shared_model, SOURCES, 16)
    assert rows == [greedy_oracle(shared_model, s, 16) for s in SOURCES]
    assert max(map(len, rows)) > 8  # Longer than the window.


def test_a_row_stops_at_a_stop_id_and_its_neighbours_go_on(shared_model):
    free = generated_ids(shared_model, SOURCES, 16, stop_token_ids=None)
    assert {len(row) for row in free} == {16}
    stop = free[0][5]
    rows = generated_ids(shared_model, SOURCES, 16, stop_token_ids=(stop,))
    for row, whole in zip(rows, free, strict=True):
        end = whole.index(stop, 1) + 1 if stop in whole[1:] else 16
        assert row == whole[:end]


def test_batch_equals_rows_and_batch_size_changes_nothing(shared_model):
    expected = [shared_model.generate(s, max_length=12) for s in SOURCES]
    assert shared_model.generate(SOURCES, max_length=12) == expected
    assert shared_model.generate(SOURCES, max_length=12, batch_size=2) == expected


def test_prompts_of_unequal_length(shared_model):
    prompts = ["The old board", "", "fox"]
    pairs = {"encoder_text": SOURCES, "decoder_text": prompts}
    arrays = shared_model.preprocessor.generate_preprocess(pairs, 16)
    out = shared_model.generate(arrays, max_length=16)
    tokenizer = shared_model.preprocessor.tokenizer
    for i, (source, prompt) in enumerate(zip(SOURCES, prompts, strict=True)):
        expected = greedy_oracle(shared_model, source, 16, tokenizer.tokenize(prompt))
        row = out["decoder_token_ids"][i][out["decoder_padding_mask"][i] > 0]
        assert row.tolist() == expected
    whole = shared_model.generate(pairs, max_length=16)
    rest = shared_model.generate(pairs, max_length=16, strip_prompt=True)
    assert [p + r for p, r in zip(prompts, rest, strict=True)] == whole


def test_inputs_in_outputs_out(shared_model):
    generate = shared_model.generate
    text = generate(SOURCES[0], max_length=8)
    assert isinstance(text, str)
    assert generate([SOURCES[0]], max_length=8) == [text]
    assert generate({"encoder_text": SOURCES[0]}, max_length=8) == text
    assert generate(np.array([SOURCES[0]]), max_length=8) == [text]
    assert generate([], max_length=8) == []
    ids = shared_model.preprocessor.tokenizer.tokenize(SOURCES[0])
    out = generate({"encoder_token_ids": np.array([ids])}, max_length=8)
    decoded = shared_model.preprocessor.generate_postprocess(out)
    assert decoded == [text]


def test_empty_source_is_generated_from_nothing(shared_model):
    """Documented: all padding, so cross-attention adds nothing, and no NaN."""
    rows = generated_ids(shared_model, ["", "A board"], 12)
    assert rows[0] == greedy_oracle(shared_model, "", 12)
    assert len(rows[0]) > 1


def beam_oracle(model, source, length, beams, stops, power=1.0):
    """Beam search by the plain forward pass, best answer first."""
    running, finished = [([2], 0.0)], []
    while True:
        rows = [ids for ids, _ in running]
        log_probs = plain_log_probs(model, source, rows, length, beams)
        candidates = [
            (ids + [token], score + row[token])
            for (ids, score), row in zip(running, log_probs, strict=False)
            for token in range(len(row))
        ]
        candidates.sort(key=lambda c: -c[1])
        size = len(candidates[0][0])
        ends = [ids[-1] in stops or size == length for ids, _ in candidates]
        for (ids, score), end in zip(candidates[:beams], ends, strict=False):
            if end:
                finished.append((ids, score / (size - 1) ** power))
        finished = sorted(finished, key=lambda c: -c[1])[:beams]
        running = [c for c, end in zip(candidates, ends, strict=True) if not end]
        running = running[:beams]
        if size == length:
            return finished
        best = running[0][1] / (size - 1) ** power
        if len(finished) == beams and best <= finished[-1][1]:
            return finished


@pytest.mark.parametrize("power", [1.0, 0.0])
def test_beam_search_equals_the_plain_loop_past_the_window(shared_model, power):
    stops = tuple(range(3, 60))  # Many, so that rows end at different times.
    out = shared_model.generate(
        SOURCES,
        16,
        stops,
        num_beams=3,
        length_penalty=power,
        num_return_sequences=3,
        return_scores=True,
    )
    sizes = set()
    for i, source in enumerate(SOURCES):
        expected = beam_oracle(shared_model, source, 16, 3, stops, power)
        got = [ids.tolist() for ids in out["token_ids"][i]]
        assert got == [ids[1:] for ids, _ in expected]
        for score, ids, (_, wanted) in zip(
            out["log_prob"][i], got, expected, strict=True
        ):
            assert abs(score / len(ids) ** power - wanted) < 1e-4
        sizes |= {len(ids) for ids in got}
    assert len(sizes) > 1
    single = shared_model.generate(SOURCES[1], 16, stops, num_beams=3, batch_size=1)
    assert power != 1.0 or single == out["text"][1][0]


def test_beam_search_by_the_compiled_sampler(model):
    expected = model.generate(SOURCES, 10, num_beams=5)
    assert expected != model.generate(SOURCES, 10)
    model.compile(sampler="beam")
    assert model.generate(SOURCES, 10) == expected
    greedy = model.generate(SOURCES, 10, num_beams=1)
    model.compile()
    assert model.generate(SOURCES, 10) == greedy


def test_keras_hub_samplers_and_seeds(model):
    keras_hub = pytest.importorskip("keras_hub")

    def run(sampler):
        model.compile(sampler=sampler)
        return generated_ids(model, SOURCES, 10)

    first = run(keras_hub.samplers.TopKSampler(k=5, seed=3))
    assert run(keras_hub.samplers.TopKSampler(k=5, seed=3)) == first
    assert run(keras_hub.samplers.RandomSampler(seed=1)) != first


def test_score_is_the_log_probability_of_the_forward_pass(shared_model):
    targets = ["fox", "The old board", ""]
    scores = shared_model.score(SOURCES, targets)
    x, y, weights = shared_model.preprocessor(
        {"encoder_text": SOURCES, "decoder_text": targets}
    )
    logits = numpy(forward(shared_model, x)).astype("float64")
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for i in range(3):
        n = int(weights[i].sum())
        expected = log_probs[i, np.arange(n), y[i, :n]]
        assert scores["token_ids"][i].tolist() == y[i, :n].tolist()
        assert np.abs(scores["token_log_probs"][i] - expected).max() < 1e-4
        assert abs(scores["log_prob"][i] - expected.sum()) < 1e-3
    single = shared_model.score(SOURCES[0], targets[0])
    assert abs(single["log_prob"] - scores["log_prob"][0]) < 1e-4


def test_without_preprocessor():
    model = kt.Seq2SeqLM(enlarge(kt.Backbone(tiny_config())))
    out = model.generate(
        {"encoder_token_ids": np.full((2, 6), 9)}, max_length=5, stop_token_ids=None
    )
    assert out["decoder_token_ids"].shape == (2, 5)
    with pytest.raises(ValueError, match="stop_token_ids='auto'.*preprocessor"):
        model.generate({"encoder_token_ids": np.full((2, 6), 9)}, max_length=5)
    with pytest.raises(ValueError, match="`score` needs a preprocessor"):
        model.score("a", "b")


@pytest.mark.parametrize(
    ("inputs", "kwargs", "message"),
    [
        ("a", {"max_length": 0}, "`max_length`.*2 to 8192.*got 0"),
        ("a", {"max_length": 9000}, "`max_length`.*2 to 8192.*got 9000"),
        ("a", {"batch_size": 0}, "batch_size"),
        (3, {}, "string or a list of strings; got int"),
        (["a", 3], {}, r"`encoder_text\[1\]` must be a string; got int"),
        ({"encoder_txt": ["a"]}, {}, "keys.*encoder_txt"),
        (
            {"encoder_text": "a", "decoder_text": "The old board, the old board"},
            {"max_length": 4},
            "more than the `max_length` of 4",
        ),
        ({"encoder_token_ids": np.full((1, 4), 480)}, {}, r"\[0, 480\).*480"),
        ({"encoder_token_ids": np.full((1, 4), -1)}, {}, r"\[0, 480\).*-1"),
        ({"encoder_token_ids": np.zeros((1, 0), int)}, {}, "a row and a token"),
        ({"encoder_token_ids": np.full((1, 4), 4), "ids": 3}, {}, "unknown keys"),
    ],
)
def test_bad_input(shared_model, inputs, kwargs, message):
    with pytest.raises(ValueError, match=message):
        shared_model.generate(inputs, **{"max_length": 8, **kwargs})


def test_unknown_sampler_is_refused(model):
    with pytest.raises(ValueError, match="`sampler`.*'greedy'.*got 'greedyy'"):
        model.compile(sampler="greedyy")


def test_signature_keeps_keras_hubs_arguments():
    keras_hub = pytest.importorskip("keras_hub")

    ours = inspect.signature(kt.Seq2SeqLM.generate).parameters
    theirs = inspect.signature(keras_hub.models.Seq2SeqLM.generate).parameters
    assert list(ours)[: len(theirs)] == list(theirs)


def test_bfloat16_generates(tokenizer):
    model = tiny_model(tokenizer, dtype="bfloat16")
    assert model.generate(SOURCES, max_length=8)
    assert keras.backend.standardize_dtype(model.backbone.compute_dtype) == "bfloat16"
