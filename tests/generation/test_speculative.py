"""Speculative decoding: the answers of plain decoding, in fewer passes."""

from types import SimpleNamespace

import keras
import numpy as np
import pytest
from helpers.models import numpy, tiny_model
from helpers.oracles import SOURCES, generated_ids, plain_logits

import keras_t5gemma as kt
from keras_t5gemma.checkpoints.checkpoint import open_checkpoint
from keras_t5gemma.generation import speculative, speculative_engine
from keras_t5gemma.generation.options import GenerationOptions
from keras_t5gemma.generation.speculative_engine import AdaptiveEngine, best_length

LENGTH = 40  # Five windows: the rings of the local layers wrap.
FULL = {"stop_token_ids": None}


@pytest.fixture
def eager(shared_model, monkeypatch):
    """The shared model, for which a pass costs the same whatever its positions."""
    monkeypatch.setattr(speculative_engine, "relative_time", lambda _: lambda rows: 1.0)
    shared_model._generator().engines.clear()
    yield shared_model
    shared_model._generator().engines.clear()


def engine_of(model, **options):
    """The engine that has run for these options."""
    checked = GenerationOptions(speculate="source", **options)
    return model._generator()._engine(checked).engine


@pytest.mark.parametrize("k", [3, 7])
def test_equals_greedy_past_the_window(eager, monkeypatch, k):
    monkeypatch.setattr(speculative, "LENGTHS", (k,))
    expected = generated_ids(eager, SOURCES, LENGTH, **FULL)
    rows = generated_ids(eager, SOURCES, LENGTH, speculate="source", **FULL)
    assert rows == expected
    engine = engine_of(eager)
    assert engine.tokens_written > 1.5 * engine.row_passes  # Rows repeat themselves.
    if keras.config.backend() == "torch":  # Elsewhere a batch of one is a program.
        single = {"speculate": "source", "batch_size": 1, **FULL}
        assert generated_ids(eager, SOURCES, LENGTH, **single) == expected


def test_the_end_of_a_row_within_an_accepted_run(eager):
    free = generated_ids(eager, SOURCES, LENGTH, **FULL)
    repeated = {row[-1] for row in free}
    # Rows that end where they repeat themselves are ahead of the others by then.
    ends = [(free[0][12],), (free[0][-1],), (free[1][-1],), (free[2][-8],)]
    for stops in [tuple(repeated), *ends]:
        expected = generated_ids(eager, SOURCES, LENGTH, stop_token_ids=stops)
        rows = generated_ids(
            eager, SOURCES, LENGTH, stop_token_ids=stops, speculate="source"
        )
        assert rows == expected
        assert {len(row) for row in rows} != {LENGTH}
    for length in range(LENGTH - 4, LENGTH):
        rows = generated_ids(eager, SOURCES, length, speculate="source", **FULL)
        assert rows == [row[:length] for row in free]


def test_few_programs(eager):
    for length in (LENGTH - 1, LENGTH):
        for stops in ((7,), (8,), None):
            options = {"stop_token_ids": stops, "speculate": "source"}
            generated_ids(eager, SOURCES, length, **options)
    engine = engine_of(eager)
    # One that starts, and one for each number of proposed tokens.
    most = 0 if keras.config.backend() == "torch" else 1 + len(speculative.LENGTHS)
    assert engine.compiled_programs() <= most
    assert len(eager._generator().engines) == 1


def test_prompts_of_unequal_length_and_streams(eager):
    prompts = ["The old board, the old", "", "fox"]
    apart = {"encoder_text": SOURCES, "decoder_text": prompts}
    shared = {"encoder_text": SOURCES[0], "decoder_text": prompts}
    for inputs in (apart, shared):
        expected = eager.generate(inputs, LENGTH)
        assert eager.generate(inputs, LENGTH, speculate="source") == expected
    one = {"encoder_text": SOURCES[0], "decoder_text": prompts[0]}
    pieces = list(eager.stream(one, LENGTH, speculate="source"))
    whole = eager.generate(one, LENGTH, strip_prompt=True)
    assert "".join(pieces) == whole


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.4, "no_repeat_ngram_size": 3, "return_scores": True},
        {"min_new_tokens": 9, "banned_token_ids": (9,), "forced_token_ids": {3: 300}},
    ],
    ids=str,
)
def test_penalties_and_lists_of_ids(eager, options):
    arrays = eager.preprocessor.generate_preprocess(SOURCES, LENGTH)
    expected = eager.generate(arrays, LENGTH, **options)
    found = eager.generate(arrays, LENGTH, speculate="source", **options)
    for name, rows in expected.items():
        for row, other in zip(rows, found[name], strict=True):
            assert np.shape(row) == np.shape(other)
            assert np.abs(np.asarray(row) - np.asarray(other)).max() < 1e-4


