import numpy as np
import pytest
from helpers.models import numpy, tiny_config

import keras_t5gemma as kt
from keras_t5gemma.checkpoints import generation_config
from keras_t5gemma.checkpoints.checkpoint import open_checkpoint
from keras_t5gemma.conversion.average import average_presets
from keras_t5gemma.conversion.convert import convert


def values(preset):
    tensors = open_checkpoint(str(preset)).tensors()
    return {path: tensor.read() for path, tensor in tensors.items()}


@pytest.fixture(scope="module")
def presets(shared_model, tmp_path_factory):
    """Three checkpoints of one configuration: ours twice, and transformers'."""
    folder = tmp_path_factory.mktemp("presets")
    rng = np.random.default_rng(1)
    paths = [folder / name for name in ("a", "b", "transformers")]
    for path in paths:
        for variable in shared_model.backbone.weights:
            variable.assign(rng.normal(0, 1, variable.shape).astype("float32"))
        if path.name == "transformers":
            shared_model.save_to_huggingface(path)
        else:
            shared_model.save_to_preset(path)
    return paths


@pytest.mark.one_backend
@pytest.mark.parametrize("weights", [None, [1, 0, 2.5]])
def test_average_is_the_mean(presets, weights, tmp_path):
    average_presets(presets, tmp_path / "mean", weights)
    found = values(tmp_path / "mean")
    sources = [values(preset) for preset in presets]
    for path, value in found.items():
        stacked = np.stack([source[path] for source in sources]).astype("float64")
        mean = np.average(stacked, axis=0, weights=weights)
        assert np.abs(value - mean).max() < 1e-6
        assert value.dtype == "float32"
    assert set(found) == set(sources[0])


def test_average_loads_with_the_first_ones_tokenizer(presets, tmp_path):
    average_presets(presets[:1] * 3, tmp_path / "mean")
    model = kt.Seq2SeqLM.from_preset(tmp_path / "mean")
    expected = values(presets[0])
    for variable in model.backbone.weights:
        np.testing.assert_allclose(numpy(variable), expected[variable.path], rtol=3e-7)
    assert model.preprocessor.encoder_sequence_length == 24


def test_average_has_the_first_ones_defaults_of_generation(presets, tmp_path):
    convert(presets[0], tmp_path / "first")
    generation_config.save(tmp_path / "first", {"no_repeat_ngram_size": 3})
    average_presets([tmp_path / "first", presets[1]], tmp_path / "mean")
    model = kt.Seq2SeqLM.from_preset(tmp_path / "mean")
    assert model.generation_defaults["no_repeat_ngram_size"] == 3


def test_dtype_is_the_firsts(presets, tmp_path):
    convert(presets[0], tmp_path / "half", dtype="bfloat16")
    average_presets([tmp_path / "half", presets[1]], tmp_path / "mean")
    half, other = values(tmp_path / "half"), values(presets[1])
    for path, value in values(tmp_path / "mean").items():
        mean = (half[path].astype("float32") + other[path]) / 2  # Rounded once.
        assert value.dtype == half[path].dtype != other[path].dtype
        assert (value == mean.astype(value.dtype)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"presets": []}, "`presets` must be a list of at least one"),
        ({"presets": "a"}, "list of at least one preset; got 'a'"),
        ({"weights": [1.0]}, "each of the 3 presets; got 1"),
        ({"weights": [1.0, -1.0, 2.0]}, "`weights`.*>= 0.*-1.0"),
        ({"weights": [0, 0, 0]}, "`weights`.*not all"),
        ({"weights": [1, 1, np.inf]}, "`weights`.*inf"),
    ],
)
def test_average_refuses(presets, change, message, tmp_path):
    arguments = {"presets": presets, "folder": tmp_path / "mean"} | change
    with pytest.raises(ValueError, match=message):
        average_presets(**arguments)
    assert not (tmp_path / "mean").exists()


def test_average_refuses_other_configs_and_overwriting(presets, tmp_path):
    stack = tiny_config().to_dict()
    other = tmp_path / "other"
    kt.Backbone(
        kt.T5GemmaConfig.from_dict(stack | {"final_soft_cap": 5.0})
    ).save_to_preset(other)
    with pytest.raises(ValueError, match="/a and .*/other differ in final_soft_cap"):
        average_presets([presets[0], other], tmp_path / "mean")
    with pytest.raises(ValueError, match="other exists already"):
        average_presets(presets[:2], other)
    average_presets(presets[:2], other, overwrite=True)
    first, second = values(presets[0]), values(presets[1])
    path = "encoder/final_norm/scale"
    np.testing.assert_allclose(
        values(other)[path], (first[path] + second[path]) / 2, rtol=1e-6
    )
