"""Values of wrong types in the JSON files of a preset are refused by file and key."""

import copy
import dataclasses
import json
import time
import warnings

import pytest
from helpers.models import one_block_config, tiny_model

import keras_t5gemma as kt

pytestmark = pytest.mark.one_backend
VALUES = [None, -1, 0, 1e400, "x", [], {}, [{}], True, 2**63]
# `(folder, file, its reader, keys below which nothing is read)`.
READ = [
    ("lm", "config.json", kt.Backbone, ()),
    ("lm", "preprocessor.json", kt.Seq2SeqLMPreprocessor, ()),
    ("classifier", "task.json", kt.TextClassifier, ("backbone", "preprocessor")),
    ("quantized", "config.json", kt.Backbone, ("config",)),
    ("transformers", "config.json", kt.Backbone, ()),
    ("transformers", "generation_config.json", kt.Seq2SeqLM, ()),
]
SAMPLES = 30  # Of each file.


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    root = tmp_path_factory.mktemp("presets")
    model = tiny_model(tokenizer, config=one_block_config())
    model.save_to_preset(root / "lm")
    model.save_to_huggingface(root / "transformers")
    encoder = kt.Backbone(dataclasses.replace(one_block_config(), decoder=None))
    classifier = kt.TextClassifier(encoder, model.preprocessor, ["a", "b"])
    classifier.save_to_preset(root / "classifier")
    encoder.quantize("int8")
    encoder.save_to_preset(root / "quantized")
    return root


LOADERS = {
    "lm": kt.Seq2SeqLM,
    "classifier": kt.TextClassifier,
    "quantized": kt.Backbone,
    "transformers": kt.Seq2SeqLM,
}


def places(value, skipped, path=()):
    """Paths of all values in parsed JSON, of lists the first item."""
    items = enumerate(value[:1]) if isinstance(value, list) else ()
    for key, part in value.items() if isinstance(value, dict) else items:
        yield (*path, key)
        if key not in skipped or "dtype" in path:
            yield from places(part, skipped, (*path, key))


def with_value(parsed, path, value):
    parsed = copy.deepcopy(parsed)
    inner = parsed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return parsed


@pytest.mark.parametrize(("kind", "name", "loader", "skipped"), READ)
def test_wrong_values_are_refused_by_name(folders, kind, name, loader, skipped):
    path = folders / kind / name
    text = path.read_text()
    parsed = json.loads(text)
    loader.from_preset(folders / kind)
    found = [p for p in places(parsed, skipped) if p != ("class_name",)]
    mutations = [(place, value) for place in found for value in VALUES]
    step = max(1, len(mutations) // SAMPLES) | 1  # Odd: it meets all of `VALUES`.
    step += 2 * (step % 5 == 0)
    refused = 0
    try:
        for place, value in mutations[::step]:
            path.write_text(json.dumps(with_value(parsed, place, value)))
            start = time.process_time()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    loader.from_preset(folders / kind)
                except ValueError as error:
                    refused += 1
                    assert name in str(error), (place, value, str(error))
            assert time.process_time() - start < 5, (place, value)
    finally:
        path.write_text(text)
    assert refused > SAMPLES // 4


@pytest.mark.parametrize(
    ("kind", "name", "place", "value", "message"),
    [
        ("lm", "config.json", ("config", "config", "dropout"), {}, "`dropout` must be"),
        ("lm", "config.json", ("config", "dtype"), "x", "`dtype` must be .* 'x'"),
        (
            "lm",
            "config.json",
            ("config", "dtype", "class_name"),
            "x",
            "`dtype` must be",
        ),
        (
            "lm",
            "config.json",
            ("registered_name",),
            1,
            "`registered_name` must be a str",
        ),
        ("lm", "preprocessor.json", ("config",), [], "`config` must be a JSON object"),
        ("lm", "preprocessor.json", ("config", "template"), 3, "`template` must be"),
        ("classifier", "task.json", ("config", "dropout"), {}, "`dropout` must be"),
        ("classifier", "task.json", ("config", "pooling"), 7, "`pooling` must be"),
        ("classifier", "task.json", ("config",), 7, "`config` must be a JSON object"),
        (
            "transformers",
            "config.json",
            ("encoder",),
            7,
            "`encoder` must be a JSON obj",
        ),
        ("transformers", "config.json", ("dtype",), 7, "`dtype` must be a string"),
        (
            *("transformers", "config.json", ("decoder", "query_pre_attn_scalar")),
            *(-1, "`query_pre_attn_scalar` must be a number above 0; got -1"),
        ),
    ],
)
def test_messages_name_the_key_and_the_value(
    folders, kind, name, place, value, message
):
    path = folders / kind / name
    text = path.read_text()
    path.write_text(json.dumps(with_value(json.loads(text), place, value)))
    try:
        with pytest.raises(ValueError, match=f"{folders / kind}: {name}: {message}"):
            LOADERS[kind].from_preset(folders / kind)
    finally:
        path.write_text(text)


@pytest.mark.parametrize("dtype", ["x", "uint8", 7, {}, {"class_name": "x"}, [1]])
def test_unknown_dtypes_are_refused(folders, dtype):
    for kind, loader in LOADERS.items():
        with pytest.raises(ValueError, match="`dtype` must be a dtype policy"):
            loader.from_preset(folders / kind, dtype=dtype)
