"""Speculative decoding with a draft: the answers of the large model alone."""

import keras
import numpy as np
import pytest
from helpers.models import one_block_config, tiny_config, tiny_model
from helpers.oracles import SOURCES, generated_ids
from sentencepiece import sentencepiece_model_pb2

import keras_t5gemma as kt
from keras_t5gemma.generation import drafting, speculative, speculative_engine
from keras_t5gemma.generation.options import GenerationOptions
from keras_t5gemma.generation.speculative_engine import DraftingEngine, best_length

LENGTH = 40  # Five windows: the rings of the local layers wrap.
FULL = {"stop_token_ids": None}
SAMPLING = {
    "top_p": 0.5,
    "temperature": 0.8,
    "seed": 1,
    "min_new_tokens": 9,
    "repetition_penalty": 1.3,
    "return_scores": True,
}


def perturbed(model, factor=0.1):
    """A copy with other weights, which often chooses the same tokens."""
    copied = tiny_model(model.preprocessor.tokenizer)
    rng = np.random.default_rng(1)
    for variable, own in zip(copied.weights, model.weights, strict=True):
        noise = 1 + factor * rng.normal(size=variable.shape)
        variable.assign(keras.ops.convert_to_numpy(own) * noise.astype("float32"))
    return copied


@pytest.fixture(scope="module")
def draft(shared_model):
    return perturbed(shared_model)


@pytest.fixture(autouse=True)
def _free(monkeypatch):
    """Drafting and further positions cost nothing, so that it always pays."""
    monkeypatch.setattr(speculative_engine, "relative_time", lambda _: lambda rows: 1.0)
    monkeypatch.setattr(drafting, "relative_cost", lambda *backbones: 0.0)


@pytest.fixture
def target(shared_model):
    shared_model._generator().engines.clear()
    yield shared_model
    shared_model._generator().engines.clear()


def tokens_a_pass(model, **options):
    """Tokens that a row has written in a pass, on average."""
    engine = model._generator()._engine(GenerationOptions(**options)).engine
    return engine.tokens_written / engine.row_passes


def test_greedy_answers_past_the_window(target, draft, monkeypatch):
    """Rows accept different numbers of tokens."""
    monkeypatch.setattr(speculative, "LENGTHS", (3,))
    expected = generated_ids(target, SOURCES, LENGTH, **FULL)
    assert generated_ids(target, SOURCES, LENGTH, draft=draft, **FULL) == expected
    assert 1.7 < tokens_a_pass(target, draft=draft) < 3.5
    rows = generated_ids(target, SOURCES, LENGTH - 1, draft=draft, **FULL)
    assert rows == [row[: LENGTH - 1] for row in expected]
    engine = target._generator()._engine(GenerationOptions(draft=draft)).engine
    # The two that start, and one that generates.
    assert engine.compiled_programs() == 3 * (keras.config.backend() != "torch")


def test_sampled_answers_are_those_of_the_seed(target, draft, monkeypatch):
    monkeypatch.setattr(speculative, "LENGTHS", (3,))
    arrays = target.preprocessor.generate_preprocess(SOURCES, LENGTH)
    expected = target.generate(arrays, LENGTH, **SAMPLING, **FULL)
    found = target.generate(arrays, LENGTH, draft=draft, **SAMPLING, **FULL)
    name = "decoder_token_ids"
    assert found[name].tolist() == expected[name].tolist()
    assert np.allclose(found["log_prob"], expected["log_prob"], atol=1e-3)
    assert tokens_a_pass(target, draft=draft, **SAMPLING) > 1.7