SAMPLING = {
    "top_k": {"top_k": 2, "temperature": 0.5, "seed": 3, "num_return_sequences": 2},
    "top_p": {
        "top_p": 0.5,
        "temperature": 0.8,
        "seed": 1,
        "min_new_tokens": 9,
        "repetition_penalty": 1.3,
        "banned_token_ids": (9,),
    },
}


def sampled(model, inputs=SOURCES, **options):
    """Sampled ids of three sources, of all answers."""
    arrays = model.preprocessor.generate_preprocess(inputs, LENGTH)
    return model.generate(arrays, LENGTH, **options)["decoder_token_ids"].tolist()


@pytest.mark.parametrize("options", SAMPLING.values(), ids=SAMPLING)
def test_sampled_answers_are_those_of_the_seed(eager, monkeypatch, options):
    monkeypatch.setattr(speculative, "LENGTHS", (3,))
    expected = sampled(eager, **options, **FULL)
    assert sampled(eager, speculate="source", **options, **FULL) == expected
    engine = engine_of(eager, **options)
    if "top_k" in options:  # Proposals are accepted, which the seed changes.
        assert engine.tokens_written > 1.1 * engine.row_passes
        assert sampled(eager, **{**options, "seed": 4}, **FULL) != expected
    if keras.config.backend() == "torch":  # Elsewhere a batch of one is a program.
        single = {"speculate": "source", "batch_size": 1, **options, **FULL}
        assert sampled(eager, **single) == expected


@pytest.mark.skipif(keras.config.backend() == "tensorflow", reason="as on JAX")
def test_bfloat16_up_to_rounding(tokenizer, monkeypatch):
    """Where rows differ from plain decoding, the two tokens are equally likely."""
    monkeypatch.setattr(speculative_engine, "relative_time", lambda _: lambda rows: 1.0)
    monkeypatch.setattr(speculative, "LENGTHS", (3,))
    model = tiny_model(tokenizer, "bfloat16")
    expected = generated_ids(model, SOURCES, LENGTH, **FULL)
    rows = generated_ids(model, SOURCES, LENGTH, speculate="source", **FULL)
    engine = engine_of(model)
    assert engine.tokens_written > 1.5 * engine.row_passes
    for source, row, other in zip(SOURCES, expected, rows, strict=True):
        if row != other:
            first = next(i for i in range(LENGTH) if row[i] != other[i])
            logits = plain_logits(model, source, [row[:first]], LENGTH)[0]
            gap = abs(logits[row[first]] - logits[other[first]])
            assert gap <= 2**-6 * np.abs(logits).max()


def test_int8(tokenizer, monkeypatch):
    monkeypatch.setattr(speculative_engine, "relative_time", lambda _: lambda rows: 1.0)
    model = tiny_model(tokenizer)
    model.quantize("int8")
    expected = generated_ids(model, SOURCES, LENGTH, **FULL)
    rows = generated_ids(model, SOURCES, LENGTH, speculate="source", **FULL)
    assert rows == expected
    engine = engine_of(model)
    assert engine.tokens_written > engine.row_passes


def test_proposals_by_their_definition():
    """Longest n-gram first, then the earliest; copies of the answer are repeated."""

    def oracle(source, written, k):
        text = [written[0], *source, *written]
        size = 1 + len(source)
        for n in (3, 2, 1):
            for last in range(len(text) - 1):
                grams = [
                    t[max(0, i - n + 1) : i + 1]
                    for t, i in ((text, last), (written, len(written) - 1))
                ]
                if last == size - 1 or grams[0] != grams[1] or len(grams[0]) < n:
                    continue
                if last < size:
                    return text[last + 1 : min(size, last + 1 + k)]
                return [text[last + 1 + i % (len(text) - 1 - last)] for i in range(k)]
        return []

    rng = np.random.default_rng(0)
    found = 0
    for xp in (np, keras.ops):
        sources = rng.integers(3, 9, (40, 10)).astype("int32")
        written = rng.integers(3, 9, (40, 12)).astype("int32")
        written[:, 0] = 2
        index = rng.integers(4, 13, 40).astype("int32")
        arrays = (sources, written, index)
        if xp is not np:
            arrays = map(keras.ops.convert_to_tensor, arrays)
        drafts = speculative.propose(*arrays, 5, xp)
        drafts = drafts if xp is np else numpy(drafts)
        for i in range(40):
            draft = drafts[i].tolist()
            draft = draft[: draft.index(-1)] if -1 in draft else draft
            text = written[i, : index[i]].tolist()
            assert draft == oracle(sources[i].tolist(), text, 5)
            found += len(draft) > 0
    assert found > 60


