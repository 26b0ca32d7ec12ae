import keras
import numpy as np
import pytest
from helpers.models import (
    SENTENCES,
    enlarge,
    forward,
    max_difference,
    numpy,
    one_block_config,
    tiny_model,
)

import keras_t5gemma as kt

SOURCES = [f"{s} {i}" for i in range(4) for s in SENTENCES]
TARGETS = [s.split()[-1] for _ in range(4) for s in SENTENCES]
ROWS = list(zip(SOURCES, TARGETS, strict=True))
PAIRS = {"encoder_text": SOURCES, "decoder_text": TARGETS}


@pytest.fixture
def fresh(tokenizer):
    """Untrained, small weights, an optimizer that moves a tiny model."""
    preprocessor = kt.Seq2SeqLMPreprocessor(tokenizer, 32, 8)
    model = kt.Seq2SeqLM(kt.Backbone(one_block_config()), preprocessor)
    model.compile(optimizer=keras.optimizers.AdamW(1e-2))
    return model


def kernels(model):
    return {v.path: numpy(v).copy() for v in model.backbone.weights}


@pytest.mark.one_backend
def test_fit_from_lists_lowers_the_loss(fresh):
    history = fresh.fit(SOURCES, TARGETS, batch_size=8, epochs=10, verbose=0)
    losses = history.history["loss"]
    assert losses[-1] < 0.6 * losses[0]
    assert fresh.evaluate(SOURCES, TARGETS, verbose=0)[0] < 0.6 * losses[0]


def test_fit_with_lora_trains_the_adapters_alone(fresh, tmp_path):
    enlarge(fresh.backbone)  # The frozen logit table must have something to say.
    before = kernels(fresh)
    fresh.enable_lora(4, ["query", "value", "output", "gate", "up", "down"])
    fresh.compile(optimizer=keras.optimizers.AdamW(3e-2))
    names = {v.path.split("/")[-1] for v in fresh.trainable_variables}
    assert names == {"lora_kernel_a", "lora_kernel_b"}
    history = fresh.fit(SOURCES, TARGETS, batch_size=8, epochs=10, verbose=0)
    losses = history.history["loss"]
    assert losses[-1] < 0.9 * losses[0]
    after = kernels(fresh)
    assert all((after[path] == value).all() for path, value in before.items())

    path = str(tmp_path / "adapters.lora.h5")
    fresh.save_lora_weights(path)
    expected = fresh.predict(PAIRS, batch_size=8, verbose=0)
    again = kt.Seq2SeqLM(kt.Backbone(one_block_config()), fresh.preprocessor)
    for ours, value in zip(again.backbone.weights, before.values(), strict=True):
        ours.assign(value)
    again.enable_lora(4, ["query", "value", "output", "gate", "up", "down"])
    again.load_lora_weights(path)
    assert np.abs(again.predict(PAIRS, batch_size=8, verbose=0) - expected).max() < 1e-4


def test_lora_goes_to_query_and_value_by_default(fresh):
    fresh.enable_lora(2)
    layers = {v.path.split("/")[-2] for v in fresh.trainable_variables}
    assert layers == {"query", "value"}
    if keras.config.backend() == "torch":
        trainable = [p for p in fresh.parameters() if p.requires_grad]
        assert len(trainable) == len(fresh.trainable_variables)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.enable_lora(0), "`rank`.*whole number from 1 to 1048576; got 0"),
        (
            lambda m: m.enable_lora(4, ["querry"]),
            "`target_layer_names` must be.*query.*querry",
        ),
    ],
)
def test_lora_refuses(fresh, call, message):
    with pytest.raises(ValueError, match=message):
        call(fresh)


def test_fit_shuffles(fresh, monkeypatch):
    """Trap: KerasHub's never does."""
    seen = []
    monkeypatch.setattr(keras.Model, "fit", lambda self, **kwargs: seen.append(kwargs))
    fresh.fit(PAIRS, batch_size=8)
    fresh.fit(PAIRS, batch_size=8, shuffle=False)
    orders = []
    for kwargs in seen:
        batches = getattr(kwargs["x"], "py_dataset", kwargs["x"])
        for epoch in range(2):
            batches.set_epoch(epoch)
            orders.append(sum((batches.rows(i) for i in range(3)), []))
    given = list(range(len(SOURCES)))
    assert orders[2] == orders[3] == given
    assert orders[0] != orders[1] != given != orders[0]
    assert sorted(orders[0]) == sorted(orders[1]) == given