@pytest.mark.one_backend
@pytest.mark.parametrize("options", [{}, SAMPLING], ids=["greedy", "sampled"])
def test_a_model_that_drafts_for_itself_is_always_right(target, monkeypatch, options):
    """The cache of the draft is rolled back exactly, and its noise is the target's."""
    monkeypatch.setattr(speculative, "LENGTHS", (7,))
    inputs = {"encoder_text": SOURCES, "decoder_text": ["", "fox", "A board"]}
    arrays = target.preprocessor.generate_preprocess(inputs, LENGTH)
    expected = target.generate(arrays, LENGTH, **options, **FULL)
    found = target.generate(arrays, LENGTH, draft=target, **options, **FULL)
    assert (found["decoder_token_ids"] == expected["decoder_token_ids"]).all()
    assert tokens_a_pass(target, draft=target, **options) > 7


@pytest.mark.one_backend
def test_rows_that_end_ahead_and_streams(target, draft):
    free = generated_ids(target, SOURCES, LENGTH, **FULL)
    for stops in [(free[0][12],), (free[2][-8],)]:
        expected = generated_ids(target, SOURCES, LENGTH, stop_token_ids=stops)
        rows = generated_ids(target, SOURCES, LENGTH, stop_token_ids=stops, draft=draft)
        assert rows == expected
        assert {len(row) for row in rows} != {LENGTH}
    pieces = list(target.stream(SOURCES[0], LENGTH, draft=draft))
    assert "".join(pieces) == target.generate(SOURCES[0], LENGTH)
    answers = {"num_return_sequences": 3, "temperature": 0.4, "seed": 2}
    expected = target.generate(SOURCES, LENGTH, **answers)
    assert target.generate(SOURCES, LENGTH, draft=draft, **answers) == expected


@pytest.mark.one_backend
def test_other_data_types_and_shapes(tokenizer, draft):
    target = tiny_model(tokenizer)
    target.quantize("int8")
    small = tiny_model(tokenizer, config=one_block_config())
    low = tiny_model(tokenizer, "bfloat16")
    expected = generated_ids(target, SOURCES, LENGTH, **FULL)
    for model in (draft, small, low):
        rows = generated_ids(target, SOURCES, LENGTH, draft=model, **FULL)
        assert rows == expected
    assert tokens_a_pass(target, draft=low) > 2
    # The engines of one draft are kept; its new variables are used.
    assert len(target._generator().engines) == 2
    low.quantize("int8")
    assert generated_ids(target, SOURCES, LENGTH, draft=low, **FULL) == expected
    assert len(target._generator().engines) == 2


@pytest.mark.one_backend
def test_a_draft_that_is_never_right_is_left_out(target, tokenizer, monkeypatch):
    monkeypatch.setattr(drafting, "relative_cost", lambda *backbones: 0.3)
    bad = tiny_model(tokenizer, config=one_block_config())
    expected = generated_ids(target, SOURCES, LENGTH, **FULL)
    chosen, starts = [], []
    kind = speculative_engine.SpeculativeEngine
    advance, start = kind.advance, kind.start

    def spied(self, state, limit, passes, k):
        chosen.append((k, "draft_cache" in state))
        return advance(self, state, limit, passes, k)

    def started(self, inputs, drafts=False):
        starts.append(drafts)
        return start(self, inputs, drafts)

    monkeypatch.setattr(kind, "advance", spied)
    monkeypatch.setattr(kind, "start", started)
    single = {"draft": bad, "batch_size": 1, **FULL}
    assert generated_ids(target, SOURCES, LENGTH, **single) == expected
    assert chosen[0] == (3, True)
    assert chosen[-1] == (0, False)
    assert starts == [True, False, True]


