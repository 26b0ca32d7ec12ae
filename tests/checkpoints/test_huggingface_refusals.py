"""Folders of transformers that are incomplete, damaged or of other models."""

import json

import pytest
from helpers.hugging_face import save_t5gemma

import keras_t5gemma as kt
from keras_t5gemma.checkpoints import safetensors_file

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_t5gemma(tmp_path_factory.mktemp("hf"))


def break_copy(folder, tmp_path, change=None, edit_config=None):
    """A copy of the folder with its tensors or its config changed."""
    path = tmp_path / "broken"
    path.mkdir()
    tensors = safetensors_torch.load_file(folder / "model.safetensors")
    if change:
        change(tensors)
    safetensors_torch.save_file(tensors, path / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    if edit_config:
        edit_config(config)
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_missing_extra_and_misshapen_tensors_are_named(folder, tmp_path):
    def change(tensors):
        del tensors["model.encoder.norm.weight"]
        tensors["model.vision.weight"] = torch.zeros(2)
        tensors["model.decoder.norm.weight"] = torch.zeros(23)

    path = break_copy(folder, tmp_path, change)
    with pytest.raises(ValueError) as error:
        kt.Backbone.from_preset(path)
    message = str(error.value)
    assert "missing tensors ['model.encoder.norm.weight']" in message
    assert "unexpected tensors ['model.vision.weight']" in message
    assert "model.safetensors has shape (23,), the config needs (24,)" in message
    assert "tensor 'model.decoder.norm.weight' in" in message
    # And nothing is left pending for the next model that is built.
    kt.Backbone.from_preset(folder)


def test_wrong_vocabulary_size_is_named(folder, tmp_path):
    def edit(config):
        config["decoder"]["vocab_size"] = 300

    with pytest.raises(ValueError, match=r"embed_tokens.*\(200, 32\).*\(300, 32\)"):
        kt.Backbone.from_preset(break_copy(folder, tmp_path, edit_config=edit))


def test_truncated_file_is_named(folder, tmp_path):
    path = break_copy(folder, tmp_path)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors is truncated: tensor"):
        kt.Backbone.from_preset(path)
    file.write_bytes(b"abc")
    with pytest.raises(ValueError, match="truncated or not a safetensors"):
        kt.Backbone.from_preset(path)
    file.unlink()
    with pytest.raises(ValueError, match="no weights"):
        kt.Backbone.from_preset(path)


def test_missing_shard_is_named(tmp_path):
    folder = save_t5gemma(tmp_path / "s", max_shard_size="50KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=f"shard {shard.name}, which is missing"):
        safetensors_file.read_folder(folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(model_type="t5"), "not a checkpoint of T5Gemma.*'t5'"),
        (lambda c: c["encoder"].pop("hidden_size"), "lacks the field 'hidden_size'"),
        (lambda c: c["decoder"].update(attention_bias=True), "attention_bias True"),
        (
            lambda c: c["decoder"].update(query_pre_attn_scalar=None),
            "`query_pre_attn_scalar` must be a number above 0",
        ),
        (lambda c: c.update(encoder=[1]), "`encoder` must be a JSON object"),
    ],
)
def test_other_models_are_refused(folder, tmp_path, edit, message):
    with pytest.raises(ValueError, match=message):
        kt.Backbone.from_preset(break_copy(folder, tmp_path, edit_config=edit))