def test_same_seed_same_training(tokenizer):
    def train():
        keras.utils.set_random_seed(5)
        preprocessor = kt.Seq2SeqLMPreprocessor(tokenizer, 32, 8)
        model = kt.Seq2SeqLM(kt.Backbone(one_block_config()), preprocessor)
        model.compile(optimizer=keras.optimizers.AdamW(1e-2))
        model.fit(SOURCES, TARGETS, batch_size=8, verbose=0)
        return kernels(model)

    first, second = train(), train()
    assert all((first[path] == second[path]).all() for path in first)


def test_loss_is_the_exact_mean_over_target_tokens(fresh):
    """Trap: Keras's default divides by all positions, padding included."""
    x, y, weights = fresh.preprocessor(PAIRS)
    logits = numpy(forward(fresh, x)).astype("float64")
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    losses = -np.take_along_axis(log_probs, y[..., None], -1)[..., 0]
    expected = (losses * weights).sum() / weights.sum()
    assert weights.mean() < 0.8  # Padding that would show.
    got = fresh.evaluate(PAIRS, batch_size=len(SOURCES), verbose=0)[0]
    assert abs(got - expected) < 1e-4


def data_sources():
    def batch(start):
        part = slice(start, start + 8)
        return {key: value[part] for key, value in PAIRS.items()}

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return batch(index * 8)

    def from_tf():
        tf = pytest.importorskip("tensorflow")
        return tf.data.Dataset.from_tensor_slices(PAIRS).batch(8)

    def from_grain_dataset():
        grain = pytest.importorskip("grain")
        rows = [dict(zip(PAIRS, pair, strict=True)) for pair in ROWS]
        return grain.MapDataset.source(rows).batch(8)

    def from_grain_loader():
        grain = pytest.importorskip("grain")
        rows = [dict(zip(PAIRS, pair, strict=True)) for pair in ROWS]
        return grain.DataLoader(
            data_source=rows,
            sampler=grain.samplers.IndexSampler(len(rows), num_epochs=1),
            operations=[grain.transforms.Batch(8)],
        )

    def from_torch():
        torch = pytest.importorskip("torch")
        return torch.utils.data.DataLoader(ROWS, batch_size=8)

    return {
        "pairs": lambda: ROWS,
        "dicts": lambda: [{"encoder_text": s, "decoder_text": t} for s, t in ROWS],
        "arrays_of_text": lambda: {k: np.array(v) for k, v in PAIRS.items()},
        "pydataset": lambda: Batches(),
        "tf.data": from_tf,
        "grain.MapDataset": from_grain_dataset,
        "grain.DataLoader": from_grain_loader,
        "torch.DataLoader": from_torch,
    }


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=() if kind == "tf.data" else pytest.mark.one_backend)
        for kind in data_sources()
    ],
)
def test_every_source_gives_the_same_two_epochs(tokenizer, kind):
    """Traps: KerasHub's `Task.fit` rejects most of these."""
    data = data_sources()[kind]()

    def train(data):
        keras.utils.set_random_seed(0)
        preprocessor = kt.Seq2SeqLMPreprocessor(tokenizer, 32, 8)
        model = kt.Seq2SeqLM(kt.Backbone(one_block_config()), preprocessor)
        model.compile(optimizer=keras.optimizers.SGD(0.1))
        history = model.fit(
            data, batch_size=8, epochs=2, shuffle=False, validation_data=data, verbose=0
        )
        return history.history

    if "expected" not in _CACHE:
        _CACHE["expected"] = train(PAIRS)
    history = train(data)
    for name, values in _CACHE["expected"].items():
        if name not in ("tokens_per_second", "padding"):
            assert np.allclose(history[name], values, atol=1e-5), name


_CACHE = {}


