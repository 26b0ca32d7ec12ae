import inspect

import keras
import numpy as np
import pytest
from conftest import enlarge, numpy, tiny_config, tiny_model

import keras_t5gemma as kt

SOURCES = ["The quick brown fox", "A board", "Fonts of the old kind, in text"]
STOPS = (1, 107)


def greedy_oracle(model, source, length, prompt=(), stops=STOPS):
    """The plain loop: the whole forward pass for every token."""
    preprocessor, backbone = model.preprocessor, model.backbone
    encoder = preprocessor.generate_preprocess(source)
    ids = [2, *prompt]
    while len(ids) < length:
        # One padded length, so that a compiling backend compiles once.
        row = np.array([ids + [0] * (length - len(ids))], "int32")
        mask = (np.arange(length) < len(ids)).astype("int32")[None]
        out = backbone(
            {
                "encoder_token_ids": encoder["encoder_token_ids"],
                "encoder_padding_mask": encoder["encoder_padding_mask"],
                "decoder_token_ids": row,
                "decoder_padding_mask": mask,
            }
        )
        logits = numpy(backbone.logits(out["decoder_sequence_output"]))
        ids.append(int(logits[0, len(ids) - 1].argmax()))
        if ids[-1] in stops:
            break
    return ids


def generated_ids(model, sources, length, **kwargs):
    """Ids of each row, stop id included, from the arrays interface."""
    arrays = model.preprocessor.generate_preprocess(sources, length)
    out = model.generate(arrays, max_length=length, **kwargs)
    rows = zip(out["decoder_token_ids"], out["decoder_padding_mask"], strict=True)
    return [ids[mask.astype(bool)].tolist() for ids, mask in rows]


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


def beam_oracle(model, source, length, beams, stops):
    """Beam search by the plain forward pass; a finished beam keeps its score."""
    preprocessor, backbone = model.preprocessor, model.backbone
    encoder = preprocessor.generate_preprocess(source)
    live = [([2], 0.0)]
    for step in range(1, length):
        rows = [ids + [0] * (length - len(ids)) for ids, _ in live]
        rows += [rows[0]] * (beams - len(rows))
        count = len(rows)
        out = backbone(
            {
                "encoder_token_ids": encoder["encoder_token_ids"].repeat(count, 0),
                "encoder_padding_mask": encoder["encoder_padding_mask"].repeat(
                    count, 0
                ),
                "decoder_token_ids": np.array(rows, "int32"),
                "decoder_padding_mask": np.ones((count, length), "int32"),
            }
        )
        logits = numpy(backbone.logits(out["decoder_sequence_output"]))
        candidates = []
        for (ids, score), row in zip(live, logits, strict=False):
            if set(ids[1:]) & set(stops):
                candidates.append((ids + [0], score))
                continue
            row = row[step - 1].astype("float64")
            row = row - np.log(np.exp(row - row.max()).sum()) - row.max()
            for token in np.argsort(-row)[:beams]:
                candidates.append((ids + [int(token)], score + row[token]))
        live = sorted(candidates, key=lambda c: -c[1])[:beams]
    ids = live[0][0]
    ends = [i + 1 for i, token in enumerate(ids) if i and token in stops]
    return ids[: ends[0]] if ends else ids


def test_batched_beam_search_equals_single_ones(tokenizer):
    """Trap: KerasHub's own fails for this model with more than one row."""
    model = tiny_model(tokenizer)
    stops = tuple(range(3, 60))  # Many, so that rows end at different times.
    model.compile(sampler="beam")
    singles = [
        generated_ids(model, s, 10, stop_token_ids=stops, batch_size=1)[0]
        for s in SOURCES
    ]
    assert generated_ids(model, SOURCES, 10, stop_token_ids=stops) == singles
    expected = [beam_oracle(model, s, 10, 5, stops) for s in SOURCES]
    assert singles == expected
    assert len({len(row) for row in expected}) > 1
    greedy = [greedy_oracle(model, s, 10, stops=stops) for s in SOURCES]
    assert greedy != expected


def test_keras_hub_samplers_and_seeds(model):
    import keras_hub

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
    logits = numpy(shared_model(x)).astype("float64")
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
        ({"encoder_token_ids": np.zeros((1, 0), int)}, {}, "length >= 1"),
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
    import keras_hub

    ours = inspect.signature(kt.Seq2SeqLM.generate).parameters
    theirs = inspect.signature(keras_hub.models.Seq2SeqLM.generate).parameters
    assert list(ours)[: len(theirs)] == list(theirs)


def test_bfloat16_generates(tokenizer):
    model = tiny_model(tokenizer, dtype="bfloat16")
    assert model.generate(SOURCES, max_length=8)
    assert keras.backend.standardize_dtype(model.backbone.compute_dtype) == "bfloat16"
