"""Engines and their compiled programs: how many there are, and what they share."""

import keras
import numpy as np
import pytest
from helpers.models import tiny_model
from helpers.oracles import SOURCES, generated_ids

import keras_t5gemma as kt
from keras_t5gemma.generation.engine_cache import EngineCache
from keras_t5gemma.generation.options import GenerationOptions

LENGTH = 16


def test_number_of_compiled_programs(tokenizer):
    """200 requests of all lengths; the bound is `batches`'s."""
    model = tiny_model(tokenizer)
    model.preprocessor = kt.Seq2SeqLMPreprocessor(tokenizer, 300, 8)
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, 200, 60)
    sources = [" ".join(["fox"] * n)[: n * 2] for n in lengths]
    model.generate(sources, batch_size=8)
    expected = 0 if keras.backend.backend() == "torch" else 2
    first = model.compiled_programs()
    assert first == expected  # Padding a model this small costs nothing.
    for n in (1, 3, 8):
        model.generate(sources[:n], batch_size=8)
    model.generate(sources[::-1], batch_size=8)
    model.generate(sources, batch_size=8, max_length=7)  # The same bucket.
    assert first <= model.compiled_programs() <= 9 * expected
    before = model.compiled_programs()
    for temperature in (0.5, 0.6, 0.7):
        model.generate(sources[:8], batch_size=8, temperature=temperature)
    more = model.compiled_programs() - before
    assert more == (0 if keras.backend.backend() == "torch" else 2)


def lists_of_ids(i):
    """Options with the i-th of many different lists of ids."""
    ids = [*range(10, 10 + i), 200 + i]
    banned = {"banned_token_ids": ids}
    forced = {"forced_token_ids": dict.fromkeys(range(i % 4 + 1), 50 + i)}
    stops = {"stop_token_ids": (300 + i,)}
    return [banned, forced, {**banned, "num_beams": 2, "min_new_tokens": 2} | stops]


def test_lists_of_ids_share_programs(shared_model):
    """20 different lists of each kind; a program depends on none of them."""
    engines = shared_model._generator().engines
    text = "A board"
    for options in lists_of_ids(0):
        shared_model.generate(text, LENGTH, **options)
    kept, programs = len(engines), engines.compiled_programs()
    for i in range(1, 20):
        for options in lists_of_ids(i):
            ids = generated_ids(shared_model, [text], LENGTH, **options)[0][1:]
            assert not set(ids) & set(options.get("banned_token_ids", ()))
            for place, token in options.get("forced_token_ids", {}).items():
                assert ids[place] == token
    assert (len(engines), engines.compiled_programs()) == (kept, programs)
    free = generated_ids(shared_model, [text], LENGTH, stop_token_ids=None)[0]
    stops = free[6:3:-1] + [5, 6]  # Any of five ids, in any order.
    stopped = generated_ids(shared_model, [text], LENGTH, stop_token_ids=stops)[0]
    end = min(i for i, token in enumerate(free) if i and token in stops)
    assert stopped == free[: end + 1]


@pytest.mark.one_backend
def test_engines_are_bounded_in_number(shared_model):
    engines = EngineCache(shared_model.backbone)
    options = [GenerationOptions(top_k=k) for k in range(1, 40)]
    made = [engines.get(o, False, None) for o in options]
    assert len(engines) == 16
    assert engines.get(options[-16], False, None) is made[-16]  # Used again: kept.
    engines.get(options[0], False, None)
    assert engines.get(options[-16], False, None) is made[-16]
    assert engines.get(options[-15], False, None) is not made[-15]


def test_engines_share_copies_of_weights(shared_model, monkeypatch):
    """On PyTorch the steps, which may hold a cast or transposed copy of each weight."""
    if keras.backend.backend() != "torch":
        pytest.skip("JAX and TensorFlow pass the variables to the programs")
    from keras_t5gemma.generation import torch_step

    made = []

    class Step(torch_step.TorchStep):
        def __init__(self, *args, **kwargs):
            made.append(args)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(torch_step, "TorchStep", Step)
    shared_model._generator().engines.clear()
    for options in ({}, {"top_k": 3}, {"num_beams": 2}, {"banned_token_ids": [7]}):
        shared_model.generate(SOURCES, LENGTH, **options)
    assert len(made) == 1


def test_compiled_programs_are_kept(tokenizer, tmp_path):
    if keras.backend.backend() != "jax":
        with pytest.raises(ValueError, match="JAX backend only; this is"):
            kt.cache_compiled_programs(tmp_path)
        return
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
        "jax_compilation_cache_max_size",
    )
    before = {name: getattr(jax.config, name) for name in names}
    model = tiny_model(tokenizer)  # Something was compiled before the call.
    try:
        with pytest.raises(ValueError, match="`max_bytes` must be .* from 1; got 0"):
            kt.cache_compiled_programs(tmp_path, max_bytes=0)
        kt.cache_compiled_programs(tmp_path, max_bytes=10**8)
        assert jax.config.jax_compilation_cache_max_size == 10**8
        model.generate(SOURCES, LENGTH)
        kept = set(tmp_path.glob("jit_run-*-cache"))  # Ours; JAX's own helpers vary.
        assert len(kept) == 2
        model._generator().engines.clear()
        jax.clear_caches()
        model.generate(SOURCES, LENGTH)
        assert set(tmp_path.glob("jit_run-*-cache")) == kept
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