def test_generators(fresh):
    def endless():
        while True:
            yield {key: value[:8] for key, value in PAIRS.items()}

    history = fresh.fit(endless(), steps_per_epoch=2, epochs=2, verbose=0)
    assert len(history.history["loss"]) == 2
    pairs = ((SOURCES[i : i + 8], TARGETS[i : i + 8]) for i in (0, 8, 16))
    fresh.fit(pairs, steps_per_epoch=3, verbose=0)


def test_arrays_that_lack_an_input_are_named(fresh):
    """Keras said: Output with path `` is not connected to `inputs`."""
    x, y, weights = fresh.preprocessor(PAIRS)
    del x["decoder_padding_mask"]
    message = "`x` must have the arrays.*without.*decoder_padding_mask"
    with pytest.raises(ValueError, match=message):
        fresh.predict_on_batch(x)
    for call in (fresh.train_on_batch, fresh.test_on_batch):
        with pytest.raises(ValueError, match=message):
            call(x, y, weights)
    with pytest.raises(ValueError, match="A batch of `x` must have the arrays"):
        fresh.fit([(x, y, weights)], verbose=0)


def test_pretokenized_arrays(fresh):
    x, y, weights = fresh.preprocessor(PAIRS)
    fresh.fit(x, y, sample_weight=weights, batch_size=8, verbose=0)
    expected = fresh.evaluate(PAIRS, batch_size=8, verbose=0)
    got = fresh.evaluate(x, y, sample_weight=weights, batch_size=8, verbose=0)
    assert np.allclose(got, expected, atol=1e-5)


def test_validation_split_and_sample_weight(fresh):
    history = fresh.fit(
        SOURCES,
        TARGETS,
        validation_split=0.25,
        sample_weight=np.linspace(0, 1, len(SOURCES)),
        batch_size=6,
        verbose=0,
    )
    assert "val_loss" in history.history


def test_adam_on_bfloat16_weights_is_refused(tokenizer):
    """Trap: it runs and never moves the weights."""
    model = tiny_model(tokenizer, dtype="bfloat16")
    with pytest.raises(ValueError, match="beta_2 rounds to 1.*mixed_bfloat16"):
        model.compile(optimizer="adam")
    with pytest.raises(ValueError, match="AdamW.*beta_2=0.999"):
        model.compile(optimizer=keras.optimizers.AdamW(1e-3))
    model.compile(optimizer=keras.optimizers.Adam(1e-2, beta_2=0.99))


def test_default_optimizer_moves_bfloat16_weights(tokenizer):
    model = tiny_model(tokenizer, "bfloat16", one_block_config())
    model.optimizer.learning_rate = 0.05
    before = kernels(model)
    model.fit(SOURCES, TARGETS, batch_size=8, verbose=0)
    moved = sum((before[p] != v).any() for p, v in kernels(model).items())
    assert moved > 0.9 * len(before)


def test_mixed_float16_trains_and_pure_float16_is_refused(tokenizer):
    """Trap: pure float16 gradients are NaN."""
    model = tiny_model(tokenizer, dtype="float16")
    with pytest.raises(ValueError, match="float16.*mixed_float16"):
        model.fit(SOURCES, TARGETS, verbose=0)
    mixed = tiny_model(tokenizer, "mixed_float16", one_block_config())
    history = mixed.fit(SOURCES, TARGETS, batch_size=8, verbose=0)
    assert np.isfinite(history.history["loss"]).all()


@pytest.mark.one_backend
def test_truncation_is_reported_once_a_fit(fresh):
    fresh.preprocessor.encoder_sequence_length = 5
    with pytest.warns(UserWarning, match="encoder texts were longer than 5") as seen:
        fresh.fit(SOURCES, TARGETS, batch_size=8, epochs=2, verbose=0)
    assert sum("longer than" in str(w.message) for w in seen) == 1


@pytest.mark.parametrize("kind", ["sources", "targets"])
def test_empty_texts_are_reported_before_training(fresh, kind):
    """Also by `evaluate`, and in batches of a user; not where they are no mistake."""
    pairs = {"sources": SOURCES[:8], "targets": TARGETS[:8]}
    pairs[kind] = [" \n", *pairs[kind][1:]]
    x, y = pairs.values()
    message = f"1 of 8 {kind} are empty"
    with pytest.warns(UserWarning, match=message) as seen:
        fresh.fit(x, y, batch_size=8, epochs=2, verbose=0)
    # For TensorFlow the first batch of a user's is looked at once more, and counted.
    with pytest.warns(UserWarning, match=f"{message}|2 of 16 {kind} are empty"):
        fresh.evaluate([(x, y)], verbose=0)
    assert sum("empty" in str(w.message) for w in seen) == 1
    fresh.score(SOURCES[0], "")
    fresh.generate(["", SOURCES[0]], max_length=4)