@pytest.mark.one_backend
def test_a_model_that_copies_takes_few_passes():
    """Rows accept different numbers: one copies its source, one writes other ids."""
    ops = keras.ops
    source = np.arange(10, 30, dtype="int32")
    answers = np.stack([[2, *source, 1], [2, *range(40, 60), 1]]).astype("int32")
    passes = []

    def step(tokens, cache, index, capped):
        places = numpy(ops.convert_to_tensor(index))[:, None] + 1
        places = places + np.arange(tokens.shape[1])
        passes.append(places)
        following = np.take_along_axis(answers, places.clip(max=21), axis=1)
        return ops.one_hot(following.reshape(-1), 64), cache

    state = {
        "token_ids": np.pad([[2], [2]], ((0, 0), (0, 29))).astype("int32"),
        "token_log_probs": np.zeros((2, 30), "float32"),
        "index": np.ones(2, "int32"),
        "done": np.zeros(2, bool),
        "source": np.stack([source, source]),
        "counts": np.zeros(4, "int32"),
        "prompt_lengths": np.ones(2, "int32"),
        "max_length": np.int32(30),
        "cache": {},
        "traced_args": {"stop_ids": ops.convert_to_tensor([[1, -1]], "int32")},
    }
    indices = []
    while not state["done"].all():
        state = speculative.verify(step, state, 7, GenerationOptions(), xp=np)
        indices.append(state["index"].tolist())
    assert [row for row, _ in indices[:3]] == [9, 17, 22]
    assert (state["token_ids"][:, :22] == answers).all()
    assert not state["token_ids"][:, 22:].any()
    assert len(indices) == 21
    assert passes[-1].shape[1] == 1  # Nothing is proposed for the row that is left.
    assert state["counts"].tolist()[:2] == [24, 42]


@pytest.mark.one_backend
def test_the_number_of_proposed_tokens_follows_what_is_accepted():
    def rising(rows):
        return 1 + 0.3 * (rows - 1)

    assert best_length(0.95, 1, rising) == 7
    assert best_length(0.7, 1, rising) == 3
    assert best_length(0.3, 1, rising) == 0
    assert best_length(0.7, 8, rising) == 0
    assert best_length(0.3, 8, lambda rows: 1.0) == 7

    class Engine:
        """Accepts nothing until position 60, and then everything."""

        time, draft_cost, chosen = staticmethod(rising), 0.0, []
        row_passes = tokens_written = 0

        def advance(self, state, limit, passes, k):
            self.chosen.append(k)
            tried = max(k, 1)
            copies = state["index"][0] >= 60
            counts = [1, 1 + copies * k, copies * tried, tried if copies else 1]
            index = state["index"] + counts[1]
            counts = state["counts"] + np.array(counts)
            return {**state, "index": index, "counts": counts}

    state = {
        "token_ids": np.zeros((1, 300), "int32"),
        "index": np.ones(1, "int32"),
        "done": np.zeros(1, bool),
        "counts": np.zeros(4, "int64"),
    }
    engine = Engine()
    adaptive = AdaptiveEngine(engine)
    for limit in range(8, 300, 8):
        state = adaptive.advance(state, limit)
    first = engine.chosen.index(0)
    assert 0 < first < 6
    assert set(engine.chosen[first:55]) == {0}
    assert engine.chosen[-1] == 7
    assert engine.tokens_written == state["index"][0] - 1


@pytest.mark.parametrize("onednn", [False, True])
def test_times_of_a_pass_as_they_were_measured(shared_model, monkeypatch, onednn):
    """S-S and the embedded presets, see benchmarks/RESULTS.md, within a factor of 2."""
    products = speculative_engine.float_products
    monkeypatch.setattr(products, "has_onednn", lambda: onednn)
    configs = kt.T5GemmaConfig.pair("s", "s"), open_checkpoint("t5gemma_mini").config
    backbone = shared_model.backbone  # On the same device.
    large, small = (
        SimpleNamespace(
            config=config, decoder=backbone.decoder, variables=backbone.variables
        )
        for config in configs
    )
    measured = {
        "torch": {4: (1.43, 1.52), 64: (7.1, 5.3) if onednn else (14.3, 5.6)},
        "jax": {4: (2.2, 2.6), 64: (6.6, 14.8)},
        "tensorflow": {4: (2.4, 3.0), 64: (6.8, 11.8)},
    }
    for rows, times in measured[keras.config.backend()].items():
        for backbone, expected in zip((large, small), times, strict=True):
            found = speculative_engine.relative_time(backbone)(rows)
            assert 0.5 < found / expected < 2


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speculate": "draft"}, "`speculate` must be 'source' or None; got 'draft'"),
        ({"speculate": True}, "`speculate` must be 'source' or None; got True"),
        ({"speculate": "source", "num_beams": 2}, "`num_beams` must be 1; got 2"),
    ],
    ids=str,
)
def test_bad_options(shared_model, options, message):
    with pytest.raises(ValueError, match=message):
        shared_model.generate("a", max_length=8, **options)