@pytest.mark.one_backend
def test_the_cost_of_the_draft_counts(shared_model):
    def rising(rows):
        return 1 + 0.1 * (rows - 1)

    assert best_length(0.9, 1, rising, draft_cost=0.0) == 7
    assert best_length(0.9, 1, rising, draft_cost=0.3) == 3
    assert best_length(0.9, 1, rising, draft_cost=1.0) == 0
    assert best_length(0.5, 1, rising, draft_cost=0.3) == 0

    class Engine:
        """A draft that is never right."""

        time, draft_cost, drafted = staticmethod(rising), 0.2, []
        row_passes = tokens_written = right = 0

        def start(self, inputs, drafts):
            self.drafted.append(drafts)
            state = {"token_ids": np.zeros((1, 300)), "done": np.zeros(1, bool)}
            state |= {"index": np.ones(1, "int32"), "counts": np.zeros(4, "int32")}
            return {**state, **({"draft_cache": {}} if drafts else {})}

        def advance(self, state, limit, passes, k):
            tried = self.right * k + (k > 0)
            counts = np.array([1, 1 + self.right * k, self.right * k, tried])
            index = state["index"] + counts[1]
            return {**state, "index": index, "counts": state["counts"] + counts}

    inputs = {"decoder_token_ids": np.zeros((1, 300))}
    engine = Engine()
    request = DraftingEngine(engine)
    for _ in range(8):
        state = request.advance(request.start(inputs), 200)
        assert "draft_cache" not in state
    assert np.flatnonzero(engine.drafted).tolist() == [0, 2, 6]
    engine.right = 1
    request = DraftingEngine(engine)
    assert "draft_cache" in request.advance(request.start(inputs), 200)


@pytest.mark.one_backend
def test_relative_cost(tokenizer, monkeypatch):
    monkeypatch.undo()
    small, large = kt.Backbone(one_block_config()), kt.Backbone(tiny_config())
    sizes = [b.decoder.count_params() for b in (small, large)]
    cost = drafting.relative_cost(small, large)
    assert cost == pytest.approx(sizes[0] / sizes[1])
    half = kt.Backbone(one_block_config(), dtype="bfloat16")
    assert drafting.relative_cost(half, large) == pytest.approx(cost / 2)


@pytest.mark.one_backend
def test_bad_drafts(shared_model, draft, tokenizer):
    def refused(message, **options):
        with pytest.raises(ValueError, match=message):
            shared_model.generate("A board", max_length=16, **options)

    refused("`draft` must be a Seq2SeqLM or None; got 'small'", draft="small")
    refused("`draft` must be a Seq2SeqLM", draft=draft.backbone)
    refused("`draft`.*`num_beams` must be 1; got 2", draft=draft, num_beams=2)
    refused("`speculate` must be None with a `draft`", draft=draft, speculate="source")
    other = kt.Seq2SeqLM(kt.Backbone(tiny_config(512)), None)
    refused("`draft` must have the vocabulary.*480 ids; got.* 512", draft=other)
    pieces = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.proto)
    for piece, next_one in ((300, 301), (301, 300)):
        pieces.pieces[piece].piece = tokenizer.id_to_token(next_one)
    other = tiny_model(kt.Tokenizer(pieces.SerializeToString()))
    refused("`draft` must have the tokenizer of the model", draft=other)
    short = kt.Seq2SeqLM(kt.Backbone(tiny_config(max_positions=8)), None)
    refused("`draft` has 8 positions, fewer than the 16 of the `max_len", draft=short)
    long = {"encoder_token_ids": np.full((1, 9), 5)}
    with pytest.raises(ValueError, match="8 positions, fewer than the 9 of the source"):
        shared_model.generate(long, max_length=8, draft=short)


@pytest.mark.one_backend
@pytest.mark.parametrize("length", [36, 40])
def test_proposals_beyond_the_last_position(target, length):
    stack = kt.StackConfig(2, 24, 48, 4, 1, 8, sliding_window=64)
    config = kt.T5GemmaConfig(stack, stack, 480, max_positions=40)
    model = tiny_model(target.preprocessor.tokenizer, config=config)
    copied = tiny_model(target.preprocessor.tokenizer, config=config)
    for variable, own in zip(copied.weights, model.weights, strict=True):
        variable.assign(own.value * 1.01)
    plain = generated_ids(model, SOURCES[:1], length, **FULL)
    assert generated_ids(model, SOURCES[:1], length, **FULL, draft=copied) == plain