@pytest.mark.one_backend
@pytest.mark.parametrize("value", [-1, 1.5, "1", None])
def test_the_first_epoch_is_checked(fresh, value):
    with pytest.raises(ValueError, match="`initial_epoch` must be a whole number"):
        fresh.fit(SOURCES, TARGETS, initial_epoch=value, verbose=0)


def test_saved_and_loaded_models_give_the_same_logits(fresh, tmp_path):
    fresh.compile(optimizer=keras.optimizers.AdamW(1e-2), sampler="beam")
    fresh.fit(SOURCES, TARGETS, batch_size=8, verbose=0)
    x, _, _ = fresh.preprocessor({k: v[:2] for k, v in PAIRS.items()})
    expected = forward(fresh, x)
    fresh.save_to_preset(str(tmp_path / "preset"))
    again = kt.Seq2SeqLM.from_preset(tmp_path / "preset")
    assert max_difference(forward(again, x), expected) == 0
    fresh.save(str(tmp_path / "model.keras"))
    loaded = keras.models.load_model(str(tmp_path / "model.keras"))
    assert max_difference(forward(loaded, x), expected) == 0
    assert loaded.backbone.config == fresh.backbone.config
    assert type(loaded.sampler).__name__ == "BeamSampler"
    assert int(loaded.optimizer.iterations) == int(fresh.optimizer.iterations) > 0


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ({"encoder_txt": ["a"], "decoder_text": ["b"]}, None, "keys.*encoder_txt"),
        (SOURCES, None, "`y` must be the list of targets"),
        (SOURCES, TARGETS[:3], "number of rows.*24.*3"),
        (PAIRS, TARGETS, "`y` must be None"),
        ("a", "b", "`x` must be a list of strings; got the string 'a'"),
        (["a"], "b", "'decoder_text' must be a list of strings; got 'b'"),
        ([], [], "`x` is empty"),
        (3, None, "`x` must.*iterable of batches of it; got 3"),
        ([{"encoder_text": "a", "decoder_text": 3}], None, "must be a string; got int"),
        (
            [{"encoder_text": ["a"], "decoder_text": ["b"]}],
            None,
            "one pair in each dict",
        ),
        ([3], [4], "A batch of `x` must be a dict"),
        ([{"source": "a", "target": "b"}], None, "'source', 'target'.*Rename them"),
        ({"source": ["a"], "target": ["b"]}, None, "'source', 'target'.*Rename them"),
    ],
)
def test_bad_data(fresh, x, y, message):
    before = kernels(fresh)
    with pytest.raises(ValueError, match=message):
        fresh.fit(x, y, verbose=0)
    assert all((before[p] == v).all() for p, v in kernels(fresh).items())


def test_ids_out_of_range_and_unbatched_data_are_refused(fresh):
    x, y, _ = fresh.preprocessor(PAIRS)
    with pytest.raises(ValueError, match=r"`y` must be in \[0, 480\)"):
        fresh.fit(x, y + 480, verbose=0)
    x["encoder_token_ids"] += 480
    with pytest.raises(ValueError, match="`encoder_token_ids` must be in"):
        fresh.fit(x, y, verbose=0)
    single = ({key: value[0] for key, value in PAIRS.items()} for _ in range(3))
    with pytest.raises(ValueError, match="Batch the dataset first"):
        fresh.fit(single, steps_per_epoch=1, verbose=0)


def test_batches_hold_their_weights(fresh):
    """With a generator, `sample_weight` was ignored."""
    batches = [({"encoder_text": ["a", "b"], "decoder_text": ["c", "d"]},)]
    for call in (fresh.fit, fresh.evaluate):
        with pytest.raises(ValueError, match="`sample_weight` needs data in memory"):
            call((batch for batch in batches), sample_weight=[0, 0])
