"""Hidden states of texts: layers, lengths, dtypes, shapes that are compiled once."""

import gc
from contextlib import nullcontext as nothing

import keras
import ml_dtypes
import numpy as np
import pytest
from helpers.models import (
    enlarge,
    max_difference,
    numpy,
    one_block_config,
    tiny_config,
)

import keras_t5gemma as kt

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*encoder texts were longer:UserWarning"
)
BACKEND = keras.config.backend()
LONG = "a library to read and to write files in a format that nobody knows "
TEXTS = ["a game of chess", LONG, "", "reads files", "tool for pictures and films"]


def make_embedder(tokenizer, make_config=tiny_config, dtype=None, mode=None, **kwargs):
    config = kt.T5GemmaConfig(make_config().encoder, None, 480)
    backbone = enlarge(kt.Backbone(config, dtype=dtype), factor=4.0)
    if mode:
        backbone.quantize(mode)
    preprocessor = kt.Seq2SeqLMPreprocessor(tokenizer, 96, 8)
    return kt.TextEmbedder(backbone, preprocessor, **kwargs)


@pytest.fixture(scope="module")
def embedder(tokenizer):
    keras.utils.set_random_seed(0)
    return make_embedder(tokenizer)


def programs(embedder):
    """How many programs were traced for the hidden states of an embedder."""
    kept = embedder.backbone.encoder.__dict__.get("_programs", (None, {}))
    return sum(function.count() for function in kept[1].values())


@pytest.fixture(scope="module")
def compilations():
    """A function of an embedder: how much was compiled so far."""
    if BACKEND == "jax":
        import jax

        names = []
        jax.monitoring.register_event_duration_secs_listener(
            lambda name, *_, **__: names.append(name)
        )
        return lambda _: names.count("/jax/core/compile/backend_compile_duration")
    if BACKEND == "tensorflow":
        return programs
    from torch._dynamo.utils import counters

    return lambda _: counters["frames"]["total"]


def test_one_text_a_hundred_times_is_compiled_once(tokenizer, compilations):
    embedder = make_embedder(tokenizer, one_block_config)
    before = compilations(embedder)
    first, _ = embedder.hidden_states(["reads files"])
    after = compilations(embedder)
    assert (after > before) == (BACKEND != "torch")
    sizes = []
    gc.freeze()  # Older objects are not searched, which takes long.
    try:
        for _ in range(2):
            for _ in range(50):
                states, _ = embedder.hidden_states(["reads files"])
            gc.collect()
            sizes.append(len(gc.get_objects()))
    finally:
        gc.unfreeze()
    assert compilations(embedder) == after
    assert sizes[1] - sizes[0] < 20  # Memory is flat.
    assert max_difference(states, first) == 0


@pytest.mark.skipif(BACKEND == "torch", reason="PyTorch compiles nothing")
def test_one_program_for_each_shape(tokenizer):
    embedder = make_embedder(tokenizer, one_block_config)
    for text in ("x", "", "reads", "reads files"):  # Up to 16 tokens.
        embedder.hidden_states([text])
    assert programs(embedder) == 1
    for text in ("x", LONG, ""):
        embedder.hidden_states([text, text], pad_to=40)
    assert programs(embedder) == 2
    embedder.hidden_states(["x"] * 7, batch_size=2, pad_to=40)  # The last has one row.
    assert programs(embedder) == 2
    embedder.hidden_states(["x"], pad_to=16, as_numpy=True)
    assert programs(embedder) == 2
    embedder.hidden_states(["x"], layers=0)
    assert programs(embedder) == 3
    embedder.backbone.quantize("int8")
    embedder.hidden_states(["x"])
    assert programs(embedder) == 1  # Those of the float weights are gone.


def test_rows_do_not_depend_on_batches(embedder):
    whole, mask = embedder.hidden_states(TEXTS, layers=[0, 2, -1])
    lengths = numpy(mask).sum(1)
    assert whole[0].shape == (5, lengths.max(), 32) == (*mask.shape, 32)
    assert lengths[2] == 0 and not any(numpy(x)[2].any() for x in whole)
    for kwargs in ({}, {"as_numpy": True}):
        parts, other = embedder.hidden_states(
            TEXTS, layers=[0, 2, -1], batch_size=2, **kwargs
        )
        assert np.array_equal(numpy(mask), numpy(other))
        for a, b in zip(whole, parts, strict=True):
            assert isinstance(b, np.ndarray) == bool(kwargs)
            assert max_difference(a, b) < 1e-5
    fixed, other = embedder.hidden_states(TEXTS, batch_size=2, pad_to=20)
    assert fixed.shape == (5, 20, 32)
    assert numpy(other).sum(1).tolist() == np.minimum(lengths, 20).tolist()
    for row in (0, 3):  # They are not cut.
        cut = slice(lengths[row])
        assert max_difference(numpy(fixed)[row, cut], numpy(whole[-1])[row, cut]) < 1e-5
        assert not numpy(fixed)[row, lengths[row] :].any()


def test_arrays_are_the_backends_and_may_be_trained_on(embedder):
    states, mask = embedder.hidden_states(TEXTS[:1])
    assert keras.ops.is_tensor(states) and keras.ops.is_tensor(mask)
    assert keras.backend.standardize_dtype(mask.dtype) == "bool"
    assert keras.backend.standardize_dtype(states.dtype) == "float32"
    states, mask = embedder.hidden_states(TEXTS[:1], as_numpy=True)
    assert type(states) is type(mask) is np.ndarray and mask.dtype == bool
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile("sgd", "mse", run_eagerly=True)
    device, _ = embedder.hidden_states(TEXTS[:1])
    model.train_on_batch(device, np.ones((1, device.shape[1], 1)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtypes(embedder, dtype):
    exact, _ = embedder.hidden_states(TEXTS, pad_to=16)
    found, _ = embedder.hidden_states(TEXTS, pad_to=16, dtype=dtype)
    assert keras.backend.standardize_dtype(found.dtype) == dtype
    rounded, _ = embedder.hidden_states(TEXTS, pad_to=16, dtype=dtype, as_numpy=True)
    assert rounded.dtype == (ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16)
    assert np.array_equal(numpy(found), rounded.astype("float32"))
    error = 2.0**-8 if dtype == "bfloat16" else 2.0**-11
    assert np.all(np.abs(numpy(found) - numpy(exact)) <= error * np.abs(numpy(exact)))


def test_final_norm(embedder):
    kept, _ = embedder.hidden_states(TEXTS, layers=[1, 3], pad_to=16)
    none, _ = embedder.hidden_states(TEXTS, layers=[1, 3], pad_to=16, final_norm=False)
    both, _ = embedder.hidden_states(TEXTS, layers=[1, -1], pad_to=16, final_norm=True)
    norm = embedder.backbone.encoder.final_norm
    assert max_difference(kept[0], none[0]) < 1e-6
    assert max_difference(kept[1], both[1]) < 1e-6
    assert max_difference(norm(none[0]), both[0]) < 1e-5
    assert max_difference(norm(none[1]), both[1]) < 1e-5
    assert max_difference(kept[0], both[0]) > 0.1


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_quantized_weights(tokenizer, mode):
    embedder = make_embedder(tokenizer, one_block_config, mode=mode)
    states, mask = embedder.hidden_states(TEXTS[:2], as_numpy=True)
    means = states.sum(1) / mask.sum(1, keepdims=True)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    assert max_difference(embedder.embed(TEXTS[:2]), means) < 1e-5


@pytest.mark.one_backend
@pytest.mark.parametrize("pad_to", [None, 40, 12])
def test_hidden_states_are_those_of_transformers(embedder, tmp_path, pad_to):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    embedder.backbone.save_to_huggingface(tmp_path)
    theirs = transformers.T5GemmaEncoderModel.from_pretrained(
        tmp_path, attn_implementation="eager"
    )
    theirs.config.encoder.sliding_window -= 1  # Theirs sees one more token.
    texts = ["reads files", LONG, "x"]
    with pytest.warns(UserWarning, match="to keep") if pad_to == 12 else nothing():
        states, mask = embedder.hidden_states(texts, range(4), pad_to=pad_to)
    rows = [ids[:pad_to] for ids in embedder.preprocessor.tokenizer.tokenize(texts)]
    width = pad_to or max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    with torch.no_grad():
        found = theirs(ids, (ids > 0).long(), output_hidden_states=True).hidden_states
    assert np.array_equal(numpy(mask), ids.numpy() > 0)
    for layer, expected in enumerate(found):
        kept = expected.numpy() * numpy(mask)[..., None]
        assert np.abs(kept).max() > 0.1
        assert max_difference(states[layer], kept) < 1e-5, layer
        for same in (layer, layer - 4):
            one, _ = embedder.hidden_states(["reads files"], same)
            cut = kept[0, : one.shape[1]]
            assert max_difference(numpy(one)[0], cut) < 1e-5, same


@pytest.mark.one_backend
class TestRecipes:
    """How other projects take the states of T5Gemma's encoder."""

    def test_stable_audio(self, embedder):
        """A fixed length, cut, without special tokens; an empty prompt."""
        with pytest.warns(UserWarning, match="1 of 3 .* than 32 .*; increase `pad_to`"):
            states, mask = embedder.hidden_states([LONG, "", "x"], pad_to=32)
        assert states.shape == (3, 32, 32)
        ids = embedder.preprocessor.tokenizer.tokenize([LONG[:-1], "", "x"])
        assert numpy(mask).sum(1).tolist() == [32, 0, len(ids[2])]
        assert np.isfinite(numpy(states)).all() and not numpy(states)[1].any()

    def test_prx(self, embedder):
        """A boolean mask; `""` for guidance without a condition."""
        states, mask = embedder.hidden_states(["a game", ""], pad_to=24)
        assert keras.backend.standardize_dtype(mask.dtype) == "bool"
        assert numpy(mask).any(1).tolist() == [True, False]
        assert states.shape[:2] == mask.shape == (2, 24)

    def test_bfloat16_weights_and_half_precision_states(self, tokenizer):
        embedder = make_embedder(tokenizer, one_block_config, dtype="bfloat16")
        states, _ = embedder.hidden_states(["a game"], pad_to=24)
        assert keras.backend.standardize_dtype(states.dtype) == "bfloat16"
        half, _ = embedder.hidden_states(["a game"], pad_to=24, dtype="float16")
        assert keras.backend.standardize_dtype(half.dtype) == "float16"
        assert max_difference(half, states) == 0  # It has more digits.

    def test_first_and_last_layer(self, embedder):
        (first, last), _ = embedder.hidden_states(["a game"], layers=(1, -1))
        assert max_difference(first, embedder.hidden_states(["a game"], 1)[0]) == 0
        assert max_difference(last, embedder.hidden_states(["a game"])[0]) < 1e-6

    def test_pooled_for_a_classifier(self, embedder):
        states, mask = embedder.hidden_states(TEXTS[:2], as_numpy=True)
        means = states.sum(1) / mask.sum(1, keepdims=True)
        means /= np.linalg.norm(means, axis=1, keepdims=True)
        assert max_difference(embedder.embed(TEXTS[:2]), means) < 1e-5


@pytest.mark.one_backend
def test_a_template_stays_whole(tokenizer):
    embedder = make_embedder(tokenizer, one_block_config)
    embedder.preprocessor.template = "<start_of_turn>{text}<end_of_turn>"
    with pytest.warns(UserWarning, match="1 of 2 encoder texts were longer than 6"):
        _, mask = embedder.hidden_states(["", LONG], pad_to=6)
        found = embedder.preprocessor.encoder_rows
    assert numpy(mask).sum(1).tolist() == [2, 6]
    with embedder.preprocessor.report_truncation(pad_to=99):
        rows = found(["", LONG], pad_to=6)
    turns = tokenizer.start_of_turn_id, tokenizer.end_of_turn_id
    assert rows[0] == list(turns) and (rows[1][0], rows[1][-1]) == turns
    with pytest.raises(ValueError, match="`pad_to` 2 leaves no room .* has 2 tokens"):
        embedder.hidden_states(["x"], pad_to=2)


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"layers": 4}, "`layers` must be a list of layers.* from -4 to 3; got 4"),
        ({"layers": [0, -5]}, r"`layers\[1\]` must be a whole.* -4 to 3; got -5"),
        ({"layers": []}, "`layers` must name at least one layer"),
        ({"layers": "last"}, "`layers` must be a list of layers.*'last'"),
        ({"layers": 1.0}, "`layers` must be.*1.0"),
        ({"pad_to": 0}, "`pad_to` must be a whole number from 1; got 0"),
        ({"pad_to": -3}, "`pad_to` must be a whole number from 1; got -3"),
        ({"pad_to": 97}, "`pad_to` must be at most 96, the `encoder_seq.*got 97"),
        ({"pad_to": True}, "`pad_to` must be a whole number"),
        ({"dtype": "int8"}, "`dtype` must be one of 'float32', 'bfloat16'.*'int8'"),
        ({"dtype": "half"}, "`dtype` must be one of.*'half'"),
        ({"final_norm": "yes"}, "`final_norm` must be one of None, True, False"),
        ({"as_numpy": 1}, "`as_numpy` must be True or False; got 1"),
        ({"batch_size": 0}, "`batch_size` must be a whole number"),
        ({"texts": "a text"}, "`texts` must be a list of texts; got 'a text'"),
        ({"texts": ["a", None]}, r"`texts\[1\]` must be a string"),
    ],
)
def test_refusals(embedder, kwargs, message):
    with pytest.raises(ValueError, match=message):
        embedder.hidden_states(**{"texts": ["a"], **kwargs})
